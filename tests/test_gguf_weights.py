"""Weights of a repaired plan in GGUF files: each tensor of each family, as llama.cpp
and transformers read it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

import engines
from api import (
    GGUF,
    GGUFTensor,
    LlamaCpp,
    RepairedPlan,
    export,
    gguf_layout,
    gguf_with_weights,
    llamacpp,
    read_gguf,
    write_gguf,
)
from gguf_families import BUILT, built, parameters, write_skeleton
from notall import Plan, TrainConfig, UsageError, heal, load, skip

pytestmark = [pytest.mark.slow, pytest.mark.each_release]
# slow as they run: 4.57 takes 40 seconds to make that model
RARE = [pytest.mark.slow, pytest.mark.any_transformers]

TOKENS = [5, 30, 31, 32, 90, 41, 7]
QUICK = {"llama", "gpt2", "qwen3_moe"}
# Those of `BUILT` that transformers reads from a GGUF file too.
READ_BACK = [
    "llama", "llama (tied)", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe",
    "gemma2", "gemma3", "gpt2", "bloom", "falcon (parallel)", "phi3", "stablelm", "starcoder2",
    "mamba", "nemotron", "lfm2",
]  # fmt: skip
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")


def cases(names):
    """Those that are not quick once: some are built otherwise by older transformers,
    and files are the same.
    """
    rare = [pytest.mark.slow, pytest.mark.any_transformers]
    return [pytest.param(name, marks=[] if name in QUICK else rare) for name in names]


def every_weight(name):
    """The tiny model, and a plan that skips nothing and brings each of its weights."""
    model = built(name)
    return model, RepairedPlan.of(Plan(), weights=parameters(model))


@needs_llamacpp
@pytest.mark.parametrize("name", cases(BUILT))
def test_llamacpp_answers_as_the_model_whose_every_weight_is_another(name, tmp_path):
    """The file that is rewritten holds zeros, so that a tensor of which one number is
    elsewhere shows.
    """
    if name.startswith(("nemotron_h", "dots1")):
        pytest.skip("llama.cpp ends the process over its made-up header")
    model, plan = every_weight(name)
    dense = write_skeleton(name, tmp_path / "dense.gguf")
    out = export(dense, plan, "gguf", tmp_path / "out", verify=False)
    (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    off = max(abs(value - float(expected[token])) for token, value in found.items())
    assert off < 0.03  # llama.cpp keeps keys and values in float16
    assert max(found.values()) - min(found.values()) > 10 * off


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.any_transformers
@pytest.mark.parametrize("name", ["apertus", "granitemoehybrid", "olmo", "qwen2_moe"])
def test_llamacpp_answers_so_without_a_block_too(name, tmp_path):
    """Of Apertus the header has numbers of each MLP."""
    model, plan = every_weight(name)
    plan = RepairedPlan.of(Plan([1], [1]), weights=plan.weights)
    out = export(
        write_skeleton(name, tmp_path / "dense.gguf"),
        plan,
        "gguf",
        tmp_path / "out",
        verify=False,
    )
    (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), TOKENS)
    with skip(model, plan.unrepaired), torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    assert (
        max(abs(value - float(expected[token])) for token, value in found.items())
        < 0.03
    )


# --- without llama.cpp
# --------------------------------------------------------------------------------------


@pytest.fixture
def without_llamacpp(monkeypatch):
    monkeypatch.setattr(LlamaCpp, "is_installed", lambda self: False)


def not_run(out):
    return json.loads((out / "notall.json").read_text())["verified"]["not_run"]


@pytest.mark.parametrize("name", cases(READ_BACK))
def test_transformers_reads_back_every_weight(name, without_llamacpp, tmp_path):
    """Of Qwen2-MoE it reads what llama-quantize wrote, and not what the converter
    did.
    """
    _, plan = every_weight(name)
    dense = write_skeleton(name, tmp_path / "dense.gguf", requantised=True)
    told = not_run(export(dense, plan, "gguf", tmp_path / "out"))
    assert "its weights, read back by transformers, are the plan's within " in told
    assert (
        float(told.rpartition(" ")[2]) < 1e-6
    )  # 1 was added and taken away again, or exp and log


def test_weights_in_another_order_are_refused_without_an_engine(
    without_llamacpp, monkeypatch, tmp_path
):
    """Trap: llama.cpp has the rows of queries and keys in another order than
    transformers.
    """
    monkeypatch.setattr(gguf_layout, "ROTATES_NEIGHBOURS", set())
    _, plan = every_weight("llama")
    dense = write_skeleton("llama", tmp_path / "dense.gguf")
    with pytest.raises(
        UsageError, match="which reads the weights back, answers differently"
    ):
        export(dense, plan, "gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["dense.gguf"]


@pytest.mark.parametrize("name", ["olmo", pytest.param("qwen2_moe", marks=RARE)])
def test_what_transformers_does_not_read_is_said(name, without_llamacpp, tmp_path):
    _, plan = every_weight(name)
    dense = write_skeleton(name, tmp_path / "dense.gguf")
    assert "its weights were not read back" in not_run(
        export(dense, plan, "gguf", tmp_path / "out")
    )


# --- some of the weights
# --------------------------------------------------------------------------------------


def filled(name, tmp_path, kind=Kind.F32):
    """The tiny model, and its file; matrices of blocks in a type of their own."""
    model = built(name)
    skeleton = read_gguf(write_skeleton(name, tmp_path / "skeleton.gguf"))
    whole = gguf_with_weights(skeleton, parameters(model))
    tensors = dict(whole.tensors)
    for tensor, held in whole.tensors.items():
        if (
            tensor.startswith("blk.")
            and held.data.ndim > 1
            and held.data.shape[-1] % 32 == 0
        ):
            tensors[tensor] = GGUFTensor(quantize(held.data, kind), kind)
    return model, GGUF(whole.path, whole.fields, tensors, whole.endianness)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v2"])
def test_one_expert_of_several_leaves_the_others_as_they_are(name, tmp_path):
    """Names of transformers 4, in which each expert is a module."""
    _, file = filled(name, tmp_path)
    path = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    path = path if name == "mixtral" else "model.layers.1.mlp.experts.2.up_proj.weight"
    before = file.tensors["blk.1.ffn_up_exps.weight"].data
    new = torch.randn(before.shape[1:], generator=torch.Generator().manual_seed(0))
    after = (
        gguf_with_weights(file, {path: new}).tensors["blk.1.ffn_up_exps.weight"].data
    )
    np.testing.assert_array_equal(after[2], new.numpy())
    np.testing.assert_array_equal(
        np.delete(after, 2, axis=0), np.delete(before, 2, axis=0)
    )
    assert not np.array_equal(
        before[2], after[2]
    )  # of the file itself nothing has changed


def test_an_expert_of_a_tensor_in_few_bits_takes_the_others_to_8_bits(tmp_path, caplog):
    _, file = filled("qwen3_moe", tmp_path, Kind.Q4_1)
    name = "blk.0.ffn_up_exps.weight"
    shape = file.tensors[name].shape
    before = dequantize(file.tensors[name].data, Kind.Q4_1)
    found = gguf_with_weights(
        file, {"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(shape[1:])}
    )
    after = dequantize(found.tensors[name].data, found.tensors[name].quantization)
    assert found.tensors[name].quantization == Kind.Q8_0
    assert not after[1].any()
    np.testing.assert_allclose(
        np.delete(after, 1, axis=0), np.delete(before, 1, axis=0), atol=0.02
    )
    assert "repaired weights that were Q4_1 are written in 8 bits" in caplog.text


def test_heads_of_stablelm_have_norms_of_their_own(tmp_path):
    _, file = filled("stablelm", tmp_path)
    norms = {
        "blk.1.attn_q_norm.weight": GGUFTensor(np.ones((4, 8), np.float32), Kind.F32)
    }
    file = GGUF(file.path, file.fields, {**file.tensors, **norms}, file.endianness)
    new = {"model.layers.1.self_attn.q_layernorm.norms.3.weight": torch.full((8,), 2.0)}
    found = gguf_with_weights(file, new).tensors["blk.1.attn_q_norm.weight"].data
    assert found[3].tolist() == [2.0] * 8
    assert found[:3].tolist() == [[1.0] * 8] * 3


def test_a_tied_head_changes_with_the_embeddings(tmp_path):
    """Of files that hold a copy of it, too, and not where the head is another
    matrix.
    """
    new = torch.randn(264, 32, generator=torch.Generator().manual_seed(0))
    weights = {"model.embed_tokens.weight": new}
    _, tied = filled("llama (tied)", tmp_path)
    assert "output.weight" not in tied.tensors
    copied = {**tied.tensors, "output.weight": tied.tensors["token_embd.weight"]}
    found = gguf_with_weights(
        GGUF(tied.path, tied.fields, copied, tied.endianness), weights
    )
    np.testing.assert_array_equal(found.tensors["output.weight"].data, new.numpy())
    _, untied = filled("llama", tmp_path)
    found = gguf_with_weights(untied, weights)
    assert found.tensors["output.weight"] is untied.tensors["output.weight"]
    np.testing.assert_array_equal(found.tensors["token_embd.weight"].data, new.numpy())


def test_what_the_converter_makes_of_more_than_the_file_holds_is_refused(tmp_path):
    _, file = filled("llama", tmp_path)
    fields = {
        name.replace("llama.", "falcon-h1."): field
        for name, field in file.fields.items()
    }
    fields["general.architecture"] = fields["general.architecture"].of("falcon-h1")
    other = GGUF(file.path, fields, file.tensors, file.endianness)
    with pytest.raises(
        UsageError,
        match=r"does not know how .* writes attn_q of falcon-h1.*convert_hf_to_gguf",
    ):
        gguf_with_weights(
            other, {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}
        )


# --- a healing
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "lora"])
def test_a_healing_of_all_weights_is_verified(train, tmp_path):
    """Queries and keys among them, which llama.cpp has in another order."""
    if train == "lora":
        pytest.importorskip("peft")
    _, file = filled("llama", tmp_path)
    dense = tmp_path / "dense.gguf"
    write_gguf(dense, file, file.fields, file.tensors)
    net, _ = load(dense, dtype="float32", device="cpu")
    batches = list(
        torch.randint(
            3, 93, (16, 12), generator=torch.Generator().manual_seed(0)
        ).split(4)
    )
    healed = heal(
        net,
        Plan(attention=[2], mlp=[1]),
        batches[:3],
        batches[3:],
        TrainConfig(train=train, rate=0.02, rank=2),
    )
    assert any("q_proj" in path for path in healed.weights)
    out = export(dense, healed, "gguf", tmp_path / "out")
    told = json.loads((out / "notall.json").read_text())["verified"]
    assert told.get("difference", 0) < 0.01
    assert "not_run" not in told or "read back" in told["not_run"]
