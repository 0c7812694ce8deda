"""The numbers that layers multiply their stream by, where some layers are cut out: folded into what is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..running.regrouping import Layer, folded
from ..structure.anatomy import Sublayer
from ..structure.observation import ModuleOp
from .dense import DenseModel
from .tensors import FLOATS, LiveTensor, Source


def folded_scales(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[tuple[str, Source]]:
    """The numbers of the layers of the export, and what is divided by some, by their new names.

    Raises `UsageError` where a number cannot be read, or what a sublayer adds cannot be divided.
    """
    if not dense.anatomy.scaled:
        return
    scales = [_scale(dense, index) for index in range(len(dense.anatomy.blocks))]
    for number, (layer, by) in enumerate(zip(layers, folded(layers, scales))):
        start, block = f"{dense.prefix}{number}.", dense.anatomy.blocks[layer.attention]
        mlp = layer.attention if layer.mlp is None else layer.mlp
        if by.attention != 1:
            yield from _divided(dense, block.attention, by.attention, start)
        if by.mlp != 1:
            yield from _divided(dense, dense.anatomy.blocks[mlp].mlp, by.mlp, start)
        if block.scaled_by:
            like = dense.block(layer.attention)[block.scaled_by]
            yield start + block.scaled_by, _like(like, torch.full(like.shape, by.whole, dtype=torch.float64))


def _scale(dense: DenseModel, index: int) -> float:
    name = dense.anatomy.blocks[index].scaled_by
    if name is None:
        return 1.0
    stored = dense.block(index).get(name)
    scale = math.nan if stored is None or stored.dtype not in FLOATS else float(_values(stored).sum())
    if not 0 < abs(scale) < math.inf:
        raise UsageError(
            f"the files of {dense.origin.model} have {scale} for {name} of layer {index}; download them again"
        )
    return scale


def _divided(dense: DenseModel, part: Sublayer, by: float, start: str) -> Iterator[tuple[str, Source]]:
    """The weights of its last module, by which what it adds to the stream is so many times less."""
    last = _last(part)
    module = dense.empty.get_submodule(f"{dense.anatomy.layers}.{part.index}.{last}")
    if not _is_divided_by_weights(module):
        raise UsageError(
            f"layers of {dense.anatomy.model_type} multiply their stream, and what {part.name} adds cannot be divided "
            "by what is cut before it; keep the layer before it whole, or skip in memory"
        )
    for name, stored in dense.parts(part).items():
        if name.startswith(f"{last}."):
            yield start + name, _like(stored, _values(stored).double() / by)


def _last(part: Sublayer) -> str:
    if part.stub:
        return part.stub.end[0]
    return [op.module for op in part.branches[0].ops if isinstance(op, ModuleOp)][-1]


@torch.no_grad()
def _is_divided_by_weights(module: nn.Module) -> bool:
    """Whether what it answers is half as large with weights that are: tried on random ones."""
    trial = copy.deepcopy(module).to_empty(device="cpu").double()
    weights = list(trial.parameters())
    for weight in weights:
        weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    width = weights[0].shape[-1] if weights else 1
    given = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    try:
        answer = trial(given)
        for weight in weights:
            weight.div_(2)
        return torch.allclose(trial(given), answer / 2, rtol=1e-5)
    except Exception:  # whatever a module raises that takes or answers something else
        return False


def _values(stored: Source) -> Tensor:
    data = bytearray(b"".join(stored.chunks()))
    return torch.frombuffer(data, dtype=FLOATS[stored.dtype]).view(stored.shape)


def _like(stored: Source, values: Tensor) -> LiveTensor:
    return LiveTensor(stored.dtype, tuple(stored.shape), values.to(FLOATS[stored.dtype]).contiguous())
