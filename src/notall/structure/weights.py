"""What the weights of a module are, also where they are quantised: how many numbers, and bytes as they lie in memory.

A quantised matrix is several tensors (numbers packed into words, scales, zeros), in parameters, in buffers, or in what
a parameter holds. It counts as the matrix that it stands for, and weighs what all of its tensors do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

STORED = "stored_bytes"  # of a parameter without values: what it weighs in the files of its model


@dataclass(frozen=True)
class Weight:
    """A parameter, or all that a quantised matrix is made of; `key` is the same wherever it is shared."""

    key: int
    elements: int
    bytes: int


def weights_of(module: nn.Module) -> dict[int, Weight]:
    """The weights at and below a module, each once, by their keys."""
    found = (weight for inner in module.modules() for weight in _own_weights(inner))
    return {weight.key: weight for weight in found}


def count_as_stored(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Have the parameters of a model without values weigh what its files hold: `sizes` are the bytes of each tensor.

    Several tensors of a quantised matrix, or of experts that are one parameter here, are added up.
    """
    parameters = dict(model.named_parameters())
    owners = {
        name: module for name, module in model.named_modules() if next(module.parameters(False), None) is not None
    }
    stored = dict.fromkeys(parameters, 0)
    for name, size in sizes.items():
        if name not in stored:
            steps = name.split(".")
            above = [".".join(steps[:depth]) for depth in range(len(steps) - 1, 0, -1)]
            owner = next((path for path in above if path in owners), None)
            if owner is None:
                continue
            name = _nearest(name, [f"{owner}.{own}" for own, _ in owners[owner].named_parameters(recurse=False)])
        stored[name] += size
    for name, parameter in parameters.items():
        setattr(parameter, STORED, stored[name])


def _nearest(name: str, parameters: Sequence[str]) -> str:
    """Of the parameters of a module, the one that a tensor is named after, else the first."""
    return max(parameters, key=lambda parameter: len(parameter) if name.startswith(parameter) else 0)


def _own_weights(module: nn.Module) -> Iterator[Weight]:
    own = dict(module.named_parameters(recurse=False))
    if elements := _quantised_elements(module, own):
        held = {**own, **dict(module.named_buffers(recurse=False))}
        bias = held["bias"].numel() if held.get("bias") is not None else 0
        yield Weight(id(module), elements + bias, sum(_bytes(tensor) for tensor in held.values()))
    else:
        yield from (Weight(id(weight), weight.numel(), _bytes(weight)) for weight in own.values())


def _quantised_elements(module: nn.Module, own: dict[str, nn.Parameter]) -> int | None:
    """The size of the matrix that a linear layer stands for, where its own weight is not just that; else None."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    weight, others = own.get("weight"), own.keys() - {"weight", "bias"}
    is_plain = weight is not None and weight.numel() == rows * columns and not others
    holds = weight is not None or bool(others) or next(module.buffers(recurse=False), None) is not None
    return None if is_plain or not holds else rows * columns


def _bytes(tensor: Tensor) -> int:
    if (stored := getattr(tensor, STORED, None)) is not None:
        return int(stored)
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, which claim the dtype that they stand for
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size() + sum(part.numel() * part.element_size() for part in _beside(tensor))


def _beside(tensor: Any) -> Iterator[Tensor]:
    """What a parameter of bitsandbytes holds beside its numbers: scales, and the table of its levels."""
    if (scales := getattr(tensor, "SCB", None)) is not None:
        yield scales
    if (state := getattr(tensor, "quant_state", None)) is not None:
        yield from (value for value in state.as_dict(packed=True).values() if isinstance(value, Tensor))
