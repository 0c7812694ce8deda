"""Ways to make up for what a plan skips. A new one is a function and a line in
`METHODS`, or is of `GROUP`.
"""

import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from ... import tensor_files
from ...digests import digest_of
from ...entry_points import explained, first_line, named, source_of, takes
from ...errors import UsageError, expect, shortened
from ...models.loading import dtype_name
from ...models.texts import checked
from ...plan import Plan, refuse_prefill
from ...progress import Progress, silent
from ...results.ledger import Ledger, read, working_in
from ...results.provenance import Provenance
from ...results.repairs import RefitRecord
from ...running import repair_folder, repaired
from ...running.repaired import LinearMap, RepairedPlan
from ...structure.locating import locate
from ...structure.model_structure import base_model
from ..checkpoints import Checkpoints
from ..healing import Training, heal
from ..refitting import about_weights, repair
from .published import Batches, ghosted, nbl, prune_and_comp, replaceme


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
    ) -> RepairedPlan: ...


@dataclass(frozen=True)
class Repair:
    """A repair by name. `adds` describes what it adds at run time, in a table."""

    repair: RepairFunction
    description: str
    adds: str = "nothing"


# The names of these two before `notall.plugins` had them.
Method, Repairing = Repair, RepairFunction


def refit(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> RepairedPlan:
    """What `notall repair` does."""
    return (
        repair(model, plan, batches, progress=progress)
        if plan
        else RepairedPlan.of(plan)
    )


METHODS = {
    "none": Repair(
        lambda model, plan, batches, progress=silent: RepairedPlan.of(plan),
        "the plan as it is",
    ),
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
GROUP = "notall.repair_methods"  # of entry points
# the folder, in that of a recovery, of the repair that the training begins with
CLOSED_FORM = "closed-form"
WEIGHT, PROMPT, MATRIX, BIAS = (
    "weight ",
    "prompt ",
    "matrix ",
    "bias ",
)  # tensors in a file of a repair


def method(way: str | Repair | RepairFunction) -> Repair:
    """The method of a name: none, refit, replaceme, prune-and-comp, nbl, ghosted, or
    `module:function`.

    Packages may add names of their own. A function of (model, plan, batches), with a
    fourth argument `progress` if it is to be told, becomes a method, described by its
    first line. Raises `UsageError` for a name that there is nothing of, and for a
    module that cannot be imported. A method of others that fails raises `UsageError` as
    well.
    """
    if isinstance(way, str):
        name, found = way, named(way, METHODS, GROUP, "repair")
    else:
        name, found = getattr(way, "__name__", "method"), way
    if isinstance(found, Repair):
        return (
            found
            if found in METHODS.values()
            else replace(found, repair=_guarded(name, found.repair))
        )
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
        more = {"progress": progress} if by_name else {}
        with explained(f"the repair {name}"):
            last = () if by_name or takes(function, 3) else (progress,)
            found = function(model, plan, there, *last, **more)
        expect(
            found,
            RepairedPlan,
            "back a RepairedPlan (docs/add-repair.md) from the repair"
            f" {shortened(name)}",
        )
        return found

    return guarded


def kept_repair(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> tuple[RepairedPlan, float]:
    """`plan` repaired by the method `name`, and the CPU seconds that took; kept in
    `folder`, which is one model's.
    """

    def make() -> tensor_files.TensorsAndNotes:
        start = time.process_time()
        found = method(name).repair(model, plan, batches, progress)
        tensors = {WEIGHT + path: weight for path, weight in found.weights.items()}
        tensors |= {
            PROMPT + path: weight for path, weight in found.prompt_weights.items()
        }
        for where, one in found.maps.items():
            tensors |= {MATRIX + where: one.matrix} | (
                {} if one.bias is None else {BIAS + where: one.bias}
            )
        return tensors, {"seconds": str(time.process_time() - start)}

    method(name)  # imports it
    spelt = name.replace(":", "-").replace("/", "-")
    stem = "-".join([spelt, *(digest[:8] for digest in source_of(name).values())])
    if stem != spelt and any(
        not old.name.startswith(stem) for old in folder.glob(f"{spelt}-*")
    ):
        raise UsageError(
            f"{folder} has repairs by {name} as it was before it changed: choose"
            " another --out"
        )
    key = [plan.indices, dtype_name(base_model(model)), digest_of(batches)[:16]]
    tensors, notes = tensor_files.cached_tensors(folder, stem, key, make)

    def named(kind: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(kind): tensor
            for name, tensor in tensors.items()
            if name.startswith(kind)
        }

    maps = {
        where: LinearMap(matrix, named(BIAS).get(where))
        for where, matrix in named(MATRIX).items()
    }
    weights = {"weights": named(WEIGHT), "prompt_weights": named(PROMPT)}
    return RepairedPlan.of(plan, **weights, maps=maps), float(notes["seconds"])


def repair_into(
    folder: Path | None,
    name: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    settings: Provenance | Mapping[str, object],
    progress: Progress = silent,
    offload: Path | None = None,
) -> RepairedPlan:
    """`plan` repaired by the method `name`, as a folder that is given as a plan; at
    once where it is there.
    """
    if name == "refit":
        return repair(
            model,
            plan,
            batches,
            offload=offload,
            out=folder,
            provenance=settings,
            progress=progress,
        )
    if folder is None:
        raise UsageError(f"--repair {name} keeps its weights: give --out")
    structure = locate(base_model(model))
    plan.check(structure)
    refuse_prefill(plan, f"a repair by {name}")
    way, how = method(name), {"calibration": digest_of(batches)[:16], "method": name}
    about = about_weights(settings, base_model(model), plan, **how, **source_of(name))
    with working_in(folder, "repair"):
        ledger = Ledger(folder, RefitRecord, about)
        if not repair_folder.refuse_other_work(folder, RefitRecord, plan):
            found = way.repair(model, plan, batches, progress)
            repaired.refuse_maps(found)
            found.check(structure)
            found.placed(model)  # refuses weights of another model
            ledger.add()  # its first line alone: where the weights come from
            repair_folder.keep_whole(
                folder, found.knowing(base_model(model)), repair_folder.WHOLE
            )
        kept = RepairedPlan.load(folder)
        kept.check_replaced(base_model(model))
        return kept


def recover(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    training: Training,
    batches: Sequence[Tensor],
    settings: Provenance | Mapping[str, object],
    progress: Progress = silent,
    offload: Path | None = None,
) -> tuple[RepairedPlan, RepairedPlan]:
    """A plan repaired by the method `name` on `batches`, and that healed by `training`.

    `folder` is that of a healing, whose records begin with the skipped model; it holds
    the repair in `CLOSED_FORM`. Repeating the call resumes an interrupted run, and the
    CPU seconds of what is there are in the record. Raises `UsageError` and
    `UnsupportedModel` as `repair` and `heal` do.
    """
    training.check(base_model(model))
    Checkpoints.of(folder).refuse_others()
    clock, closed = training.clock, folder / CLOSED_FORM
    start = clock()
    earlier = sum(
        refit.seconds for refit in read(closed / RefitRecord.file, RefitRecord)
    )
    about = Provenance.of(settings, sequences=sum(map(len, batches)))
    found = repair_into(
        closed, name, model, training.plan, batches, about, progress, offload
    )
    given = (model, found, training.batches, training.held_out, training.config)
    spent = earlier + clock() - start
    return found, heal(
        *given,
        out=folder,
        provenance=settings,
        progress=progress,
        spent=spent,
        clock=clock,
    )
