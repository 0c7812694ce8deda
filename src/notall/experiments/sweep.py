"""The paper's experiment: three variants, three fractions, with and without the last
layer, beside the original.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..digests import digest_of
from ..errors import UsageError
from ..extras import FIGURES, installed
from ..files import write_whole
from ..options import WORKLOAD, Workload
from ..plan import KIND_NAMES, Plan, several
from ..progress import Progress, Stages, reading, silent, writing
from ..results.facts import (
    CONFIGURED,
    DELTA_NLL,
    FOOTPRINT,
    GRID,
    PEAK,
    QUALITY,
    SPEEDUPS,
    Configured,
    Times,
)
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance, behind, place_of, windows_in_words
from ..results.record import Count, Fact, Number, Record, Unsigned, is_number
from ..results.table import Column, as_latex, inherited, table, with_error, within
from ..strict_json import Settings
from .driver import (
    HeldScores,
    LeaveOneOutRecord,
    SimilarityRecord,
    Subject,
    scored_as,
    similarities,
    time_plan,
)
from .folder import Figure, Folder, Sample, Shown
from .pages import MeasuredPlan, points_of, results, shown_plans, similarity_section
from .verdict import next_command, on_the_text

if TYPE_CHECKING:
    from altair import LayerChart
    from torch import Tensor

    from ..structure.model_structure import ModelStructure


PROMPTS = (
    "The capital of France is",
    "To make a good cup of tea, first",
)  # for the examples of what a plan says
SAMPLE_TOKENS = 32
FEW_SEQUENCES = (
    2  # for what leaving out each sublayer costs: a plan a sublayer is a lot of plans
)


class InPrompt(Fact):
    """What the same sublayers cost where the prompt alone skips them, behind that
    prompt.
    """

    prompt_tokens: Count = Field(
        description="first tokens of each window, which are not scored"
    )
    in_prompt_delta_nll: Number = Field(
        description="less the original model's there, nats per token"
    )
    in_prompt_delta_nll_se: Unsigned = Field(description="of the paired differences")
    in_prompt_kl: Number = Field(
        description="KL(dense || skipped) of the next token, nats per token"
    )
    in_prompt_kl_se: Unsigned = Field(description="nats per token")


IN_PROMPT: Column[InPrompt] = with_error(
    "NLL added in the prompt alone",
    lambda one: (one.in_prompt_delta_nll, one.in_prompt_delta_nll_se),
    unit=DELTA_NLL.unit,
)


class SweepRecord(MeasuredPlan, Record, Configured, kind="sweep", key=GRID):
    """One configuration, measured."""

    times: Times
    in_prompt: InPrompt | None = Field(
        None,
        description=(
            "the same sublayers, skipped in the prompt alone; None where they cannot be"
        ),
    )


class SaidRecord(Record, Configured, kind="samples", key=(*GRID, "plan")):
    """How one plan continues prompts."""

    said: dict[str, str] = Field(description="by prompt")


COLUMNS: tuple[Column[SweepRecord], ...] = (
    *inherited(SweepRecord, CONFIGURED),
    *within((DELTA_NLL,), lambda one: one.quality),
    *within((IN_PROMPT,), lambda one: one.in_prompt),
    *within(SPEEDUPS, lambda one: one.times),
    *within(QUALITY[1:4], lambda one: one.quality),
    *within(FOOTPRINT, lambda one: one.footprint),
    *within((PEAK,), lambda one: one.times),
)


def sweep(
    subject: Subject, workload: Workload = WORKLOAD, progress: Progress = silent
) -> list[SweepRecord]:
    """Evaluate and time the paper's grid on the subject's text; one record a
    configuration.

    The folder also gets the scores of every sequence, similarities, what leaving out
    each sublayer alone costs and what some plans say. Goes on where it stopped. Raises
    `UsageError` when the folder holds results of other settings.
    """
    from ..choosing.criteria.data_free import paper_grid
    from ..running.skipping import footprint

    workload.check(subject.model)
    rows = paper_grid(subject.structure)
    asked = {
        "workload": asdict(workload),
        "seed": subject.seed,
        "batches": digest_of(subject.batches)[:16],
    }
    about = Provenance.of(subject.provenance, **asked)
    prompt = subject.batches[0].shape[1] // 2
    twins = {
        row.configuration: in_prompt_alone(subject.structure, row.plan, prompt)
        for row in rows
    }
    scoring, timing = reading(subject.tokens, 2 * len(rows)), workload.steps
    leaving_out = subject.batches[0].shape[-1] * len(subject.structure.sublayers)
    sampling = writing(SAMPLE_TOKENS, 4) if subject.tokenizer else 0
    stages = Stages(
        progress, scoring + len(rows) * timing + subject.tokens + leaving_out + sampling
    )
    with working_in(subject.out, "sweep"):
        done = Ledger(subject.out, SweepRecord, about)
        held = HeldScores(subject, about)
        plans = {scored_as(row.plan): row.plan for row in rows}
        in_prompt = [twin for twin in twins.values() if twin]
        behind_it = [Plan(), *in_prompt] if in_prompt else []
        plans |= {scored_as(one, prompt_tokens=prompt): one for one in behind_it}
        held.measure(plans, "evaluating all configurations", stages.stage(scoring))
        for row in rows:
            telling, twin = stages.stage(timing), twins[row.configuration]
            known = next((one for one in done if row.describes(one)), None)
            if known is None or (
                twin and not known.in_prompt
            ):  # which folders of before lack
                times = (
                    known.times
                    if known
                    else time_plan(subject, row.plan, workload, telling, row.name)
                )
                quality, left = (
                    held.quality(scored_as(row.plan)),
                    footprint(subject.model, row.plan),
                )
                more = {"in_prompt": _behind(held, twin, prompt)} if twin else {}
                facts = {"quality": quality, "times": times, "footprint": left, **more}
                done.add(SweepRecord.from_fact(row, **facts, provenance=about))
            telling(1, 1, f"timed {row.name}")
        records = [done[row.configuration] for row in rows]
        similarities(subject, about, stages.stage(subject.tokens))
        leave_one_out(subject, about, stages.stage(leaving_out))
        if subject.tokenizer:
            continuations(subject, least_lost(records), about, stages.stage(sampling))
        return records


def in_prompt_alone(
    structure: "ModelStructure", plan: Plan, prompt_tokens: int
) -> Plan | None:
    """The same sublayers, skipped in a prompt of so many tokens alone; None where they
    cannot be.
    """
    twin = Plan(prefill={"attention": plan.attention, "mlp": plan.mlp})
    with suppress(UsageError):
        twin.check(structure)
        return twin if twin and prompt_tokens > twin.prefill.last_tokens else None
    return None


def _behind(held: HeldScores, twin: Plan, prompt_tokens: int) -> InPrompt:
    found = held.quality(scored_as(twin, prompt_tokens=prompt_tokens))
    return InPrompt(
        prompt_tokens=prompt_tokens,
        in_prompt_delta_nll=found.delta_nll,
        in_prompt_delta_nll_se=found.delta_nll_se,
        in_prompt_kl=found.kl,
        in_prompt_kl_se=found.kl_se,
    )


def leave_one_out(subject: Subject, about: Provenance, progress: Progress) -> None:
    """What leaving out each of the sublayers alone costs, on the first sequences."""
    from ..measuring.quality import gather

    structure, held = subject.structure, Ledger(subject.out, LeaveOneOutRecord, about)
    # The only attention that counts tokens cannot be left out alone.
    parts = [
        part
        for part in structure.sublayers
        if part.kind == "mlp" or structure.counting != {part.index}
    ]
    progress(0, 1, "leaving out each sublayer alone")
    if held.missing((part.name,) for part in parts):
        few: list[Tensor] = []
        for tokens in subject.batches:
            few.append(tokens[: FEW_SEQUENCES - sum(map(len, few))])
        plans = [Plan(**{part.kind: [part.index]}) for part in parts]
        qualities = gather(
            subject.score(plans, tokens) for tokens in few if len(tokens)
        )
        records = [
            LeaveOneOutRecord.from_fact(one, sublayer=part.name, provenance=about)
            for part, one in zip(parts, qualities)
        ]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "left out each sublayer alone")


def continuations(
    subject: Subject, rows: Sequence[Configured], about: Provenance, progress: Progress
) -> None:
    from ..running.generating import continue_prompts

    assert subject.tokenizer
    held = Ledger(subject.out, SaidRecord, about)
    for number, row in enumerate(rows):
        progress(number, len(rows), f"generating, {row.variant}")
        if (*row.configuration, row.plan) not in held:
            said = continue_prompts(
                subject.model, subject.tokenizer, row.plan, PROMPTS, SAMPLE_TOKENS
            )
            held.add(
                SaidRecord.from_fact(
                    row, said=dict(zip(PROMPTS, said)), provenance=about
                )
            )
    progress(1, 1, "generated examples")


def least_lost(records: Sequence[SweepRecord]) -> list[SweepRecord]:
    """Of each variant the record with the smallest loss, in the order of the grid."""
    best: dict[str, SweepRecord] = {}
    for record in sorted(
        records,
        key=lambda record: (
            record.quality.nll if is_number(record.quality.nll) else 1e300
        ),
    ):
        best.setdefault(record.variant, record)
    return [record for record in records if record is best[record.variant]]


def in_prompt_note(records: Sequence[SweepRecord]) -> str:
    """What the column of the prompt's skips says; "" without one."""
    prompt = next(
        (one.in_prompt.prompt_tokens for one in records if one.in_prompt), None
    )
    if not prompt:
        return ""
    told = (
        "the same sublayers skipped for the prompt's tokens alone, keys and values"
        " kept, nothing repaired"
    )
    return f"In the prompt alone: {told}{behind(prompt)} of each window. "


