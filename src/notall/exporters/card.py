"""The model card of an export: what its manifest says, for people, and what records say
of it, for people and for hubs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..encodings import printable
from ..errors import UsageError, shortened
from ..files import write_whole, writing
from ..plan import several
from ..results.repairs import LEAST_REFIT_GAIN
from ..strict_json import Settings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from . import Export

CARD = "README.md"
# What the title adds to the model's name, what becomes of what is skipped, the head of
# the table, and a tag for hubs.
OF_EVERY_TOKEN = (
    "without some of its sublayers",
    "What is left out is in no file, takes no time and holds no cache.",
    "left out of these layers of the original model, from 0",
    "pruned",
)
OF_PROMPTS = (
    "whose prompts skip some of its sublayers",
    "All of its weights are here.",
    "skipped by a prompt's tokens in these layers, from 0",
    "prefill-only",
)
# Of the hub's four (adapter, finetune, merge, quantized); none is for pruned models.
RELATION = "finetune"
# Around the part that records fill, so that it can be written again.
BEGIN, END = "<!-- notall: results -->", "<!-- notall: end of results -->"
RESULTS = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
# The argument by which a figure of ours is known among others of the metadata.
ORIGINAL = "original"


@dataclass(frozen=True)
class Results:
    """What was measured of an export: paragraphs and tables in Markdown, and figures as
    the metadata of the hub has them, each with the `ORIGINAL` model's.
    """

    sections: Sequence[str]
    figures: "Sequence[EvalResult]" = ()


def facts_of(
    export: "Export", measured: Mapping[str, object] | None, command: str
) -> Settings:
    """What the manifest says for the card alone, so that it can be written again."""
    shown = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in (measured or {}).items()
    }
    facts: Settings = {
        "library": export.library,
        "terms": export.origin.terms,
        "use": export.use,
        "own_keys": export.own_keys,
        "measured": shown,
        "command": command,
    }
    return {name: value for name, value in facts.items() if value}


def write_new_card(folder: Path, manifest: Settings, check: str) -> None:
    """Write the card of an export from its manifest; `check` says how it was compared
    with the original model.
    """
    from huggingface_hub import ModelCard

    text = f"---\n{_metadata(manifest)}\n---\n\n{_body(manifest, check)}\n"
    # notes are anyone's
    card = ModelCard("\n".join(map(printable, text.split("\n"))))
    write_whole(folder / CARD, str(card))


def write_results(folder: Path, results: Results) -> None:
    """Put results into the card of an export, in place of earlier ones; all else stays
    as it is.

    Raises `UsageError` for a card that is damaged, or cannot be written.
    """
    from huggingface_hub import ModelCardData

    path = folder / CARD
    card = _read(path)
    assert isinstance(card.data, ModelCardData)
    part = "\n\n".join((BEGIN, *results.sections, END))
    part = "\n".join(map(printable, part.split("\n")))
    if RESULTS.search(card.text):
        card.text = RESULTS.sub(lambda _: part, card.text, count=1)
    else:
        card.text = f"\n{card.text.strip()}\n\n{part}\n"
    others = [
        one
        for one in card.data.eval_results or ()
        if ORIGINAL not in (one.metric_args or {})
    ]
    card.data.eval_results = [*others, *results.figures] or None
    card.data.model_name = card.data.model_name or folder.resolve().name
    with writing(f"the card {shortened(path)}", "choose another folder"):
        write_whole(path, str(card))


def _read(path: Path) -> "ModelCard":
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(path)
    except Exception:  # whatever YAML makes of it
        raise UsageError(
            f"{shortened(path)} is damaged: repair what is between its --- lines, or"
            " delete it, and it is written anew"
        ) from None


def _metadata(manifest: Settings) -> str:
    """The card's YAML: what hubs sort and link models by."""
    from huggingface_hub import ModelCardData

    about, model = manifest.get("card", {}), manifest["dense"]["model"]
    tags = ["notall", _kind_of(manifest)[3]]
    # A hub id is linked to; a folder's name would link to someone else's model.
    base = {}
    if "/" in model:
        base = {"base_model": model, "base_model_relation": RELATION}
    library = {"library_name": about["library"]} if "library" in about else {}
    data = ModelCardData(tags=tags, **about.get("terms", {}), **library, **base)
    return data.to_yaml()


def _kind_of(manifest: Settings) -> tuple[str, str, str, str]:
    return OF_PROMPTS if manifest["plan"].get("prefill") else OF_EVERY_TOKEN


def _body(manifest: Settings, check: str) -> str:
    """What was left out of which model, how to run it, what was measured as it was
    written, and the command that wrote it.
    """
    dense, plan, about = manifest["dense"], manifest["plan"], manifest.get("card", {})
    skips = plan.get("prefill") or plan
    rows = [
        (name, ", ".join(map(str, skips[name.lower()])) or "none")
        for name in ("attention", "MLP")
    ]
    title, note, head, _ = _kind_of(manifest)
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
        own_keys = about.get("own_keys") if plan.get("prefill") else None
        sections += _on_repair(manifest["repair"], own_keys)
    sections += [about["use"]] if "use" in about else []
    sections.append(f"Check: {check}.")
    if "measured" in about:
        measured = [
            (literal(name), literal(shown)) for name, shown in about["measured"].items()
        ]
        sections += ["## Measured", _table(("what", "value"), measured)]
    if "command" in about:
        sections += ["## How it was made", _fenced(about["command"])]
    return "\n\n".join(sections)


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


def _fenced(command: str) -> str:
    """A command in a fence that it cannot close, on one line."""
    longest = max(map(len, re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{printable(command)}\n{fence}"


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(
        f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows)
    )
