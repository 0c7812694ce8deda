"""Ways to make up for what a plan skips: ours, and the published ones to measure it against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError, shortened
from ...progress import Progress, silent
from ...records.plan import Plan
from ...running.repaired import RepairedPlan
from ..refitting import repair
from .ghosted import ghosted
from .nbl import nbl
from .prune_and_comp import prune_and_comp
from .replaceme import replaceme


class Repairing(Protocol):
    """A plan with weights, or with matrices that stay, from calibration text: token ids, (batch, tokens) each."""

    def __call__(
        self, model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent
    ) -> RepairedPlan: ...


@dataclass(frozen=True)
class Method:
    repair: Repairing
    description: str
    adds: str = "nothing"  # at run time


def none(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """The plan as it is."""
    return RepairedPlan.of(plan)


def refit(model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent) -> RepairedPlan:
    """What `notall repair` does."""
    return repair(model, plan, batches, progress=progress) if plan else RepairedPlan.of(plan)


METHODS = {
    "none": Method(none, "the plan as it is"),
    "refit": Method(refit, "notall's own: kept output projections refit to the dense stream, one gap ahead"),
    "replaceme": Method(replaceme, "a linear map over each gap, folded into the projection before it; 2505.02819"),
    "prune-and-comp": Method(prune_and_comp, "the stream's magnitude restored behind each gap; 2507.18212"),
    "nbl": Method(nbl, "a linear map in place of what is skipped; 2505.21077", "a matrix and a bias each"),
    "ghosted": Method(ghosted, "a linear map at each gap; 2605.15491", "a matrix each"),
}


def method(name: str) -> Method:
    """Raises `UsageError` for a name that there is not."""
    if name not in METHODS:
        raise UsageError(f"there is no repair {shortened(name)!r}: choose {', '.join(METHODS)}")
    return METHODS[name]
