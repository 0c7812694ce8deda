"""What every export owes its user: whole or absent, streamed, complete, and refused in
one line where it can't be.
"""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from api import (
    build_empty,
    check_tensors,
    exporters_checkpoint,
    hf,
    read_header,
    read_tensors,
    write_shards,
)
from families import family
from notall import Plan, Source, UsageError, export, locate, skip
from small_disk import room_for

BLOCK = Plan([1], [1])
MIXED = Plan([0, 3], [1])


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The folder of an original model, as one would fetch it from a hub: weights,
    tokenizer, licence, pickles.
    """
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    family("llama").build().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "LICENSE").write_text("yours")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA tiny llama.\n")
    return folder


def assert_one_line(refusal):
    assert "\n" not in str(refusal)
    assert len(str(getattr(refusal, "value", refusal))) < 300


def nothing_left(folder):
    return not list(folder.iterdir())


GOING_ALONG = [
    "tokenizer.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "generation_config.json",
    "LICENSE",
]


@pytest.mark.parametrize("plan", [BLOCK, MIXED], ids=["ordinary", "regrouped"])
def test_companions_go_along_and_other_weights_do_not(dense, plan, tmp_path):
    out = export(dense, plan, "hf", tmp_path / "out")
    for name in GOING_ALONG:
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    assert not (out / "pytorch_model.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (
        out.stat().st_mode & 0o777
        == tmp_path.joinpath("out", "config.json").stat().st_mode & 0o666 | 0o111
    )


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("target", "name"),
    [("hf", "modeling_notall_llama.py"), ("nemotron-nas", "configuration_decilm.py")],
)
def test_code_beside_the_model_never_takes_the_place_of_ours(
    dense, target, name, trusted, tmp_path
):
    ours = (export(dense, MIXED, target, tmp_path / "ours") / name).read_text()
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    out = export(
        Source(tmp_path / "dense", trust_remote_code=trusted),
        MIXED,
        target,
        tmp_path / "out",
    )
    assert not (tmp_path / "ran").exists()
    assert (out / name).read_text() == ours


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_python_goes_along_only_where_it_is_allowed(dense, target, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "tokenization_own.py").write_text("")
    for trusted in (False, True):
        out = export(
            Source(tmp_path / "dense", trust_remote_code=trusted),
            BLOCK,
            target,
            tmp_path / f"{trusted}",
        )
        assert (out / "tokenization_own.py").exists() == trusted


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_of_its_own_code_is_exported_where_that_is_allowed(dense, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense, source)
    (source / "modeling_own.py").write_text(OWN_CODE)
    auto_map = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    config = json.loads((source / "config.json").read_text()) | {"auto_map": auto_map}
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "own_llama"})
    )
    with pytest.raises(UsageError, match="allow it with trust_remote_code"):
        export(source, BLOCK, "hf", tmp_path / "out")
    out = export(Source(source, trust_remote_code=True), BLOCK, "hf", tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["auto_map"] == auto_map
    (source / "config.json").write_text(
        json.dumps(config)
    )  # transformers has a class for it: its own code isn't read
    plain = export(source, BLOCK, "hf", tmp_path / "plain")
    assert "auto_map" not in json.loads((plain / "config.json").read_text())


def test_the_card_keeps_the_licence_and_shows_what_was_measured(dense, tmp_path):
    out = export(
        dense,
        MIXED,
        "hf",
        tmp_path / "out",
        measured={"NLL added, nats": 0.123456, "rounds": 5},
    )
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "| NLL added, nats | 0.1235 |" in card
    assert "| rounds | 5 |" in card
    assert "| attention | 0, 3 |" in card
    assert str(dense.parent) not in card + (out / "notall.json").read_text()
    assert (
        "base_model" not in card
    )  # of a folder: its name would link to someone else's model


def test_a_note_of_anyone_steers_no_terminal_that_shows_the_card(dense, tmp_path):
    plan = Plan(attention=[1], mlp=[1], note="found \x1b[31mby chance")
    card = (
        export(dense, plan, "hf", tmp_path / "out", verify=False) / "README.md"
    ).read_text()
    assert r"Plan: found \x1b\[31mby chance." in card
    assert "\x1b" not in card


def test_shards_are_indexed_and_hold_the_same(dense, tmp_path):
    whole = load_file(
        export(dense, MIXED, "hf", tmp_path / "whole") / "model.safetensors"
    )
    out = export(dense, MIXED, "hf", tmp_path / "shards", shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == [shard.name for shard in shards]
    held = {}
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as shard:
            held[name] = shard.get_tensor(name)
    assert held.keys() == whole.keys()
    assert all(torch.equal(held[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(
        weight.nbytes for weight in whole.values()
    )
    sizes = [
        [
            held[name].nbytes
            for name, where in index["weight_map"].items()
            if where == s.name
        ]
        for s in shards
    ]
    assert all(sum(each) <= 20_000 or len(each) == 1 for each in sizes)


def test_a_sharded_model_is_read(dense, tmp_path):
    family("llama").build().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert not (tmp_path / "dense" / "model.safetensors").exists()
    found = load_file(
        export(tmp_path / "dense", BLOCK, "hf", tmp_path / "a") / "model.safetensors"
    )
    expected = load_file(
        export(dense, BLOCK, "hf", tmp_path / "b") / "model.safetensors"
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


STREAMED = """
import resource, sys
from api import export, hf
from notall import Plan
export(sys.argv[1], Plan([1], [1]), "hf", sys.argv[2] + "-small", verify=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(sys.argv[3], Plan([1], [1]), "hf", sys.argv[2], verify=False, shard_bytes=int(sys.argv[4]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.any_transformers  # it is about files
def test_one_shard_is_in_memory_at_a_time(dense, tmp_path):
    big = family("llama").build(
        hidden_size=512, intermediate_size=4096, vocab_size=20_000, head_dim=64
    )
    big.save_pretrained(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 150_000_000
    shard = size // 4  # the embedding is a quarter
    command = [
        sys.executable,
        "-c",
        STREAMED,
        dense,
        tmp_path / "out",
        tmp_path / "big",
        str(shard),
    ]
    grown = int(
        subprocess.run(
            command,
            cwd=Path(__file__).parent,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert grown < 1.5 * shard


def test_a_live_model_is_exported_as_it_is(tmp_path):
    model = family("llama").build()
    model.model.layers[2].mlp.up_proj.weight.data.zero_()
    out = export(model, BLOCK, "hf", tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    assert not weights["model.layers.1.mlp.up_proj.weight"].any()
    with (
        skip(model, BLOCK),
        pytest.raises(UsageError, match=r"inside a `with notall\.skip"),
    ):
        export(model, BLOCK, "hf", tmp_path / "other")


def test_the_kind_of_a_model_is_read_from_its_config(tmp_path):
    """Their bug: a substring of the path decides it."""
    family("qwen2").build().save_pretrained(tmp_path / "llama-of-mistral")
    out = export(tmp_path / "llama-of-mistral", MIXED, "hf", tmp_path / "gemma2")
    assert json.loads((out / "config.json").read_text())["model_type"] == "notall_qwen2"


@pytest.mark.parametrize("name", ["gemma2", "qwen2 (sliding)", "smollm3", "llama4"])
def test_lists_by_layer_are_cut_with_the_layers(name, tmp_path):
    """Their bug: they keep an entry for each dense layer, so that kinds of attention
    move to other layers.
    """
    if not family(name).exists:
        pytest.skip(f"this transformers has no {name}")
    model = family(name).build()
    kinds = {
        key: getattr(model.config, key, None)
        for key in ("layer_types", "no_rope_layers")
    }
    out = export(model, BLOCK, "hf", tmp_path / "out", verify=False)
    found = json.loads((out / "config.json").read_text())
    assert found["num_hidden_layers"] == 3
    for key, dense in kinds.items():
        if dense:
            assert found[key] == [dense[0], *dense[2:]]


@pytest.mark.parametrize(("skipped", "leading"), [(0, 0), (1, 1), (2, 1)])
def test_leading_layers_without_experts_are_counted_again(skipped, leading, tmp_path):
    model = family("glm4_moe").build()
    assert model.config.first_k_dense_replace == 1
    out = export(
        model, Plan([skipped], [skipped]), "hf", tmp_path / "out", verify=False
    )
    assert (
        json.loads((out / "config.json").read_text())["first_k_dense_replace"]
        == leading
    )


# --- refusals, after which nothing is left
# --------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(dense, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export(dense, BLOCK, "hf", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_plan_for_another_model_is_refused(dense, tmp_path):
    other = locate(family("qwen2").build()).fingerprint
    with pytest.raises(UsageError, match="this plan was made for qwen2"):
        export(dense, Plan([1], fingerprint=other), "hf", tmp_path / "out")
    with pytest.raises(UsageError, match="layer 7"):
        export(dense, Plan([7]), "hf", tmp_path / "out")
    assert nothing_left(tmp_path)


def test_an_unknown_target_is_refused(dense, tmp_path):
    with pytest.raises(
        UsageError,
        match="no export target 'onnx': choose from hf, nemotron-nas, gguf, executorch",
    ):
        export(dense, BLOCK, "onnx", tmp_path / "out")


def test_a_form_that_the_architecture_lacks_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose a portable plan"):
        export(family("gpt2").build(), Plan([1]), "hf", tmp_path / "out")
    assert nothing_left(tmp_path)


def test_a_full_disk_leaves_nothing(dense, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporters_checkpoint.shutil, "copyfile", full)
    with pytest.raises(UsageError, match="no space left"):
        export(dense, BLOCK, "hf", tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("size", [200, 2_000, 20_000])
@pytest.mark.parametrize("live", [False, True], ids=["files", "live"])
def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_nothing(
    dense, tmp_path, size, live
):
    """In the config, in code, and in weights; a live model is saved first."""
    model = family("llama").build() if live else dense
    with room_for(size), pytest.raises(UsageError, match="no space left"):
        export(model, BLOCK, "hf", tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("more", [1e-3, math.nan])
def test_a_different_answer_leaves_nothing(dense, tmp_path, monkeypatch, more):
    load = hf.load_whole

    def bent(loader, folder, trusted):
        model = load(loader, folder, trusted)
        model.model.norm.weight.data += more
        return model

    monkeypatch.setattr(hf, "load_whole", bent)
    with pytest.raises(UsageError, match="answers differently"):
        export(dense, BLOCK, "hf", tmp_path / "out")
    assert nothing_left(tmp_path)


@pytest.fixture
def damaged(dense, tmp_path):
    """A function that exports the original model with its weights file changed."""

    def run(change):
        folder = tmp_path / "damaged"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_bytes((dense / "config.json").read_bytes())
        (folder / "model.safetensors").write_bytes(
            change((dense / "model.safetensors").read_bytes())
        )
        return export(folder, BLOCK, "hf", tmp_path / "out")

    return run


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(damaged, tmp_path, keep):
    with pytest.raises(UsageError, match="no whole safetensors file"):
        damaged(lambda data: data[:keep])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [-4, 4])
def test_a_range_that_is_not_that_of_its_shape_is_refused(tmp_path, more):
    header = {
        "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24 + more]}
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(
        UsageError,
        match=r"no whole safetensors file \(invalid shape, data type, or offset",
    ):
        read_header(path)


def rewritten(path, change):
    """Give a safetensors file another header, made of its own by `change`."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def overlapping(header):
    first, second = [
        entry
        for name, entry in header.items()
        if name.endswith(("q_proj.weight", "o_proj.weight"))
    ][:2]
    second["data_offsets"] = first["data_offsets"]
    return header


ODD_HEADERS = {
    "overlap": overlapping,
    "gap": lambda header: {
        name: entry for name, entry in header.items() if name != "model.norm.weight"
    },
    "huge": (
        lambda header: (
            header
            | {"x": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}
        )
    ),
    "long name": (
        lambda header: (
            header
            | {
                "\x1b[31m" * 1000: {
                    "dtype": "F32",
                    "shape": [1],
                    "data_offsets": [0, 3],
                }
            }
        )
    ),
    "list": lambda header: [header],
    "deep": lambda header: header | {"x": json.loads("[" * 900 + "]" * 900)},
}


@pytest.mark.parametrize("change", ODD_HEADERS.values(), ids=ODD_HEADERS)
def test_an_odd_header_is_refused_in_one_short_line(beside, change, tmp_path):
    rewritten(beside / "model.safetensors", change)
    assert_refused(
        beside, "hf", "safetensors file|lacks weights|not those of", tmp_path
    )


ODD = [
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1e308,
    "",
    "x" * 9000,
    [],
    {},
    [[]],
    {"a": {}},
    [1] * 4,
    "\x1b[31m",
]


@pytest.mark.slow
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_no_odd_value_of_a_config_ends_in_a_traceback(dense, tmp_path, data):
    """It is exported, if nothing reads the value, or refused in one short line."""
    folder = tmp_path / "odd"
    if not folder.exists():
        shutil.copytree(dense, folder)
    config = json.loads((dense / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(
            st.sampled_from(
                [*sorted(config), "rope_scaling", "quantization_config", "auto_map"]
            )
        )
        config[name] = data.draw(st.sampled_from(ODD))
    (folder / "config.json").write_text(json.dumps(config))
    plan, target = (
        data.draw(st.sampled_from([BLOCK, MIXED])),
        data.draw(st.sampled_from(["hf", "nemotron-nas"])),
    )
    try:
        shutil.rmtree(export(folder, plan, target, tmp_path / "out", verify=False))
    except UsageError as refusal:
        assert_one_line(refusal)


def test_a_missing_shard_is_named(tmp_path):
    family("llama").build().save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    victim = sorted((tmp_path / "dense").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UsageError, match=victim.name):
        export(tmp_path / "dense", BLOCK, "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def shards(dense, tmp_path):
    """A copy of the original model in shards, and the index of them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.copyfile(dense / "config.json", folder / "config.json")
    write_shards(folder, read_header(dense / "model.safetensors"), shard_bytes=20_000)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


def assert_refused(folder, target, match, tmp_path):
    with pytest.raises(UsageError, match=match) as refusal:
        export(folder, BLOCK, target, tmp_path / "out", verify=False)
    assert_one_line(refusal)
    assert not (tmp_path / "out").exists()


def assert_same_weights(found, expected):
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (found, expected)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def beside(dense, tmp_path):
    """A copy of the original model, to lay things beside."""
    return Path(shutil.copytree(dense, tmp_path / "beside"))


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_what_is_not_on_the_list_stays_where_it_is(beside, target, tmp_path):
    secrets = (
        "secrets.json",
        "train.log",
        "optimizer.safetensors",
        ".env",
        "id_rsa",
        "notes.md",
    )
    for name in secrets:
        (beside / name).write_text("mine")
    out = export(beside, BLOCK, target, tmp_path / "out", verify=False)
    assert not {path.name for path in out.iterdir()} & set(secrets)
    for name in GOING_ALONG:
        assert (out / name).is_file()


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "tokenizer.json", "README.md", "config.json", "model.safetensors"],
)
def test_a_link_out_of_the_folder_is_refused(beside, name, tmp_path):
    (beside / name).rename(tmp_path / "elsewhere")
    (beside / name).symlink_to(tmp_path / "elsewhere")
    for target in ("hf", "nemotron-nas"):
        assert_refused(beside, target, f"{name} of beside is a link out", tmp_path)


def test_links_within_the_folder_and_to_the_blobs_of_a_hub_cache_are_followed(
    dense, beside, tmp_path
):
    (beside / "LICENSE").rename(beside / "terms.txt")
    (beside / "LICENSE").symlink_to("terms.txt")
    assert (
        export(beside, BLOCK, "hf", tmp_path / "a", verify=False) / "LICENSE"
    ).read_text() == "yours"
    repository = tmp_path / "models--me--tiny"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = Path(shutil.copytree(dense, repository / "snapshots" / "0123"))
    for file in snapshot.iterdir():
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    found = export(snapshot, BLOCK, "hf", tmp_path / "b", verify=False)
    assert (found / "LICENSE").read_text() == "yours"
    assert_same_weights(found, tmp_path / "a")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/hostname", "sub/model.safetensors", "..", ""]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(shards, name, tmp_path):
    folder, index = shards
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(
        folder, "hf", "is not in it|lacks|only safetensors are read", tmp_path
    )


@pytest.mark.parametrize("name", ["x" * 100_000, "\0"])
def test_an_index_that_names_what_no_file_is_called_is_refused(shards, name, tmp_path):
    folder, index = shards
    index["weight_map"]["model.norm.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(
        folder,
        "hf",
        r"names (x+…|�), and only safetensors are read: save the model with"
        r" save_pretrained",
        tmp_path,
    )


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "model.safetensors", "README.md", "config.json", "a.safetensors"],
)
def test_a_fifo_does_not_hang(beside, name, tmp_path):
    (beside / name).unlink(missing_ok=True)
    os.mkfifo(beside / name)
    try:
        out = export(beside, BLOCK, "hf", tmp_path / "out", verify=False)
    except UsageError as refusal:
        assert_one_line(refusal)
    else:
        assert name in ("LICENSE", "README.md", "a.safetensors")
        assert not (out / "LICENSE").exists() or name != "LICENSE"


CARDS = {
    "broken": b"---\nlicense: [mit\n---\n",
    "a list": b"---\n- license\n- mit\n---\n",
    "bad UTF-8": b"---\nlicense: mit\n---\n\xff\xfe",
    "deep": b"---\nlicense: " + b"[" * 5000 + b"\n---\n",
    "no mapping": b"---\n5\n---\n",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_damaged_card_costs_the_licence_and_is_said(beside, card, tmp_path, caplog):
    (beside / "README.md").write_bytes(card)
    out = export(beside, BLOCK, "hf", tmp_path / "out", verify=False)
    assert "license" not in (out / "README.md").read_text().lower()
    assert "look its licence up" in caplog.text


@pytest.mark.parametrize(
    "more",
    [
        "model-index: 5",
        "model-index:\n- name: 3\n  results: 4",
        "language: {a: 1}",
        "tags: 7",
    ],
)
def test_odd_fields_of_a_card_pass(beside, more, tmp_path):
    (beside / "README.md").write_text(f"---\nlicense: mit\n{more}\n---\n")
    card = (
        export(beside, BLOCK, "hf", tmp_path / "out", verify=False) / "README.md"
    ).read_text()
    assert "license: mit" in card
    assert "language" not in card


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"model_type": "llama"',
        "[1]",
        "5",
        '{"a":' * 5000 + "1" + "}" * 5000,
        "\xff",
    ],
)
def test_a_damaged_config_is_refused(beside, text, tmp_path):
    (beside / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(beside, "hf", "config.json is damaged", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"hidden_size": "wide"}, "cannot load"),
    ],
)
def test_an_impossible_config_is_refused_at_once(beside, change, said, tmp_path):
    config = json.loads((beside / "config.json").read_text())
    (beside / "config.json").write_text(json.dumps(config | change))
    assert_refused(beside, "hf", said, tmp_path)


def test_a_truncated_shard_is_named(shards, tmp_path):
    folder, _ = shards
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    assert_refused(
        folder, "hf", f"{victim.name} is no whole safetensors file", tmp_path
    )


@pytest.mark.parametrize(
    "told", ["[]", '{"format": 1}', '{"format": "pt", "format": "pt"}', "NaN"]
)
def test_a_header_that_transformers_would_not_read_is_refused(beside, told, tmp_path):
    whole = (beside / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    del header["__metadata__"]
    text = (json.dumps(header)[:-1] + f', "__metadata__": {told}}}').encode()
    (beside / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + whole[8 + length :]
    )
    assert_refused(beside, "hf", "is no whole safetensors file", tmp_path)


def test_a_header_with_what_only_we_would_pass_over_is_refused(beside, tmp_path):
    whole = (beside / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    text = whole[8 : 8 + length].replace(
        b'"dtype"', b'"noise": 1' + b"0" * 400 + b', "dtype"', 1
    )
    (beside / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + whole[8 + length :]
    )
    assert_refused(beside, "hf", "is no whole safetensors file", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"a":' * 5000 + "1" + "}" * 5000,
    ],
)
def test_a_damaged_index_is_named(shards, text, tmp_path):
    folder, _ = shards
    (folder / "model.safetensors.index.json").write_text(text)
    assert_refused(folder, "hf", "index.json is damaged", tmp_path)


@pytest.mark.parametrize("more", [{}, {"metadata": 128384}, {"metadata": None}])
def test_an_index_that_transformers_would_not_read_is_refused(shards, more, tmp_path):
    folder, index = shards
    text = json.dumps({"weight_map": index["weight_map"]} | more)
    (folder / "model.safetensors.index.json").write_text(text)
    assert_refused(folder, "hf", "index.json is damaged", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.bin",
        "pytorch_model.bin",
        "../other.safetensors",
        "/etc/hostname",
        5,
    ],
)
def test_weights_that_the_config_names_are_safetensors_in_the_folder(
    beside, name, tmp_path
):
    config = json.loads((beside / "config.json").read_text()) | {
        "transformers_weights": name
    }
    (beside / "config.json").write_text(json.dumps(config))
    for target in ("hf", "nemotron-nas"):
        assert_refused(
            beside,
            target,
            "take transformers_weights out of config.json|hostname|cannot load",
            tmp_path,
        )


def test_weights_of_another_name_are_read_and_recorded(dense, beside, tmp_path):
    weights = {
        name: weight + 1
        for name, weight in load_file(dense / "model.safetensors").items()
    }
    save_file(weights, beside / "other.safetensors", {"format": "pt"})
    config = json.loads((beside / "config.json").read_text()) | {
        "transformers_weights": "other.safetensors"
    }
    (beside / "config.json").write_text(json.dumps(config))
    out = export(beside, BLOCK, "hf", tmp_path / "out")
    assert torch.equal(
        load_file(out / "model.safetensors")["model.norm.weight"],
        weights["model.norm.weight"],
    )
    assert (
        json.loads((out / "notall.json").read_text())["dense"]["weights"]
        == "other.safetensors"
    )
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_a_lora_beside_the_model_is_refused(beside, target, tmp_path):
    (beside / "adapter_config.json").write_text("{}")
    assert_refused(beside, target, "merge it", tmp_path)


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_a_tensor_that_the_index_forgets_is_written_all_the_same(
    dense, shards, target, tmp_path
):
    folder, index = shards
    del index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = export(folder, BLOCK, target, tmp_path / "found", verify=False)
    assert_same_weights(
        found, export(dense, BLOCK, target, tmp_path / "expected", verify=False)
    )


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_of_two_sources_of_weights_the_one_that_load_reads_is_written(
    dense, shards, target, tmp_path
):
    folder, _ = shards
    weights = load_file(dense / "model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder)  # as `notall.load` does
    found = load_file(
        export(folder, Plan([3], [3]), target, tmp_path / "out", verify=False)
        / "model.safetensors"
    )
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(found[name], loaded.state_dict()[name])


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_renamed_or_absent_tensor_is_refused(dense, target, name, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    for other in (None, name.replace("weight", "weighs"), name.replace("2", "7")):
        weights = load_file(dense / "model.safetensors")
        weight = weights.pop(name)
        if other and other != name:
            weights[other] = weight
        save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
        assert_refused(tmp_path / "dense", target, f"lacks weights .*{name}", tmp_path)


@pytest.mark.parametrize("target", ["hf", "nemotron-nas"])
def test_a_tensor_of_another_shape_is_refused(dense, target, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(40, 32)
    save_file(weights, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    assert_refused(tmp_path / "dense", target, "not those of llama", tmp_path)


def test_a_tensor_in_two_shards_is_refused(shards, tmp_path):
    folder, _ = shards
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    both = load_file(first) | load_file(second)
    save_file(both, second, {"format": "pt"})
    assert_refused(folder, "hf", "two shards hold", tmp_path)


def test_of_a_quantised_model_each_module_must_have_tensors(dense, tmp_path):
    """Its tensors have names of their own, which only its quantiser knows."""
    config = AutoConfig.from_pretrained(dense)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    tensors = {}
    for name, tensor in read_header(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        packed = {f"{module}.qweight": tensor, f"{module}.scales": tensor}
        tensors |= packed if module.endswith("_proj") else {name: tensor}
    model = build_empty(config)
    check_tensors("tiny", model, tensors)
    del (
        tensors["model.layers.3.mlp.up_proj.scales"],
        tensors["model.layers.3.mlp.up_proj.qweight"],
    )
    with pytest.raises(UsageError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        check_tensors("tiny", model, tensors)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt2"])
def test_names_that_transformers_changes_on_loading_are_known(name, tmp_path):
    model = family(name).build()
    model.save_pretrained(tmp_path)
    (_, tensors), empty = read_tensors(tmp_path), build_empty(model.config)
    check_tensors(name, empty, tensors)
    for victim in [
        name for name in tensors if "layers" not in name or "layers.2." in name
    ]:
        with pytest.raises(UsageError, match=r"lacks weights|are not those of"):
            check_tensors(
                name,
                empty,
                {key: tensor for key, tensor in tensors.items() if key != victim},
            )


@pytest.mark.any_transformers
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_no_damage_crashes_the_reader(dense, tmp_path, data):
    """A file with a few bytes changed, or cut, is read as some tensors inside it, or
    refused in one line.
    """
    content = bytearray((dense / "model.safetensors").read_bytes())
    header = struct.unpack("<Q", content[:8])[0] + 8
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path / "mutant.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except UsageError as refusal:
        assert_one_line(refusal)
        return
    for tensor in tensors.values():
        assert tensor.read().nbytes == tensor.size


def test_written_files_are_what_the_library_reads(tmp_path):
    kinds = [
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.uint8,
        torch.bool,
    ]
    weights = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    weights |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}
    save_file(weights, tmp_path / "source.safetensors")
    write_shards(
        tmp_path, read_header(tmp_path / "source.safetensors"), shard_bytes=1_000
    )
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        assert found[name].dtype == weight.dtype
        assert found[name].shape == weight.shape
        assert torch.equal(found[name].to(torch.float32), weight.to(torch.float32))
