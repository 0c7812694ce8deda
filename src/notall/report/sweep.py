"""The grid of a sweep: table, figure and page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..experiments.next_commands import next_command, on_the_text
from ..experiments.similarity import SimilarityRecord
from ..experiments.sweep import ContinuationsRecord, InPromptLoss, SweepRecord
from ..extras import FIGURES, installed
from ..files import write_whole
from ..plan import KIND_NAMES, several
from ..results.facts import CONFIGURED, DELTA_NLL, FOOTPRINT, PEAK, QUALITY, SPEEDUPS
from ..results.provenance import behind, place_of, windows_in_words
from ..results.table import Column, as_latex, inherited, table, with_error, within
from ..strict_json import Settings
from .folder import Folder
from .parts import Figure, PageParts, Sample, Section
from .plans import plans_page, points_of, results
from .similarity import similarity_section

if TYPE_CHECKING:
    from altair import LayerChart


IN_PROMPT_LOSS: Column[InPromptLoss] = with_error(
    "NLL added in the prompt alone",
    lambda one: (one.in_prompt_delta_nll, one.in_prompt_delta_nll_se),
    unit=DELTA_NLL.unit,
)


COLUMNS: tuple[Column[SweepRecord], ...] = (
    *inherited(SweepRecord, CONFIGURED),
    *within((DELTA_NLL,), lambda one: one.quality),
    *within((IN_PROMPT_LOSS,), lambda one: one.in_prompt),
    *within(SPEEDUPS, lambda one: one.times),
    *within(QUALITY[1:4], lambda one: one.quality),
    *within(FOOTPRINT, lambda one: one.footprint),
    *within((PEAK,), lambda one: one.times),
)


def in_prompt_note(records: Sequence[SweepRecord]) -> str:
    """How to read the column of what the prompt alone skips; "" without one."""
    prompts = [one.in_prompt.prompt_tokens for one in records if one.in_prompt]
    if not prompts:
        return ""
    return (
        "In the prompt alone: the same sublayers skipped for the prompt's tokens alone,"
        f" keys and values kept, nothing repaired{behind(prompts[0])} of each window. "
    )


HOW_TO_READ = (
    (
        "Lower right is better. Labels: share of the layers skipped. Bars: standard"
        " error; quartiles of the speedup."
    ),
    "Grey line: the front, where nothing measured is both faster and better.",
)


def write_sweep(records: Sequence[SweepRecord], out: Path, model: str) -> None:
    """Write the grid of `model` as `out/table.md`, .tex and .csv, which has every digit;
    and with the extra `report` the trade-off drawn.
    """
    rows = table("sweep", COLUMNS, records)
    caption = _caption(records, model, rows.legend)
    texts = {
        "csv": rows.csv,
        "tex": as_latex(rows, caption=caption, label="sweep"),
        "md": f"{caption}\n\n{rows.markdown()}",
    }
    for suffix, text in texts.items():
        write_whole(out / f"table.{suffix}", text)
    if installed(*FIGURES):
        from ..charts.style import framed, save

        title = f"Quality lost against decode speedup, {model}"
        save(framed(_drawn(records), title, HOW_TO_READ), out / "tradeoff")


def _caption(records: Sequence[SweepRecord], model: str, legend: str) -> str:
    about = records[0].provenance
    assert about
    workload = about.what["workload"]
    counts = {
        "prompt_tokens": "prompt token",
        "generation_tokens": "new token",
        "rounds": "round",
    }
    timed = ", ".join(several(workload[name], noun) for name, noun in counts.items())
    place = place_of(about.where.get("machine"), versions=False)
    return (
        f"{model} without its deepest attentions, MLPs or blocks, beside the original"
        f" model: quality on {windows_in_words(about.what)}. Fraction: of the layers;"
        " where nothing is said, the last layer is skipped too. NLL and KL in nats a"
        f" token. {legend} {in_prompt_note(records)}Times of {timed};"
        f" {about.what['dtype']} on {place}."
    )


def _drawn(records: Sequence[SweepRecord]) -> "LayerChart":
    """A point for each configuration with a loss, but for the dense one."""
    from ..charts.losses import Titles, tradeoff
    from ..charts.style import KIND_COLOURS

    def look(one: SweepRecord) -> Settings:
        last = "kept" if one.keep_last else "skipped too"
        share = {"count": one.fraction, "label": f"{one.fraction:.0%}"}
        return {"colour": KIND_NAMES[one.variant], "shape": last, **share}

    points = [
        point for point in points_of(records, look) if point.colour in KIND_COLOURS
    ]
    return tradeoff(
        points,
        KIND_COLOURS,
        Titles("skipped", "last layer", DELTA_NLL.titled),
        paths=True,
    )


def page_parts(folder: Folder) -> PageParts:
    """The grid, its trade-off, similarity by depth, and what plans say."""
    records, similarity = folder.of(SweepRecord), folder.of(SimilarityRecord)
    sections = [similarity_section(similarity)] if similarity else []
    if not records:
        return PageParts(sections=tuple(sections), similarity=similarity)
    sections.insert(0, _results(records))
    originals = [one.footprint for one in records if one.variant == "dense"]
    dense = originals[0] if originals else None
    found = plans_page(folder, records, sections, _find_better, dense)
    return replace(found, similarity=similarity, samples=_samples(folder))


def _results(records: Sequence[SweepRecord]) -> Section:
    from ..charts.style import on_page

    figures = []
    if len(records) > 1:  # one point is no figure
        drawn, note = on_page(_drawn(records)), " ".join(HOW_TO_READ)
        figures.append(Figure(drawn, "quality lost against decode speedup", note=note))
    note = in_prompt_note(records).strip()
    return results(records, COLUMNS, range(len(records)), figures, note)


def _samples(folder: Folder) -> tuple[Sample, ...]:
    """How each plan continues each prompt."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for record in folder.of(ContinuationsRecord):
        for prompt, text in record.continuations.items():
            prompts.setdefault(prompt, []).append((record.name, text.strip()))
    return tuple(Sample(prompt, tuple(texts)) for prompt, texts in prompts.items())


def _find_better(folder: Folder, record: SweepRecord) -> tuple[str, str]:
    kind, text = record.variant, on_the_text(folder.provenance)
    count = len(record.plan.mlp if kind == "mlp" else record.plan.attention)
    command = next_command(
        "search", folder.model, skip=f"{kind}:{count}", **text, out="plan.json"
    )
    return "look for a better set of that size", command
