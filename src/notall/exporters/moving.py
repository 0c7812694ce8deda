"""Where the tensors and modules of the dense model are in an export of regrouped or ordinary layers.

Some layers multiply their stream by a number; where such layers are cut out, it is folded into those that are left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UsageError
from ..running.regrouping import Layer, folded
from ..structure.model_structure import Sublayer
from ..structure.observation import ModuleOp, child
from .dense import DenseModel
from .tensors import FLOATS, Weight, Weights


@dataclass(frozen=True)
class Piece:
    """What comes from one layer of the dense model: its tensors by their names below it, and their new beginning."""

    parts: Sequence[Sublayer]
    tensors: Weights
    start: str


def moved_tensors(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[tuple[str, Weight]]:
    """The tensors of the export under their new names; of a name that comes again, the later one."""
    yield from dense.outside_layers.items()
    for piece in _pieces(dense, layers):
        yield from ((piece.start + name, tensor) for name, tensor in piece.tensors.items())
    yield from folded_scales(dense, layers)


def moved_modules(dense: DenseModel, layers: Sequence[Layer]) -> dict[str, str | None]:
    """The new name of each module, in the files and in the model; None for what is left out."""
    moved: dict[str, str | None] = {name: name for name in _modules_of(dense.outside_layers)}
    for block in dense.structure.blocks:
        moved |= dict.fromkeys(_new_names(dense, Piece(block.sublayers, dense.layers[block.index], "")))
    for piece in _pieces(dense, layers):
        moved |= _new_names(dense, piece)
    return moved


def _pieces(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[Piece]:
    blocks = dense.structure.blocks
    for number, layer in enumerate(layers):
        start, block = f"{dense.prefix}{number}.", blocks[layer.attention]
        if layer.mlp == layer.attention:
            yield Piece(block.sublayers, dense.layers[block.index], start)
            parts = []
        else:
            parts = [(start, block.attention)] + ([] if layer.mlp is None else [(start, blocks[layer.mlp].mlp)])
        for place, indices in (("before", layer.before), ("after", layer.after)):
            parts += [(f"{start}{place}.{slot}.", blocks[index].mlp) for slot, index in enumerate(indices)]
        yield from (Piece([part], dense.parts(part), beginning) for beginning, part in parts)


def _new_names(dense: DenseModel, piece: Piece) -> dict[str, str]:
    """The names of a piece's modules in the dense model, to those in the export."""
    index = piece.parts[0].index
    layer = dense.empty.get_submodule(f"{dense.structure.layers}.{index}")
    paths = [path for part in piece.parts for path in part.modules]
    modules = dict(pair for path in paths for pair in child(layer, path).named_modules(prefix=path))
    weigh = {name for name, module in modules.items() if next(module.parameters(), None) is not None}
    return {f"{dense.prefix}{index}.{name}": piece.start + name for name in weigh | _modules_of(piece.tensors)}


def _modules_of(tensors: Iterable[str]) -> set[str]:
    """The modules that tensors of these names are in, and those that these are in."""
    paths = [name.split(".")[:-1] for name in tensors]
    return {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}


# --- numbers that layers multiply their stream by ---------------------------------------------------------------------


def folded_scales(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[tuple[str, Weight]]:
    """The numbers of the layers of the export, and what is divided by some, by their new names.

    Raises `UsageError` where a number cannot be read, or what a sublayer adds cannot be divided.
    """
    if not dense.structure.scaled:
        return
    scales = [_scale(dense, index) for index in range(len(dense.structure.blocks))]
    for number, (layer, by) in enumerate(zip(layers, folded(layers, scales))):
        start, block = f"{dense.prefix}{number}.", dense.structure.blocks[layer.attention]
        mlp = layer.attention if layer.mlp is None else layer.mlp
        if by.attention != 1:
            yield from _divided(dense, block.attention, by.attention, start)
        if by.mlp != 1:
            yield from _divided(dense, dense.structure.blocks[mlp].mlp, by.mlp, start)
        if block.scaled_by:
            stored = dense.layers[layer.attention][block.scaled_by]
            yield start + block.scaled_by, stored.holding(torch.full(stored.shape, by.whole, dtype=torch.float64))


def _scale(dense: DenseModel, index: int) -> float:
    name = dense.structure.blocks[index].scaled_by
    if name is None:
        return 1.0
    stored = dense.layers[index].get(name)
    scale = math.nan if stored is None or stored.dtype not in FLOATS else float(stored.read().double().sum())
    if not 0 < abs(scale) < math.inf:
        raise UsageError(
            f"the files of {dense.origin.model} have {scale} for {name} of layer {index}; download them again"
        )
    return scale


def _divided(dense: DenseModel, part: Sublayer, by: float, start: str) -> Iterator[tuple[str, Weight]]:
    """The weights of its last module, by which what it adds to the stream is so many times less."""
    last = _last(part)
    module = dense.empty.get_submodule(f"{dense.structure.layers}.{part.index}.{last}")
    if not _is_divided_by_weights(module):
        raise UsageError(
            f"layers of {dense.structure.model_type} multiply their stream, and what {part.name} adds cannot be "
            "divided by what is cut before it; keep the layer before it whole, or skip in memory"
        )
    for name, stored in dense.parts(part).items():
        if name.startswith(f"{last}."):
            yield start + name, stored.divided(by)


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
