"""GGUF files in the types of llama.cpp: routines of the wheel `xllamacpp` pack the numbers, by llama.cpp's rules."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType, quant_shape_to_byte_shape
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from ..models.gguf_file import Field, GGUFTensor, read_gguf, write_gguf

Values = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]

PLAIN = "F16"
FILE_TYPES = {
    PLAIN: LlamaFileType.MOSTLY_F16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q5_K_M": LlamaFileType.MOSTLY_Q5_K_M,
    "Q4_K_M": LlamaFileType.MOSTLY_Q4_K_M,
}
# What most tensors get, and what fused queries, keys and values get.
MOST = {"Q8_0": Kind.Q8_0, "Q5_K_M": Kind.Q5_K, "Q4_K_M": Kind.Q4_K}
FUSED = {"Q8_0": Kind.Q8_0, "Q5_K_M": Kind.Q6_K, "Q4_K_M": Kind.Q5_K}
# Where rows are no multiple of 256 values.
NARROWER = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
FLOATS = {Kind.F32: np.float32, Kind.F16: np.float16}
# Matrices that llama.cpp never quantises.
WHOLE = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|(position|token_types)_embd|_rel_b|ssm_conv1d|shortconv\.conv"
)


def write_in_type(source: Path, kind: str, out: Path) -> None:
    """The model of a GGUF file in one of `FILE_TYPES`, whatever it was in. Raises `UsageError` as `read_gguf`."""
    model = read_gguf(source)
    types = types_of(kind, {name: tensor.shape for name, tensor in model.tensors.items()})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = pool.map(lambda name: _packed(model.tensors[name], types[name]), model.tensors)
        tensors = dict(zip(model.tensors, packed))
    fields = {**model.fields, "general.file_type": Field.of(int(FILE_TYPES[kind]))}
    if kind != PLAIN:
        fields["general.quantization_version"] = Field.of(2)
    write_gguf(out, model, fields, tensors)


def types_of(kind: str, shapes: Shapes) -> dict[str, Kind]:
    """What each tensor, whose shape is as numpy has it, gets in a file of `kind`: as `llama_model_quantize` has it."""
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and not WHOLE.search(name)]
    found = dict.fromkeys(shapes, Kind.F32)
    if kind == PLAIN:
        return found | dict.fromkeys(matrices, Kind.F16)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    finer = {head} | _finer(matrices, r"attn_(v|qkv|kv_b)\.weight$") | _finer(matrices, r"ffn_down(_exps)?\.weight$")
    for name in matrices:
        wanted = MOST[kind]
        if "attn_qkv." in name:
            wanted = FUSED[kind]
        elif name in finer and wanted != Kind.Q8_0:
            wanted = Kind.Q6_K
        width, either = shapes[name][-1], (wanted, NARROWER.get(wanted, wanted))  # where its blocks divide a row
        fits = (one for one in either if width % GGML_QUANT_SIZES[one][0] == 0)
        found[name] = next(fits, Kind.F16)
    return found


def _finer(names: Sequence[str], pattern: str) -> set[str]:
    """Matrices that get more bits: of the first and the last eighth of layers, and of every third between."""
    ones = sorted((name for name in names if re.search(pattern, name)), key=lambda name: int(name.split(".")[1]))
    count, eighth = len(ones), len(ones) // 8
    ends = (*range(eighth), *range(7 * count // 8, count))
    return {name for place, name in enumerate(ones) if place in ends or (place - eighth) % 3 == 2}


def _packed(tensor: GGUFTensor, kind: Kind) -> GGUFTensor:
    if tensor.quantization == kind:
        return tensor
    values = dequantize(tensor.data, tensor.quantization) if tensor.quantization not in FLOATS else tensor.data
    if kind in FLOATS:
        return GGUFTensor(values.astype(FLOATS[kind]), kind)
    return GGUFTensor(pack(np.ascontiguousarray(values, np.float32), kind), kind)


def pack(values: Values, kind: Kind) -> Values:
    """Float32 values of shape (..., width) as the bytes of `kind`, (..., bytes of a row)."""
    packed = np.empty(quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    rows, width = values.size // values.shape[-1], values.shape[-1]
    written = _quantize_chunk()(int(kind), values.ctypes.data, packed.ctypes.data, 0, rows, width, None)
    assert written == packed.nbytes, f"{kind.name}: {written} bytes, not {packed.nbytes}"
    return packed


@cache
def _quantize_chunk() -> Any:
    """`ggml_quantize_chunk(type, from, to, first row, rows, width, importance)`, which answers how many bytes."""
    from xllamacpp import xllamacpp

    function = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return function
