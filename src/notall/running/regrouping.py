"""What a plan keeps, cut into layers of one mixer each: the rule behind `skip` and
every export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..plan import Plan

if TYPE_CHECKING:
    # it needs torch, and this does not
    from ..structure.model_structure import ModelStructure


@dataclass
class Layer:
    """A layer of a regrouped model, by dense indices: an attention, an MLP or none of
    it, and MLPs ahead and behind.
    """

    attention: int
    # equal to `attention` where the dense layer is kept as it is, also one of a single
    # sublayer; None without an MLP of its own
    mlp: int | None
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    # the dense block whose input is the layer's input
    start: int = field(default=0, compare=False)
    # the dense block whose input is the layer's output; past the last one at the end
    end: int = field(default=0, compare=False)

    @property
    def whole(self) -> bool:
        """Whether the layer of the original model is kept as it is, in itself."""
        return self.mlp == self.attention

    @property
    def is_ordinary(self) -> bool:
        """Whether it has an attention and an MLP, and nothing else."""
        return self.mlp is not None and not self.before and not self.after


BOTH = ("attention", "mlp")


def regroup(
    kinds: Sequence[Sequence[str]], plan: Plan, fits: Callable[[int, int], bool]
) -> list[Layer]:
    """Cut what `plan` keeps into layers of one attention each, in the order of the
    original model.

    `kinds` are those of each layer's sublayers; a layer of one sublayer stays as it is,
    or goes. The first MLP j behind a lone attention i becomes its layer's own where it
    `fits(i, j)`.
    """
    layers: list[Layer] = []
    ahead: list[int] = []  # MLPs before the first live attention
    for index, held in enumerate(kinds):
        kept = [kind for kind in held if index not in getattr(plan, kind)]
        has_only_mlp = "attention" not in held
        if "attention" in kept or (kept and has_only_mlp):
            own_mlp = index if len(kept) == len(held) else None
            layers.append(Layer(index, own_mlp, before=ahead))
            ahead = []
        elif kept:
            (layers[-1].after if layers else ahead).append(index)
    # a layer's stream ends where the next one's first sublayer begins
    firsts = [min([layer.attention, *layer.before]) for layer in layers[1:]]
    ends = [*firsts, len(kinds)]
    for layer, start, end in zip(layers, [0, *ends], ends):
        layer.start, layer.end = start, end
        if layer.mlp is None and layer.after and fits(layer.attention, layer.after[0]):
            layer.mlp = layer.after.pop(0)
    return layers


def layers_of(
    structure: ModelStructure,
    plan: Plan,
    fit: Callable[[int, int], bool] = lambda *_: True,
) -> list[Layer]:
    """`regroup` of a model, of what fits by `fit` too: an MLP whose attention its
    checkpoint lacks rides along too.
    """
    lacking = {*structure.missing.attention, *structure.missing.mlp}
    kinds = [
        BOTH if block.index in lacking else block.kinds for block in structure.blocks
    ]
    return regroup(
        kinds,
        plan | structure.missing,
        lambda i, j: fits(structure, i, j) and fit(i, j),
    )


def is_portable(structure: ModelStructure, plan: Plan) -> bool:
    """Whether what `plan` keeps alternates, attention, MLP, attention, MLP: any engine
    loads such a model.
    """
    return (not plan or structure.cuttable) and all(
        layer.is_ordinary for layer in layers_of(structure, plan)
    )


def fits(structure: ModelStructure, attention: int, mlp: int) -> bool:
    """Whether the MLP of block `mlp` can stand in the place of the one of block
    `attention`.
    """
    block, other = structure.blocks[attention], structure.blocks[mlp]
    if "mlp" not in block.kinds:  # so that its own form is not known
        return False
    attention_first = block.sublayers[0].kind == "attention"
    alike = (block.mlp.branches, block.mlp.stub) == (other.mlp.branches, other.mlp.stub)
    return not block.parallel and attention_first and alike


@dataclass(frozen=True)
class Folded:
    """The number `whole` that an exported layer multiplies its stream by, and what
    divides what its sublayers add.
    """

    attention: float
    mlp: float
    whole: float


def folded(layers: Sequence[Layer], scales: Sequence[float]) -> list[Folded]:
    """For each layer, of the numbers `scales` of the dense ones.

    A dense layer i ends in h = s_i h, and h goes on being multiplied where layers are
    left out. So a layer of attention i and MLP j, with attention n next, has s_i ...
    s_(n-1); s_i ... s_(j-1) of it comes late for the MLP, and what stands before the
    first attention for both. A norm begins them, which does not mind how large their
    stream is.
    """
    found = []
    for number, layer in enumerate(layers):
        mlp = layer.attention if layer.mlp is None else layer.mlp
        following = (
            layers[number + 1].attention if number + 1 < len(layers) else len(scales)
        )
        late = math.prod(scales[: layer.attention]) if number == 0 else 1.0
        between, whole = (
            scales[layer.attention : mlp],
            scales[layer.attention : following],
        )
        found.append(Folded(late, late * math.prod(between), late * math.prod(whole)))
    return found


def sparse_layers(layers: Iterable[Layer]) -> Iterator[tuple[int | None, int | None]]:
    """The attention and the MLP, or None, of each layer for engines that can leave out
    either: lone MLPs are layers.
    """
    for layer in layers:
        yield from ((None, mlp) for mlp in layer.before)
        yield layer.attention, layer.mlp
        yield from ((None, mlp) for mlp in layer.after)
