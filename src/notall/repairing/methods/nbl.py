"""Neural Block Linearization: a linear map in place of what is skipped, kept at run time (arXiv 2505.21077)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...progress import Progress, silent, tracked
from ...records.plan import Plan
from ...running.repaired import LinearMap, RepairedPlan
from .lines import DenseRun, gaps_of, least_squares


@torch.no_grad()
def nbl(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """The linear minimum mean-square estimator: W = C_yx C_xx^-1, b = E[y] - W E[x], of the dense model.

    x is the stream before an attention and y what it adds, as its repository's layers run: no norm stands before W.
    A skipped MLP gets a map as well, and a block that is skipped whole one for both, as in the paper's Block NBL.
    A least-squares fit with a bias is the same estimator.
    """
    dense = DenseRun(model, plan, batches)
    maps = {}
    for gap in tracked(gaps_of(dense.anatomy, plan, by_block=True), "fitting maps to what is skipped", progress):
        before, behind = dense.stream.before(gap.start, gap.end)
        found = least_squares(before, [to.double() - at for at, to in zip(before, behind)], biased=True).to(dense.dtype)
        maps[gap.name] = LinearMap(found[:, :-1].contiguous(), found[:, -1].contiguous())
    return RepairedPlan.of(plan, maps=maps)
