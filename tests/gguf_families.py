"""Tiny models of families as GGUF files, with the headers that llama.cpp's converter
wrote for them.

`gguf_headers.json` holds the headers and the shapes; `record_gguf_headers.py` makes it.
Sizes and settings of a family are changed where llama.cpp takes them from its
architecture, and not from the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Kind, GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from families import family
from tiny_gguf import WORDS, add_tokenizer

RECORDED = Path(__file__).with_name("gguf_headers.json")

WIDE = {
    "sliding_window": 64
}  # than any prompt of the tests: llama.cpp has no window here, or in other layers
DELTA = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
# transformers reads these sizes from no header, and takes its own.
QWEN2_MOE = {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}
SECTIONS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}
# What is built otherwise than in `families`.
BUILT: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama (biases)": {"attention_bias": True},
    "llama (tied)": {"tie_word_embeddings": True},
    "mistral": WIDE,
    "ministral3": {},
    "mixtral": WIDE,
    "qwen2": {},
    "qwen2_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1} | QWEN2_MOE,
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 128, "moe_intermediate_size": 768},
    "qwen3_next": DELTA | {"mlp_only_layers": [], "decoder_sparse_step": 1},
    "qwen3_5_text": DELTA | SECTIONS,
    "qwen3_5_moe_text": DELTA | SECTIONS,
    "gemma": {},
    "gemma2": WIDE,
    "gemma3": WIDE | {"layer_types": ["sliding_attention"] * 4},
    "gemma4_text (experts)": WIDE | {"final_logit_softcapping": 30.0},
    "gemma4_text (nothing shared)": WIDE | {"final_logit_softcapping": 30.0},
    "gpt2": {"n_positions": 1024},
    "gpt_bigcode": {},
    "bloom": {},
    "mpt": {},
    "falcon (parallel)": {"ffn_hidden_size": 128},
    "falcon (two norms)": {},
    "gpt_neox": {},
    "granite": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": {"mamba_n_groups": 1},
    "granitemoehybrid (dense)": {"mamba_n_groups": 1, "num_experts_per_tok": 0, "position_embedding_type": "nope"},
    "jamba": {},
    "lfm2": {},
    "lfm2_moe": {},
    "falcon_mamba": {},
    "mamba": {},
    "mamba2": {},
    "nemotron": {},
    "nemotron_h": {"hybrid_override_pattern": "M*-M-*"},
    "nemotron_h (experts)": {"hybrid_override_pattern": "M*EME*"},
    "olmo": {},
    "olmo2": {},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 128},
    "phi3": WIDE,
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {},
    "starcoder2": WIDE,
    "cohere": {"use_qk_norm": False},
    "cohere2": WIDE | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_oss": WIDE,
    "hunyuan": {},
    "hunyuan (MoE)": {"moe_intermediate_size": [48] * 4, "moe_topk": [2] * 4, "num_shared_expert": [1] * 4},
    "exaone4": {"layer_types": ["full_attention"] * 4, "sliding_window": None, "sliding_window_pattern": None},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_intermediate_size": 24},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "dots1": {"num_key_value_heads": 4},
    "dbrx": {},
    "arcee": {},
    "apertus": {},
    "llama4": {"no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 64},
    "qwen2_vl (text part)": {},
}  # fmt: skip


def built(name: str) -> PreTrainedModel:
    """The tiny model, whose vocabulary is `WORDS`."""
    found = family(name if name in _rows() else name.partition(" (")[0])
    text = {"vocab_size": len(WORDS)}
    if "text_config" in found.config:
        return found.build(
            text_config=found.config["text_config"] | text, **BUILT[name]
        )
    return found.build(**text, **BUILT[name])


def _rows() -> set[str]:
    from families import FAMILIES
    from hybrid_families import HYBRIDS
    from plain_families import OTHERS

    return {one.name for one in (*FAMILIES, *HYBRIDS, *OTHERS)}


@cache
def recorded() -> Mapping[str, Any]:
    """By name the header's fields and the shapes of tensors; numbers of those that are
    no parameter's.
    """
    return json.loads(RECORDED.read_text())


def parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the part that reads text, and the buffers that are learned."""
    learned = ("correction_bias", "expert_bias", "layer_scalar")
    buffers = {
        name: one for name, one in model.named_buffers() if name.endswith(learned)
    }
    both = {**dict(model.named_parameters()), **buffers}
    return {
        name: one.detach().clone() for name, one in both.items() if "visual" not in name
    }


def folded(shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Shapes by name, those of alike blocks once: `{"blk.0,2": {"attn_q.weight": [32,
    32]}}`.
    """
    blocks: dict[str, dict[str, list[int]]] = {}
    outside = {}
    for name, shape in shapes.items():
        if name.startswith("blk."):
            _, number, rest = name.split(".", 2)
            blocks.setdefault(number, {})[rest] = shape
        else:
            outside[name] = shape
    alike: dict[str, list[str]] = {}
    for number, block in blocks.items():
        alike.setdefault(json.dumps(block), []).append(number)
    return outside | {
        f"blk.{','.join(numbers)}": json.loads(block)
        for block, numbers in alike.items()
    }


def _unfolded(shapes: Mapping[str, Any]) -> dict[str, list[int]]:
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, list):
            found[name] = shape
            continue
        numbers = name.removeprefix("blk.").split(",")
        found |= {
            f"blk.{one}.{rest}": each for one in numbers for rest, each in shape.items()
        }
    return found


def write_skeleton(name: str, path: Path, *, requantised: bool = False) -> Path:
    """The family's file, with zeros for every number of a parameter.

    `requantised`: with shapes as llama-quantize writes them again, without ones at the
    front.
    """
    fields, tensors = recorded()[name]["fields"], recorded()[name]["tensors"]
    writer = GGUFWriter(path, fields["general.architecture"][1])
    for key, (kind, value) in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_key_value(
                key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType[kind]
            )
        else:
            writer.add_key_value(key, value, GGUFValueType[kind])
    add_tokenizer(writer)
    for key, shape in _unfolded(tensors).items():
        while requantised and len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        numbers = recorded()[name]["numbers"].get(key)
        values = np.zeros(shape, np.float32) if numbers is None else np.float32(numbers)
        writer.add_tensor(key, values, raw_dtype=Kind.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
