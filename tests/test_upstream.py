"""The patches of `docs/upstream` do what they say, on copies of what is installed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import notall
from api import Field, GGUFTensor, exporters_gguf, read_gguf, write_gguf
from families import family
from tiny_gguf import WORDS, write_gguf as write_tiny

PATCH = Path(__file__).parents[1] / "docs/upstream/transformers-skip.patch"
SKIPPED = {0: ["attention"], 1: ["mlp"], 3: ["attention", "mlp"]}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def patched(tmp_path, monkeypatch):
    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the patch is for the source of transformers 5.24")
    file = tmp_path / "src/transformers/models/llama/modeling_llama.py"
    file.parent.mkdir(parents=True)
    shutil.copy(modeling_llama.__file__, file)
    subprocess.run(["git", "apply", PATCH], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location(
        "transformers.models.llama.patched_llama", file
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_transformers_skips_what_a_config_names(patched, tmp_path):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=5, vocab_size=99, **SIZES)
    ).eval()
    plan = notall.Plan(attention=[0, 3], mlp=[1, 3])
    config = LlamaConfig(
        num_hidden_layers=5,
        vocab_size=99,
        per_layer_config={layer: {"skip": kinds} for layer, kinds in SKIPPED.items()},
        **SIZES,
    )
    config.save_pretrained(tmp_path / "saved")
    model = patched.LlamaForCausalLM(
        LlamaConfig.from_pretrained(tmp_path / "saved")
    ).eval()
    missing, unused = model.load_state_dict(dense.state_dict(), strict=False)
    assert not missing
    assert {int(name.split(".")[2]) for name in unused} == {0, 1, 3}
    tokens = torch.arange(14).view(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with notall.skip(dense, plan):
        expected = dense(tokens, attention_mask=mask).logits
        text = dense.generate(
            tokens, attention_mask=mask, max_new_tokens=6, do_sample=False
        )
    torch.testing.assert_close(
        model(tokens, attention_mask=mask).logits, expected, rtol=0, atol=1e-6
    )
    begun = model(
        tokens[:, :4], attention_mask=mask[:, :4], use_cache=True
    )  # a cache counts the tokens that it has
    behind = model(tokens[:, 4:], attention_mask=mask, cache=begun.cache)
    torch.testing.assert_close(behind.logits, expected[:, 4:], rtol=0, atol=1e-6)
    said = model.generate(
        tokens, attention_mask=mask, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(said, text)
    assert not torch.allclose(
        dense(tokens, attention_mask=mask).logits, expected, atol=1e-3
    )


# --- llama.cpp
# --------------------------------------------------------------------------------------

LLAMACPP = os.environ.get(
    "NOTALL_LLAMACPP"
)  # the folder of programs that were built of its patched source
needs_llamacpp = pytest.mark.skipif(
    not LLAMACPP,
    reason="llama.cpp is not built of its patched source: `make test-llamacpp`",
)
ROUNDING = 1e-5  # of the largest logit


def batch(tokens, outputs=1, sequence=0):
    """As `llamacpp_logits.cpp` reads it: the last so many tokens have an output."""
    return " ".join(map(str, [sequence, outputs, *tokens]))


def llama_logits(file, *batches, ubatch=512, flash=False, unified=True):
    """Of each output of these batches, one after the other: (outputs, vocabulary)."""
    how = [str(int(one)) for one in (ubatch, flash, unified)]
    asked = [Path(LLAMACPP) / "llama-simple", file, *how]
    done = subprocess.run(
        asked, input="\n".join(batches).encode(), check=True, capture_output=True
    )
    outputs = sum(int(part.split()[1]) for one in batches for part in one.split("/"))
    return np.frombuffer(done.stdout, np.float32).reshape(outputs, -1)


def assert_near(found, expected, most=ROUNDING):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=most * abs(expected).max())


def bare(padded: Path, out: Path) -> Path:
    """The file of an export without what it has in the place of sublayers that are
    missing.
    """
    source = read_gguf(padded)
    heads, kv_heads, widths = names = [
        f"deci.{name}"
        for name in (
            "attention.head_count",
            "attention.head_count_kv",
            "feed_forward_length",
        )
    ]
    lists = {name: list(source.fields[name].value) for name in names}
    drop = []
    for number, (count, width) in enumerate(zip(lists[heads], lists[widths])):
        if count == 1:
            lists[heads][number] = lists[kv_heads][number] = 0
            drop.append(f"blk.{number}.attn_")
        if width == 32:
            lists[widths][number] = 0
            drop.append(f"blk.{number}.ffn_")
    assert len(drop) == 3
    fields = source.fields | {name: Field.of(of) for name, of in lists.items()}
    tensors = {
        name: one
        for name, one in source.tensors.items()
        if not name.startswith(tuple(drop))
    }
    write_gguf(out, source, fields, tensors)
    return out


@needs_llamacpp
@pytest.mark.slow
def test_llama_cpp_runs_layers_that_lack_a_sublayer(tmp_path):
    """No first attention, an MLP missing in the middle, and the last one."""
    plan = notall.Plan(attention=[0, 10], mlp=[5, 29])
    (padded,) = notall.export("smollm2", plan, "gguf", tmp_path / "padded").glob(
        "*.gguf"
    )
    asked = batch([504, 3575, 282, 4649, 314])  # The capital of France is
    expected = llama_logits(padded, asked, flash=True)
    assert abs(expected).max() > 5
    assert_near(
        llama_logits(bare(padded, tmp_path / "bare.gguf"), asked, flash=True), expected
    )


# --- llama.cpp: blocks that a prompt skips
# --------------------------------------------------------------------------------------

STEPS = 3  # tokens behind a prompt
PROMPT = (
    "A prompt's tokens are only read through their keys and values, and each token of"
    " an answer makes a decision. Deep layers can therefore be left out of the prompt,"
    " as long as the answer runs whole."
)
TEXT = [
    torch.randint(3, 99, (8, 16), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
TINY = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
}
PLANS = {
    "as it is": notall.Plan(prefill={"attention": [1, 2, 3], "mlp": [1, 2, 3]}),
    "repaired": notall.Plan(prefill={"attention": [1, 2, 3], "mlp": [1, 2, 3]}),
    "the last block": notall.Plan(prefill={"attention": [3], "mlp": [3]}),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function from a family's name and a plan's to the original model, the plan and
    its file, written once.
    """
    known = {}

    def write(name, which):
        if (name, which) not in known:
            folder = tmp_path_factory.mktemp("prefill")
            model, plan = family(name).build(**TINY, eos_token_id=None), PLANS[which]
            plan = notall.repair(model, plan, TEXT) if which == "repaired" else plan
            dense = write_tiny(model, folder / f"{name}.gguf")
            out = notall.export(dense, plan, "gguf", folder / "out", verify=False)
            known[name, which] = model, plan, next(out.glob("*.gguf"))
        return known[name, which]

    return write


