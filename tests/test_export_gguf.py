"""Rewritten GGUF files: what they hold, what is refused, and what llama.cpp, where it
is, answers.
"""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind, GGUFEndian, GGUFValueType
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings, strategies as st

import engines
from api import (
    GGUF,
    Field,
    GGUFTensor,
    LlamaCpp,
    UnknownArchitecture,
    cut,
    exporters_gguf,
    gguf_with_weights as with_weights,
    llamacpp,
    load_config,
    loading,
    read_gguf,
    write_gguf,
)
from families import family
from notall import Plan, UsageError, export, load, repair, skip
from tiny_gguf import WORDS, write_gguf as write_tiny

PLANS = {
    "portable": Plan(attention=[2], mlp=[1]),
    "block": Plan([1], [1]),
    "first attention": Plan(
        attention=[0, 2]
    ),  # trap: llama.cpp reads the size of heads from layer 0
    "last MLP": Plan(
        mlp=[1, 3]
    ),  # trap: a deci layer without an MLP loses its attention, and the last one aborts
    "mixed": Plan(attention=[0, 3], mlp=[1]),
}
ORDINARY = ("portable", "block")
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def dense(request, tmp_path_factory):
    """A tiny model as a GGUF file in float32."""
    model = family(request.param).build(**SIZES, eos_token_id=None)
    return write_tiny(model, tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf")


@pytest.fixture(autouse=True)
def _cache_of_its_own(request, tmp_path_factory, monkeypatch):
    """Copies of tiny models are not worth keeping; that of the default model is."""
    if "default_model" not in request.fixturenames:
        monkeypatch.setenv(
            "NOTALL_CACHE", str(tmp_path_factory.getbasetemp() / "cache")
        )


@pytest.fixture
def llama(tmp_path):
    return write_tiny(family("llama").build(**SIZES), tmp_path / "llama.gguf")


# --- answers
# --------------------------------------------------------------------------------------


@needs_llamacpp
@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(plan, id=name, marks=[] if name == "mixed" else [pytest.mark.slow])
        for name, plan in PLANS.items()
    ],
)
def test_llamacpp_answers_as_the_skipped_model(dense, plan, tmp_path):
    out = export(dense, plan, "gguf", tmp_path / "out", verify=False)
    tokens = [5, 30, 31, 32, 90, 41, 7]
    (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), tokens)
    model, _ = load(dense, dtype="float32", device="cpu")
    with skip(model, plan), torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    assert len(found) == llamacpp.LIKELIEST
    for token, value in found.items():
        assert value == pytest.approx(
            float(expected[token]), abs=2e-3
        )  # llama.cpp keeps keys and values in float16
    kind = (
        "portable, whole blocks"
        if plan in (PLANS["portable"], PLANS["block"])
        else "any"
    )
    engines.works("llama.cpp", "xllamacpp", "gguf", model.config.model_type, kind)


def answering(monkeypatch, dense, said):
    """Let what llama.cpp answers be `said` of the likeliest tokens' log-probabilities,
    of the dense file those.
    """
    model, _ = load(dense, dtype="float32", device="cpu")

    def answers(path, *prompts):
        with torch.no_grad():
            logprobs = model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)
        best = [row.topk(10) for row in logprobs]
        found = [dict(zip(row.indices.tolist(), row.values.tolist())) for row in best]
        return (
            found
            if path == dense
            else [{token: said(value) for token, value in one.items()} for one in found]
        )

    monkeypatch.setattr(LlamaCpp, "is_installed", lambda self: True)
    monkeypatch.setattr(LlamaCpp, "version", "of this test")
    monkeypatch.setattr(exporters_gguf, "next_token_logprobs", answers)


