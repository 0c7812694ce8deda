"""A sublayer's function as it was traced: operations from the residual stream to what is
added to it, which run on any layer's modules.

Shapes: a stream, a value and a residual are (batch, tokens, hidden).
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from .calls import LayerCall, child


class Stream(Enum):
    """A hidden state that a branch hands on, (batch, tokens, hidden)."""

    VALUE = "its running value"
    RESIDUAL = "the residual stream as the branch found it"


@dataclass(frozen=True)
class Argument:
    """An argument of the layer's own call, under the layer's name for it."""

    name: str
    default: object = None


Slot = object  # a Stream, an Argument, or else a constant


def _fill(slot: Slot, value: Tensor, residual: Tensor, call: LayerCall) -> Any:
    """What an operation is given in a `slot`: value and residual are (batch, tokens,
    hidden).
    """
    if isinstance(slot, Argument):
        return call.arguments.get(slot.name, slot.default)
    if slot is Stream.VALUE:
        return value
    return residual if slot is Stream.RESIDUAL else slot


@dataclass(frozen=True)
class Op:
    """A call of a child module, by its path, or of a torch function, with arguments
    traced to where they come from.
    """

    made_by: str | Callable[..., Tensor]
    positional: tuple[Slot, ...]
    keywords: tuple[tuple[str, Slot], ...]
    # which element of a module's answer goes on; None when the answer is a tensor
    output: int | None = None
    is_attention: bool = False
    takes_extras: bool = False

    @property
    def module(self) -> str:
        """The path of the module; empty for a function."""
        return self.made_by if isinstance(self.made_by, str) else ""

    @property
    def name(self) -> str:
        """Of the function; empty for a module."""
        return getattr(self.made_by, "__name__", "")

    def run(
        self, holder: nn.Module, value: Tensor, residual: Tensor, call: LayerCall
    ) -> Tensor:
        """What the operation makes of `value`, by the modules of `holder`."""
        positional = [_fill(slot, value, residual, call) for slot in self.positional]
        keywords = {
            name: _fill(slot, value, residual, call) for name, slot in self.keywords
        }
        if not isinstance(self.made_by, str):
            if self.name == "dropout":  # traced in eval mode, run in the layer's mode
                keywords["training"] = holder.training
            return self.made_by(*positional, **keywords)
        if self.takes_extras:
            keywords.update(call.extras)
        answer = child(holder, self.made_by)(*positional, **keywords)
        if self.is_attention:
            call.attention = answer
        return answer if self.output is None else answer[self.output]


@dataclass(frozen=True)
class Branch:
    """Operations from the residual stream to what is added to it."""

    ops: tuple[Op, ...]
    # the last module is given the residual, and answers the new stream (BLOOM, MPT)
    adds_itself: bool = False

    @property
    def is_attention(self) -> bool:
        """Whether a module in it writes to the cache."""
        return any(op.is_attention for op in self.ops)

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of its modules, in the order they run."""
        return tuple(op.module for op in self.ops if op.module)

    def run(self, holder: nn.Module, residual: Tensor, call: LayerCall) -> Tensor:
        """What is added to `residual`, or the new stream where it `adds_itself`."""
        value = residual
        for op in self.ops:
            value = op.run(holder, value, residual, call)
        return value


def run_branches(
    branches: tuple[Branch, ...], holder: nn.Module, hidden: Tensor, call: LayerCall
) -> Tensor:
    """One line of the residual stream: `hidden` plus what each branch makes of it.
    (batch, tokens, hidden).
    """
    total = hidden
    for branch in branches:
        value = branch.run(holder, hidden, call)
        if value.shape != hidden.shape:  # a layer that flattens batch and tokens
            value = value.view(hidden.shape)
        total = value if branch.adds_itself else total + value
    return total


def scaled(hidden: Tensor, scale: float) -> Tensor:
    """`hidden` times `scale`: itself where that is 1."""
    return hidden if scale == 1 else scale * hidden
