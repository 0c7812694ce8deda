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
from .in_place import stubbed_layer
from .model_structure import Block
from .observation import PROBE_BATCH, PROBE_TOKENS, Branch, LayerCall, LayerTrace, as_given, first, run_branches, scaled
from .sharing import Sharing
from .slicing import cache_slots_freed, numbered, sliced

NOT_ITS_PARTS = (
    " differs from its recomposition by {error:.1e} of its largest value (expected at most {most:.0e}); it may count "
    "on its index or on what other layers leave behind"
)
NOT_LOCAL = (
    " looks at other tokens without a cache, or keeps a state elsewhere; expected that of a mixer that writes to the "
    "cache"
)


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
    _expect(trace, hidden, first(trace.answer), NOT_ITS_PARTS)
    for branch, stream in local:
        _prove_branch_local(config, trace, branch, stream)


def _prove_adds(config: PretrainedConfig, trace: LayerTrace, branch: Branch, residual: Tensor) -> None:
    """A module that is given the residual must add it, unchanged: its answer for none is less by just that."""
    *ops, last = branch.ops
    value = Branch(tuple(ops)).run(trace.layer, residual, _alone(config, trace))
    with_it = last.run(trace.layer, value, residual, _alone(config, trace)).view(residual.shape)
    without = last.run(trace.layer, value, torch.zeros_like(residual), _alone(config, trace)).view(residual.shape)
    said = f": {branch.modules[-1]} changes the residual stream that it is given; expected it to add to it"
    _expect(trace, without + residual, with_it, said, residual.dtype)


def _prove_branch_local(config: PretrainedConfig, trace: LayerTrace, branch: Branch, hidden: Tensor) -> None:
    said = f": {', '.join(branch.modules)} looks at other tokens without a cache; expected that of the attention alone"

    def run(given: Tensor) -> Tensor:
        return branch.run(trace.layer, given, _alone(config, trace)).view(given.shape)

    _prove_local(trace, hidden, run, said, _computed_in(config, hidden.dtype))


def prove_in_place(config: PretrainedConfig, trace: LayerTrace, block: Block, sharing: Sharing) -> None:
    """Run the layer in its place: as it is, with each sublayer silenced and left out, and without its mixer.

    So it depends on others only by what it was seen to read, stubs do what silence does, and the MLP is local.
    """
    elsewhere = [write.layer_idx for write in trace.cache_writes if write.layer_idx != trace.index]
    if elsewhere:
        raise UnsupportedModel(f"{_name(trace)} writes to the cache at {elsewhere[0]}; expected its own place")
    alone = _InPlace(config, trace, sharing)
    _compare(trace, alone.run(trace.layer, trace.hidden), first(trace.answer), "what it answers alone, in its place")
    mixer = block.attention
    for part in block.sublayers:
        assert part.stub is not None
        silent = alone.run(stubbed_layer(trace.layer, trace.index, scaled={part.stub: torch.zeros_like}), trace.hidden)
        stubbed = alone.run(stubbed_layer(trace.layer, trace.index, [part.stub]), trace.hidden, freed=part is mixer)
        _compare(trace, stubbed, silent, f"what it answers when {part.name} runs and adds nothing")
    assert mixer.stub is not None
    if not mixer.stub.is_layer:
        without = stubbed_layer(trace.layer, trace.index, [mixer.stub])
        _prove_local(trace, trace.hidden, lambda hidden: alone.run(without, hidden, freed=True))
    elif not trace.cache_writes and not sharing.reads_others(trace.index):
        _prove_local(trace, trace.hidden, lambda hidden: alone.run(trace.layer, hidden))


def prove_layer(config: PretrainedConfig, trace: LayerTrace) -> None:
    """A layer that goes or stays as a whole answers the same alone, as the first one of its model."""
    with numbered(trace.layer, 0):
        _compare(trace, _run_alone(config, trace, trace.hidden), first(trace.answer), "what it answers alone")
        if not trace.cache_writes:
            _prove_local(trace, trace.hidden, lambda hidden: _run_alone(config, trace, hidden))


