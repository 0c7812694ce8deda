"""The patches of `docs/upstream` do what they say, on copies of what is installed."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import notall

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
