"""What a plan keeps, cut into layers of one mixer each: the rule behind `skip` and every export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..plan import Plan

if TYPE_CHECKING:
    from ..structure.model_structure import ModelStructure  # it needs torch, and this does not


@dataclass
class Group:
    """A layer of the regrouped model, by dense indices: MLPs ahead, a layer or its attention, and MLPs behind.

    `layer` is kept as it is where it is `whole`; where not, its attention alone. The stream goes in as the dense block
    `start` is given it, and comes out as `end` is.
    """

    layer: int
    whole: bool
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)

    @property
    def untouched(self) -> bool:
        return self.whole and not self.before and not self.after


BOTH = ("attention", "mlp")


def regroup(kinds: Sequence[Sequence[str]], plan: Plan) -> list[Group]:
    """Cut what `plan` keeps into layers of one attention each, in the order of the dense model.

    `kinds` are those of each layer's sublayers. A layer of one sublayer stays as it is, or goes.
    """
    groups: list[Group] = []
    ahead: list[int] = []  # MLPs before the first live attention
    for index, held in enumerate(kinds):
        kept = [kind for kind in held if index not in getattr(plan, kind)]
        if "attention" in kept or (kept and "attention" not in held):
            groups.append(Group(index, whole=len(kept) == len(held), before=ahead))
            ahead = []
        elif kept:
            (groups[-1].after if groups else ahead).append(index)
    ends = [min([group.layer, *group.before]) for group in groups[1:]] + [len(kinds)]
    for group, start, end in zip(groups, [0, *ends], ends):
        group.start, group.end = start, end
    return groups


def groups_of(structure: ModelStructure, plan: Plan) -> list[Group]:
    """`regroup` of a model: an MLP whose attention its checkpoint lacks rides along too."""
    lacking = {*structure.missing.attention, *structure.missing.mlp}
    kinds = [BOTH if block.index in lacking else block.kinds for block in structure.blocks]
    return regroup(kinds, plan | structure.missing)


def is_portable(structure: ModelStructure, plan: Plan) -> bool:
    """Whether what `plan` keeps is an ordinary model of fewer layers, which any engine loads.

    So it is when the kept sublayers alternate, attention, MLP, attention, MLP, whichever blocks they come from.
    """
    cuttable = not plan or structure.cuttable
    return cuttable and all(is_ordinary(structure, group) for group in groups_of(structure, plan))


def is_ordinary(structure: ModelStructure, group: Group) -> bool:
    """Whether `group` is an attention and one MLP behind it, of the form of the attention's own block."""
    if group.untouched:
        return True
    alone = not group.whole and not group.before and len(group.after) == 1
    return alone and fits(structure, group.layer, group.after[0])


def fits(structure: ModelStructure, attention: int, mlp: int) -> bool:
    """Whether the MLP of block `mlp` can stand in the place of the one of block `attention`."""
    block, other = structure.blocks[attention], structure.blocks[mlp]
    if "mlp" not in block.kinds:  # so that its own form is not known
        return False
    attention_first = block.sublayers[0].kind == "attention"
    alike = (block.mlp.branches, block.mlp.stub) == (other.mlp.branches, other.mlp.stub)
    return not block.parallel and attention_first and alike


@dataclass(frozen=True)
class Layer:
    """A layer of an exported model, by dense indices: an attention, its own MLP or none, MLPs before and after."""

    attention: int
    mlp: int | None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def is_ordinary(self) -> bool:
        return self.mlp is not None and not self.before and not self.after


def merged(groups: list[Group], fits: Callable[[int, int], bool]) -> list[Layer]:
    """`groups` with the first MLP j behind a lone attention i made its layer's own, where it `fits(i, j)`."""
    layers = []
    for group in groups:
        mlp, after = group.layer if group.whole else None, list(group.after)
        if mlp is None and after and fits(group.layer, after[0]):
            mlp = after.pop(0)
        layers.append(Layer(group.layer, mlp, tuple(group.before), tuple(after)))
    return layers


@dataclass(frozen=True)
class Folded:
    """The number `whole` that an exported layer multiplies its stream by, and what divides what its sublayers add."""

    attention: float
    mlp: float
    whole: float


def folded(layers: Sequence[Layer], scales: Sequence[float]) -> list[Folded]:
    """For each layer, of the numbers `scales` of the dense ones.

    A dense layer i ends in h = s_i h, and h goes on being multiplied where layers are left out. So a layer of attention
    i and MLP j, with attention n next, has s_i ... s_(n-1); s_i ... s_(j-1) of it comes late for the MLP, and what
    stands before the first attention for both. A norm begins them, which does not mind how large their stream is.
    """
    found = []
    for number, layer in enumerate(layers):
        mlp = layer.attention if layer.mlp is None else layer.mlp
        following = layers[number + 1].attention if number + 1 < len(layers) else len(scales)
        late = math.prod(scales[: layer.attention]) if number == 0 else 1.0
        between, whole = scales[layer.attention : mlp], scales[layer.attention : following]
        found.append(Folded(late, late * math.prod(between), late * math.prod(whole)))
    return found


@dataclass(frozen=True)
class SparseLayer:
    """A layer of a model whose layers may lack either sublayer, by dense indices."""

    attention: int | None
    mlp: int | None


def sparse_layers(layers: Iterable[Layer]) -> Iterator[SparseLayer]:
    """`layers` for engines that can leave out a sublayer of a layer: each lone MLP becomes a layer of its own."""
    for layer in layers:
        yield from (SparseLayer(None, mlp) for mlp in layer.before)
        yield SparseLayer(layer.attention, layer.mlp)
        yield from (SparseLayer(None, mlp) for mlp in layer.after)