@pytest.mark.parametrize(
    "said",
    [lambda value: value - 20, lambda value: float("nan")],
    ids=["far off", "nan"],
)
def test_a_wrong_answer_of_llamacpp_is_refused(llama, said, monkeypatch, tmp_path):
    answering(monkeypatch, llama, said)
    with pytest.raises(
        UsageError, match=r"answers differently from the skipped model.*\(--no-verify\)"
    ):
        export(llama, PLANS["portable"], "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.any_transformers  # llama.cpp runs it
@needs_llamacpp
def test_what_answers_as_another_plan_would_is_refused(
    default_model, monkeypatch, tmp_path
):
    """Of the default model's 4-bit file, whose own answers are a tenth of a nat from
    exact ones.
    """
    plan = Plan(attention=[4, 6, 7, 9, 22, 25, 26, 29])
    told = verdict(export("smollm2", plan, "gguf", tmp_path / "right"))
    assert 0.02 < told["difference"] < told["most"] / 2
    dense = exporters_gguf.dense_gguf("smollm2")
    monkeypatch.setattr(
        exporters_gguf,
        "next_token_logprobs",
        lambda _, *prompts: llamacpp.next_token_logprobs(dense, *prompts),
    )
    with pytest.raises(UsageError, match="answers differently"):
        export("smollm2", plan, "gguf", tmp_path / "wrong")


def test_only_an_unknown_architecture_stops_the_comparison(
    llama, monkeypatch, tmp_path
):
    """Any other failure to read the dense file, such as too little memory, is the
    user's to know.
    """
    answering(monkeypatch, llama, float)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(loading, "load", fail)
    error = UsageError("cannot load llama.gguf: not enough memory")
    with pytest.raises(UsageError, match="not enough memory"):
        export(llama, PLANS["portable"], "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    error = UnknownArchitecture("transformers has no mumble")
    assert verdict(export(llama, PLANS["portable"], "gguf", tmp_path / "out")) == {
        "not_run": str(error)
    }


def verdict(out):
    return json.loads((out / "notall.json").read_text())["verified"]


def test_an_export_says_by_what_it_was_checked_or_why_it_was_not(
    llama, monkeypatch, tmp_path
):
    if LlamaCpp(1).is_installed():
        found = verdict(export(llama, PLANS["portable"], "gguf", tmp_path / "checked"))
        assert found["by"] == f"llama.cpp (xllamacpp {LlamaCpp(1).version})"
        assert found["difference"] < found["most"]
    monkeypatch.setattr(LlamaCpp, "is_installed", lambda self: False)
    assert (
        "not installed"
        in verdict(export(llama, PLANS["portable"], "gguf", tmp_path / "out"))[
            "not_run"
        ]
    )


def test_what_transformers_cannot_read_at_all_has_a_word_of_its_own(llama, tmp_path):
    """The real words of transformers and of llama.cpp, not ours."""
    path = tmp_path / "foreign.gguf"
    path.write_bytes(llama.read_bytes().replace(b"llama", b"plamo"))
    with pytest.raises(UnknownArchitecture):
        load(path)
    path.write_bytes(llama.read_bytes()[:-1])
    with pytest.raises(UsageError) as refusal:
        load(path)
    assert not isinstance(refusal.value, UnknownArchitecture)


@pytest.mark.slow
@needs_llamacpp
def test_what_llamacpp_says_is_told(llama, tmp_path):
    path = tmp_path / "foreign.gguf"
    path.write_bytes(llama.read_bytes().replace(b"llama", b"mlama"))
    with pytest.raises(
        UnknownArchitecture, match=r"foreign.gguf: unknown model architecture: 'mlama'"
    ):
        llamacpp.next_token_logprobs(path, [1, 2])
    path.write_bytes(llama.read_bytes()[:-1])
    with pytest.raises(
        UsageError, match=r"is not within the file bounds, model is corrupted"
    ) as refusal:
        llamacpp.next_token_logprobs(path, [1, 2])
    assert not isinstance(refusal.value, UnknownArchitecture)


@pytest.mark.slow
@needs_llamacpp
def test_the_default_model_answers_within_its_quantisation(default_model, tmp_path):
    model, tokenizer = default_model
    tokens = tokenizer("The history of the Roman Empire begins with")["input_ids"]
    for plan in (
        Plan(attention=[0, 5, 11, 12, 29]),
        Plan(attention=[10, 20], mlp=[9, 19]),
    ):
        out = export("smollm2", plan, "gguf", tmp_path / str(len(plan)), verify=False)
        (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), tokens)
        with skip(model, plan), torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert (
            max(abs(value - float(expected[token])) for token, value in found.items())
            < 0.3
        )


def test_a_repaired_plan_answers_as_the_skipped_model_with_its_weights(dense, tmp_path):
    model, _ = load(dense, dtype="float32", device="cpu")
    tokens = torch.arange(8 * 12).view(8, 12) * 7 % 90 + 3
    for plan in (PLANS["portable"], PLANS["block"]):
        repaired = repair(model, plan, [tokens])
        assert repaired.weights
        out = export(dense, repaired, "gguf", tmp_path / str(plan), verify=False)
        exported, _ = load(next(out.glob("*.gguf")), dtype="float32", device="cpu")
        with torch.no_grad(), skip(model, repaired):
            expected = model(tokens).logits
        with torch.no_grad():
            torch.testing.assert_close(
                exported(tokens).logits, expected, rtol=1e-4, atol=1e-4
            )


# Nats: llama.cpp keeps keys and values in float16, and rounds what it multiplies with
# quantised matrices to 8 bits.
KINDS = {
    Kind.F32: 5e-3,
    Kind.F16: 5e-3,
    Kind.Q8_0: 0.06,
    Kind.Q4_1: 0.1,
    Kind.Q4_K: 0.1,
}


@pytest.mark.slow
@needs_llamacpp
@pytest.mark.parametrize(
    ("kind", "most"), KINDS.items(), ids=[kind.name for kind in KINDS]
)
def test_llamacpp_answers_with_repaired_weights(kind, most, tmp_path, caplog):
    sizes = SIZES | {
        "hidden_size": 256,
        "intermediate_size": 256,
        "head_dim": 64,
    }  # Q4_K has blocks of 256
    dense = write_tiny(
        family("llama").build(**sizes, eos_token_id=None),
        tmp_path / "dense.gguf",
        kind=kind,
    )
    model, _ = load(dense, dtype="float32", device="cpu")
    repaired = repair(
        model, PLANS["portable"], [torch.arange(8 * 12).view(8, 12) * 7 % 90 + 3]
    )
    out = export(dense, repaired, "gguf", tmp_path / "out", verify=False)
    written = read_gguf(next(out.glob("*.gguf")))
    kinds = {
        tensor.quantization
        for name, tensor in written.tensors.items()
        if name.startswith("blk.")
    }
    coarse = kind in (
        Kind.Q4_1,
        Kind.Q4_K,
    )  # what is repaired goes into 8 bits, and that is said
    assert kinds == {Kind.F32, kind} | ({Kind.Q8_0} if coarse else set())
    assert (
        f"repaired weights that were {kind.name} are written in 8 bits" in caplog.text
    ) == coarse
    tokens = [5, 30, 31, 32, 90, 41, 7]
    (found,) = llamacpp.next_token_logprobs(written.path, tokens)

    def off(plan):
        with skip(model, plan), torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        return max(
            abs(value - float(expected[token])) for token, value in found.items()
        )

    assert off(repaired) < most < off(repaired.unrepaired) / 2


# --- what the files hold
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_kept_tensors_are_the_dense_ones(llama, name, tmp_path):
    plan = PLANS[name]
    source = read_gguf(llama)
    out = export(llama, plan, "gguf", tmp_path / "out", verify=False)
    written = read_gguf(next(out.glob("*.gguf")))
    assert written.architecture == ("llama" if name in ORDINARY else "deci")
    held = [tensor.data.tobytes() for tensor in written.tensors.values()]
    for kind, skipped in (("attn_", plan.attention), ("ffn_", plan.mlp)):
        for index in range(source.depth):
            for part, tensor in source.block(index).items():
                if part.startswith(kind):
                    assert (tensor.data.tobytes() in held) == (index not in skipped)
    assert (
        written.fields["tokenizer.ggml.tokens"]
        == source.fields["tokenizer.ggml.tokens"]
    )


def test_deci_layers_say_what_they_lack(llama):
    fields, tensors = cut(read_gguf(llama), PLANS["mixed"])
    # M0, A1 alone, A2 M2, M3: the first has a silent head, and the lone attention a
    # narrow MLP of zeros.
    assert fields["deci.block_count"].value == 4
    assert fields["deci.attention.head_count"].value == [1, 4, 4, 0]
    assert fields["deci.attention.head_count_kv"].value == [1, 2, 2, 0]
    assert fields["deci.feed_forward_length"].value == [96, 32, 96, 96]
    assert not tensors["blk.0.attn_output.weight"].data.any()
    assert not tensors["blk.1.ffn_down.weight"].data.any()
    assert "blk.3.attn_q.weight" not in tensors


def test_the_manifest_is_in_the_file_too(llama, tmp_path):
    out = export(llama, PLANS["mixed"], "gguf", tmp_path / "out")
    inside = json.loads(
        read_gguf(next(out.glob("*.gguf"))).fields["notall.manifest"].value
    )
    outside = json.loads((out / "notall.json").read_text())
    assert outside.items() > inside.items()
    assert outside.keys() - inside.keys() == {
        "card",
        "verified",
        "weight_bytes",
        "files",
        "sealed",
    }
    assert inside["plan"] == {"attention": [0, 3], "mlp": [1], "note": None}


def test_no_torch_is_needed(llama, tmp_path):
    program = (
        "import sys; from api import export; from notall import"
        f" Plan\nexport({str(llama)!r}, Plan([0], [1]), 'gguf',"
        f" {str(tmp_path / 'out')!r}, verify=False)\nassert 'torch' not in sys.modules"
        " and 'transformers' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, check=True
    )


# --- rules that llama.cpp keeps by layer
# --------------------------------------------------------------------------------------


def sketch(
    architecture,
    depth=12,
    tensors=("attn_norm", "attn_q", "attn_output", "ffn_norm", "ffn_up"),
    **more,
):
    """A GGUF of no model, with one number a tensor."""
    given = {"block_count": depth, "embedding_length": 8} | {
        name.replace("__", "."): v for name, v in more.items()
    }
    fields = {
        f"{architecture}.{name}": Field.of(value) for name, value in given.items()
    }
    fields["general.architecture"] = Field.of(architecture)
    numbers = {
        f"blk.{index}.{name}.weight": GGUFTensor(
            np.full(1, index, np.float32), Kind.F32
        )
        for index in range(depth)
        for name in tensors
    }
    return GGUF(Path(f"{architecture}.gguf"), fields, numbers, GGUFEndian.LITTLE)


def test_lists_by_layer_are_cut_by_their_source():
    lists = {
        "attention__head_count": list(range(12)),
        "feed_forward_length": list(range(12)),
    }
    fields, tensors = cut(sketch("openelm", **lists), Plan(attention=[4], mlp=[3]))
    assert fields["openelm.attention.head_count"].value == [
        0,
        1,
        2,
        3,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
    ]
    assert fields["openelm.feed_forward_length"].value == [
        0,
        1,
        2,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
    ]
    assert tensors["blk.3.attn_q.weight"].data[0] == 3
    assert tensors["blk.3.ffn_up.weight"].data[0] == 4


def test_leading_dense_layers_are_counted_again():
    source = sketch("deepseek2", leading_dense_block_count=3)
    fields, _ = cut(source, Plan([1, 5], [1, 5]))
    assert fields["deepseek2.leading_dense_block_count"].value == 2
    fields, _ = cut(
        source, Plan(attention=[3], mlp=[2])
    )  # layer 2 has the MLP of block 3, which has experts
    assert fields["deepseek2.leading_dense_block_count"].value == 2


def test_windows_are_written_out_where_their_order_changes():
    fields, _ = cut(sketch("gemma3"), Plan([0], [0]))
    pattern = fields["gemma3.attention.sliding_window_pattern"]
    assert pattern.kind == GGUFValueType.BOOL
    assert pattern.value == [
        True,
        True,
        True,
        True,
        False,
        True,
        True,
        True,
        True,
        True,
        False,
    ]


def test_attentions_without_rope_stay_where_llamacpp_looks_for_them():
    cut(sketch("smollm3"), Plan([4, 5, 6, 7], [4, 5, 6, 7]))
    with pytest.raises(UsageError, match="every 4th layer of smollm3"):
        cut(sketch("smollm3"), Plan([4], [4]))


def test_a_plan_for_another_model_names_the_fix():
    with pytest.raises(
        UsageError,
        match=r"qwen2-28x1536, but .* is \d+x\d+; make a plan for this model, or copy",
    ):
        cut(sketch("gemma2", depth=4), Plan([0], fingerprint="qwen2-28x1536"))


def test_a_depth_that_llamacpp_reads_more_from_is_refused():
    with pytest.raises(UsageError, match="gemma2 of 46 layers"):
        cut(sketch("gemma2", depth=46), Plan([0, 1], [0, 1]))


def test_a_norm_behind_the_attention_goes_with_it_unless_it_is_the_only_one_before_the_mlp():
    both = (
        "attn_norm",
        "attn_q",
        "post_attention_norm",
        "ffn_norm",
        "ffn_up",
        "post_ffw_norm",
    )
    _, tensors = cut(
        sketch("gemma2", depth=4, tensors=both), Plan(attention=[2], mlp=[1])
    )
    assert tensors["blk.1.post_attention_norm.weight"].data[0] == 1
    only = ("attn_norm", "attn_q", "post_attention_norm", "ffn_up")
    _, tensors = cut(
        sketch("seed_oss", depth=4, tensors=only), Plan(attention=[2], mlp=[1])
    )
    assert tensors["blk.1.post_attention_norm.weight"].data[0] == 2


def test_parallel_blocks_go_whole():
    parallel = sketch("phi2", tensors=("attn_norm", "attn_q", "ffn_up"))
    cut(parallel, Plan([1], [1]))
    with pytest.raises(UsageError, match="export to hf"):
        cut(parallel, Plan(attention=[2], mlp=[1]))


def one_tensor(architecture, name, values, kind=Kind.F32):
    source = sketch(architecture, depth=1, tensors=())
    return GGUF(
        source.path,
        source.fields,
        {name: GGUFTensor(quantize(values, kind), kind)},
        source.endianness,
    )


@pytest.mark.parametrize(
    ("architecture", "name", "path", "shape", "kind", "convert"),
    [
        (
            "gemma2",
            "blk.0.attn_norm",
            "model.layers.0.input_layernorm",
            (64,),
            Kind.F32,
            lambda one: one + 1,
        ),
        (
            "llama",
            "blk.0.attn_norm",
            "model.layers.0.input_layernorm",
            (64,),
            Kind.F32,
            lambda one: one,
        ),
        (
            "gpt2",
            "blk.0.ffn_down",
            "transformer.h.0.mlp.c_proj",
            (96, 64),
            Kind.F32,
            lambda one: one.T,
        ),
        (
            "llama",
            "blk.0.ffn_down",
            "model.layers.0.mlp.down_proj",
            (32, 64),
            Kind.F16,
            lambda one: one,
        ),
        (
            "llama",
            "blk.0.ffn_down",
            "model.layers.0.mlp.down_proj",
            (32, 64),
            Kind.Q8_0,
            lambda one: one,
        ),
    ],
)
def test_a_weight_is_packed_as_the_converter_does(
    architecture, name, path, shape, kind, convert
):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = convert(weight).numpy()
    source = one_tensor(
        architecture, f"{name}.weight", np.zeros(expected.shape, np.float32), kind
    )
    found = with_weights(source, {f"{path}.weight": weight}).tensors[f"{name}.weight"]
    assert found.quantization == kind
    np.testing.assert_array_equal(
        found.data, quantize(np.ascontiguousarray(expected), kind)
    )


def test_a_weight_that_the_file_has_no_tensor_for_is_one_line():
    source = one_tensor("llama", "blk.0.attn_norm.weight", np.ones(64, np.float32))
    for path in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.other.weight"):
        with pytest.raises(
            UsageError, match=r"has no tensor for model\.layers\.0"
        ) as refusal:
            with_weights(source, {path: torch.ones(64)})
        assert "\n" not in str(refusal.value)


# --- refusals, after which nothing is left
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rwkv7", "gemma3n", "from-the-future"])
def test_an_architecture_that_is_not_a_stack_of_blocks_is_refused(name):
    with pytest.raises(UsageError, match=f"layers of {name}") as refusal:
        cut(sketch(name), Plan([1], [1]))
    engines.refused("gguf", name, "whole blocks", str(refusal.value))


@pytest.mark.parametrize(
    ("name", "tensor"), [("qwen3", "attn_q_norm"), ("llama", "ffn_gate_exps")]
)
def test_what_deci_cannot_compute_is_refused(name, tensor):
    with pytest.raises(
        UsageError, match=r"choose a portable plan, or export to hf"
    ) as refusal:
        cut(
            sketch(name, tensors=("attn_norm", "attn_q", "ffn_norm", tensor)), Plan([1])
        )
    engines.refused("gguf", f"{name} with {tensor}", "any", str(refusal.value))


def test_a_file_that_does_not_match_the_plan_is_refused(llama, tmp_path):
    for plan in (Plan([1], fingerprint="llama-30x576-1f0c2a9b"), Plan([9])):
        with pytest.raises(UsageError, match=r"30x576|layer 9"):
            export(llama, plan, "gguf", tmp_path / "out")
    with pytest.raises(UsageError, match="give that file"):
        export(tmp_path, Plan([1]), "gguf", tmp_path / "out")
    with pytest.raises(UsageError, match="there is no"):
        export(tmp_path / "absent.gguf", Plan([1]), "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["llama.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 30, 2000, 100_000, -1])
