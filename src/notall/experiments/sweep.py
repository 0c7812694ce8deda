"""The paper's experiment: three variants, three fractions, with and without the last layer, beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

from ..extras import FIGURES, installed
from ..options import WORKLOAD, Workload
from ..plan import KIND_NAMES
from ..progress import Progress, Stages, silent
from ..results.facts import (
    CONFIGURED,
    DELTA_NLL,
    FOOTPRINT,
    KL,
    PEAK,
    PERPLEXITY,
    SPEEDUPS,
    TOP1,
    Configured,
    Footprint,
    Quality,
    Times,
)
from ..results.latex import as_latex
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance, place_of, windows_in_words
from ..results.record import Record, is_number
from ..results.table import Column, as_csv, inherited, table, within
from .costs import read_costs
from .driver import (
    SAMPLE_TOKENS,
    HeldScores,
    SaidRecord,
    Subject,
    continuations,
    fields_of,
    first_sequences,
    leave_one_out,
    removable,
    scored_as,
    similarity_by_depth,
    time_plan,
)
from .folder import Folder
from .shown import Card, Figure, Sample, Section, Shown, Step
from .similarity import SimilarityRecord, similarity_section
from .verdict import fastest_card, first_shown, judged, mark_usable, next_command, on_the_text

if TYPE_CHECKING:
    from pathlib import Path

    from altair import LayerChart

    from ..charts.losses import Point

DECODED_TOKEN = 20  # what a decoded token takes, in prefilled ones


class SweepRecord(Record, Configured):
    """One configuration, measured."""

    file = "results.jsonl"
    commands = ("sweep",)
    key_fields = ("variant", "fraction", "keep_last")

    record: Literal["sweep"] = "sweep"
    quality: Quality
    times: Times
    footprint: Footprint


COLUMNS: tuple[Column[SweepRecord], ...] = (
    *inherited(SweepRecord, CONFIGURED),
    *within((DELTA_NLL,), lambda one: one.quality),
    *within(SPEEDUPS, lambda one: one.times),
    *within((KL, TOP1, PERPLEXITY), lambda one: one.quality),
    *within(FOOTPRINT, lambda one: one.footprint),
    *within((PEAK,), lambda one: one.times),
)


# --- the run ----------------------------------------------------------------------------------------------------------


def sweep(subject: Subject, workload: Workload = WORKLOAD, progress: Progress = silent) -> list[SweepRecord]:
    """Evaluate and time the paper's grid on the subject's text; one record a configuration.

    Writes to the folder: a record as soon as a configuration is done; the scores of every sequence; the similarity of
    each layer and kind; what leaving out each sublayer alone costs on the first two sequences; and, given a tokenizer,
    what some of the plans say. Called again on the same folder it goes on where it stopped. Raises `UsageError` when
    the folder holds the results of other settings or of another command, is in use, or cannot be written.
    """
    from ..choosing.criteria.data_free import paper_grid
    from ..running.footprint import footprint

    workload.check(subject.model)
    rows = paper_grid(subject.structure)
    asked = {"workload": asdict(workload), "seed": subject.seed, "batches": subject.digest}
    about = Provenance.of(subject.provenance, **asked)
    with working_in(subject.out, "sweep"):
        done = Ledger(subject.out, SweepRecord, about)
        steps = _Steps(progress, subject, rows, workload)
        held = HeldScores(subject, about)
        held.measure({scored_as(row.plan): row.plan for row in rows}, "evaluating all configurations", steps.scoring)
        for row, telling in zip(rows, steps.timing):
            if row.configuration not in done or not row.describes(done[row.configuration]):
                record = SweepRecord(
                    **fields_of(row),
                    quality=held.quality(scored_as(row.plan)),
                    times=time_plan(subject, row.plan, workload, _naming(telling, row)),
                    footprint=footprint(subject.model, row.plan),
                    provenance=about,
                )
                done.add(record)
            telling(1, 1, f"timed {row.name}")
        records = [done[row.configuration] for row in rows]
        similarity_by_depth(subject, about, steps.comparing)
        leave_one_out(subject, about, steps.leaving_out)
        if subject.tokenizer:
            continuations(subject, least_lost(records), about, steps.sampling)
        return records


def least_lost(records: Sequence[SweepRecord]) -> list[SweepRecord]:
    """Of each variant the record with the smallest loss, in the order of the grid."""
    best: dict[str, SweepRecord] = {}
    for record in sorted(records, key=lambda record: record.quality.nll if is_number(record.quality.nll) else 1e300):
        best.setdefault(record.variant, record)
    return [record for record in records if record is best[record.variant]]


def _naming(progress: Progress, row: Configured) -> Progress:
    return lambda done, total, doing: progress(done, total, f"timing {row.name}")


class _Steps:
    """The stages of a sweep, each as many steps as it prefills tokens."""

    def __init__(self, progress: Progress, subject: Subject, rows: Sequence[Configured], workload: Workload) -> None:
        structure, tokens = subject.structure, subject.tokens
        sublayers = len(structure.sublayers)
        kept = len(rows) * sublayers - sum(len(row.plan) for row in rows)
        scoring = tokens * kept / sublayers / 4  # about a quarter of the work is left by sharing
        per_run = workload.concurrency * (workload.prompt_tokens + DECODED_TOKEN * workload.generation_tokens)
        timing = 2 * (workload.rounds + 1) * per_run
        few = sum(batch.numel() for batch in first_sequences(subject.batches))
        leaving_out = few * len(removable(structure)) / 2  # half of it is shared
        sampling = 4 * DECODED_TOKEN * SAMPLE_TOKENS if subject.tokenizer else 0
        stages = Stages(progress, scoring + len(rows) * timing + tokens + leaving_out + sampling)
        self.scoring = stages.stage(scoring)
        self.timing = [stages.stage(timing) for _ in rows]
        self.comparing = stages.stage(tokens)
        self.leaving_out = stages.stage(leaving_out)
        self.sampling = stages.stage(sampling)


# --- files ------------------------------------------------------------------------------------------------------------


def write_sweep(records: Sequence[SweepRecord], out: Path, model: str) -> None:
    """Its table as table.md, .tex and .csv, which has every digit; and with the extra `report` the trade-off drawn."""
    lines = table("sweep", COLUMNS, records)
    caption = (
        f"{model} without its deepest attentions, MLPs or blocks, beside the dense model: quality on {_text(records)}. "
        f"Fraction: of the layers; where nothing is said, the last layer is skipped too. NLL and KL in nats a token. "
        f"{lines.legend} {_times(records)}"
    )
    texts = {
        "csv": as_csv(records),
        "tex": as_latex(lines, caption=caption, label="sweep"),
        "md": f"{caption}\n\n{lines.markdown()}",
    }
    for suffix, text in texts.items():
        (out / f"table.{suffix}").write_text(text, encoding="utf-8")
    if installed(*FIGURES):
        from ..charts.style import framed, save

        save(framed(_drawn(records), f"Quality lost against decode speedup, {model}", HOW_TO_READ), out / "tradeoff")


HOW_TO_READ = (
    "Lower right is better. Labels: share of the layers skipped. Bars: standard error; quartiles of the speedup.",
    "Grey line: the front, where nothing measured is both faster and better.",
)


def _drawn(records: Sequence[SweepRecord]) -> LayerChart:
    from ..charts.losses import tradeoff
    from ..charts.style import KIND_COLOURS

    points = points_of(records)
    return tradeoff(points, KIND_COLOURS, colour="skipped", shape="last layer", lost=DELTA_NLL.titled, paths=True)


def points_of(records: Sequence[SweepRecord]) -> list[Point]:
    """A point for each configuration with a loss, but for the dense one; `plan` counts the records from 0."""
    from ..charts.losses import Point

    return [
        Point(
            record.name,
            record.quality.delta_nll,
            record.quality.delta_nll_se,
            record.times.speedup_decode,
            record.fraction,
            KIND_NAMES[record.variant],
            "kept" if record.keep_last else "skipped too",
            f"{record.fraction:.0%}",
            plan=number,
        )
        for number, record in enumerate(records)
        if record.variant != "dense" and is_number(record.quality.delta_nll)
    ]


def _text(records: Sequence[SweepRecord]) -> str:
    what = records[0].what
    return windows_in_words(what) if "length" in what else f"{records[0].quality.sequences} windows of text"


def _times(records: Sequence[SweepRecord]) -> str:
    """How and where, as far as that was written down."""
    about, timed = records[0].provenance, records[0].what.get("workload")
    if about is None:
        return ""
    where = f"{about.what.get('dtype')} on {place_of(about.where.get('machine'), versions=False)}"
    if not timed:
        return f"{where}."
    asked = "{prompt_tokens} prompt tokens, {generation_tokens} new ones, {rounds} rounds".format_map(timed)
    return f"Times of {asked}; {where}."


# --- on a page --------------------------------------------------------------------------------------------------------


def shown(folder: Folder) -> Shown:
    """What a page says of a sweep."""
    records, similarity = folder.of(SweepRecord), folder.of(SimilarityRecord)
    if not records:
        return Shown(sections=(similarity_section(similarity),) if similarity else (), similarity=similarity)
    dense = next((record for record in records if record.variant == "dense"), None)
    whole = dense.footprint if dense else None
    steps = tuple(Step(one.name, one.plan, one.quality, one.times, one.footprint, whole) for one in records)
    return Shown(
        message=judged(folder, records, then=lambda one: _found_better(folder, one), dense=whole),
        cards=tuple(_cards(records, dense)),
        steps=steps,
        first=first_shown(records),
        sections=(_results(records), *([similarity_section(similarity)] if similarity else [])),
        similarity=similarity,
        costs=read_costs(folder.path),
        samples=samples_of(folder.of(SaidRecord)),
    )


def _found_better(folder: Folder, record: SweepRecord) -> tuple[str, str]:
    kind = record.variant
    count = len(record.plan.mlp if kind == "mlp" else record.plan.attention)
    text = on_the_text(folder.provenance)
    command = next_command("search", folder.model, skip=f"{kind}:{count}", **text, out="plan.json")
    return "look for a better set of that size", command


def _results(records: Sequence[SweepRecord]) -> Section:
    from ..charts.style import on_page

    columns = mark_usable(COLUMNS, lambda one: one.quality if one.plan else None)
    figures = [
        Figure(on_page(_drawn(records)), "quality lost against decode speedup", note=" ".join(HOW_TO_READ))
        for _ in records[1:2]  # one point is no figure
    ]
    lines = table("results", columns, records)
    return Section("results", "Results", tuple(figures), lines, tuple(range(len(records))))


def _cards(records: Sequence[SweepRecord], dense: SweepRecord | None) -> list[Card]:
    """Of the dense model, of what loses least, of what is fastest of the usable, of the front."""
    from ..charts.losses import front

    known = [one for one in records if one.plan and is_number(one.quality.delta_nll)]
    if not dense or not known:
        return []
    least = min(known, key=lambda one: one.quality.delta_nll)
    points = [(one.times.speedup_decode.median, one.quality.delta_nll) for one in known]
    best = front([(1.0, 0.0), *points])
    on_front = [one.name.replace(", last layer kept", " kept") for one, point in zip(known, points) if point in best]
    step, millions = dense.times.decode_ms_per_token.median, dense.footprint.params / 1e6
    told = f"{step:.0f} ms a token, {millions:,.0f} million parameters"
    loses = f"{least.name}; decodes {least.times.speedup_decode.median:.2f}×"
    named = ", ".join(on_front[:5]) + (" …" if len(on_front) > 5 else "")
    return [
        Card("Dense model", PERPLEXITY.cell(dense.quality).text, PERPLEXITY.heading, told),
        fastest_card(known),
        Card("Loses least", f"{least.quality.delta_nll:+.2f}", "nats a token", loses),
        Card(
            "On the front",
            f"{len(on_front)} of {len(known)}",
            "plans",
            f"no other plan is both faster and better: {named}",
        ),
    ]


def samples_of(records: Sequence[SaidRecord]) -> tuple[Sample, ...]:
    """For each prompt what each plan says."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        for prompt, said in record.said.items():
            prompts.setdefault(prompt, []).append((record.name, said.strip()))
    return tuple(Sample(prompt, tuple(said)) for prompt, said in prompts.items())
