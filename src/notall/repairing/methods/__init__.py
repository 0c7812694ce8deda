"""Ways to make up for what a plan skips: ours, and the published ones to measure it against.

A new one is one function, and a line in `METHODS`; of another package, an entry point of the group
`notall.repair_methods`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError, expect, shortened
from ...plan import Plan
from ...plugins import explained, named, positional
from ...progress import Progress, silent
from ...running.repaired import RepairedPlan
from ..refitting import repair
from .linear_maps import ghosted, nbl
from .prune_and_comp import prune_and_comp
from .replaceme import replaceme


class Repairing(Protocol):
    """A function that answers a plan with weights, or with matrices that stay, from calibration text.

    `batches` are token ids, (batch, tokens) each.
    """

    def __call__(
        self, model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent
    ) -> RepairedPlan: ...


@dataclass(frozen=True)
class Method:
    """A way to make up for what a plan skips; `adds` says what it adds at run time, for people."""

    repair: Repairing
    description: str
    adds: str = "nothing"


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


GROUP = "notall.repair_methods"  # of entry points


def method(way: str | Method | Repairing) -> Method:
    """The method of a name: none, refit, replaceme, prune-and-comp, nbl, ghosted, or `module:function`.

    Packages may add names of their own. A function of (model, plan, batches), with a fourth argument `progress` if
    it is to be told, becomes a method. Raises `UsageError` for a name that there is nothing of, and for a
    module that cannot be imported. What fails in a method of others is a `UsageError` too, when it is called.
    """
    if not isinstance(way, str):
        return _made(getattr(way, "__name__", "method"), way)
    return METHODS.get(way) or _made(way, named(way, METHODS, GROUP, "repair"))


def _made(name: str, found: Any) -> Method:
    """A method; a function becomes one, described by its first line."""
    if isinstance(found, Method):
        return found if found in METHODS.values() else replace(found, repair=_guarded(name, found.repair))
    if not inspect.isfunction(found):
        raise UsageError(f"{shortened(name)} is no repair: give a function of a model, a plan and batches, or a Method")
    return Method(_guarded(name, found), (inspect.getdoc(found) or "").partition("\n")[0].rstrip("."))


def _guarded(name: str, function: Repairing) -> Repairing:
    """A repair of others, whose faults are one line. Raises `UsageError` for one that takes other arguments."""
    taken = positional(function)
    by_name = "progress" in inspect.signature(function).parameters
    if 3 not in taken and 4 not in taken:
        raise UsageError(f"{shortened(name)} is no repair: let it take (model, plan, batches) or progress too")

    def guarded(
        model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent
    ) -> RepairedPlan:
        with explained(f"the repair {name}"):
            named_so = {"progress": progress} if by_name else {}
            fourth = () if by_name or 3 in taken else (progress,)
            found = function(model, plan, batches, *fourth, **named_so)
        expect(found, RepairedPlan, f"back a RepairedPlan from the repair {shortened(name)}")
        return found

    return guarded
