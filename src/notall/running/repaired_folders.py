"""A repaired plan as a folder: the plan, its weights, what made them, and, once all of that is there, its seal.

The seal, `finished.json`, says which plan that is and what each file holds. A folder without one was not finished, and
one that holds anything else is not believed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from ..errors import UsageError, shortened
from ..files import own_file
from ..plan import Plan
from ..results.ledger import Ledger, header_of, read
from ..results.provenance import Provenance
from ..results.record import Record
from ..results.repairs import HealRecord, RefitRecord, RepairStep
from .repaired import RepairedPlan, refuse_maps
from .tensor_files import read_tensors, write_tensors

PLAN, SEAL, HEALED, WHOLE = "plan.json", "finished.json", "healed.safetensors", "weights.safetensors"
BEFORE = "before"  # the history of what was healed
HISTORY = TypeAdapter(tuple[RepairStep, ...])
FIX = "delete the folder, and repair the plan again"


class Seal(BaseModel):
    """What a finished folder holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: dict[str, list[int]]
    files: dict[str, str]  # their digests: of records the SHA-256, of weights as `tensor_files.digest_of_tensors`


def step_of(by: str, about: Provenance) -> RepairStep:
    """What made weights, as a plan's `history` has it. Raises `ValueError` for `texts` that say no name and hash."""
    told_elsewhere = ("plan", "fingerprint", BEFORE)
    settings = {name: value for name, value in about.what.items() if name not in told_elsewhere}
    return RepairStep.model_validate({**settings, "by": by})


def keep_whole(folder: Path, plan: RepairedPlan, name: str) -> None:
    """Write a plan and its weights, all in the one file `name`: `HEALED` where they were trained, else `WHOLE`."""
    finish(folder, plan.unrepaired, {name: write_tensors(folder / name, plan.weights)})


def finish(folder: Path, plan: Plan, weights: Mapping[str, str]) -> None:
    """Write the plan and then the seal: the records are there, and the `weights`, by file their digests."""
    records = {
        kind.file: _sha256(folder / kind.file) for kind in (RefitRecord, HealRecord) if (folder / kind.file).is_file()
    }
    plan.save(folder / PLAN)
    seal, part = Seal(plan=plan.indices, files=records | dict(weights)), folder / f"{SEAL}.part"
    try:
        part.write_text(seal.model_dump_json(indent=1) + "\n", encoding="utf-8")
        part.replace(folder / SEAL)
    except OSError as error:
        raise UsageError(
            f"cannot write {shortened(folder / SEAL)}: {error.strerror}; make room, and run again"
        ) from None


def refuse_other_work(folder: Path, kind: type[Record], plan: Plan) -> bool:
    """Whether the command that writes `kind` has finished `plan` in `folder`.

    Raises `UsageError` where another command's plan lies there, or another plan.
    """
    seal = _seal_of(folder)
    if seal and kind.file not in seal.files:
        raise UsageError(f"{shortened(folder)} holds a repaired plan that others wrote: choose another folder")
    if (folder / PLAN).is_file() and Plan.load(folder / PLAN).indices != plan.indices:
        raise UsageError(
            f"{shortened(folder)} holds another plan, in {PLAN}: choose another folder, or move that file away"
        )
    return seal is not None


def save_repaired(folder: Path, plan: RepairedPlan) -> None:
    """Write a plan with its weights and its history to a new folder, from which `load_repaired` reads it.

    Raises `UsageError` for a plan that keeps matrices at run time, and a folder that holds something.
    """
    refuse_maps(plan)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{shortened(folder)} holds something already: choose a new folder for plan and weights")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {shortened(folder)}: {error.strerror}; choose another folder") from None
    if plan.history:
        *before, last = plan.history
        told = last.model_dump(mode="json", exclude={"by"}, exclude_unset=True)
        about = Provenance(what={**told, BEFORE: [step.model_dump(mode="json") for step in before]})
        if last.by == "repair":
            Ledger(folder, RefitRecord, about).add(*plan.refits)
        else:
            Ledger(folder, HealRecord, about).add()
    keep_whole(folder, plan, WHOLE)


def load_repaired(folder: Path) -> RepairedPlan:
    """The plan that `notall repair` or `notall heal` wrote to `folder`, with its weights.

    Raises `UsageError` for a folder of something else, one that does not hold what was written, and a repair that was
    not finished.
    """
    if not folder.exists():
        raise UsageError(f"there is no folder {shortened(folder)}: give one that `notall repair` wrote")
    if folder.is_file():
        raise UsageError(f"{shortened(folder)} is a file: notall.Plan.load reads a plan without weights")
    seal = _seal_of(folder)
    if seal is None:
        begun = [kind for kind in (RefitRecord, HealRecord) if (folder / kind.file).is_file()]
        raise UsageError(
            f"what {shortened(folder)} holds was not finished: run the same `notall {begun[0].commands[0]}` again, and "
            "it goes on"
            if begun
            else f"{shortened(folder)} is no repaired plan: give a plan file, or a folder that `notall repair` wrote"
        )
    _refuse_foreign_weights(folder, seal)
    for name in seal.files:
        if name.endswith(".jsonl") and _sha256(_file(folder, name)) != seal.files[name]:
            raise UsageError(f"{name} of {shortened(folder)} is damaged (it is not what was written): {FIX}")
    plan = Plan.load(_file(folder, PLAN))
    if plan.indices != seal.plan:
        raise UsageError(f"{PLAN} of {shortened(folder)} is another plan than the one that was repaired: {FIX}")
    files = [name for name in seal.files if name.endswith(".safetensors")]
    weights = {path: one for name in files for path, one in read_weights(folder, name, seal.files[name]).items()}
    refits = tuple(read(folder / RefitRecord.file, RefitRecord))
    return RepairedPlan.of(plan, weights=weights, refits=refits, history=_history(folder))


def read_weights(folder: Path, name: str, digest: str) -> dict[str, Tensor]:
    """By their paths in the dense model. Raises `UsageError` for a file that is not there, and for a damaged one."""
    weights, _ = read_tensors(_file(folder, name), digest, fix=FIX)
    for path, weight in weights.items():
        if not weight.isfinite().all():
            raise UsageError(f"{path} in {name} of {shortened(folder)} has numbers that are not finite: {FIX}")
    return weights


def file_of(refit: RefitRecord) -> str:
    """What the weights of one step of a repair are in."""
    return f"{'+'.join(refit.sublayers)}.safetensors"


def _seal_of(folder: Path) -> Seal | None:
    file = own_file(folder, SEAL)
    try:
        return Seal.model_validate_json(file.read_bytes()) if file else None
    except (ValidationError, OSError):
        raise UsageError(f"{SEAL} of {shortened(folder)} is damaged: {FIX}") from None


def _refuse_foreign_weights(folder: Path, seal: Seal) -> None:
    """Nothing reads them; but who put them there thinks otherwise."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith((WHOLE, HEALED, "attn.", "mlp.")) and path.name not in seal.files:
            raise UsageError(
                f"{shortened(folder)} holds {shortened(path.name)}, which is no part of its repair: move that file away"
            )


def _file(folder: Path, name: str) -> Path:
    file = own_file(folder, name)
    if file is None:
        raise UsageError(f"{shortened(folder)} lacks {shortened(name)}: {FIX}")
    return file


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
