"""What a developer meets first: the names, what objects look like when printed, and a
quiet terminal.
"""

import logging
import os
import pydoc
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import notall
from api import (
    DROPPED,
    build_empty,
    by_count,
    drop_chatter,
    in_ranges,
    load_config,
    nll,
)
from families import TRANSFORMERS_5, family
from notall import Plan
from tiny_checkpoint import save_tiny_checkpoint


def test_dir_and_completion_show_the_public_names_and_no_others():
    assert dir(notall) == notall.__all__
    assert {"Plan", "deepest", "generate_text", "load", "skip"} <= set(dir(notall))
    assert all(getattr(notall, name) is not None for name in dir(notall))


def test_help_explains_each_public_function():
    told = pydoc.render_doc(notall, renderer=pydoc.plaintext)
    for name in notall.__all__:
        if not name.startswith("_") and name[0].islower():
            assert f"\n    {name}(" in told, name
    for name in ("import_module", "_HOMES"):
        assert f"\n    {name}" not in told


@pytest.mark.parametrize(
    ("indices", "written"),
    [
        ([], ""),
        ([7], "7"),
        ([1, 0], "0, 1"),
        ([0, 1, 2, 3, 7], "0-3, 7"),
        ([2, 4, 5, 6, 8, 9], "2, 4-6, 8, 9"),
    ],
)
def test_indices_are_written_as_ranges(indices, written):
    assert in_ranges(indices) == written


@pytest.mark.parametrize(
    ("plan", "written"),
    [
        (Plan(), "nothing"),
        (Plan([5, 7]), "attention 5, 7"),
        (Plan([7, 20, 21, 22], [12, 20, 21, 22]), "block 20-22; attention 7; mlp 12"),
    ],
)
def test_a_plan_prints_as_a_line(plan, written):
    assert str(plan) == written


def test_a_plan_names_its_sublayers():
    assert Plan([5, 7], [2]).names == ("attn.5", "attn.7", "mlp.2")


def lines_at_80_columns(printed):
    return sum(-(-max(1, len(line)) // 80) for line in printed.splitlines())


@pytest.mark.parametrize(
    "shape", ["llama-2-7b", pytest.param("llama-2-70b", marks=pytest.mark.slow)]
)
def test_a_structure_fits_a_screen(shape):
    structure = notall.locate(build_empty(load_config(shape)))
    layers = len(structure.blocks)
    printed = str(structure)
    assert lines_at_80_columns(printed) <= 6
    assert f"layers 0-{layers - 1}" in printed
    assert f"{structure.blocks[0].mlp.parameters:,} parameters" in printed
    assert (
        f"attention (full_attention): {structure.blocks[0].attention.parameters:,}"
        " parameters" in printed
    )
    every_other = Plan(range(0, layers, 2), range(1, layers, 2))
    for one in (
        every_other,
        structure.blocks[0],
        structure.blocks[0].mlp,
        notall.Space(structure),
    ):
        assert lines_at_80_columns(repr(one)) <= 12, one
        assert lines_at_80_columns(str(one)) <= 12, one


@pytest.mark.parametrize(
    "name", ["gpt_neox", *(["nemotron_h", "qwen3_next"] if TRANSFORMERS_5 else [])]
)
def test_a_structure_tells_layers_of_different_forms_apart(name):
    structure = notall.locate(family(name).build())
    printed = str(structure)
    assert ("in parallel" in printed) == structure.blocks[0].parallel
    for mixer in structure.mixers:
        layers = [part.index for part in structure.sublayers if part.mixer == mixer]
        assert f"layers {in_ranges(layers)}" in printed
        assert f"({mixer})" in printed


def test_what_a_choice_comes_to_fits_a_screen():
    model = family("llama").build(num_hidden_layers=40)
    batches, held_out = (
        [torch.arange(first, first + 16).view(1, 16)] for first in (0, 16)
    )
    space = notall.Space(notall.locate(model), "sublayer")
    budget, objective = by_count(space, 30), nll(batches)
    config = notall.SearchConfig(held_out=held_out)
    chosen = notall.choose_plan(
        model, "deepest", space, budget, batches, objective, config
    )
    for one, most in (
        (chosen, 20),
        (budget, 2),
        (objective, 2),
        (chosen.held_out[1], 4),
    ):
        assert lines_at_80_columns(repr(one)) <= most, one
    told = (
        f"skip {chosen.plan}: nll {chosen.dense_cost:.3f} without the plan,"
        f" {chosen.cost:.3f} with it"
    )
    assert told in str(chosen)
    assert ": nll 0.000 without the plan, -0.001 with it" in str(
        replace(chosen, dense_cost=-1e-9, cost=-0.001)
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=4
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is what talks")
def test_no_library_talks_on_the_terminal(tiny):
    """In a fresh process: what libraries say as they are imported, they say once."""
    words = [
        "-m",
        "notall",
        "eval",
        str(tiny),
        "--skip",
        "attention",
        "--sequences",
        "1",
        "--length",
        "8",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_only_what_is_known_to_be_chatter_is_dropped(caplog, monkeypatch):
    drop_chatter()
    drop_chatter()
    for name, words in DROPPED.items():
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        logging.getLogger(name).warning("%s, and more", words[0])
        logging.getLogger(name).warning("a kernel of %s is wrong", name)
    assert [record.getMessage() for record in caplog.records] == [
        f"a kernel of {name} is wrong" for name in DROPPED
    ]
    assert [len(logging.getLogger(name).filters) for name in DROPPED] == [1] * len(
        DROPPED
    )


def test_the_package_leaves_the_logs_of_others_to_who_imports_it():
    """Only the command line drops lines of them."""
    told = (
        "import logging, notall; print([n for n, l in"
        " logging.root.manager.loggerDict.items() if vars(l)['filters']])"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
