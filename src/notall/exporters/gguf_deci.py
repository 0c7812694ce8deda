"""llama.cpp's `deci`: blocks of Llama's sublayers, of which each may lack one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as Kind, quant_shape_to_byte_shape

from ..errors import UsageError
from ..models.gguf_file import (
    ARCHITECTURE,
    BLOCK,
    GGUF,
    Field,
    Fields,
    GGUFTensor,
    GGUFTensors,
)
from ..running.regrouping import Layer, sparse_layers
from .gguf_layout import halves_paired

ARCHITECTURES = ("llama", "qwen2")  # whose layers `deci`'s are, when they are whole
TENSORS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate",
    "ffn_up", "ffn_down",
)  # fmt: skip
# the width of an MLP of zeros: llama.cpp's `deci` would drop an attention that has no
# MLP behind it
NARROW = 32


class Sizes(NamedTuple):
    """Heads of queries and of keys, the size of one, and the widths of the stream and
    of the MLPs.
    """

    heads: int
    kv_heads: int
    head: int
    hidden: int
    mlp: int


def deci(source: GGUF, layers: Sequence[Layer]) -> tuple[Fields, GGUFTensors]:
    """Fields and tensors of the file. Raises `UsageError` for an architecture that
    `deci` does not compute.
    """
    _check(source)
    sizes = _sizes(source)
    rows = list(sparse_layers(layers))
    tensors = source.outside_blocks
    for number, (attention, mlp) in enumerate(rows):
        behind = _silent_mlp(sizes) if mlp is None else source.mlp(mlp)
        parts = _attention(source, attention, sizes, is_first=number == 0) | behind
        tensors |= {f"{BLOCK}{number}.{name}": tensor for name, tensor in parts.items()}
    # llama.cpp reads the size of heads only if layer 0 has some
    none = [int(number == 0) for number in range(len(rows))]
    has_heads = [attention is not None for attention, _ in rows]
    counts: dict[str, int | list[int]] = {
        "attention.head_count": [
            sizes.heads if has else few for has, few in zip(has_heads, none)
        ],
        "attention.head_count_kv": [
            sizes.kv_heads if has else few for has, few in zip(has_heads, none)
        ],
        "feed_forward_length": [
            NARROW if mlp is None else sizes.mlp for _, mlp in rows
        ],
        "attention.key_length": sizes.head,
        "attention.value_length": sizes.head,
        "rope.dimension_count": sizes.head,
        "block_count": len(rows),
    }
    start = f"{source.architecture}."
    fields: Fields = {}
    for name, field in source.fields.items():
        own = name.startswith(start)
        fields[f"deci.{name.removeprefix(start)}" if own else name] = field
    fields |= {f"deci.{name}": Field.of(value) for name, value in counts.items()}
    fields[ARCHITECTURE] = Field.of("deci")
    return fields, tensors


def _check(source: GGUF) -> None:
    """Raise `UsageError` where `deci` doesn't compute the layers of the source."""
    name = source.architecture
    names = {
        tensor.split(".")[0]
        for index in range(source.depth)
        for tensor in source.block(index)
    }
    foreign = sorted(names - set(TENSORS))
    per_layer = ("attention.head_count", "feed_forward_length")
    problem = ""
    if name not in ARCHITECTURES:
        problem = f"llama.cpp has no layers with one sublayer for {name}"
    elif foreign:
        problem = (
            f"llama.cpp's layers with one sublayer have no {foreign[0]}, which this"
            f" {name} has"
        )
    elif any(isinstance(source.setting(key), list) for key in per_layer):
        problem = "the layers of this file differ in size"
    elif _rotates_parts(source):
        problem = (
            "llama.cpp's layers with one sublayer rotate whole heads, and this"
            " model rotates parts"
        )
    if problem:
        raise UsageError(
            f"{problem}, and this plan keeps sublayers that do not alternate; choose a"
            " portable plan, or export to hf"
        )


def _rotates_parts(source: GGUF) -> bool:
    """Whether RoPE turns a part of each head alone."""
    head = _head_size(source)
    return bool(source.setting("rope.dimension_count", head) != head)


def _head_size(source: GGUF) -> int:
    hidden = source.count("embedding_length")
    heads = source.count("attention.head_count")
    return source.count("attention.key_length", hidden // heads)


def _sizes(source: GGUF) -> Sizes:
    """Those of the header. Raises `UsageError` where a tensor has another."""
    sizes = Sizes(
        heads=source.count("attention.head_count"),
        kv_heads=source.count("attention.head_count_kv"),
        head=_head_size(source),
        hidden=source.count("embedding_length"),
        mlp=source.count("feed_forward_length"),
    )
    rows = {
        "attn_norm": sizes.hidden,
        "attn_q": sizes.heads * sizes.head,
        "attn_k": sizes.kv_heads * sizes.head,
        "ffn_up": sizes.mlp,
    }
    for index in range(source.depth):
        block = source.block(index)
        for name, expected in rows.items():
            stored = block.get(f"{name}.weight")
            if stored is None or len(stored.data) != expected:
                raise UsageError(
                    f"header and tensors of {source.path.name} disagree in block"
                    f" {index}; download it again"
                )
    return sizes


def _attention(
    source: GGUF, index: int | None, sizes: Sizes, *, is_first: bool
) -> GGUFTensors:
    """The tensors of an attention of the source; without one, none, but for a first
    layer, from which llama.cpp reads the size of heads: it gets zeros.
    """
    if index is not None:
        return _rotated(source.attention(index), source.architecture, sizes)
    if not is_first:
        return {}
    return _zeros_of("attn", ("q", "k", "v"), "output", sizes.head, sizes.hidden)


def _silent_mlp(sizes: Sizes) -> GGUFTensors:
    return _zeros_of("ffn", ("gate", "up"), "down", NARROW, sizes.hidden)


def _rotated(parts: GGUFTensors, architecture: str, sizes: Sizes) -> GGUFTensors:
    """Queries and keys in the order of `deci`, which rotates neighbours of a head.

    Llama's files have that order. Qwen2 rotates the halves of a head: row i of each
    first half goes before row i of its second.
    """
    if architecture == "llama":
        return parts
    heads = {"attn_q": sizes.heads, "attn_k": sizes.kv_heads}
    rotated = dict(parts)
    for name, tensor in parts.items():
        if count := heads.get(name.split(".")[0]):
            paired = halves_paired(tensor.data, count)
            rotated[name] = GGUFTensor(paired, tensor.quantization)
    return rotated


def _zeros_of(
    kind: str, into: Sequence[str], back: str, inner: int, width: int
) -> GGUFTensors:
    """A sublayer that adds nothing: matrices of zeros from the stream to `inner`
    channels (`into`) and back, and its norm.
    """
    parts = {f"{kind}_{name}.weight": _zeros(inner, width) for name in into}
    parts[f"{kind}_{back}.weight"] = _zeros(width, inner)
    parts[f"{kind}_norm.weight"] = _zeros(width)
    return parts


def _zeros(*shape: int) -> GGUFTensor:
    """In 8 bits where rows allow it: a block of zero bytes is a block of zeros."""
    if len(shape) > 1 and shape[-1] % 32 == 0:
        packed = quant_shape_to_byte_shape(shape, Kind.Q8_0)
        return GGUFTensor(np.zeros(packed, np.uint8), Kind.Q8_0)
    return GGUFTensor(np.zeros(shape, np.float32), Kind.F32)
