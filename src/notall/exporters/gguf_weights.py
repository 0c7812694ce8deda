"""The weights of a repaired plan in the GGUF file of its original model."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from ..errors import UsageError
from ..models.gguf_file import EMBEDDING, GGUF, HEAD, Field, Fields, GGUFTensor
from .gguf_layout import TensorPart, Values, places, setting_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MOST_ROUNDING = (
    0.1  # of a matrix's size: two roundings of the same numbers differ by less
)
ROWS = 64  # of a matrix that are compared


def gguf_with_weights(source: GGUF, weights: "Mapping[str, Tensor]") -> GGUF:
    """`source` with these values of parameters, by their paths in transformers; types
    get 8 bits or more.

    Raises `UsageError` for a parameter that the file does not hold, or holds in another
    shape.
    """
    fields, changed = dict(source.fields), dict[str, Values]()
    for path, weight in weights.items():
        values = weight.detach().float().cpu().numpy()
        if found := setting_of(path):
            _put_setting(source, fields, path, *found, float(values.reshape(-1)[0]))
            continue
        for place in places(source, path, values):
            _put(source, changed, path, place)
    if EMBEDDING in changed and HEAD not in changed and _is_tied(source):
        changed[HEAD] = changed[EMBEDDING]
    tensors = {
        name: packed(values, source.tensors[name].quantization)
        for name, values in changed.items()
    }
    _warn_of_wider(source, tensors)
    return replace(source, fields=fields, tensors=source.tensors | tensors)


def _put(
    source: GGUF, changed: dict[str, Values], path: str, place: TensorPart
) -> None:
    stored = source.tensors.get(place.tensor)
    shape = stored.shape if stored else None
    if shape and place.part is not None:
        shape = shape[1:]  # of one of several in the tensor, such as an expert
    values = place.values
    if shape and place.tensor in (EMBEDDING, HEAD):
        values = values[: shape[0]]  # a file may lack the rows that no token has
    if shape and values.shape == (1, *shape):
        values = values[0]  # llama-quantize leaves it out
    if values.shape != shape:
        raise UsageError(
            f"{path} has another shape in {source.path.name}; repair the model of this"
            " file"
        )
    if place.part is None:
        changed[place.tensor] = values
        return
    whole = changed.setdefault(
        place.tensor, _numbers(source.tensors[place.tensor]).copy()
    )
    whole[place.part] = values


def _put_setting(
    source: GGUF, fields: Fields, path: str, name: str, index: int, value: float
) -> None:
    held = fields.get(name)
    if held is None or not isinstance(held.value, list) or index >= len(held.value):
        raise UsageError(
            f"{source.path.name} has no setting for {path}, which the plan has weights"
            " for; repair it"
        )
    fields[name] = Field(
        [*held.value[:index], value, *held.value[index + 1 :]], held.kind
    )


def packed(values: Values, stored: Kind) -> GGUFTensor:
    """Numbers that were fitted, in the type of those that they replace, or in 8 bits
    where that has fewer.
    """
    kind = _wide_enough(stored)
    return GGUFTensor(quantize(np.ascontiguousarray(values), kind), kind)


def _wide_enough(kind: Kind) -> Kind:
    """Numbers that were fitted lose more in fewer bits."""
    block, size = GGML_QUANT_SIZES[kind]
    return Kind.Q8_0 if size < block else kind


def _numbers(tensor: GGUFTensor) -> Values:
    return dequantize(tensor.data, tensor.quantization)


def _is_tied(source: GGUF) -> bool:
    """Whether the head of the file is a copy of its embeddings, in the same type or in
    another.
    """
    if HEAD not in source.tensors:
        return False
    one, other = (source.tensors[name] for name in (EMBEDDING, HEAD))
    if one.shape != other.shape:
        return False
    first, second = (
        _numbers(replace(each, data=each.data[:ROWS])) for each in (one, other)
    )
    return bool(np.linalg.norm(first - second) <= MOST_ROUNDING * np.linalg.norm(first))


def _warn_of_wider(source: GGUF, tensors: Mapping[str, GGUFTensor]) -> None:
    before = {name: source.tensors[name].quantization for name in tensors}
    widened = {
        kind.name for name, kind in before.items() if kind != tensors[name].quantization
    }
    if widened:
        named = ", ".join(sorted(widened))
        fix = "repair and export an F16 file, and quantise that"
        logger.warning(
            "repaired weights that were %s are written in 8 bits, in which they lose"
            " less; to have that type, %s",
            named,
            fix,
        )
