"""Tiny hybrids as GGUF files, of random numbers in the shapes that llama.cpp asks for:
no model is behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind, GGUFWriter

from tiny_gguf import WORDS, add_tokenizer

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 16
STATE, GROUPS, CONV = 16, 2, 4
DEPTH = 8
Shapes = dict[str, tuple[int, ...]]


def _attention(*, gated: bool = False, normed: bool = False) -> Shapes:
    queries = HEADS * HEAD * (2 if gated else 1)
    found = {
        "attn_norm": (WIDTH,),
        "attn_q": (queries, WIDTH),
        "attn_k": (KV_HEADS * HEAD, WIDTH),
        "attn_v": (KV_HEADS * HEAD, WIDTH),
        "attn_output": (WIDTH, HEADS * HEAD),
    }
    return found | ({"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)} if normed else {})


def _mlp(norm: str | None, *, gate: bool = True) -> Shapes:
    found = {"ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
    found |= {"ffn_gate": (INNER, WIDTH)} if gate else {}
    return found | ({norm: (WIDTH,)} if norm else {})


def _delta() -> Shapes:
    keys = values = STATE * GROUPS
    return {
        "attn_norm": (WIDTH,),
        "attn_qkv": (2 * keys + values, WIDTH),
        "attn_gate": (values, WIDTH),
        "ssm_conv1d": (2 * keys + values, CONV),
        "ssm_dt.bias": (GROUPS,),
        "ssm_a.": (GROUPS,),
        "ssm_beta": (GROUPS, WIDTH),
        "ssm_alpha": (GROUPS, WIDTH),
        "ssm_norm": (STATE,),
        "ssm_out": (WIDTH, values),
    }


def _mamba2(inner: int = WIDTH) -> Shapes:
    heads = HEADS
    mixed = inner + 2 * GROUPS * STATE
    return {
        "attn_norm": (WIDTH,),
        "ssm_in": (inner + mixed + heads, WIDTH),
        "ssm_conv1d": (mixed, CONV),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (heads,),
        "ssm_a.": (heads, 1),
        "ssm_d.": (heads, 1),
        "ssm_norm": (GROUPS, inner // GROUPS),
        "ssm_out": (WIDTH, inner),
    }


def _convolution() -> Shapes:
    return {
        "attn_norm": (WIDTH,),
        "shortconv.conv": (WIDTH, CONV - 1),
        "shortconv.in_proj": (3 * WIDTH, WIDTH),
        "shortconv.out_proj": (WIDTH, WIDTH),
    }


def _qwen35(index: int) -> Shapes:
    mixer = _attention(gated=True, normed=True) if index % 4 == 3 else _delta()
    return mixer | _mlp("post_attention_norm")


def _lfm2(index: int) -> Shapes:
    return (_attention(normed=True) if index in (2, 5) else _convolution()) | _mlp(
        "ffn_norm"
    )


def _nemotron_h(index: int) -> Shapes:
    """M - M * - M - *, a letter a layer."""
    if index in (3, 7):
        return _attention()
    return (
        _mamba2()
        if index in (0, 2, 5)
        else {"attn_norm": (WIDTH,)} | _mlp(None, gate=False)
    )


def _granite(index: int) -> Shapes:
    return (_attention() if index in (2, 5) else _mamba2(2 * WIDTH)) | _mlp("ffn_norm")


def _gemma4(index: int) -> Shapes:
    """Windows in all but every fourth layer, whose heads are larger; what a layer ends
    in is scaled.
    """
    head = 2 * HEAD if index % 4 == 3 else HEAD
    return {
        "attn_norm": (WIDTH,),
        "attn_q": (HEADS * head, WIDTH),
        "attn_k": (KV_HEADS * head, WIDTH),
        "attn_v": (KV_HEADS * head, WIDTH),
        "attn_output": (WIDTH, HEADS * head),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "post_attention_norm": (WIDTH,),
        "post_ffw_norm": (WIDTH,),
        "layer_output_scale": (1,),
    } | _mlp("ffn_norm")


LAYERS: dict[str, Callable[[int], Shapes]] = {
    "qwen35": _qwen35,
    "lfm2": _lfm2,
    "nemotron_h": _nemotron_h,
    "granitehybrid": _granite,
    "gemma4": _gemma4,
}
ENDS = (
    "attn_output",
    "ssm_out",
    "shortconv.out_proj",
    "ffn_down",
)  # what a sublayer adds goes through one of these


def write_hybrid(
    architecture: str, path: Path, *, silent: frozenset[str] = frozenset()
) -> Path:
    """Write it; of the sublayers `silent`, such as attn.3, the last matrix is all
    zeros, so that they add nothing.
    """
    draw, writer = np.random.default_rng(0), GGUFWriter(path, architecture)
    _add_settings(writer, architecture)
    add_tokenizer(writer)

    def add(name: str, shape: tuple[int, ...], silenced: bool = False) -> None:
        values = draw.standard_normal(shape).astype(np.float32)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("layer_output_scale.weight"):
            values = np.exp(0.3 * values)
        elif name.endswith(("ssm_a", "ssm_d", ".bias")):
            values = -np.exp(0.3 * values) if name.endswith("ssm_a") else 0.3 * values
        else:
            values /= shape[-1] ** 0.5
        writer.add_tensor(
            name, np.zeros_like(values) if silenced else values, raw_dtype=Kind.F32
        )

    add("token_embd.weight", (len(WORDS), WIDTH))
    add(
        "token_embd_norm.weight" if architecture == "lfm2" else "output_norm.weight",
        (WIDTH,),
    )
    add("output.weight", (len(WORDS), WIDTH))
    if architecture == "gemma4":
        writer.add_tensor(
            "rope_freqs.weight", np.ones(HEAD, np.float32), raw_dtype=Kind.F32
        )
    for index in range(DEPTH):
        for name, shape in LAYERS[architecture](index).items():
            kind = "mlp" if name.startswith("ffn") else "attn"
            whole = (
                f"blk.{index}.{name}".removesuffix(".")
                if "." in name[4:] and "shortconv" not in name
                else ""
            )
            add(
                whole or f"blk.{index}.{name}.weight",
                shape,
                name in ENDS and f"{kind}.{index}" in silent,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_settings(writer: GGUFWriter, architecture: str) -> None:
    layers = [LAYERS[architecture](index) for index in range(DEPTH)]
    writer.add_block_count(DEPTH)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_vocab_size(len(WORDS))
    writer.add_head_count(HEADS)
    if architecture != "gemma4":
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_rope_dimension_count(HEAD)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)  # what Nemotron-H's is called
    if architecture == "gemma4":
        writer.add_head_count_kv(KV_HEADS)
        writer.add_feed_forward_length(INNER)
        _add_windows(writer)
        return
    if architecture == "qwen35":
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_sections([4, 2, 2, 0])
    else:
        writer.add_head_count_kv(
            [KV_HEADS if "attn_q" in layer else 0 for layer in layers]
        )
    if architecture == "nemotron_h":
        writer.add_feed_forward_length(
            [INNER if "ffn_up" in layer else 0 for layer in layers]
        )
    else:
        writer.add_feed_forward_length(INNER)
    if architecture == "lfm2":
        writer.add_shortconv_l_cache(CONV - 1)
        return
    writer.add_ssm_conv_kernel(CONV)
    inner = {"qwen35": STATE * GROUPS, "granitehybrid": 2 * WIDTH}
    writer.add_ssm_inner_size(inner.get(architecture, WIDTH))
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_group_count(GROUPS)
    writer.add_ssm_time_step_rank(GROUPS if architecture == "qwen35" else HEADS)


def _add_windows(writer: GGUFWriter) -> None:
    """As Gemma 4 has them: heads of layers with a window are smaller."""
    writer.add_sliding_window(4)
    writer.add_sliding_window_pattern([index % 4 != 3 for index in range(DEPTH)])
    writer.add_key_length(2 * HEAD)
    writer.add_value_length(2 * HEAD)
    writer.add_key_length_swa(HEAD)
    writer.add_value_length_swa(HEAD)
    writer.add_rope_dimension_count(2 * HEAD)
    writer.add_rope_dimension_count_swa(HEAD)
    writer.add_rope_freq_base_swa(10_000.0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_shared_kv_layers(0)
