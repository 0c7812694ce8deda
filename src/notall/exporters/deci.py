"""llama.cpp's architecture `deci`, whose layers may lack a sublayer each: the file of a plan that is not portable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

from ..errors import UsageError
from ..models.gguf_file import ARCHITECTURE, BLOCK, GGUF, Field, Fields, GGUFTensor, Tensors
from ..running.regrouping import Layer, sparse_layers

DECI = ("llama", "qwen2")  # architectures that `deci` computes
DECI_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
NARROW = 32  # the width of an MLP of zeros: llama.cpp's `deci` would drop an attention that has no MLP behind it


def deci(source: GGUF, layers: Sequence[Layer]) -> tuple[Fields, Tensors]:
    """Fields and tensors of the file. Raises `UsageError` for an architecture that `deci` does not compute."""
    _check_deci(source)
    _check_sizes(source)
    rows = list(sparse_layers(layers))
    heads, kv_heads = source.count("attention.head_count"), source.count("attention.head_count_kv")
    width, head_size = source.count("feed_forward_length"), _head_size(source)
    tensors = source.outside_blocks
    for number, row in enumerate(rows):
        parts: Tensors = {}
        if row.attention is not None:
            parts |= _rotated(source.attention(row.attention), source.architecture, heads, kv_heads)
        elif number == 0:  # llama.cpp reads the size of heads only if layer 0 has some
            parts |= _silent("attn", ("q", "k", "v"), "output", head_size, source)
        parts |= _silent("ffn", ("gate", "up"), "down", NARROW, source) if row.mlp is None else source.mlp(row.mlp)
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    has_heads = [row.attention is not None for row in rows]
    counts: dict[str, int | list[int]] = {
        "attention.head_count": [heads if has else int(number == 0) for number, has in enumerate(has_heads)],
        "attention.head_count_kv": [kv_heads if has else int(number == 0) for number, has in enumerate(has_heads)],
        "feed_forward_length": [NARROW if row.mlp is None else width for row in rows],
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head_size),
        "block_count": len(rows),
    }
    start = f"{source.architecture}."
    fields = {name.replace(start, "deci.", int(name.startswith(start))): f for name, f in source.fields.items()}
    fields |= {f"deci.{name}": Field.of(value) for name, value in counts.items()}
    return fields | {ARCHITECTURE: Field.of("deci")}, tensors


def _check_sizes(source: GGUF) -> None:
    """Raise `UsageError` unless the header gives the sizes that the tensors have: what is added is made by it."""
    sizes = {
        "attn_norm.weight": source.count("embedding_length"),
        "attn_q.weight": source.count("attention.head_count") * _head_size(source),
        "attn_k.weight": source.count("attention.head_count_kv") * _head_size(source),
        "ffn_up.weight": source.count("feed_forward_length"),
    }
    for index in range(source.depth):
        block = source.block(index)
        if any(name not in block or len(block[name].data) != size for name, size in sizes.items()):
            where = f"{source.path.name} and its tensors disagree in block {index}"
            raise UsageError(f"the header of {where}; download it again")


def _check_deci(source: GGUF) -> None:
    name = source.architecture
    names = {tensor.split(".")[0] for index in range(source.depth) for tensor in source.block(index)}
    foreign = sorted(names - set(DECI_TENSORS))
    if name not in DECI:
        problem = f"llama.cpp has no layers with one sublayer for {name}"
    elif foreign:
        problem = f"llama.cpp's layers with one sublayer have no {foreign[0]}, which this {name} has"
    elif any(isinstance(source.setting(key), list) for key in ("attention.head_count", "feed_forward_length")):
        problem = "the layers of this file differ in size"
    elif source.setting("rope.dimension_count", _head_size(source)) != _head_size(source):
        problem = "llama.cpp's layers with one sublayer rotate whole heads, and this model rotates parts"
    else:
        return
    raise UsageError(
        f"{problem}, and this plan keeps sublayers that do not alternate; choose a portable plan, or export to hf"
    )


def _head_size(source: GGUF) -> int:
    """As llama.cpp has it: the width divided by the heads, unless the file says otherwise."""
    usual = source.count("embedding_length") // source.count("attention.head_count")
    return source.count("attention.key_length", usual)


def _rotated(parts: Tensors, architecture: str, heads: int, kv_heads: int) -> Tensors:
    """`deci` rotates neighbours, and qwen2 the halves of a head: bring the rows of queries and keys into that order.

    Of each head, row i of the first half is followed by row i of the second.
    """
    if architecture == "llama":
        return parts
    rotated = dict(parts)
    for name, tensor in parts.items():
        if count := {"attn_q": heads, "attn_k": kv_heads}.get(name.split(".")[0]):
            halves = tensor.data.reshape(count, 2, -1, *tensor.data.shape[1:])
            rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.data.shape)
            rotated[name] = GGUFTensor(rows, tensor.quantization)
    return rotated


def _silent(kind: str, into: Sequence[str], back: str, inner: int, source: GGUF) -> Tensors:
    """A sublayer of zeros: its matrices from the stream to `inner` numbers, that back, and its norm."""
    width = source.count("embedding_length")
    parts = {f"{kind}_{name}.weight": _zeros(inner, width) for name in into}
    return parts | {f"{kind}_{back}.weight": _zeros(width, inner), f"{kind}_norm.weight": _zeros(width)}


def _zeros(*shape: int) -> GGUFTensor:
    """In 8 bits where rows allow it: a block of zero bytes is a block of zeros."""
    if len(shape) > 1 and shape[-1] % 32 == 0:
        kind = GGMLQuantizationType.Q8_0
        return GGUFTensor(np.zeros(quant_shape_to_byte_shape(shape, kind), np.uint8), kind)
    return GGUFTensor(np.zeros(shape, np.float32), GGMLQuantizationType.F32)
