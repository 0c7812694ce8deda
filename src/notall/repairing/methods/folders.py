"""Repairs as folders that are given as a plan, by any method, and with a training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ...digests import digest_of
from ...entry_points import hash_of_source
from ...errors import UsageError
from ...plan import Plan, refuse_prefill
from ...progress import Progress, silent
from ...results.ledger import Ledger, read_records, working_in
from ...results.provenance import Provenance
from ...results.repairs import RefitRecord
from ...running import repair_folder
from ...running.repaired import RepairedPlan, refuse_run_time_maps
from ...structure.locating import locate
from ...structure.model_structure import base_model
from ..checkpoints import Checkpoints
from ..healing import Training, heal_by
from ..refitting import about_weights, repair
from .registry import method

# in the folder of a recovery: the repair that the training begins with
CLOSED_FORM = "closed-form"


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

    `settings` are what the repair was asked for with, for its records. Raises
    `UsageError` for a method that keeps matrices at run time, a folder of other work,
    and as the method does.
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
    way = method(name)
    about = about_weights(
        settings,
        base_model(model),
        plan,
        calibration=digest_of(batches)[:16],
        method=name,
        **hash_of_source(name),
    )
    with working_in(folder, "repair"):
        ledger = Ledger(folder, RefitRecord, about)
        if not repair_folder.refuse_other_work(folder, RefitRecord, plan):
            found = way.repair(model, plan, batches, progress)
            refuse_run_time_maps(found)
            found.check(structure)
            found.placed(model)  # refuses weights of another model
            ledger.add()  # its first line alone: where the weights come from
            repair_folder.keep_whole(
                folder, found.knowing(base_model(model)), repair_folder.ALL_WEIGHTS
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
    closed = folder / CLOSED_FORM
    start = training.clock()
    records = read_records(closed / RefitRecord.file, RefitRecord)
    earlier = sum(refit.seconds for refit in records)
    about = Provenance.of(settings, sequences=sum(map(len, batches)))
    repaired = repair_into(
        closed, name, model, training.plan, batches, about, progress, offload
    )
    spent = earlier + training.clock() - start
    healed = heal_by(
        replace(training, plan=repaired, spent=spent),
        model,
        out=folder,
        provenance=settings,
        progress=progress,
    )
    return repaired, healed
