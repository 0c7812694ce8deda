"""What each layer and sublayer does to the residual stream of the dense model, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..structure.in_place import Stub, stubbed_layer
from ..structure.locating import locate
from ..structure.model_structure import Block, base_model
from ..structure.observation import Arguments, LayerCall, called_with, first, forward_replaced, run_branches, scaled
from .replay import Enough, answering


@dataclass(frozen=True)
class Passage:
    """A block's passage: the residual stream, (batch, tokens, hidden), before and after it and around its sublayers.

    `around` maps a kind to the stream (before, after) that sublayer. Of several streams all are there, side by side.
    """

    block: Block
    before: Tensor
    after: Tensor
    around: dict[str, tuple[Tensor, Tensor]]


Look = Callable[[Passage], None]


def walk(model: PreTrainedModel, look: Look, **inputs: Tensor) -> None:
    """Have `look` see the dense model's passages on `inputs`, a block's states at a time, without running the head."""
    inner = base_model(model)
    structure = locate(inner)
    shape = inputs["input_ids"].shape

    def seen(passage: Passage) -> None:
        look(passage)
        if passage.block is structure.blocks[-1]:
            raise Enough

    with ExitStack() as replaced:
        for block, layer in zip(structure.blocks, inner.get_submodule(structure.layers).children()):
            stubs = [part.stub for part in block.sublayers if part.stub]
            watched = _stubbed(block, layer, stubs, shape, seen) if stubs else _read(block, layer, seen)
            replaced.enter_context(forward_replaced(layer, watched))
        with suppress(Enough):
            inner(**inputs, use_cache=False)


def _read(block: Block, layer: nn.Module, look: Look) -> Callable[..., object]:
    """A forward for a layer whose sublayers can be run one at a time."""

    def answer(arguments: Arguments, before: Tensor) -> Tensor:
        after = before
        around: dict[str, tuple[Tensor, Tensor]] = {}
        for part in block.sublayers:
            start = before if block.parallel else after
            end = run_branches(part.branches, layer, start, LayerCall(arguments))
            around[part.kind] = start, end
            after = after + (end - start) if block.parallel and after is not before else end
        after = scaled(after, block.scale)
        look(Passage(block, before, after, around))
        return after

    return answering(layer, block, answer)


def _stubbed(
    block: Block, layer: nn.Module, stubs: Sequence[Stub], shape: Sequence[int], look: Look
) -> Callable[..., object]:
    """A forward for a layer whose sublayers run only inside of it: with none, with the first, with all of them.

    The dense layer comes last: others read what it makes.
    """
    fewer = [stubbed_layer(layer, block.index, stubs[ran:]) for ran in range(len(stubs) + 1)]

    def forward(*args: object, **kwargs: object) -> object:
        _, given = called_with(layer, args, kwargs)
        before = as_stream(given, shape).clone()
        states = []
        for twin in fewer:
            answer = twin(*args, **kwargs)
            states.append(as_stream(first(answer), shape))
        around = zip(block.kinds, pairwise(states))
        look(Passage(block, before, states[-1], dict(around)))
        return answer

    return forward


def as_stream(state: Tensor, shape: Sequence[int]) -> Tensor:
    """Any number of streams as one, (batch, tokens, hidden); `shape` is (batch, tokens)."""
    if state.dim() > 3 and state.shape[:2] != tuple(shape):  # Gemma 3n's streams come first
        state = state.movedim(0, 2)
    return state.flatten(2)