HOW_TO_READ = (
    (
        "Lower right is better. Labels: share of the layers skipped. Bars: standard"
        " error; quartiles of the speedup."
    ),
    "Grey line: the front, where nothing measured is both faster and better.",
)


def write_sweep(records: Sequence[SweepRecord], out: Path, model: str) -> None:
    """Its table as table.md, .tex and .csv, which has every digit; and with the extra
    `report` the trade-off drawn.
    """
    lines, about = table("sweep", COLUMNS, records), records[0].provenance
    assert about
    work = about.what["workload"]
    counts = {
        "prompt_tokens": "prompt token",
        "generation_tokens": "new token",
        "rounds": "round",
    }
    timed = ", ".join(several(work[name], one) for name, one in counts.items())
    place = place_of(about.where.get("machine"), versions=False)
    caption = (
        f"{model} without its deepest attentions, MLPs or blocks, beside the original"
        f" model: quality on {windows_in_words(about.what)}. Fraction: of the layers;"
        " where nothing is said, the last layer is skipped too. NLL and KL in nats a"
        f" token. {lines.legend} {in_prompt_note(records)}Times of {timed};"
        f" {about.what['dtype']} on {place}."
    )
    tex = as_latex(lines, caption=caption, label="sweep")
    for suffix, content in {
        "csv": lines.csv,
        "tex": tex,
        "md": f"{caption}\n\n{lines.markdown()}",
    }.items():
        write_whole(out / f"table.{suffix}", content)
    if installed(*FIGURES):
        from ..charts.style import framed, save

        save(
            framed(
                _drawn(records),
                f"Quality lost against decode speedup, {model}",
                HOW_TO_READ,
            ),
            out / "tradeoff",
        )


