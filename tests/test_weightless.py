"""From a config alone, with no weights, `locate` says what it says of the model
itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from api import fingerprint
from families import FAMILIES, LLAMA, TRANSFORMERS_5, Family, each_block
from notall import ModelStructure, UnsupportedModel, locate

# In transformers 4.57 these go by values: of the router (DeepSeek), or at construction
# (Apertus).
NEEDS_VALUES = (
    {}
    if TRANSFORMERS_5
    else {"deepseek_v2": UnsupportedModel, "apertus": NotImplementedError}
)


@each_block(FAMILIES)
def test_same_structure_without_weights(family: Family) -> None:
    if not family.exists:
        pytest.skip(f"this transformers has no {family.model_type}")
    if family.name in NEEDS_VALUES:
        with pytest.raises(NEEDS_VALUES[family.name]):
            locate(empty(family))
        return
    try:
        structure = locate(family.build())
    except UnsupportedModel:
        pytest.skip("refused with weights")
    assert facts(locate(empty(family))) == facts(structure)


def empty(family: Family) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(family.model_type, **family.config)
        return family.auto.from_config(config, attn_implementation="eager").eval()


def facts(structure: ModelStructure) -> Any:
    return (
        structure.model_type,
        structure.layers,
        structure.fingerprint,
        structure.blocks,
    )


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 98},
        {"hidden_size": 64},
        {"intermediate_size": 47},
        {"num_hidden_layers": 5},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
    ],
    ids=str,
)
def test_a_fingerprint_tells_shapes_apart(change: dict[str, int]) -> None:
    """So that a plan is refused by a model of another shape."""
    shape = {**LLAMA, **change}
    assert fingerprint(AutoConfig.for_model("llama", **shape)) != fingerprint(
        AutoConfig.for_model("llama", **LLAMA)
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak from /proc"
)
def test_llama_70b_in_little_memory() -> None:
    program = """
import pathlib, re, torch, transformers, notall
config = transformers.LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
attention = notall.locate(model).blocks[79].attention
peak = re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())
print(int(peak.group(1)) // 1024, attention.parameters, attention.kv_bytes_per_token)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    mebibytes, parameters, kv_bytes = map(int, answer.stdout.split())
    assert mebibytes < 1024
    assert parameters == 8192 * (8192 + 1024 + 1024 + 8192) + 8192
    assert kv_bytes == 2 * 8 * 128 * 4
