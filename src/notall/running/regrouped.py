"""The modules of regrouped layers: an attention or a whole block of the original model
runs in its own class, with MLPs that lost their attention ahead and behind.

Shapes: a stream of hidden states is (batch, tokens, hidden) wherever it passes.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..structure.branches import run_branches
from ..structure.calls import LayerCall, called_with, child, parameter_names
from ..structure.model_structure import (
    Block,
    ModelStructure,
    Sublayer,
)
from ..structure.slicing import (
    move_inputs_like,
    set_child,
    shallow_clone,
)
from .prefill import InPrompt
from .regrouping import Layer


class Holder(nn.Module):
    """The modules of one MLP that lost its attention, those of a dense layer."""

    def __init__(
        self, source: nn.Module, mlp: Sublayer, in_prompt: InPrompt | None = None
    ) -> None:
        super().__init__()
        self.sublayer, self.training = mlp, source.training
        self.in_prompt = in_prompt
        for name in mlp.modules:
            set_child(self, name, child(source, name))
        move_inputs_like(source, self)

    def forward(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """`hidden` and what the MLP adds to it, (batch, tokens, hidden) each."""
        if self.in_prompt and self.in_prompt.splits:
            return self.in_prompt.run([self.sublayer], self, hidden, call)
        return run_branches(self.sublayer.branches, self, hidden, call)


class Scales(nn.Module):
    """Numbers that dense layers multiply their stream by, on its way to a part of a
    regrouped layer, or behind all.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        super().__init__()
        for place, number in enumerate(numbers):
            self.register_buffer(str(place), number, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` times all numbers, (batch, tokens, hidden), in its own dtype."""
        for number in self.buffers():  # of another device or a finer dtype, maybe
            hidden = (hidden * number.to(hidden.device)).to(hidden.dtype)
        return hidden


class RegroupedLayer(nn.Module):
    """Mixed into the class of a dense layer: runs MLPs ahead, its attention or whole
    block, and MLPs behind.

    Each MLP runs where its own layer did, and the stream comes back from there.
    """

    is_cut = True
    before: nn.ModuleList
    after: nn.ModuleList
    scales: Iterable[nn.Module]  # one for each part and one behind all, or none
    # its own block, what it runs of it, and whether that is all of it
    _layout: tuple[Block, Sublayer, bool]
    in_prompt: InPrompt | None  # what of its own block is skipped in the prompt

    def forward(self, *args: object, **kwargs: object) -> object:
        """In the form of the original layer: its hidden states, (batch, tokens, hidden),
        alone or the first of a tuple.
        """
        arguments, hidden = called_with(self, args, kwargs)
        block, own, whole = self._layout
        declared = parameter_names(self)
        extras = {name: one for name, one in kwargs.items() if name not in declared}
        call = LayerCall(arguments, extras)
        ways = iter(self.scales)
        here = hidden.device

        def scaled(hidden: Tensor) -> Tensor:
            way = next(ways, None)
            return hidden if way is None else way(hidden)

        # every statement maps (batch, tokens, hidden) to (batch, tokens, hidden)
        for holder in self.before:
            hidden = holder(scaled(hidden), call).to(here)
        hidden = scaled(hidden)
        splits = self.in_prompt is not None and self.in_prompt.splits
        if whole and not splits:
            answer = super().forward(hidden, **arguments)
            is_tuple = isinstance(answer, tuple)
            hidden, *rest = answer if is_tuple else (answer,)
        elif splits:
            hidden = self._run_split(hidden, call)
            rest = self._further_answers(call)
        else:
            hidden = run_branches(own.branches, self, hidden, call)
            rest = self._further_answers(call)
        for holder in self.after:
            hidden = holder(scaled(hidden), call).to(here)
        hidden = scaled(hidden)
        return hidden if block.answer is None else (hidden, *rest)

    def _further_answers(self, call: LayerCall) -> list[Any]:
        """What the original layer answers in addition to its hidden states, as far as
        the attention gave it.
        """
        places = self._layout[0].answer or ()
        given = call.attention
        if given is None:  # it ran for no token
            return [None for _ in places]
        if not isinstance(given, tuple):
            given = (given,)
        if call.arguments.get("output_attentions"):
            return list(given[1:])
        return [None if at is None else given[at] for at in places]

    def _run_split(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """What it runs of its own block on (batch, tokens, hidden), some of it for the
        last tokens alone.
        """
        assert self.in_prompt is not None
        block, own, whole = self._layout
        if not whole:
            lines: list[tuple[Sublayer, ...]] = [(own,)]
        elif block.parallel:
            lines = [block.sublayers]
        else:
            lines = [(part,) for part in block.sublayers]
        for parts in lines:
            hidden = self.in_prompt.run(parts, self, hidden, call)
        if whole and block.scaled_by:
            hidden = (hidden * getattr(self, block.scaled_by)).to(hidden.dtype)
        return hidden


@functools.cache
def _regrouped_class(layer_class: type) -> type[RegroupedLayer]:
    """A subclass, which whatever looks for the layer's class finds, with the signature
    of the layer's own forward.
    """
    if issubclass(layer_class, RegroupedLayer):
        return layer_class

    @functools.wraps(layer_class.forward)  # type: ignore[attr-defined]
    def forward(self: RegroupedLayer, *args: object, **kwargs: object) -> object:
        return RegroupedLayer.forward(self, *args, **kwargs)

    name, bases = f"Regrouped{layer_class.__name__}", (RegroupedLayer, layer_class)
    return type(name, bases, {"__module__": __name__, "forward": forward})


def regrouped_layer(
    structure: ModelStructure,
    dense: nn.ModuleList,
    layer: Layer,
    skipped: Mapping[int, InPrompt] = {},
) -> nn.Module:
    """The module that runs `layer`: the dense one itself where nothing in it changes.

    `skipped` holds for dense blocks what of them is skipped in the prompt.
    """
    source = dense[layer.attention]
    block = structure.blocks[layer.attention]
    after = list(layer.after)
    if layer.mlp is not None and not layer.whole:
        after.insert(0, layer.mlp)
    is_split = not skipped.keys().isdisjoint([layer.attention, *after])
    # the MLP of another block, in the place of its own
    if layer.is_ordinary and after and not is_split:
        swapped = {name: child(dense[after[0]], name) for name in block.mlp.modules}
        children = dict(source.named_children()) | swapped
        return shallow_clone(source, children, type(source))
    ways = _scaling_blocks(structure, layer, after)
    if layer.whole and layer.is_ordinary and not any(ways) and not is_split:
        return source
    own = block.attention if "attention" in block.kinds else block.mlp
    parts = block.sublayers if layer.whole else (own,)
    children = {name: child(source, name) for part in parts for name in part.modules}
    made = shallow_clone(source, children, _regrouped_class(type(source)))  # type: ignore[arg-type]

    def holder_of(index: int) -> Holder:
        return Holder(dense[index], structure.blocks[index].mlp, skipped.get(index))

    def number_of(index: int) -> Tensor:
        name = structure.blocks[index].scaled_by
        assert name is not None  # `_scaling_blocks` has no others
        return getattr(dense[index], name)

    made.before = nn.ModuleList(map(holder_of, layer.before))
    made.after = nn.ModuleList(map(holder_of, after))
    for holders in (made.before, made.after):
        holders.training = source.training
    made.scales = ()
    if any(ways):
        made.scales = nn.ModuleList(Scales([*map(number_of, way)]) for way in ways)
    made._layout = block, own, layer.whole
    made.in_prompt = skipped.get(layer.attention)
    return made


def _scaling_blocks(
    structure: ModelStructure, layer: Layer, after: Sequence[int]
) -> list[list[int]]:
    """The blocks that multiply the stream on its way to each part of `layer`, and in
    the end those behind all of them.
    """
    here = layer.start
    ways: list[list[int]] = []
    for index in [*layer.before, layer.attention, *after, layer.end]:
        between = range(here, index)
        ways.append([one for one in between if structure.blocks[one].scaled_by])
        # a whole block has multiplied its stream itself
        is_whole = layer.whole and index == layer.attention
        here = index + 1 if is_whole else index
    return ways
