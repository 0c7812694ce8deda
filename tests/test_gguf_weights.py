"""Weights of a repaired plan in GGUF files: each tensor of each family, as llama.cpp and transformers read it."""

from __future__ import annotations

import pytest
import torch

import engines
from api import RepairedPlan, export, llamacpp
from gguf_families import BUILT, built, parameters, write_skeleton
from notall import Plan

TOKENS = [5, 30, 31, 32, 90, 41, 7]
QUICK = {"llama", "gpt2", "gemma3", "qwen3_moe", "qwen3_5_text"}
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in BUILT]
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")


@needs_llamacpp
@pytest.mark.parametrize("name", CASES)
def test_llamacpp_answers_as_the_model_whose_every_weight_is_another(name, tmp_path):
    """The file that is rewritten holds zeros, so that a tensor of which one number is elsewhere shows."""
    model = built(name)
    plan = RepairedPlan.of(Plan(), weights=parameters(model))
    dense = write_skeleton(name, tmp_path / "dense.gguf")
    out = export(dense, plan, "gguf", tmp_path / "out", verify=False)
    (found,) = llamacpp.next_token_logprobs(next(out.glob("*.gguf")), TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, -1].log_softmax(-1)
    off = max(abs(value - float(expected[token])) for token, value in found.items())
    assert off < 0.03  # llama.cpp keeps keys and values in float16
    assert max(found.values()) - min(found.values()) > off