def _drawn(records: Sequence[SweepRecord]) -> "LayerChart":
    """A point for each configuration with a loss, but for the dense one."""
    from ..charts.losses import tradeoff
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
        colour="skipped",
        shape="last layer",
        lost=DELTA_NLL.titled,
        paths=True,
    )


def shown(folder: Folder) -> Shown:
    from ..charts.style import on_page

    records, similarity = folder.of(SweepRecord), folder.of(SimilarityRecord)
    sections = [similarity_section(similarity)] if similarity else []
    if not records:
        return Shown(sections=tuple(sections), similarity=similarity)
    dense = next(
        (record.footprint for record in records if record.variant == "dense"), None
    )
    figures = []
    if len(records) > 1:  # one point is no figure
        drawn = on_page(_drawn(records))
        figures.append(
            Figure(
                drawn, "quality lost against decode speedup", note=" ".join(HOW_TO_READ)
            )
        )
    note = in_prompt_note(records).strip()
    sections.insert(0, results(records, COLUMNS, range(len(records)), figures, note))
    prompts: dict[str, list[tuple[str, str]]] = {}
    for record in folder.of(SaidRecord):
        for prompt, said in record.said.items():
            prompts.setdefault(prompt, []).append((record.name, said.strip()))
    samples = tuple(Sample(prompt, tuple(said)) for prompt, said in prompts.items())
    found = shown_plans(folder, records, sections, _found_better, dense)
    return replace(found, similarity=similarity, samples=samples)


def _found_better(folder: Folder, record: SweepRecord) -> tuple[str, str]:
    kind, text = record.variant, on_the_text(folder.provenance)
    count = len(record.plan.mlp if kind == "mlp" else record.plan.attention)
    command = next_command(
        "search", folder.model, skip=f"{kind}:{count}", **text, out="plan.json"
    )
    return "look for a better set of that size", command
