"""A repair as a folder: weights step by step while it is under way, and the plan when it is whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UsageError, shortened
from ..models.folders import own_file
from ..records.healing import HealRecord
from ..records.ledger import Ledger, header_of, read
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.repair import RefitRecord, RepairStep
from ..running.repaired import RepairedPlan

PLAN, HEALED, WHOLE = "plan.json", "healed.safetensors", "weights.safetensors"
BEFORE = "before"  # the history of what was healed
HISTORY = TypeAdapter(tuple[RepairStep, ...])


class Kept:
    """What was refit so far. The plan file comes last, so that a folder with one is whole."""

    def __init__(self, folder: Path, about: Provenance) -> None:
        self.folder = folder
        self.refits = Ledger(folder, RefitRecord, about)

    def weights(self, refit: RefitRecord) -> dict[str, Tensor]:
        """By their paths in the dense model; none where the step was left alone."""
        return _weights(self.folder, refit)

    def add(self, refit: RefitRecord, weights: dict[str, Tensor]) -> None:
        """Weights first: a line says that they are there."""
        if weights:
            save_file({path: weight.cpu() for path, weight in weights.items()}, self.folder / _file(refit))
        self.refits.add(refit)

    def has(self, steps: Iterable[tuple[str, ...]]) -> bool:
        """Whether all of these steps are done with, by the names of their sublayers."""
        return all((names,) in self.refits for names in steps)

    def finish(self, plan: Plan) -> RepairedPlan:
        """The plan with all that was refit."""
        weights = {path: weight for refit in self.refits for path, weight in self.weights(refit).items()}
        plan.save(self.folder / PLAN)
        return RepairedPlan.of(plan, weights=weights, refits=tuple(self.refits))


def step_of(by: str, about: Provenance) -> RepairStep:
    """What made weights, as a plan's `history` has it. Raises `ValueError` for `texts` that say no name and hash."""
    told_elsewhere = ("plan", "fingerprint", BEFORE)
    settings = {name: value for name, value in about.what.items() if name not in told_elsewhere}
    return RepairStep.model_validate({**settings, "by": by})


def keep_whole(folder: Path, plan: RepairedPlan, name: str) -> None:
    """Write a plan and its weights, all in the one file `name`: `HEALED` where they were trained, else `WHOLE`."""
    save_file({path: weight.cpu().contiguous() for path, weight in plan.weights.items()}, folder / name)
    plan.save(folder / PLAN)


def load_repaired(folder: Path) -> RepairedPlan:
    """The plan that `notall repair` or `notall heal` wrote to `folder`, with its weights.

    Raises `UsageError` for a folder of something else, one that is damaged, and a repair that was not finished.
    """
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
    weights = {path: weight for refit in refits for path, weight in _weights(folder, refit).items()}
    history = _history(folder)
    for name in (WHOLE, HEALED):
        weights |= _read(folder, name) if own_file(folder, name) else {}
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


def _file(refit: RefitRecord) -> str:
    return f"{'+'.join(refit.sublayers)}.safetensors"


def _weights(folder: Path, refit: RefitRecord) -> dict[str, Tensor]:
    return {} if refit.ridge is None else _read(folder, _file(refit))


def _read(folder: Path, name: str) -> dict[str, Tensor]:
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
