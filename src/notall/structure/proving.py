"""The proof of what was read.

Every layer run again from its parts, alone, must give what it gave, and no MLP may look at other tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from ..errors import UnsupportedModel
from .anatomy import Block
from .lending import Lending
from .observation import PROBE_BATCH, PROBE_TOKENS, Branch, LayerCall, LayerTrace, as_given, first, run_branches, scaled
from .seats import emptied
from .slicing import numbered, places_freed, sliced


def prove(config: PretrainedConfig, trace: LayerTrace, block: Block) -> None:
    """Run the layer from its parts, alone in a cache of one layer, and compare it with what the layer answered."""
    hidden, call = trace.hidden, _alone(config, trace)
    local: list[tuple[Branch, Tensor]] = []  # with the stream that they are given
    with numbered(trace.layer, 0):
        for branches in block_lines(block):
            for branch in branches:
                if branch.adds_itself:
                    _prove_adds(config, trace, branch, hidden)
                if not branch.is_attention:
                    local.append((branch, hidden))
            hidden = run_branches(branches, trace.layer, hidden, call)
    hidden = scaled(hidden, block.scale)
    expected = trace.answer[0] if isinstance(trace.answer, tuple) else trace.answer
    error = relative_error(hidden, expected)
    if not error <= tolerance(expected.dtype):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}) differs from its recomposition by {error:.1e} of its "
            f"largest value (expected at most {tolerance(expected.dtype):.0e}); it may count on its index or on what "
            "other layers leave behind. notall leaves this model alone: choose another one"
        )
    for branch, stream in local:
        _prove_local(config, trace, branch, stream)


def _prove_adds(config: PretrainedConfig, trace: LayerTrace, branch: Branch, residual: Tensor) -> None:
    """A module that is given the residual must add it, unchanged: its answer for none is less by just that."""
    *ops, last = branch.ops
    value = Branch(tuple(ops)).run(trace.layer, residual, _alone(config, trace))
    with_it = last.run(trace.layer, value, residual, _alone(config, trace)).view(residual.shape)
    without = last.run(trace.layer, value, torch.zeros_like(residual), _alone(config, trace)).view(residual.shape)
    if not relative_error(without + residual, with_it) <= tolerance(residual.dtype):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}): {branch.modules[-1]} changes the residual stream "
            "that it is given; expected it to add to it. notall leaves this model alone: choose another one"
        )


def _prove_local(config: PretrainedConfig, trace: LayerTrace, branch: Branch, hidden: Tensor) -> None:
    """What is called an MLP must make the same of the last token whatever came before it."""
    others = torch.cat([hidden[:, :-1].flip(-1), hidden[:, -1:]], dim=1)
    found, expected = (
        branch.run(trace.layer, stream, _alone(config, trace)).view(hidden.shape)[:, -1] for stream in (others, hidden)
    )
    if not relative_error(found, expected) <= tolerance(_computed_in(config, hidden.dtype)):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}): {', '.join(branch.modules)} looks at other tokens "
            "without a cache; expected that of the attention alone. notall leaves this model alone: choose another one"
        )


def prove_seat(config: PretrainedConfig, trace: LayerTrace, block: Block, lending: Lending) -> None:
    """Run the layer in its seat: as it is, with each sublayer silenced and left out, and without its mixer.

    So it depends on others only by what it was seen to read, stubs do what silence does, and the MLP is local.
    """
    where = f"layer {trace.index} ({type(trace.layer).__name__})"
    elsewhere = [write.layer_idx for write in trace.cache_writes if write.layer_idx != trace.index]
    if elsewhere:
        raise UnsupportedModel(f"{where} writes to the cache at {elsewhere[0]}; expected its own place")
    seat = _Seat(config, trace, lending)
    _compare(trace, seat.run(trace.layer, trace.hidden), first(trace.answer), "what it answers alone, in its seat")
    mixer = block.attention
    for part in block.sublayers:
        assert part.stub is not None
        silent = seat.run(emptied(trace.layer, trace.index, scaled={part.stub: torch.zeros_like}), trace.hidden)
        stubbed = seat.run(emptied(trace.layer, trace.index, [part.stub]), trace.hidden, freed=part is mixer)
        _compare(trace, stubbed, silent, f"what it answers when {part.name} runs and adds nothing")
    assert mixer.stub is not None
    if not mixer.stub.is_layer:
        without = emptied(trace.layer, trace.index, [mixer.stub])
        _prove_others_local(trace, lambda hidden: seat.run(without, hidden, freed=True))
    elif not trace.cache_writes and not lending.borrows(trace.index):
        _prove_others_local(trace, lambda hidden: seat.run(trace.layer, hidden))


def prove_layer(config: PretrainedConfig, trace: LayerTrace) -> None:
    """A layer that goes or stays as a whole answers the same alone, as the first one of its model."""
    with numbered(trace.layer, 0):
        _compare(trace, _run_alone(config, trace, trace.hidden), first(trace.answer), "what it answers alone")
        if not trace.cache_writes:
            _prove_others_local(trace, lambda hidden: _run_alone(config, trace, hidden))


def prove_causal(config: PretrainedConfig, trace: LayerTrace, lending: Lending | None = None) -> None:
    """What a layer makes of a token must not hang on those that follow, as in an encoder: tried on the last one.

    `lending` is that of layers that keep their seats.
    """
    axis = _tokens_axis(trace.hidden)
    earlier, last = trace.hidden.split([trace.hidden.shape[axis] - 1, 1], dim=axis)
    changed = torch.cat([earlier, last.flip(-1)], dim=axis)
    if lending:
        found = _Seat(config, trace, lending).run(trace.layer, changed)
    else:
        with numbered(trace.layer, 0):
            found = _run_alone(config, trace, changed)
    # the first one is padding in the probe, where attention may look anywhere
    found, expected = (answer.narrow(axis, 1, earlier.shape[axis] - 1) for answer in (found, first(trace.answer)))
    if not relative_error(found, expected) <= tolerance(_computed_in(config, expected.dtype)):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}) looks at the tokens that follow, as encoders do; "
            "notall skips sublayers of causal language models: choose another one"
        )


def _prove_others_local(trace: LayerTrace, run: Callable[[Tensor], Tensor]) -> None:
    """What is no mixer must make the same of the last token whatever came before it."""
    found, expected = (last_token(run(given)) for given in (_earlier_flipped(trace.hidden), trace.hidden))
    if not relative_error(found, expected) <= tolerance(expected.dtype):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}) looks at other tokens without a cache, or keeps a "
            "state elsewhere; expected that of a mixer that writes to the cache. notall leaves this model alone: "
            "choose another one"
        )


def _compare(trace: LayerTrace, found: Tensor, expected: Tensor, what: str) -> None:
    if not (error := relative_error(found, expected)) <= tolerance(expected.dtype):
        raise UnsupportedModel(
            f"layer {trace.index} ({type(trace.layer).__name__}) differs by {error:.1e} of its largest value from "
            f"{what} (expected at most {tolerance(expected.dtype):.0e}). notall leaves this model alone: "
            "choose another one"
        )


@dataclass(frozen=True)
class _Seat:
    """Runs a layer, or a twin of it, as it was called, in a cache where no other layer has left anything."""

    config: PretrainedConfig
    trace: LayerTrace
    lending: Lending

    def run(self, layer: nn.Module, hidden: Tensor, freed: bool = False) -> Tensor:
        with places_freed(self.config, [self.trace.index] if freed else []):
            cache = DynamicCache(config=self.config)
        given = {
            name: cache if isinstance(value, DynamicCache) else self._unread_zeroed(value)
            for name, value in as_given(self.trace.given).items()
        }
        return first(layer(hidden.clone(), **given))

    def _unread_zeroed(self, value: Any) -> Any:
        """What others lend and this layer was not seen to read makes no difference."""
        if isinstance(value, Tensor):
            unread = self.lending.lender_of(value) and not self.lending.is_read(value, self.trace.index)
            return torch.zeros_like(value) if unread else value
        if isinstance(value, MutableMapping):
            for name, held in value.items():
                value[name] = self._unread_zeroed(held)
        return tuple(map(self._unread_zeroed, value)) if type(value) is tuple else value


def last_token(hidden: Tensor) -> Tensor:
    """(..., width), of hidden states whose batch and tokens are those of the probe, in this order."""
    return hidden.select(_tokens_axis(hidden), -1)


def _earlier_flipped(hidden: Tensor) -> Tensor:
    axis = _tokens_axis(hidden)
    earlier, last = hidden.split([hidden.shape[axis] - 1, 1], dim=axis)
    return torch.cat([earlier.flip(-1), last], dim=axis)


def _tokens_axis(hidden: Tensor) -> int:
    pairs = list(itertools.pairwise(hidden.shape))
    return pairs.index((PROBE_BATCH, PROBE_TOKENS)) + 1


def _computed_in(config: PretrainedConfig, dtype: torch.dtype) -> torch.dtype:
    """LLM.int8() computes in float16, and picks by all tokens the columns that it does not round to 8 bits."""
    is_int8 = getattr(getattr(config, "quantization_config", None), "load_in_8bit", False)
    return torch.float16 if is_int8 else dtype


def _alone(config: PretrainedConfig, trace: LayerTrace) -> LayerCall:
    """What the layer was called with, and an empty cache of one layer for the one it wrote to."""
    with sliced(config, [trace.index]):
        cache = DynamicCache(config=config)
    return LayerCall(
        {name: cache if isinstance(value, DynamicCache) else value for name, value in trace.arguments.items()}
    )


def _run_alone(config: PretrainedConfig, trace: LayerTrace, hidden: Tensor) -> Tensor:
    """The layer as it is, as the first one of its model."""
    return first(trace.layer(hidden.clone(), **_alone(config, trace).arguments))


def block_lines(block: Block) -> list[tuple[Branch, ...]]:
    """The lines of a whole block: one where it is parallel, one a sublayer where it is not."""
    lines = [part.branches for part in block.sublayers]
    return [tuple(itertools.chain(*lines))] if block.parallel else lines


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected magnitude; nan where either holds one."""
    scale = expected.float().abs().max().clamp_min(1e-30)
    return float((found.float() - expected.float()).abs().max() / scale)


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same additions may differ, relative to the largest value."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
