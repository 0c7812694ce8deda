"""Layers cut anew out of those of a model: one mixer each, and what rides along with it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..structure.model_structure import Block, ModelStructure, Sublayer
from ..structure.observation import LayerCall, called_with, child, parameter_names, run_branches
from ..structure.slicing import move_inputs_like, set_child, shallow_clone
from .regrouping import Group, is_ordinary


class Holder(nn.Module):
    """The modules of one MLP that lost its attention, those of a dense layer."""

    def __init__(self, source: nn.Module, mlp: Sublayer) -> None:
        super().__init__()
        self.sublayer, self.training = mlp, source.training
        for name in mlp.modules:
            set_child(self, name, child(source, name))
        move_inputs_like(source, self)

    def forward(self, hidden: Tensor, call: LayerCall) -> Tensor:
        return run_branches(self.sublayer.branches, self, hidden, call)


class Scales(nn.Module):
    """Numbers that dense layers multiply their stream by, on its way to a part of a regrouped layer, or behind all."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        super().__init__()
        for place, number in enumerate(numbers):
            self.register_buffer(str(place), number, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        for number in self.buffers():
            hidden = (hidden * number).to(hidden.dtype)  # a number may be of a finer one
        return hidden


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole block, and MLPs behind."""

    is_cut = True
    before: nn.ModuleList
    after: nn.ModuleList
    scales: Iterable[nn.Module]  # one for each part and one behind all, or none
    _layout: _Layout

    def forward(self, *args: object, **kwargs: object) -> object:
        arguments, hidden = called_with(self, args, kwargs)
        declared, layout, ways = parameter_names(self), self._layout, iter(self.scales)
        call = LayerCall(arguments, {name: value for name, value in kwargs.items() if name not in declared})

        def scaled(hidden: Tensor) -> Tensor:
            way = next(ways, None)
            return hidden if way is None else way(hidden)

        for holder in self.before:
            hidden = holder(scaled(hidden), call)
        hidden = scaled(hidden)
        if layout.whole:
            answer = super().forward(hidden, **arguments)
            hidden, rest = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
        else:
            hidden = run_branches(layout.own.branches, self, hidden, call)
            given = call.attention if isinstance(call.attention, tuple) else (call.attention,)
            places = (
                layout.block.answer or ()
            )  # of what the dense layer answers beside, as far as the attention gave it
            as_asked = call.arguments.get("output_attentions")
            rest = given[1:] if as_asked else tuple(None if at is None else given[at] for at in places)
        for holder in self.after:
            hidden = holder(scaled(hidden), call)
        hidden = scaled(hidden)
        return hidden if layout.block.answer is None else (hidden, *rest)


class _Layout(NamedTuple):
    """What a regrouped layer runs of its own block: all of it, or one sublayer."""

    block: Block
    own: Sublayer
    whole: bool


@functools.cache
def _regrouped_class(layer_class: type) -> type[RegroupedLayer]:
    """A subclass, which whatever looks for the layer's class finds, with the signature of the layer's own forward."""
    if issubclass(layer_class, RegroupedLayer):
        return layer_class

    @functools.wraps(layer_class.forward)  # type: ignore[attr-defined]
    def forward(self: RegroupedLayer, *args: object, **kwargs: object) -> object:
        return RegroupedLayer.forward(self, *args, **kwargs)

    name, bases = f"Regrouped{layer_class.__name__}", (RegroupedLayer, layer_class)
    return type(name, bases, {"__module__": __name__, "forward": forward})


def regrouped_layer(structure: ModelStructure, dense: nn.ModuleList, group: Group) -> nn.Module:
    """The module that runs `group`: the dense layer itself where nothing in it changes."""
    source, ways = dense[group.layer], _ways(structure, group)
    if group.untouched and not any(ways):
        return source
    block = structure.blocks[group.layer]
    own = block.attention if "attention" in block.kinds else block.mlp
    parts = block.sublayers if group.whole else (own,)
    children = {name: child(source, name) for part in parts for name in part.modules}
    layer = shallow_clone(source, children, _regrouped_class(type(source)))  # type: ignore[arg-type]
    layer.before, layer.after = (
        nn.ModuleList(Holder(dense[index], structure.blocks[index].mlp) for index in indices)
        for indices in (group.before, group.after)
    )
    numbers = [[getattr(dense[index], structure.blocks[index].scaled_by or "") for index in way] for way in ways]
    layer.scales = nn.ModuleList(map(Scales, numbers)) if any(ways) else ()
    for extras in (layer.before, layer.after):
        extras.training = source.training
    layer._layout = _Layout(block, own, group.whole)
    return layer


def _ways(structure: ModelStructure, group: Group) -> list[list[int]]:
    """The blocks that multiply the stream and whose ends lie before each part of a regrouped layer, and behind all."""
    parts = [*group.before, group.layer, *group.after]
    here, ways = group.start, []
    for block in [*parts, group.end]:
        ways.append([index for index in range(here, block) if structure.blocks[index].scaled_by])
        here = block + (group.whole and block == group.layer)
    return ways


def merged_layer(structure: ModelStructure, dense: nn.ModuleList, group: Group) -> nn.Module | None:
    """Attention i with the MLP of block j as one ordinary layer; None where only a regrouped layer will do."""
    if group.untouched or structure.scaled or not is_ordinary(structure, group):
        return None
    source, donor = dense[group.layer], dense[group.after[0]]
    if type(source) is not type(donor):
        return None
    block = structure.blocks[group.layer]
    swapped = {name: child(donor, name) for name in block.mlp.modules}
    return shallow_clone(source, dict(source.named_children()) | swapped, type(source))
