"""Layers cut anew out of those of a model: one mixer each, and what rides along with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..structure.model_structure import Block, ModelStructure, Sublayer
from ..structure.observation import LayerCall, child, parameter_names, run_branches
from ..structure.slicing import move_inputs_like, set_child, shallow_clone
from .regrouping import Group, is_ordinary


class Holder(nn.Module):
    """The modules of one MLP that lost its attention."""

    def forward(self, hidden: Tensor, mlp: Sublayer, call: LayerCall) -> Tensor:
        return run_branches(mlp.branches, self, hidden, call)


class Scales(nn.Module):
    """The numbers that dense layers multiply their stream by, on the way to each part of a regrouped one and behind."""

    def __init__(self, ways: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.ways: list[list[str]] = []
        for way, numbers in enumerate(ways):
            self.ways.append([f"{way}_{place}" for place in range(len(numbers))])
            for name, number in zip(self.ways[-1], numbers):
                self.register_buffer(name, number, persistent=False)

    def forward(self, hidden: Tensor, way: int) -> Tensor:
        for name in self.ways[way]:
            hidden = (hidden * getattr(self, name)).to(hidden.dtype)  # a number may be of a finer one
        return hidden


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole block, and MLPs behind."""

    is_cut = True
    before: nn.ModuleList
    after: nn.ModuleList
    scales: Scales | None
    blocks: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout: _Layout = self._layout  # type: ignore[assignment]
        arguments = dict(zip(layout.names, args)) | kwargs
        hidden: Tensor = arguments.pop(layout.names[0])
        extras = {name: value for name, value in kwargs.items() if name not in layout.declared}
        call, way = LayerCall(arguments, extras), 0

        def scaled(hidden: Tensor) -> Tensor:
            nonlocal way
            way += 1
            return self.scales(hidden, way - 1) if self.scales else hidden

        for mlp, holder in zip(layout.before, self.before):
            hidden = holder(scaled(hidden), mlp, call)
        hidden = scaled(hidden)
        if layout.whole:
            answer = layout.stock_forward(self, hidden, **arguments)
            hidden, rest = (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())
        else:
            hidden = run_branches(layout.own.branches, self, hidden, call)
            rest = layout.rest(call)
        for mlp, holder in zip(layout.after, self.after):
            hidden = holder(scaled(hidden), mlp, call)
        hidden = scaled(hidden)
        return hidden if layout.block.answer is None else (hidden, *rest)


@dataclass(frozen=True)
class _Layout:
    """What a regrouped layer runs, apart from its modules."""

    block: Block
    own: Sublayer  # that is run where the layer is not whole
    whole: bool
    before: tuple[Sublayer, ...]
    after: tuple[Sublayer, ...]
    names: tuple[str, ...]  # of the arguments of the dense layer's forward
    declared: frozenset[str]
    stock_forward: Callable[..., Any]

    def rest(self, call: LayerCall) -> tuple[Any, ...]:
        """What the dense layer answers beside the hidden states, as far as the attention gave it."""
        given = call.attention if isinstance(call.attention, tuple) else (call.attention,)
        if call.arguments.get("output_attentions"):
            return given[1:]
        return tuple(None if index is None else given[index] for index in self.block.answer or ())


@functools.cache
def _regrouped_class(layer_class: type) -> type[RegroupedLayer]:
    """A subclass, so that whatever looks for the layer's class (hooks, checkpointing, device maps) finds it.

    Its forward has the signature of the layer's own, by which arguments are told apart.
    """
    if issubclass(layer_class, RegroupedLayer):
        return layer_class
    forward = functools.wraps(layer_class.forward)(RegroupedLayer.forward)  # type: ignore[attr-defined]
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
    layer.before = nn.ModuleList(_holder(dense[index], structure.blocks[index].mlp) for index in group.before)
    layer.after = nn.ModuleList(_holder(dense[index], structure.blocks[index].mlp) for index in group.after)
    for extras in (layer.before, layer.after):
        extras.training = source.training
    numbers = [[_scale(structure, dense, index) for index in way] for way in ways]
    layer.scales = Scales(numbers) if any(ways) else None
    names = tuple(parameter_names(source))
    layer._layout = _Layout(  # type: ignore[assignment]
        block,
        own,
        group.whole,
        tuple(structure.blocks[index].mlp for index in group.before),
        tuple(structure.blocks[index].mlp for index in group.after),
        names,
        frozenset(names),
        type(source).forward,
    )
    return layer


def _ways(structure: ModelStructure, group: Group) -> list[list[int]]:
    """The blocks that multiply the stream and whose ends lie before each part of a regrouped layer, and behind all."""
    parts = [*group.before, group.layer, *group.after]
    here, ways = group.start, []
    for block in [*parts, group.end]:
        ways.append([index for index in range(here, block) if structure.blocks[index].scaled_by])
        here = block + (group.whole and block == group.layer)
    return ways


def _scale(structure: ModelStructure, dense: nn.ModuleList, index: int) -> Tensor:
    return getattr(dense[index], structure.blocks[index].scaled_by)  # type: ignore[arg-type]


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


def _holder(source: nn.Module, mlp: Sublayer) -> Holder:
    holder = Holder()
    holder.training = source.training
    for name in mlp.modules:
        set_child(holder, name, child(source, name))
    if "_hf_hook" in source.__dict__:
        move_inputs_like(source, holder)
    return holder