def tokens_of(count, seed=0):
    return torch.randint(
        3, 99, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


@torch.no_grad()
def prefilled(model, plan, tokens, prompt):
    """Logits of the prompt's last token and of those that follow it: (1 + following,
    vocabulary).
    """
    with notall.skip(model, plan), notall.prompt(model, prompt):
        return model(torch.tensor([tokens])).logits[0, prompt - 1 :]


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("ubatch", [512, 5], ids=["one ubatch", "several"])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 33])
@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpp_skips_in_the_prompt(exported, name, which, count, ubatch):
    """A prompt, and tokens behind it; of more than one ubatch the first have no
    outputs.
    """
    model, plan, file = exported(name, which)
    tokens = tokens_of(count + STEPS)
    expected = prefilled(model, plan, tokens, count)
    asked = [batch(tokens[:count]), *(batch([token]) for token in tokens[count:])]
    assert_near(llama_logits(file, *asked, ubatch=ubatch), expected)
    assert_near(
        llama_logits(file, *asked, ubatch=ubatch, flash=True), expected, most=1e-2
    )  # float16
    if count > 2 and which != "the last block":  # which is exact
        assert not torch.allclose(
            expected[0], whole(model, tokens)[count - 1], rtol=1e-2
        )


@torch.no_grad()
def whole(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpp_runs_whole_what_has_outputs(exported, name):
    """All tokens of a perplexity; and those of a draft, behind a prompt."""
    model, plan, file = exported(name, "repaired")
    tokens = tokens_of(12)
    assert_near(llama_logits(file, batch(tokens, outputs=12)), whole(model, tokens))
    found = llama_logits(file, batch(tokens[:8]), batch(tokens[8:], outputs=4))
    assert_near(found, prefilled(model, plan, tokens, 8))


@needs_llamacpp
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpp_skips_in_the_prompts_of_a_batch(exported, name):
    """One sequence goes on while the prompt of another comes in, and two prompts come
    in at once.
    """
    model, plan, file = exported(name, "repaired")
    first, second = tokens_of(10), tokens_of(9, seed=1)
    found = llama_logits(
        file,
        batch(first[:8]),
        f"{batch(first[8:9])} / {batch(second[:8], sequence=1)}",
        f"{batch(first[9:])} / {batch(second[8:], sequence=1)}",
    )
    one, other = prefilled(model, plan, first, 8), prefilled(model, plan, second, 8)
    assert_near(found, torch.stack([one[0], one[1], other[0], one[2], other[1]]))
    for unified in (True, False):  # a cache for both, and one for each
        found = llama_logits(
            file,
            f"{batch(first[:8], outputs=0)} /"
            f" {batch(second[:8], outputs=0, sequence=1)}",
            batch(first[8:9]),
            batch(second[8:], sequence=1),
            unified=unified,
        )
        expected = [
            prefilled(model, plan, tokens[:9], 9)[0] for tokens in (first, second)
        ]
        assert_near(found, torch.stack(expected))


@needs_llamacpp
@pytest.mark.slow
def test_llama_cpp_runs_an_ubatch_of_several_caches_whole(exported):
    """Where it has outputs, whose number may differ from one cache to the next."""
    model, _, file = exported("llama", "repaired")
    first, second = tokens_of(8), tokens_of(8, seed=1)
    found = llama_logits(
        file, f"{batch(first)} / {batch(second, sequence=1)}", unified=False
    )
    assert_near(
        found, torch.stack([whole(model, tokens)[-1] for tokens in (first, second)])
    )


@needs_llamacpp
@pytest.mark.slow
def test_llama_cpp_skips_in_the_prompt_of_the_default_model(default_model, tmp_path):
    """In float32, as transformers has it, and with other keys and values in every block
    that is skipped.
    """
    model, tokenizer = default_model
    tail = range(20, 30)
    plan = changed(model, notall.Plan(prefill={"attention": tail, "mlp": tail}))
    plain = in_float32(exporters_gguf.dense_gguf("smollm2"), tmp_path / "plain.gguf")
    (file,) = notall.export(plain, plan, "gguf", tmp_path / "out", verify=False).glob(
        "*.gguf"
    )
    tokens = tokenizer(PROMPT).input_ids
    for count in (3, len(tokens) - STEPS):
        asked = [
            batch(tokens[:count]),
            *(batch([one]) for one in tokens[count : count + STEPS]),
        ]
        expected = prefilled(model, plan, tokens[: count + STEPS], count)
        for ubatch in (512, 16):
            assert_near(llama_logits(file, *asked, ubatch=ubatch), expected)


def changed(model, plan):
    """The plan with keys and values for the prompt that are some noise away from the
    original's.
    """
    draws = torch.Generator().manual_seed(0)
    weights = {}
    for index in plan.prefill.attention:
        for name in ("k_proj", "v_proj"):
            path = f"model.layers.{index}.self_attn.{name}"
            weight = model.get_parameter(f"{path}.weight").detach()
            noise = torch.randn(len(weight), weight.shape[1] + 1, generator=draws)
            weights[f"{path}.weight"] = weight + 0.1 * weight.std() * noise[:, 1:]
            weights[f"{path}.bias"] = 0.1 * noise[:, 0]
    return notall.RepairedPlan.of(plan, prompt_weights=weights)


def in_float32(dense: Path, out: Path) -> Path:
    source = read_gguf(dense)
    tensors = {
        name: GGUFTensor(dequantize(one.data, one.quantization), Kind.F32)
        for name, one in source.tensors.items()
    }
    write_gguf(out, source, source.fields, tensors)
    return out