def test_a_truncated_file_is_refused(llama, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(llama.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"no whole GGUF file|names no architecture"):
        export(path, Plan([1], [1]), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("count", [2**40, 2**22 + 1, 265])
@pytest.mark.parametrize(
    "key",
    ["tokenizer.ggml.token_type", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"],
)
def test_a_list_that_counts_more_than_the_file_holds_is_refused_at_once(
    llama, key, count, tmp_path
):
    """The library would read on behind the end of the file, an empty number at a
    time.
    """
    content = bytearray(llama.read_bytes())
    at = (
        content.index(key.encode()) + len(key) + 4 + 4
    )  # behind the types of the value and of its elements
    content[at : at + 8] = struct.pack("<Q", count)
    path = tmp_path / "counts.gguf"
    path.write_bytes(content)
    for function in (
        lambda: export(path, Plan([1], [1]), "gguf", tmp_path / "out", verify=False),
        lambda: load(path),
    ):
        with pytest.raises(UsageError, match="no whole GGUF file") as refusal:
            function()
        assert_one_line(refusal)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "what"), [("block_count", "layers"), ("expert_count", "experts")]
)
@pytest.mark.parametrize("count", [10**6, 19_000])
def test_more_layers_or_experts_than_there_is_room_for_are_refused_at_once(
    llama, key, what, count, tmp_path
):
    """transformers would build each of them."""
    content, path = llama.read_bytes(), tmp_path / "counts.gguf"
    name, value = f"llama.{key}".encode(), struct.pack("<II", 4, count)
    if name in content:
        end = content.index(name) + len(name)
        content = content[:end] + value + content[end + len(value) :]
    else:
        fields = struct.pack("<Q", struct.unpack("<Q", content[16:24])[0] + 1)
        content = (
            content[:16]
            + fields
            + struct.pack("<Q", len(name))
            + name
            + value
            + content[24:]
        )
    path.write_bytes(content)
    for function in (
        lambda: export(path, Plan([1], [1]), "gguf", tmp_path / "out", verify=False),
        lambda: load_config(path),
        lambda: load(path),
        lambda: LlamaCpp(1).check(path),
    ):
        with pytest.raises(
            UsageError,
            match=f"header counts {count} {what}, and its tensors have room for",
        ) as refusal:
            function()
        assert_one_line(refusal)


def test_lists_in_lists_end(llama, tmp_path):
    lists = struct.pack("<IQ", 9, 1) * 20_000 + struct.pack("<IQ", 4, 0)
    field = struct.pack("<Q", 4) + b"deep" + struct.pack("<I", 9) + lists
    (tmp_path / "deep.gguf").write_bytes(
        llama.read_bytes()[:16] + struct.pack("<Q", 1) + field
    )
    with pytest.raises(UsageError, match="no whole GGUF file"):
        export(tmp_path / "deep.gguf", Plan([1], [1]), "gguf", tmp_path / "out")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small whole file, and a folder for its mutants."""
    folder = tmp_path_factory.mktemp("mutants")
    sizes = {
        "attention__head_count": 2,
        "attention__head_count_kv": 1,
        "feed_forward_length": 8,
    }
    source = sketch("llama", depth=4, **sizes)
    rows = dict.fromkeys(
        ("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), 8
    ) | {"attn_k": 4, "attn_v": 4}
    shapes = {name: (count, 8) for name, count in rows.items()} | {
        "attn_norm": (8,),
        "ffn_norm": (8,),
    }
    tensors = {
        f"blk.{index}.{name}.weight": GGUFTensor(np.ones(shape, np.float32), Kind.F32)
        for index in range(4)
        for name, shape in shapes.items()
    }
    words = {"tokenizer.ggml.tokens": Field(["a", "bc", "def"], GGUFValueType.STRING)}
    write_gguf(folder / "small.gguf", source, source.fields | words, tensors)
    return (folder / "small.gguf").read_bytes(), folder


def assert_one_line(refusal):
    assert "\n" not in str(refusal)
    assert len(str(getattr(refusal, "value", refusal))) < 300


@pytest.mark.any_transformers
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_damage_crashes_the_export(small, data):
    """A file with a few bytes changed, or cut, is rewritten or refused in one line, and
    nothing is left then.
    """
    content, folder = bytearray(small[0]), small[1]
    header = len(content) - 4 * 4 * (
        5 * 64 + 2 * 32 + 2 * 8
    )  # the rest are ones, in float32
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path, out = folder / "mutant.gguf", folder / "out"
    path.write_bytes(
        content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    )
    plan = data.draw(st.sampled_from([Plan([1], [1]), Plan([0, 2], [1])]))
    try:
        export(path, plan, "gguf", out, verify=False)
    except UsageError as refusal:
        assert_one_line(refusal)
    else:
        assert sum(file.stat().st_size for file in out.iterdir()) < 2 * len(small[0])
        shutil.rmtree(out)
    assert sorted(found.name for found in folder.iterdir()) == [
        "mutant.gguf",
        "small.gguf",
    ]


def test_a_whole_file_is_exported_by_the_same_road(small):
    path = small[1] / "whole.gguf"
    path.write_bytes(small[0])
    for plan in (Plan([1], [1]), Plan([0, 2], [1])):
        shutil.rmtree(export(path, plan, "gguf", small[1] / "out", verify=False))
    path.unlink()
