"""The proof of what was read.

Every layer run again from its parts, alone, must give what it gave, and no MLP may look at other tokens.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from ..errors import UnsupportedModel
from .anatomy import Block
from .observation import Branch, LayerCall, LayerTrace, run_branches
from .slicing import numbered, sliced


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
