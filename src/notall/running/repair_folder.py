"""The folder of a repaired plan: the plan, its weights, the records of what made them,
and at last `finished.json`, a seal with the digest of each file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from ..digests import digest_of
from ..errors import UsageError, shortened
from ..files import contents, own_file, write_whole, writing
from ..integrity import sealed, unsealed
from ..plan import Plan
from ..results.ledger import header_of
from ..results.provenance import Provenance
from ..results.record import Record
from ..results.repairs import HealRecord, RefitRecord, RepairStep
from ..strict_json import Settings
from ..tensor_files import (
    Tensors,
    read_tensors,
    refuse_replacing,
    write_tensors,
)

PLAN = "plan.json"
SEAL = "finished.json"
HEALED = "healed.safetensors"  # all weights, where they were trained
ALL_WEIGHTS = "weights.safetensors"  # all weights, where they were written at once
WEIGHT_STEMS = (
    ALL_WEIGHTS,
    HEALED,
    "attn.",
    "mlp.",
)  # how names of files of weights begin
BEFORE = "before"  # the history of what was healed
HISTORY = TypeAdapter(tuple[RepairStep, ...])
# Commands that write weights, and their records.
MADE_BY: dict[str, type[Record]] = {"repair": RefitRecord, "heal": HealRecord}
FIX = "delete the folder, and repair the plan again"
# How names of tensors begin that are not a weight in the original model's place:
REPLACED = "replaced "  # a sample of the weight that is replaced
IN_PROMPT = "in the prompt "  # a weight that is used for a prompt's tokens alone


class PlanWithWeights(Protocol):
    """What is written of a `RepairedPlan`; see there."""

    @property
    def unrepaired(self) -> Plan:
        """What it skips, alone."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """By path in the original model."""

    @property
    def prompt_weights(self) -> Mapping[str, Tensor]:
        """By path, for a prompt's tokens alone."""

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        """Samples of the weights that are replaced, by path."""


class Seal(BaseModel, frozen=True, extra="forbid"):
    """What a finished folder holds."""

    plan: Settings  # its `indices`
    # Digests by file: of records the SHA-256, of weights as `digest_of_tensors`.
    files: dict[str, str]


def step_of(by: str, about: Provenance) -> RepairStep:
    """What made weights, as a plan's `history` has it. Raises `ValueError` where its
    `texts` have no name and hash.
    """
    settings = {
        name: value
        for name, value in about.what.items()
        if name not in ("plan", "fingerprint", BEFORE)
    }
    return RepairStep.model_validate({**settings, "by": by})


def keep_whole(folder: Path, plan: PlanWithWeights, name: str) -> None:
    """Write a plan and its weights, all in the one file `name`: `HEALED` where they
    were trained, else `ALL_WEIGHTS`.
    """
    seal(folder, plan.unrepaired, {name: write_weights(folder / name, plan)})


def seal(folder: Path, plan: Plan, weights: Mapping[str, str]) -> None:
    """Write the plan and then the seal: the records are there, and the `weights`, by
    file their digests.
    """
    plan.save(folder / PLAN)
    records = [folder / kind.file for kind in MADE_BY.values()]
    written = [*(path for path in records if path.is_file()), folder / PLAN]
    digests = {path.name: digest_of([path.read_bytes()]) for path in written}
    whole = Seal(plan=plan.indices, files=digests | dict(weights))
    content = sealed(whole.model_dump_json(indent=1).encode()) + b"\n"
    path = folder / SEAL
    with writing(shortened(path), "make room, and run again"):
        write_whole(path, content)


def refuse_other_work(folder: Path, kind: type[Record], plan: Plan) -> bool:
    """Whether the command that writes `kind` has finished `plan` in `folder`. Raises
    `UsageError` for others' work.
    """
    seal = seal_of(folder)
    is_begun = (folder / kind.file).is_file()
    if not is_begun:  # else what is there is read, and checked
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.startswith(WEIGHT_STEMS):
                refuse_replacing(path)
    if seal and kind.file not in seal.files:
        raise UsageError(
            f"{shortened(folder)} holds a repaired plan that others wrote: choose"
            " another folder"
        )
    if (folder / PLAN).is_file() and Plan.load(folder / PLAN).indices != plan.indices:
        raise UsageError(
            f"{shortened(folder)} holds another plan, in {PLAN}: choose another folder,"
            " or move it away"
        )
    return seal is not None


