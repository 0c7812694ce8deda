"""Repairs by name: notall's own, the published ones, and those of others."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ...entry_points import explained_plugin, first_line, named, takes
from ...errors import UsageError, expect, shortened
from ...models.texts import checked
from ...plan import Plan
from ...progress import Progress, silent
from ...running.repaired import RepairedPlan
from ..refitting import repair
from .published import Batches, ghosted, nbl, prune_and_comp, replaceme

GROUP = "notall.repair_methods"  # of entry points


class RepairFunction(Protocol):
    """A function that makes a `RepairedPlan` of a plan and calibration text.

    It returns new weights of what the plan keeps, or matrices that stay at run time.

    `batches` are token ids, (batch, tokens) each, on the device where the model takes
    its inputs.
    """

    def __call__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        batches: Sequence[Tensor],
        progress: Progress = silent,
    ) -> RepairedPlan:
        """Raises `UsageError` for a plan or a model that it cannot repair."""


@dataclass(frozen=True)
class Repair:
    """A repair by name. `adds` describes what it adds at run time, in a table."""

    repair: RepairFunction
    description: str
    adds: str = "nothing"


def refit(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> RepairedPlan:
    """What `notall repair` does."""
    if not plan:
        return RepairedPlan.of(plan)
    return repair(model, plan, batches, progress=progress)


def unrepaired(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> RepairedPlan:
    """The plan as it is."""
    return RepairedPlan.of(plan)


METHODS = {
    "none": Repair(unrepaired, "the plan as it is"),
    "refit": Repair(
        refit,
        "notall's own: kept output projections refit to the dense stream, one gap"
        " ahead",
    ),
    "replaceme": Repair(
        replaceme,
        "a linear map over each gap, folded into the projection before it; 2505.02819",
    ),
    "prune-and-comp": Repair(
        prune_and_comp, "the stream's magnitude restored behind each gap; 2507.18212"
    ),
    "nbl": Repair(
        nbl,
        "a linear map in place of what is skipped; 2505.21077",
        "a matrix and a bias each",
    ),
    "ghosted": Repair(ghosted, "a linear map at each gap; 2605.15491", "a matrix each"),
}


def method(way: str | Repair | RepairFunction) -> Repair:
    """The method of a name: none, refit, replaceme, prune-and-comp, nbl, ghosted, or
    `module:function`.

    Packages may add names of their own. A function of (model, plan, batches), with a
    fourth argument `progress` if it reports progress, becomes a method, described by
    its first line. Raises `UsageError` for a name that there is nothing of, and for a
    module that cannot be imported. A method of others that fails raises `UsageError` as
    well.
    """
    if isinstance(way, str):
        name, found = way, named(way, METHODS, GROUP, "repair")
    else:
        name, found = getattr(way, "__name__", "method"), way
    if isinstance(found, Repair):
        if found in METHODS.values():
            return found
        return replace(found, repair=_guarded(name, found.repair))
    if not inspect.isfunction(found):
        raise UsageError(
            f"{shortened(name)} is no repair: give a function of a model, a plan and"
            " batches, or a Repair"
        )
    return Repair(_guarded(name, found), first_line(found))


def _guarded(name: str, function: RepairFunction) -> RepairFunction:
    """A repair of others, whose faults are one line. Raises `UsageError` for one that
    takes other arguments.
    """
    by_name = "progress" in inspect.signature(function).parameters
    if not takes(function, 3) and not takes(function, 4):
        raise UsageError(
            f"{shortened(name)} is no repair: let it take (model, plan, batches) or"
            " progress too"
        )

    def guarded(
        model: PreTrainedModel,
        plan: Plan,
        batches: Batches,
        progress: Progress = silent,
    ) -> RepairedPlan:
        there = [*checked(batches, model)]
        with explained_plugin(f"the repair {name}"):
            if by_name:
                found = function(model, plan, there, progress=progress)
            elif takes(function, 3):
                found = function(model, plan, there)
            else:
                found = function(model, plan, there, progress)
        expect(
            found,
            RepairedPlan,
            "back a RepairedPlan (docs/add-repair.md) from the repair"
            f" {shortened(name)}",
        )
        return found

    return guarded