def prove_causal(config: PretrainedConfig, trace: LayerTrace, sharing: Sharing | None = None) -> None:
    """What a layer makes of a token must not hang on those that follow, as in an encoder: tried on the last one.

    `sharing` is that of layers that stay in place.
    """
    axis, changed = _tokens_axis(trace.hidden), _flipped(trace.hidden, last=True)
    if sharing:
        found = _InPlace(config, trace, sharing).run(trace.layer, changed)
    else:
        with numbered(trace.layer, 0):
            found = _run_alone(config, trace, changed)
    # the first one is padding in the probe, where attention may look anywhere
    found, expected = (answer.narrow(axis, 1, PROBE_TOKENS - 2) for answer in (found, first(trace.answer)))
    if not relative_error(found, expected) <= tolerance(_computed_in(config, expected.dtype)):
        raise UnsupportedModel(
            f"{_name(trace)} looks at the tokens that follow, as encoders do; notall skips sublayers of causal "
            "language models: choose another one"
        )


def _prove_local(
    trace: LayerTrace,
    hidden: Tensor,
    run: Callable[[Tensor], Tensor],
    said: str = NOT_LOCAL,
    computed_in: torch.dtype | None = None,
) -> None:
    """What is no mixer must make the same of the last token whatever came before it."""
    found, expected = (last_token(run(given)) for given in (_flipped(hidden, last=False), hidden))
    _expect(trace, found, expected, said, computed_in)


def _compare(trace: LayerTrace, found: Tensor, expected: Tensor, what: str) -> None:
    said = f" differs by {{error:.1e}} of its largest value from {what} (expected at most {{most:.0e}})"
    _expect(trace, found, expected, said)


def _expect(
    trace: LayerTrace, found: Tensor, expected: Tensor, said: str, computed_in: torch.dtype | None = None
) -> None:
    """Raise `UnsupportedModel`, which says this of the layer, where more than rounding is between both."""
    error, most = relative_error(found, expected), tolerance(computed_in or expected.dtype)
    if not error <= most:
        told = said.format(error=error, most=most)
        raise UnsupportedModel(f"{_name(trace)}{told}. notall leaves this model alone: choose another one")


def _name(trace: LayerTrace) -> str:
    return f"layer {trace.index} ({type(trace.layer).__name__})"


@dataclass(frozen=True)
class _InPlace:
    """Runs a layer, or a twin of it, as it was called, in a cache where no other layer has left anything."""

    config: PretrainedConfig
    trace: LayerTrace
    sharing: Sharing

    def run(self, layer: nn.Module, hidden: Tensor, freed: bool = False) -> Tensor:
        with cache_slots_freed(self.config, [self.trace.index] if freed else []):
            cache = DynamicCache(config=self.config)
        given = {
            name: cache if isinstance(value, DynamicCache) else self._unread_zeroed(value)
            for name, value in as_given(self.trace.given).items()
        }
        return first(layer(hidden.clone(), **given))

    def _unread_zeroed(self, value: Any) -> Any:
        """What others lend and this layer was not seen to read makes no difference."""
        if isinstance(value, Tensor):
            unread = self.sharing.source_of(value) and not self.sharing.is_read(value, self.trace.index)
            return torch.zeros_like(value) if unread else value
        if isinstance(value, MutableMapping):
            for name, held in value.items():
                value[name] = self._unread_zeroed(held)
        return tuple(map(self._unread_zeroed, value)) if type(value) is tuple else value


def last_token(hidden: Tensor) -> Tensor:
    """(..., width), of hidden states whose batch and tokens are those of the probe, in this order."""
    return hidden.select(_tokens_axis(hidden), -1)


def _flipped(hidden: Tensor, last: bool) -> Tensor:
    """With other states of the last token, or of all earlier ones."""
    earlier, end = hidden.split([PROBE_TOKENS - 1, 1], dim=_tokens_axis(hidden))
    return torch.cat([earlier, end.flip(-1)] if last else [earlier.flip(-1), end], dim=_tokens_axis(hidden))


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
