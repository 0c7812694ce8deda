"""Ghosted Layers: a matrix at each cut that takes the stream to where it was, kept at run time (arXiv 2605.15491)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...progress import Progress, silent, tracked
from ...records.plan import Plan
from ...running.repaired import LinearMap, RepairedPlan
from .lines import DenseRun, gaps_of, least_squares

RIDGE = 1e-6  # what its repository adds to X'X


@torch.no_grad()
def ghosted(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """x becomes x (I + X^+ D): X is the dense stream before a gap and D what the gap adds to it.

    X^+ = (X'X + 1e-6 I)^-1 X', in float64, as in its repository's `recovery.py`. One matrix a gap, as the paper has
    for layers that are cut together; there is no bias.
    """
    dense = DenseRun(model, plan, batches)
    maps = {}
    for gap in tracked(gaps_of(dense.anatomy, plan), "fitting maps over the gaps", progress):
        before, behind = dense.stream.before(gap.start, gap.end)
        found = least_squares(before, [to.double() - at for at, to in zip(before, behind)], ridge=RIDGE)
        maps[gap.name] = LinearMap(found.to(dense.dtype))
    return RepairedPlan.of(plan, maps=maps)
