"""What an export says of itself: `notall.json` for programs, with all that its model
card says to people.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, shortened
from ..files import expanded
from ..integrity import MANIFEST, REDONE, check_manifest, read_manifest, write_manifest
from ..models.names import DEFAULT_MODEL, default_gguf
from ..plan import Fingerprint, Plan
from ..strict_json import Settings
from ..version import __version__
from .card import facts_of, write_new_card

if TYPE_CHECKING:
    from . import Export


@dataclass(frozen=True)
class Origin:
    """The original model of an export."""

    model: str
    revision: str  # what fixes its weights
    layers: int
    fingerprint: str
    weights: str  # the file that they were read from, or the index of them
    terms: Settings = field(default_factory=dict)  # its licence and language


class NotAsSkipped(UsageError):
    """What was written is another model than the original one that skips the plan."""


@dataclass(frozen=True)
class Verified:
    """An engine ran what was written, and answered as the original model that skips the
    plan.
    """

    by: str  # the engine and its release
    difference: float  # in `unit`
    most: float  # that is let pass
    unit: str

    def __str__(self) -> str:
        near = f"within {self.difference:.2g} {self.unit} (at most {self.most:.2g})"
        return (
            f"{self.by} answers as the skipped model does,"
            f" {near if self.difference else 'to the last bit'}"
        )

    def checked(self) -> "Verified":
        """Raises `NotAsSkipped` where it answered differently."""
        if not self.difference <= self.most:
            raise NotAsSkipped(
                f"{self.by} answers differently from the skipped model, by"
                f" {self.difference:.3g} {self.unit} (at most {self.most:.3g} was"
                " expected), so nothing was written; please report model and plan, or"
                " export without this comparison (--no-verify)"
            )
        return self


@dataclass(frozen=True)
class NotVerified:
    """What was written was not run."""

    not_run: str  # because

    def __str__(self) -> str:
        return f"not compared with the skipped model: {self.not_run}"


Verification = Verified | NotVerified
TURNED_OFF = NotVerified("it was turned off (--no-verify)")


def describe(
    folder: Path,
    export: "Export",
    verdict: Verification,
    measured: Mapping[str, object] | None = None,
    command: str = "",
) -> None:
    """Write the manifest, with what is known now that the weights are written, and the
    card; `command` is the one that wrote the export.
    """
    manifest = export.manifest | {
        "weight_bytes": {"dense": export.dense_bytes, "written": export.written_bytes},
        "verified": asdict(verdict),
        "card": facts_of(export, measured, command),
    }
    write_manifest(folder, manifest)
    write_new_card(folder, manifest, str(verdict))


def manifest_of(origin: Origin, plan: Plan, form: str) -> Settings:
    """The plan, twice: ours, and as transformers' `per_layer_config` has it. `form` is
    the model type written.
    """
    dense = asdict(origin)
    del dense["terms"]
    per_layer: Settings = {}
    for index in range(origin.layers):
        kinds = [kind for kind in ("attention", "mlp") if index in getattr(plan, kind)]
        if kinds:
            per_layer[str(index)] = {"skip": kinds}
    return {
        "notall": __version__,
        "model_type": form,
        "dense": dense,
        "plan": {**plan.indices, "note": plan.note},
        **_repair_of(plan),
        "per_layer_config": per_layer,
    }


def _repair_of(plan: Plan) -> Settings:
    """What made the weights of a repaired plan; empty for any other."""
    if not hasattr(plan, "history"):  # its class would import torch
        return {}
    steps = [
        {**step.model_dump(mode="json"), "told": str(step)} for step in plan.history
    ]
    refits = [
        refit.model_dump(mode="json", exclude={"record", "provenance"})
        for refit in plan.refits  # type: ignore[attr-defined]
    ]
    return {"repair": {"weights": plan.digest, "history": steps, "refits": refits}}


def exported_plan(folder: Path) -> Plan:
    """In the original model's numbers. Raises `UsageError` where it is damaged, or the
    plan has weights of its own.
    """
    manifest = check_manifest(folder, strict=False)
    found = plan_in(manifest, folder)
    if "repair" in manifest:
        repairs = weights_beside(folder)
        which = f", {shortened(repairs)}" if repairs else ""
        raise UsageError(
            f"{shortened(folder)} was exported from a repaired plan: give the folder of"
            f" the repair itself{which}"
        )
    # that of a GGUF file has no digest, and is equal to no model's
    shape = Fingerprint.parse(found.fingerprint)
    if shape and shape.digest:
        return found
    return found.model_copy(update={"fingerprint": None})


def plan_in(manifest: Settings, folder: Path) -> Plan:
    """What the export in `folder` skips, of the original model whose fingerprint it
    has; without the weights of a repair. Raises `UsageError` where that is damaged.
    """
    try:
        plan, fingerprint = manifest["plan"], manifest["dense"]["fingerprint"]
        return Plan(
            plan["attention"],
            plan["mlp"],
            prefill=plan.get("prefill", {}),
            note=plan.get("note"),
            fingerprint=fingerprint,
        )
    except (KeyError, TypeError, AttributeError, UsageError):
        raise UsageError(
            f"{MANIFEST} of {shortened(folder)} is damaged: {REDONE}"
        ) from None


def weights_beside(folder: Path) -> Path | None:
    """The folder of the repair that an export was made of, where it is next to it."""
    repairs = folder.with_name(f"{folder.name}.repaired")
    return repairs if repairs.is_dir() else None


def dense_of(folder: Path) -> str:
    """The name of the model that an export was made of; of the default model's file
    that of the default model.
    """
    try:
        name = str(read_manifest(folder)["dense"]["model"])
    except (UsageError, KeyError, TypeError):
        return "the hub id or folder that it was made of"
    default = default_gguf()
    return DEFAULT_MODEL if default and name == default.name else shortened(name)


def verification_of(manifest: Settings) -> Verification:
    """The verdict that a manifest holds."""
    found = manifest["verified"]
    return NotVerified(**found) if "not_run" in found else Verified(**found)


def check_verified(spec: str | Path) -> None:
    """Raise `UsageError` for an export that was never compared with the model that it
    was made of.
    """
    path = expanded(spec)
    folder = path.parent if path.is_file() else path
    if not (folder / MANIFEST).is_file() or "verified" not in (
        manifest := read_manifest(folder)
    ):
        return
    if isinstance(verdict := verification_of(manifest), NotVerified):
        problem = f"{shortened(path.name)} is an export that was {verdict}"
        raise UsageError(
            f"{problem}: export it again with that comparison, and measure what passes it"
        )
