"""Where the tensors and modules of the dense model are in an export of regrouped or ordinary layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..running.regrouping import Layer
from ..structure.anatomy import Sublayer
from ..structure.observation import child
from .dense import DenseModel
from .folding import folded_scales
from .tensors import Source
from .weights import Tensors


@dataclass(frozen=True)
class Piece:
    """What comes from one layer of the dense model: its tensors by their names below it, and their new beginning."""

    parts: tuple[Sublayer, ...]
    tensors: Tensors
    start: str


def moved_tensors(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[tuple[str, Source]]:
    """The tensors of the export under their new names; of a name that comes again, the later one."""
    yield from dense.outside_layers.items()
    for piece in _pieces(dense, layers):
        yield from ((piece.start + name, tensor) for name, tensor in piece.tensors.items())
    yield from folded_scales(dense, layers)


def moved_modules(dense: DenseModel, layers: Sequence[Layer]) -> dict[str, str | None]:
    """The new name of each module, in the files and in the model; None for what is left out."""
    moved: dict[str, str | None] = {name: name for name in _holders(dense.outside_layers)}
    for block in dense.anatomy.blocks:
        whole = Piece(block.sublayers, dense.block(block.index), "")
        moved |= dict.fromkeys(_before(dense, whole))
    for piece in _pieces(dense, layers):
        moved |= _before(dense, piece)
    return moved


def _pieces(dense: DenseModel, layers: Sequence[Layer]) -> Iterator[Piece]:
    for number, layer in enumerate(layers):
        start = f"{dense.prefix}{number}."
        block = dense.anatomy.blocks[layer.attention]
        if layer.mlp == layer.attention:
            yield Piece(block.sublayers, dense.block(block.index), start)
        else:
            yield _piece(dense, block.attention, start)
            if layer.mlp is not None:
                yield _piece(dense, dense.anatomy.blocks[layer.mlp].mlp, start)
        for place, indices in (("before", layer.before), ("after", layer.after)):
            for slot, index in enumerate(indices):
                yield _piece(dense, dense.anatomy.blocks[index].mlp, f"{start}{place}.{slot}.")


def _piece(dense: DenseModel, part: Sublayer, start: str) -> Piece:
    return Piece((part,), dense.parts(part), start)


def _before(dense: DenseModel, piece: Piece) -> dict[str, str]:
    """The names of a piece's modules in the dense model, to those in the export."""
    index = piece.parts[0].index
    layer = dense.empty.get_submodule(f"{dense.anatomy.layers}.{index}")
    paths = [path for part in piece.parts for path in part.modules]
    built = {name for path in paths for name, one in child(layer, path).named_modules(prefix=path) if _weighs(one)}
    return {f"{dense.prefix}{index}.{name}": piece.start + name for name in built | _holders(piece.tensors)}


def _weighs(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _holders(tensors: Iterable[str]) -> set[str]:
    """The modules that tensors of these names are in, and those that these are in."""
    paths = [name.split(".")[:-1] for name in tensors]
    return {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