def write_weights(path: Path, plan: PlanWithWeights) -> str:
    """Write a plan's weights and samples to a file. Returns its `digest_of_tensors`.

    Raises `UsageError` as `write_tensors` does.
    """
    prompt = {IN_PROMPT + where: one for where, one in plan.prompt_weights.items()}
    replaced = {REPLACED + where: one for where, one in plan.replaced.items()}
    return write_tensors(path, {**plan.weights, **prompt, **replaced})


class FileWeights(NamedTuple):
    """What a file holds of a repaired plan, by path."""

    weights: Tensors
    prompt_weights: Tensors
    replaced: Tensors  # samples


def read_weights(folder: Path, name: str, digest: str) -> FileWeights:
    """What `write_weights` wrote. Raises `UsageError` for an absent or damaged file."""
    tensors, _ = read_tensors(file_in(folder, name), digest, fix=FIX)
    replaced, prompt = _taken(tensors, REPLACED), _taken(tensors, IN_PROMPT)
    for path, weight in (*tensors.items(), *prompt.items()):
        if not weight.isfinite().all():
            raise UsageError(
                f"{path} in {name} of {shortened(folder)} has numbers that are not"
                f" finite: {FIX}"
            )
    return FileWeights(tensors, prompt, replaced)


def _taken(tensors: Tensors, prefix: str) -> Tensors:
    """Out of `tensors` those whose names begin so, without it."""
    return {
        name.removeprefix(prefix): tensors.pop(name)
        for name in [*tensors]
        if name.startswith(prefix)
    }


def refit_file(refit: RefitRecord) -> str:
    """The name of the file of a step's weights, such as `mlp.3.safetensors`."""
    return f"{'+'.join(refit.sublayers)}.safetensors"


def seal_of(folder: Path) -> Seal | None:
    """What a folder says of itself, where it was finished. Raises `UsageError` where
    that is damaged.
    """
    file = own_file(folder, SEAL)
    if file is None:
        return None
    try:
        return Seal.model_validate_json(unsealed(contents(file)) or b"")
    except (ValidationError, OSError):
        raise UsageError(f"{SEAL} of {shortened(folder)} is damaged: {FIX}") from None


def sealed_weights(folder: Path, seal: Seal) -> FileWeights:
    """As `read_weights`, of all files of a folder. Raises `UsageError` for files with
    such names that are not in the seal, too.
    """
    _refuse_unsealed(folder, seal)
    whole = FileWeights({}, {}, {})
    for name, digest in seal.files.items():
        if name.endswith(".safetensors"):
            part = read_weights(folder, name, digest)
            whole.weights.update(part.weights)
            whole.prompt_weights.update(part.prompt_weights)
            whole.replaced.update(part.replaced)
    return whole


def _refuse_unsealed(folder: Path, seal: Seal) -> None:
    """Raise `UsageError` for weights and records that the seal does not name. Nothing
    reads them, but who put them there thinks otherwise.
    """
    records = {kind.file for kind in MADE_BY.values()}
    for path in sorted(folder.iterdir()):
        is_weight = path.suffix == ".safetensors" and path.name.startswith(WEIGHT_STEMS)
        if (is_weight or path.name in records) and path.name not in seal.files:
            raise UsageError(
                f"{shortened(folder)} holds {shortened(path.name)}, which is no part of"
                " its repair: move that file away"
            )


def history_in(folder: Path) -> tuple[RepairStep, ...]:
    """What made the weights of a folder, in order. Raises `UsageError` for a damaged
    record.
    """
    history: list[RepairStep] = []
    for by, kind in MADE_BY.items():
        header = header_of(folder / kind.file)
        if header is None or not (about := header.provenance):
            continue
        try:
            history += HISTORY.validate_python(about.what.get(BEFORE, ()))
            history.append(step_of(by, about))
        except ValidationError:
            raise UsageError(
                f"line 1 of {kind.file} in {shortened(folder)} is damaged: {FIX}"
            ) from None
    return tuple(history)


def file_in(folder: Path, name: str) -> Path:
    """The file of that name. Raises `UsageError` where there is none."""
    if (file := own_file(folder, name)) is None:
        raise UsageError(f"{shortened(folder)} lacks {shortened(name)}: {FIX}")
    return file
