"""What an export says of itself: `notall.json` for programs, a model card for
people.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..encodings import printable
from ..errors import UsageError, shortened
from ..files import expanded
from ..integrity import MANIFEST, REDONE, check_manifest, read_manifest, write_manifest
from ..models.names import DEFAULT_MODEL, default_gguf
from ..plan import Fingerprint, Plan, several
from ..results.repairs import LEAST_REFIT_GAIN
from ..strict_json import Settings
from ..version import __version__

if TYPE_CHECKING:
    from . import Export

logger = logging.getLogger(__name__)

# Of a card: what its title adds to the model's name, what becomes of what is skipped,
# and the head of its table.
OF_EVERY_TOKEN = (
    "without some of its sublayers",
    "What is left out is in no file, takes no time and holds no cache.",
    "left out of these layers of the original model, from 0",
)
OF_PROMPTS = (
    "whose prompts skip some of its sublayers",
    "All of its weights are here.",
    "skipped by a prompt's tokens in these layers, from 0",
)


@dataclass(frozen=True)
class Origin:
    """The original model of an export."""

    model: str
    revision: str  # what fixes its weights
    layers: int
    fingerprint: str
    weights: str  # the file that they were read from, or the index of them
    card: Path | None = None  # its own model card


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
) -> None:
    """Write the manifest, with what is known now that the weights are written, and the
    card.
    """
    weights = {"dense": export.dense_bytes, "written": export.written_bytes}
    known = {"weight_bytes": weights, "verified": asdict(verdict)}
    write_manifest(folder, {**export.manifest, **known})
    card = _card(export, verdict, measured)
    (folder / "README.md").write_text(card, encoding="utf-8")


def manifest_of(origin: Origin, plan: Plan, form: str) -> Settings:
    """The plan, twice: ours, and as transformers' `per_layer_config` has it. `form` is
    the model type written.
    """
    dense = asdict(origin)
    del dense["card"]
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


def plan_of(folder: Path) -> Plan:
    """In the original model's numbers. Raises `UsageError` where it is damaged, or the
    plan has weights of its own.
    """
    manifest = check_manifest(folder, strict=False)
    try:
        plan, fingerprint = manifest["plan"], manifest["dense"]["fingerprint"]
        skipped = {
            "attention": plan["attention"],
            "mlp": plan["mlp"],
            "prefill": plan.get("prefill", {}),
        }
        is_repaired = "repair" in manifest
        found = Plan(**skipped, note=plan.get("note"))
    except (KeyError, TypeError, AttributeError, UsageError):
        raise UsageError(
            f"{MANIFEST} of {shortened(folder)} is damaged: {REDONE}"
        ) from None
    if is_repaired:
        repairs = weights_beside(folder)
        which = f", {shortened(repairs)}" if repairs else ""
        raise UsageError(
            f"{shortened(folder)} was exported from a repaired plan: give the folder of"
            f" the repair itself{which}"
        )
    # that of a GGUF file has no digest, and is equal to no model's
    shape = Fingerprint.parse(fingerprint)
    if shape and shape.digest:
        return found.model_copy(update={"fingerprint": str(fingerprint)})
    return found


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


def verdict_of(manifest: Settings) -> Verification:
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
    if isinstance(verdict := verdict_of(manifest), NotVerified):
        problem = f"{shortened(path.name)} is an export that was {verdict}"
        raise UsageError(
            f"{problem}: export it again with that comparison, and measure what passes it"
        )


def _card(
    export: "Export", verdict: Verification, measured: Mapping[str, object] | None
) -> str:
    """What was left out of which model, how to run it, and what was measured. Keeps the
    original model's licence.
    """
    from huggingface_hub import ModelCardData

    manifest = export.manifest
    dense, plan = manifest["dense"], manifest["plan"]
    # A hub id is linked to; a folder's name would link to someone else's model.
    base = {"base_model": dense["model"]} if "/" in dense["model"] else {}
    data = ModelCardData(tags=["notall", "pruned"], **_terms(export.origin.card) | base)
    in_prompt = plan.get("prefill")
    skips = in_prompt or plan
    rows = [
        (name, ", ".join(map(str, skips[name.lower()])) or "none")
        for name in ("attention", "MLP")
    ]
    title, note, head = OF_PROMPTS if in_prompt else OF_EVERY_TOKEN
    model, revision = literal(dense["model"]), literal(dense["revision"])
    sections = [
        f"# {model} {title}",
        (
            f"Written by notall {manifest['notall']} from {model} ({revision}), which"
            f" has {several(dense['layers'], 'layer')}. {note}"
        ),
        _table(("sublayer", head), rows),
    ]
    if plan["note"]:
        sections.append(f"Plan: {literal(plan['note'])}.")
    if "repair" in manifest:
        own_keys = export.own_keys if in_prompt else None
        sections += _on_repair(manifest["repair"], own_keys)
    sections += [export.use, f"Check: {verdict}."]
    if measured:
        rows = []
        for name, value in measured.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append((literal(name), literal(shown)))
        sections += ["## Measured", _table(("what", "value"), rows)]
    card = f"---\n{data}\n---\n\n" + "\n\n".join(sections) + "\n"
    return "\n".join(map(printable, card.split("\n")))  # notes are anyone's


def _on_repair(repair: Settings, own_keys: str | None) -> Iterator[str]:
    """That weights are not the original model's, by what they were made, and what is
    left of the error.
    """
    steps = "; then ".join(literal(step["told"]) for step in repair["history"])
    made = f" They were {steps}." if steps else ""
    yield "## Repaired"
    if own_keys:
        yield f"{own_keys}{made}"
    else:
        yield (
            "The remaining weights are repaired: some of them are not the original"
            f" model's.{made}"
        )
    refit = [one for one in repair["refits"] if one["ridge"] is not None]
    mended = [one for one in refit if one["left"] <= 1 - LEAST_REFIT_GAIN]
    rows = [
        (literal(" ".join(one["sublayers"])), f"{one['left']:.1%}") for one in mended
    ]
    if refit:
        yield (
            f"{len(rows)} of {several(len(refit), 'refit step')} left at most"
            f" {1 - LEAST_REFIT_GAIN:.0%} of the error."
        )
    if rows:
        yield _table(
            (
                "refit, in the original model's numbers",
                "error left on text that it was not fitted to",
            ),
            rows,
        )


def literal(text: object) -> str:
    """`text` as Markdown shows it as it is, and not as HTML or other markup: it may be
    anyone's.
    """
    return re.sub(r"[\\`*<>\[\]&|]", r"\\\g<0>", " ".join(str(text).split()))


def _terms(dense_card: Path | None) -> Settings:
    """What the original model's card says of its licence and language: words, or lists
    of words.
    """
    from huggingface_hub import metadata_load

    if dense_card is None:
        return {}
    try:
        known = metadata_load(dense_card) or {}
    except Exception:  # whatever YAML makes of it
        logger.warning(
            "%s of the original model is damaged: look its licence up, and add it",
            dense_card.name,
        )
        return {}
    found = {
        name: known.get(name)
        for name in ("license", "license_name", "license_link", "language")
    }
    lists = {
        name: value if isinstance(value, list) else [value]
        for name, value in found.items()
    }
    return {
        name: found[name]
        for name, words in lists.items()
        if words and all(isinstance(w, str) for w in words)
    }


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)
    )
