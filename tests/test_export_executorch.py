"""ExecuTorch's programs: what is refused, and (where ExecuTorch is) that they answer as
the skipped model does.
"""

import json
from pathlib import Path

import pytest
import torch

import engines
from api import executorch, footprint
from families import ROPE_FIELD, family
from notall import Plan, Source, UsageError, export, repair, skip

needs_executorch = engines.needs("executorch", "make test-executorch")
pytestmark = pytest.mark.timeout(1800)

MIXED = Plan(attention=[0, 3], mlp=[1, 3])  # an attention, an MLP and a block
BOTH = Plan(attention=[0], mlp=[1])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 500.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TWO = {"num_hidden_layers": 2}  # building a program takes seconds a layer
FITTING = [
    ("llama", {"tie_word_embeddings": True, ROPE_FIELD: LLAMA3}, MIXED),
    ("mistral", TWO | {"sliding_window": None}, BOTH),
    ("qwen2", TWO, BOTH),
    ("qwen3", TWO, BOTH),
]
TOKENS = torch.randint(99, (2, 13), generator=torch.Generator().manual_seed(3))


def answers(out):
    return executorch.logits_of_program(out / "model.pte", TOKENS)


def memory_plan(out):
    """Bytes of all memory that the program plans for, and the shapes of the tensors in
    it.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    plan = deserialize_pte_binary(
        (out / "model.pte").read_bytes()
    ).program.execution_plan[0]
    shapes = [
        tuple(value.val.sizes) for value in plan.values if hasattr(value.val, "sizes")
    ]
    return sum(plan.non_const_buffer_sizes), shapes


@needs_executorch
@pytest.mark.parametrize(
    ("name", "changes", "plan"), FITTING, ids=[name for name, *_ in FITTING]
)
def test_a_program_answers_as_the_skipped_model(name, changes, plan, tmp_path):
    """`export` itself compares a prompt and a token; so does this, with other
    tokens.
    """
    model = family(name).build(**changes)
    out = export(model, plan, "executorch", tmp_path / "out")
    assert json.loads((out / "notall.json").read_text())["verified"]["most"] == 1e-4
    with skip(model, plan), torch.no_grad():
        expected = model(TOKENS).logits[:, -2:]
    torch.testing.assert_close(answers(out), expected, rtol=1e-4, atol=1e-4)
    engines.works("ExecuTorch", "executorch", "executorch", name, "any")


@needs_executorch
def test_a_repaired_plan_keeps_its_weights(tmp_path):
    model = family("llama").build(num_hidden_layers=3)
    batches = [
        torch.randint(99, (4, 16), generator=torch.Generator().manual_seed(seed))
        for seed in range(4)
    ]
    repaired = repair(model, Plan([1], [1, 2]), batches)
    out = export(model, repaired, "executorch", tmp_path / "out")
    with skip(model, repaired), torch.no_grad():
        expected = model(TOKENS).logits[:, -2:]
    with skip(model, repaired.unrepaired), torch.no_grad():
        assert not torch.allclose(expected, model(TOKENS).logits[:, -2:], atol=1e-2)
    torch.testing.assert_close(answers(out), expected, rtol=1e-4, atol=1e-4)


@needs_executorch
def test_a_program_in_four_bits_is_as_near_as_torchao_s_own_rounding(
    tmp_path, monkeypatch
):
    model = family("llama").build(hidden_size=64, intermediate_size=128, head_dim=32)
    out = export(model, MIXED, "executorch-8da4w", tmp_path / "out")
    verified = json.loads((out / "notall.json").read_text())["verified"]
    assert (verified["unit"], verified["most"]) == (
        "times the error of torchao's 8da4w",
        1.25,
    )
    written = json.loads((out / "notall.json").read_text())["weight_bytes"]["written"]
    assert (
        written
        < (out / "model.pte").stat().st_size
        < 0.6 * footprint(model, MIXED).weight_bytes
    )
    with skip(model, MIXED), torch.no_grad():
        expected = model(TOKENS).logits[:, -2:]
    assert 0.01 < float((answers(out) - expected).norm() / expected.norm()) < 0.5
    engines.works("ExecuTorch", "executorch", "executorch-8da4w", "llama", "any")
    said = executorch.logits_of_program
    monkeypatch.setattr(executorch.ExecuTorchExport, "write", lambda *_: None)
    monkeypatch.setattr(
        executorch,
        "logits_of_program",
        lambda _, tokens: 1.5 * said(out / "model.pte", tokens),
    )
    with pytest.raises(UsageError, match="answers differently"):
        export(model, MIXED, "executorch-8da4w", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@needs_executorch
def test_bytes_are_the_counted_ones(tmp_path):
    """Of the file those of the weights, but for what describes the graph; of memory
    those of the cache.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    model, plan = family("llama").build(**TWO, **sizes), Plan([0], [1])
    dense, skipped = (
        export(model, one, "executorch", tmp_path / str(one)) for one in (Plan(), plan)
    )
    before, after = (footprint(model, one) for one in (Plan(), plan))
    files = [(out / "model.pte").stat().st_size for out in (dense, skipped)]
    assert files[0] - files[1] == pytest.approx(
        before.weight_bytes - after.weight_bytes, rel=0.1
    )
    (planned, shapes), (fewer, left) = map(memory_plan, (dense, skipped))
    for footprint_of, held in ((before, shapes), (after, left)):
        caches = (
            held.count((1, 64, 2, 32)) // 2
        )  # each as it was, and as it is updated, in the same place
        assert caches * 64 * 2 * 32 * 4 == 64 * footprint_of.kv_bytes_per_token
    assert planned - fewer >= 64 * (
        before.kv_bytes_per_token - after.kv_bytes_per_token
    )


