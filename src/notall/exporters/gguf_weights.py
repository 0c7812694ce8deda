"""Repaired weights in a GGUF file: found by the names that its converter gives, and packed as the file's are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quant_shape_from_byte_shape,
)
from gguf.quants import quantize

from ..errors import UsageError
from .gguf_file import GGUF, GGUFTensor

if TYPE_CHECKING:
    from torch import Tensor

TURNED = ("gpt2", "jais")  # their matrices are (inputs, outputs) in transformers
NORMS_LESS_ONE = ("gemma", "gemma2", "gemma3", "nemotron")  # transformers keeps gain - 1, llama.cpp the gain
FALLBACK = GGMLQuantizationType.Q8_0  # for types of fewer bits: numbers that were fitted lose more in these

logger = logging.getLogger(__name__)


def with_weights(source: GGUF, weights: Mapping[str, Tensor]) -> GGUF:
    """With these values of parameters, by their paths in the transformers model, in the types of the file's tensors.

    What has fewer than 8 bits goes into 8, with a warning: rounded coarsely, a repair gives back less. Raises
    `UsageError` where the file has no such tensor.
    """
    architectures = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(architectures[source.architecture], source.depth)
    tensors, widened = dict(source.tensors), set[str]()
    for path, weight in weights.items():
        module, _, kind = path.rpartition(".")
        name = f"{names.get_name(module)}.{kind}"
        if name not in tensors:
            raise UsageError(f"{source.path.name} has no tensor for {path}, which the plan has weights for; repair it")
        values = _as_converted(source.architecture, weight.float().cpu().numpy())
        if values.shape != _shape(tensors[name]):
            raise UsageError(f"{path} has another shape in {source.path.name}; repair the model of this file")
        tensors[name] = _packed(values, tensors[name].quantization)
        if tensors[name].quantization != source.tensors[name].quantization:
            widened.add(source.tensors[name].quantization.name)
    if widened:
        logger.warning(
            "repaired weights that were %s are written in 8 bits, in which they lose less. To have that type all the "
            "same, repair and export an F16 file, and quantise that with llama.cpp's own tools",
            ", ".join(sorted(widened)),
        )
    return replace(source, tensors=tensors)


def _as_converted(architecture: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.ndim == 1 and architecture in NORMS_LESS_ONE:
        return values + 1
    return np.ascontiguousarray(values.T) if architecture in TURNED else values


def _shape(tensor: GGUFTensor) -> tuple[int, ...]:
    shape = tensor.data.shape
    return tuple(quant_shape_from_byte_shape(shape, tensor.quantization)) if tensor.data.dtype == np.uint8 else shape


def _packed(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> GGUFTensor:
    block, size = GGML_QUANT_SIZES[kind]
    kind = FALLBACK if size < block else kind
    return GGUFTensor(quantize(values, kind), kind)
