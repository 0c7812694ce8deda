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
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import notall
from api import Field, read_gguf, write_gguf

PATCH = Path(__file__).parents[1] / "docs/upstream/transformers-skip.patch"
SKIPPED = {0: ["attention"], 1: ["mlp"], 3: ["attention", "mlp"]}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def patched(tmp_path, monkeypatch):
    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the patch is for the source of transformers 5.24")
    file = tmp_path / "src/transformers/models/llama/modeling_llama.py"
    file.parent.mkdir(parents=True)
    shutil.copy(modeling_llama.__file__, file)
    subprocess.run(["git", "apply", PATCH], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("transformers.models.llama.patched_llama", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_transformers_skips_what_a_config_names(patched, tmp_path):
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, vocab_size=99, **SIZES)).eval()
    plan = notall.Plan(attention=[0, 3], mlp=[1, 3])
    config = LlamaConfig(
        num_hidden_layers=5,
        vocab_size=99,
        per_layer_config={layer: {"skip": kinds} for layer, kinds in SKIPPED.items()},
        **SIZES,
    )
    config.save_pretrained(tmp_path / "saved")
    model = patched.LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path / "saved")).eval()
    missing, unused = model.load_state_dict(dense.state_dict(), strict=False)
    assert not missing
    assert {int(name.split(".")[2]) for name in unused} == {0, 1, 3}
    tokens = torch.arange(14).view(2, 7)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with notall.skip(dense, plan):
        expected = dense(tokens, attention_mask=mask).logits
        text = dense.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    torch.testing.assert_close(model(tokens, attention_mask=mask).logits, expected, rtol=0, atol=1e-6)
    begun = model(tokens[:, :4], attention_mask=mask[:, :4], use_cache=True)  # a cache counts the tokens that it has
    behind = model(tokens[:, 4:], attention_mask=mask, cache=begun.cache)
    torch.testing.assert_close(behind.logits, expected[:, 4:], rtol=0, atol=1e-6)
    said = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(said, text)
    assert not torch.allclose(dense(tokens, attention_mask=mask).logits, expected, atol=1e-3)


# --- llama.cpp --------------------------------------------------------------------------------------------------------

LLAMA_DEBUG = os.environ.get("NOTALL_LLAMA_DEBUG")  # built of its patched source


def bare(padded: Path, out: Path) -> Path:
    """The file of an export without what it has in the place of sublayers that are missing."""
    source = read_gguf(padded)
    heads, kv_heads, widths = names = [
        f"deci.{name}" for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
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
    tensors = {name: one for name, one in source.tensors.items() if not name.startswith(tuple(drop))}
    write_gguf(out, source, fields, tensors)
    return out


def logits_of(file: Path, out: Path) -> np.ndarray:
    asked = [LLAMA_DEBUG, "-m", file, "-p", "The capital of France is", "-t", "2", "-fa", "on"]
    subprocess.run([*asked, "--save-logits", "--logits-output-dir", out], check=True, capture_output=True)
    (found,) = (one for one in out.glob("*.bin") if "tokens" not in one.name)
    return np.fromfile(found, dtype=np.float32)


@pytest.mark.skipif(not LLAMA_DEBUG, reason="llama.cpp is not built of its patched source: `make test-llamacpp`")
@pytest.mark.slow
def test_llama_cpp_runs_layers_that_lack_a_sublayer(tmp_path):
    """No first attention, an MLP missing in the middle, and the last one."""
    plan = notall.Plan(attention=[0, 10], mlp=[5, 29])
    (padded,) = notall.export("smollm2", plan, "gguf", tmp_path / "padded").glob("*.gguf")
    expected = logits_of(padded, tmp_path / "expected")
    found = logits_of(bare(padded, tmp_path / "bare.gguf"), tmp_path / "found")
    assert abs(expected).max() > 5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())
