"""Damage planted in exports: each check of an export refuses it, in the files, and in
what an engine answers.

A damaged export is written, and then verified by the sound one, as after a fault of the
disk, or by itself, as if notall had worked out the wrong tensors or settings, which
only an engine's answer can tell.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import engines
from api import (
    Field,
    GGUFTensor,
    LlamaCpp,
    executorch,
    nemotron_nas,
    silent,
    target_named,
)
from families import ROPE_FIELD, family
from notall import Plan, Source, UsageError
from tiny_gguf import WORDS, write_gguf

needs_executorch = engines.needs("executorch", "make test-executorch")
PLAN = Plan([1], [1])  # leaves three layers in the ordinary form
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
# By which names each target has two matrices of the first layer.
DOWN = {
    "hf": "model.layers.0.mlp.down_proj.weight",
    "nemotron-nas": "model.layers.0.mlp.down_proj.weight",
    "gguf": "blk.0.ffn_down.weight",
    "executorch": "layers.0.feed_forward.w2.weight",
}
KEYS = {
    "hf": "model.layers.0.self_attn.k_proj.weight",
    "nemotron-nas": "model.layers.0.self_attn.k_proj.weight",
    "gguf": "blk.0.attn_k.weight",
    "executorch": "layers.0.attention.wk.weight",
}
Made = dict[str, Any]


def changed(tensors: Made, name: str, change: Callable[[Tensor], Tensor]) -> Made:
    tensor = tensors[name]
    if isinstance(tensor, GGUFTensor):
        new: Any = GGUFTensor(
            change(torch.from_numpy(tensor.data.copy())).numpy(), tensor.quantization
        )
    else:
        new = tensor.changed(change)
    return tensors | {name: new}


def without_a_row(values: Tensor) -> Tensor:
    return values.index_fill(0, torch.tensor([5]), 0)


def swapped(tensors: Made) -> Made:
    """With the tensors of the first layer in the place of the second's, which have
    their shapes.
    """
    other = {
        name: (
            name.replace(".0.", ".1.") if ".0." in name else name.replace(".1.", ".0.")
        )
        for name in tensors
    }
    return {name: tensors[other[name]] for name in tensors}


DAMAGE: dict[str, Callable[[str, Made], Made]] = {
    "a row of zeros": lambda target, tensors: changed(
        tensors, DOWN[target], without_a_row
    ),
    "two layers swapped": lambda target, tensors: swapped(tensors),
    "a matrix times 1.05": lambda target, tensors: changed(
        tensors, DOWN[target], lambda values: values * 1.05
    ),
    "keys times 1.05": lambda target, tensors: changed(
        tensors, KEYS[target], lambda values: values * 1.05
    ),
}
ROPE = "another base of RoPE"
KINDS = [*DAMAGE, ROPE]


@contextmanager
def prepared(target: str, folder: Path, **how: Any) -> Iterator[Any]:
    model = family("llama").build(**SIZES)
    of = write_gguf(model, folder / "dense.gguf") if target == "gguf" else model
    with target_named(target).prepared(Source(of, **how), PLAN) as export:
        yield export


def damaged(export: Any, target: str, kind: str) -> Any:
    """Another export, as if this had been worked out with a fault."""
    if kind != ROPE:
        tensors = DAMAGE[kind](target, export.tensors)
        assert tensors.keys() == export.tensors.keys()
        if target == "gguf":
            export = copy.copy(export)
            export.tensors = tensors
            return export
        return replace(export, tensors=tensors)
    if target == "gguf":
        export = copy.copy(export)
        name = f"{export.form}.rope.freq_base"
        export.fields = export.fields | {
            name: Field(2 * export.fields[name].value, export.fields[name].kind)
        }
        return export
    if target == "executorch":  # RoPE is built from the original's config
        config = copy.deepcopy(export.dense.config)
        vars(config)[ROPE_FIELD] = with_base(vars(config)[ROPE_FIELD])
        return replace(export, dense=replace(export.dense, config=config))
    return replace(export, settings=with_base(export.settings))


def with_base(settings: Any) -> Any:
    """With twice the base of RoPE, wherever it stands."""
    if not isinstance(settings, dict):
        return settings
    return {
        name: 2 * value if name == "rope_theta" else with_base(value)
        for name, value in settings.items()
    }


def write(export: Any, folder: Path) -> Path:
    folder.mkdir()
    export.write(folder, 5_000_000_000, silent)
    return folder


@pytest.mark.parametrize("target", ["hf", "nemotron-nas", "gguf"])
def test_files_that_are_not_what_was_to_be_written_are_refused(
    target, tmp_path, monkeypatch
):
    """To the last bit, whether an engine is there or not; sound ones are not."""
    monkeypatch.setattr(LlamaCpp, "is_installed", lambda self: False)
    monkeypatch.setattr(nemotron_nas, "find_spec", lambda name: None)
    with prepared(target, tmp_path) as export:
        export.verify(write(export, tmp_path / "sound"))
        for kind in KINDS:
            folder = write(damaged(export, target, kind), tmp_path / kind)
            with pytest.raises(UsageError, match="does not hold what was written"):
                export.verify(folder)


@pytest.mark.slow
def test_wrong_tensors_and_settings_are_seen_in_what_transformers_answers(tmp_path):
    with prepared("hf", tmp_path) as export:
        sound = export.verify(write(export, tmp_path / "sound"))
        assert sound.difference < sound.most / 3
        for kind in KINDS:
            wrong = damaged(export, "hf", kind)
            with pytest.raises(UsageError, match="answers differently"):
                wrong.verify(write(wrong, tmp_path / kind))


@needs_executorch
@pytest.mark.timeout(600)
def test_wrong_tensors_and_settings_are_seen_in_what_executorch_answers(
    tmp_path, monkeypatch
):
    """A program of a fault that all of it has, and of each fault the model that a
    program is built of.
    """
    with prepared("executorch", tmp_path) as export:
        sound = export.verify(write(export, tmp_path / "sound"))
        assert sound.difference < sound.most / 3
        folder = write(damaged(export, "executorch", ROPE), tmp_path / "wrong")
        with pytest.raises(UsageError, match="answers differently"):
            export.verify(folder)
        answered: list[Any] = [export]
        monkeypatch.setattr(
            executorch,
            "logits_of_program",
            lambda _, tokens: answered[-1].logits(tokens),
        )
        assert export.verify(folder).difference < sound.most / 3
        for kind in KINDS:
            answered.append(damaged(export, "executorch", kind))
            with pytest.raises(UsageError, match="answers differently"):
                export.verify(folder)