def test_a_wrong_answer_leaves_nothing(tmp_path, monkeypatch):
    """Where ExecuTorch is or not: the program and its answers are made up."""
    model, factor = family("llama").build(), 1.0

    def said(_, tokens):
        with skip(model, MIXED), torch.no_grad():
            return factor * model(tokens).logits[:, -2:]

    monkeypatch.setattr(executorch, "find_spec", lambda name: True)
    monkeypatch.setattr(executorch, "version", lambda name: "1.5.1")
    monkeypatch.setattr(executorch.ExecuTorchExport, "write", lambda *_: None)
    monkeypatch.setattr(executorch, "logits_of_program", said)
    export(model, MIXED, "executorch", tmp_path / "right")
    factor = 1.01
    with pytest.raises(UsageError, match="answers differently"):
        export(model, MIXED, "executorch", tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


@needs_executorch
@pytest.mark.slow
def test_the_default_model_says_the_same(default_model, tmp_path):
    """64 tokens, each the likeliest, with 8 attentions left out."""
    model, tokenizer = default_model
    plan = Plan(attention=range(20, 28))
    out = export(
        Source("smollm2", dtype="float32"), plan, "executorch", tmp_path / "out"
    )
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with skip(model, plan), torch.no_grad():
        said = model.generate(
            prompt, max_new_tokens=64, do_sample=False, eos_token_id=None
        )[0, prompt.shape[1] :]
    run = executorch.runner(out / "model.pte")
    logits, found = run(prompt[0], 0), []
    for place in range(prompt.shape[1], prompt.shape[1] + 64):
        found.append(int(logits.argmax()))
        logits = run(torch.tensor(found[-1:]), place)
    assert found == said.tolist()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma2", {}, "not built of Llama's layers"),
        ("mistral", {}, "a window of 5 tokens"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama", {"attention_bias": True}, "no place for self_attn.o_proj.bias"),
        ("llama", {ROPE_FIELD: DYNAMIC}, "by how long a text is"),
    ],
)
def test_what_does_not_fit_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(UsageError, match=reason) as refusal:
        export(family(name).build(**changes), MIXED, "executorch", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    told = {key: value for key, value in changes.items() if key != ROPE_FIELD} or {
        "rope": "dynamic"
    }
    variant = (
        "".join(f" ({key}={value})" for key, value in told.items()) if changes else ""
    )
    engines.refused("executorch", name + variant, "any", str(refusal.value))


def test_without_executorch_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(executorch, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match="ExecuTorch is not installed: install it and notall"
    ):
        export(family("llama").build(), MIXED, "executorch", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_executorch
def test_the_patch_for_executorch_builds_layers_without_mlps(tmp_path):
    """`docs/upstream` has it; it is applied to a copy of what is installed."""
    import importlib.util
    import shutil
    import subprocess

    from executorch.examples.models.llama import llama_transformer, model_args

    root, name = (
        Path(__file__).parent.parent,
        "examples/models/llama/llama_transformer.py",
    )
    (tmp_path / name).parent.mkdir(parents=True)
    shutil.copy(llama_transformer.__file__, tmp_path / name)
    subprocess.run(
        ["git", "apply", root / "docs/upstream/executorch-mlp-type.patch"],
        cwd=tmp_path,
        check=True,
    )
    spec = importlib.util.spec_from_file_location("patched", tmp_path / name)
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    settings = {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": 99,
        "max_seq_len": 16,
    }
    settings |= {
        "layer_types": ["attention", "skip_attention", "attention"],
        "mlp_type": ["skip", "default", "default"],
    }
    args = model_args.ModelArgs(**settings)
    stock, mended = (
        one.construct_transformer(args).eval() for one in (llama_transformer, patched)
    )
    assert hasattr(stock.layers[0], "feed_forward"), (
        "it heeds mlp_type now: the patch and what it dodges can go"
    )
    del stock.layers[0].feed_forward, stock.layers[0].ffn_norm
    stock.layers[0].mlp_type = "skip"
    mended.load_state_dict(stock.state_dict())
    tokens = torch.arange(7)[None]
    torch.testing.assert_close(mended(tokens)[0], stock(tokens)[0], rtol=0, atol=0)
