"""Linear maps over what is skipped, kept at run time: Neural Block Linearization and Ghosted Layers.

arXiv 2505.21077 and 2605.15491.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError
from ...plan import Plan
from ...progress import Progress, silent, tracked
from ...running.repaired import LinearMap, RepairedPlan
from ..least_squares import Moments
from ..streams import DenseRun, gaps_of

RIDGE = 1e-6  # what the repository of Ghosted Layers adds to X'X


@torch.no_grad()
def nbl(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """The linear minimum mean-square estimator: W = C_yx C_xx^-1, b = E[y] - W E[x], of the dense model.

    x is the stream before an attention and y what it adds, as its repository's layers run: no norm stands before W.
    A skipped MLP gets a map as well, and a block that is skipped whole one for both, as in the paper's Block NBL.
    A least-squares fit with a bias is the same estimator.
    """
    dense = DenseRun(model, plan, batches)
    maps = {}
    for gap in tracked(gaps_of(dense.structure, plan, by_block=True), "fitting maps to what is skipped", progress):
        before, behind = dense.stream.before(gap.start, gap.end)
        found = least_squares(before, [to.double() - at for at, to in zip(before, behind)], biased=True).to(dense.dtype)
        maps[gap.name] = LinearMap(found[:, :-1].contiguous(), found[:, -1].contiguous())
    return RepairedPlan.of(plan, maps=maps)


@torch.no_grad()
def ghosted(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """x becomes x (I + X^+ D): X is the dense stream before a gap and D what the gap adds to it.

    X^+ = (X'X + 1e-6 I)^-1 X', in float64, as in its repository's `recovery.py`. One matrix a gap, as the paper has
    for layers that are cut together; there is no bias.
    """
    dense = DenseRun(model, plan, batches)
    maps = {}
    for gap in tracked(gaps_of(dense.structure, plan), "fitting maps over the gaps", progress):
        before, behind = dense.stream.before(gap.start, gap.end)
        found = least_squares(before, [to.double() - at for at, to in zip(before, behind)], ridge=RIDGE)
        maps[gap.name] = LinearMap(found.to(dense.dtype))
    return RepairedPlan.of(plan, maps=maps)


def least_squares(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, ridge: float = 0.0, biased: bool = False
) -> Tensor:
    """argmin over C of sum |y - C x|^2 + ridge * |C|^2 in float64, (outputs, inputs), with a last column for a bias.

    Raises `UsageError` where tokens, (batch, tokens, channels) or (tokens, channels) each, are too few to tell.
    """
    like = inputs[0].new_empty(0).double()
    moments = Moments.none(inputs[0].shape[-1], outputs[0].shape[-1], biased, like)
    for given, wanted in zip(inputs, outputs):
        given, wanted = given.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        moments.add(given, wanted, given.new_ones(len(given)))
    found = moments.solve(ridge, alike=True)
    if found is None:
        raise UsageError(
            f"the calibration text is too short to tell a matrix of {inputs[0].shape[-1]} channels from others; "
            "give more of it, with --sequences"
        )
    return found
