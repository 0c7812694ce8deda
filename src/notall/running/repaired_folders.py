"""A repaired plan as a folder: the plan, its weights, and what made them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UsageError, shortened
from ..models.folders import own_file
from ..models.paths import open_to_others
from ..records.healing import HealRecord
from ..records.ledger import Ledger, header_of, read
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.repair import RefitRecord, RepairStep
from .repaired import RepairedPlan, refuse_maps

PLAN, HEALED, WHOLE = "plan.json", "healed.safetensors", "weights.safetensors"
BEFORE = "before"  # the history of what was healed
HISTORY = TypeAdapter(tuple[RepairStep, ...])


def step_of(by: str, about: Provenance) -> RepairStep:
    """What made weights, as a plan's `history` has it. Raises `ValueError` for `texts` that say no name and hash."""
    told_elsewhere = ("plan", "fingerprint", BEFORE)
    settings = {name: value for name, value in about.what.items() if name not in told_elsewhere}
    return RepairStep.model_validate({**settings, "by": by})


def keep_whole(folder: Path, plan: RepairedPlan, name: str) -> None:
    """Write a plan and its weights, all in the one file `name`: `HEALED` where they were trained, else `WHOLE`."""
    write_weights(folder / name, plan.weights)
    plan.unrepaired.save(folder / PLAN)


def save_repaired(folder: Path, plan: RepairedPlan) -> None:
    """Write a plan with its weights and its history to a new folder, from which `load_repaired` reads it.

    Raises `UsageError` for a plan that keeps matrices at run time, and a folder that holds something.
    """
    refuse_maps(plan)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{shortened(folder)} holds something already: choose a new folder for plan and weights")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if plan.history:
            *before, last = plan.history
            told = last.model_dump(mode="json", exclude={"by"}, exclude_unset=True)
            about = Provenance(what={**told, BEFORE: [step.model_dump(mode="json") for step in before]})
            if last.by == "repair":
                Ledger(folder, RefitRecord, about).add(*plan.refits)
            else:
                Ledger(folder, HealRecord, about).add()
        keep_whole(folder, plan, WHOLE)
    except OSError as error:
        raise UsageError(f"cannot write to {shortened(folder)}: {error.strerror}; choose another folder") from None


def load_repaired(folder: Path) -> RepairedPlan:
    """The plan that `notall repair` or `notall heal` wrote to `folder`, with its weights.

    Raises `UsageError` for a folder of something else, one that is damaged, and a repair that was not finished.
    """
    if not folder.exists():
        raise UsageError(f"there is no folder {shortened(folder)}: give one that `notall repair` wrote")
    if folder.is_file():
        raise UsageError(f"{shortened(folder)} is a file: notall.Plan.load reads a plan without weights")
    if not (folder / PLAN).is_file():
        begun = [kind for kind in (RefitRecord, HealRecord) if (folder / kind.file).is_file()]
        raise UsageError(
            f"what {shortened(folder)} holds was not finished: run the same `notall {begun[0].commands[0]}` again, and "
            "it goes on"
            if begun
            else f"{shortened(folder)} is no repaired plan: give a plan file, or a folder that `notall repair` wrote"
        )
    plan = Plan.load(folder / PLAN)
    refits = read(folder / RefitRecord.file, RefitRecord)
    whole = own_file(folder, WHOLE) is not None
    parts = [WHOLE] if whole else [file_of(refit) for refit in refits if refit.ridge is not None]
    names = [*parts, *([HEALED] if own_file(folder, HEALED) else [])]
    weights = {path: weight for name in names for path, weight in read_weights(folder, name).items()}
    history = _history(folder)
    return RepairedPlan.of(plan, weights=weights, refits=tuple(refits), history=history)


def _history(folder: Path) -> tuple[RepairStep, ...]:
    """As the headers say."""
    found: list[RepairStep] = []
    for by, kind in (("repair", RefitRecord), ("heal", HealRecord)):
        header = header_of(folder / kind.file)
        try:
            for about in [header.provenance] if header and header.provenance else ():
                found += HISTORY.validate_python(about.what.get(BEFORE, ()))
                found.append(step_of(by, about))
        except ValidationError as error:
            field = ".".join(map(str, error.errors()[0]["loc"]))
            raise UsageError(
                f"the first line of {kind.file} in {shortened(folder)} is damaged ({shortened(field)}): delete the "
                f"folder, and {by} the plan again"
            ) from None
    return tuple(found)


def file_of(refit: RefitRecord) -> str:
    """What the weights of one step of a repair are in."""
    return f"{'+'.join(refit.sublayers)}.safetensors"


def write_weights(file: Path, weights: Mapping[str, Tensor]) -> None:
    """By their paths in the dense model."""
    save_file({path: weight.cpu().contiguous() for path, weight in weights.items()}, file)
    open_to_others(file)  # safetensors makes files that only their owner can read


def read_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """By their paths in the dense model. Raises `UsageError` for a file that is not there, and for a damaged one."""
    file = own_file(folder, name)
    if file is None:
        raise UsageError(f"{shortened(folder)} lacks {name}: delete the folder, and repair the plan again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UsageError(
            f"{name} of {shortened(folder)} is damaged ({shortened(error)}): delete the folder, and repair the plan "
            "again"
        ) from None
