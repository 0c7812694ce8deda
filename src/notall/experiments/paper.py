"""What the paper measured, on any model: its grid on benchmarks and by the clock, its Fig. 1, and what holds of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import Field

from ..errors import UsageError, shortened
from ..models.names import model_in_words
from ..options import Option, Workload
from ..plan import KIND_NAMES, several
from ..progress import Progress, Stages, silent
from ..results.facts import (
    BESIDE,
    CHECK,
    CONFIGURED,
    DIFFERENCE,
    DOCUMENTS,
    FOOTPRINT,
    PEAK,
    SIGNIFICANT,
    SPEEDUPS,
    TASK,
    TIMES,
    VALUE,
    WORSE,
    Compared,
    Configured,
    Footprint,
    P,
    TaskScore,
    Times,
)
from ..results.latex import as_latex
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance, place_of, windows_in_words
from ..results.record import Count, Number, Quartiles, Record, Unsigned, is_number
from ..results.table import EMPTY, Cell, Column, Table, as_csv, inherited, number, table, within, words
from .driver import BenchmarkRecord, Benchmarks, DiagnosticsRecord, Subject, diagnose, fields_of, similarity_by_depth
from .folder import Folder
from .options import Diagnostics, TaskChoice
from .shown import Card, Message, Section, Shown, Step
from .similarity import SimilarityRecord, similarity_section
from .verdict import MOST_NATS, NAME_LETTERS, joined, next_command

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from ..measuring.speed import Timing

LEAST_DOCUMENTS = 30  # of each task: from fewer a standard error is a guess
LEAST_ROUNDS = 5  # three may lie on one side by chance: one time in four
LEAST_WINDOWS = 8  # of text
ERRORS = 2  # how many standard errors a difference must be away from zero to be told from it
JUDGED = (
    f"A difference counts if it exceeds {ERRORS} standard errors, a speed if both quartiles lie on one side; else it "
    f"is inconclusive. Too few: fewer than {LEAST_DOCUMENTS} documents of a task, {LEAST_ROUNDS} timed rounds, or "
    f"{LEAST_WINDOWS} windows of text."
)

Configuration = tuple[str, float, bool]  # variant, fraction, whether the last layer is kept
DENSE: Configuration = ("dense", 0.0, False)
Verdict = Literal["holds", "does not hold", "inconclusive", "too few"]


# --- what is written down ---------------------------------------------------------------------------------------------


class TimesRecord(Record, Configured):
    """One configuration at one prompt length and number of sequences at once."""

    file = "times.jsonl"
    commands = ("paper",)
    key_fields = ("prompt_tokens", "asked_concurrency", "variant", "fraction", "keep_last")

    record: Literal["times"] = "times"
    prompt_tokens: Count
    concurrency: Count = Field(description="sequences at once, as many as memory held")
    asked_concurrency: Count
    times: Times
    footprint: Footprint


class ClaimRecord(Record):
    """A claim of arXiv 2407.15516, the figures that bear on it here, and what they say of it."""

    file = "claims.jsonl"
    commands = ("paper",)
    key_fields = ("claim",)

    record: Literal["claim"] = "claim"
    claim: str
    here: str = Field(description="the figures of this model")
    verdict: Verdict = Field(description="too few: documents, rounds or windows, below the least for a verdict")
    figure: Number = Field(math.nan, description="what is judged: a difference, a correlation, how many times as fast")
    error: Unsigned = Field(math.nan, description="its standard error")
    low: Number = Field(math.nan, description="its lower quartile, of a speed")
    high: Number = Field(math.nan, description="its upper quartile")
    unit: str | None = Field(None, description="of these")


class Average(Compared):
    """Of a configuration over tasks, beside the dense model's."""

    variant: str
    fraction: float
    keep_last: bool
    tasks: Count = Field(description="over how many")


CLAIMS: tuple[Column[ClaimRecord], ...] = (
    words("claim", lambda one: one.claim),
    words("verdict", lambda one: one.verdict),
    words("here", lambda one: one.here),
)
BENCHMARKS: tuple[Column[BenchmarkRecord], ...] = (
    *inherited(BenchmarkRecord, TASK),
    *inherited(BenchmarkRecord, CONFIGURED),
    *inherited(BenchmarkRecord, (DIFFERENCE, P, VALUE)),
    *inherited(BenchmarkRecord, DOCUMENTS),
)
DIAGNOSTICS: tuple[Column[DiagnosticsRecord], ...] = (
    *inherited(DiagnosticsRecord, (CHECK,)),
    *inherited(DiagnosticsRecord, CONFIGURED),
    *inherited(DiagnosticsRecord, (DIFFERENCE, WORSE, P, VALUE)),
)
TIMED: tuple[Column[TimesRecord], ...] = (
    *inherited(TimesRecord, CONFIGURED),
    number("prompt tokens", lambda one: one.prompt_tokens, "d"),
    number("concurrency", lambda one: one.concurrency, "d"),
    *within(TIMES, lambda one: one.times),
    *within(FOOTPRINT, lambda one: one.footprint),
    *within((PEAK,), lambda one: one.times),
)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimingGrid:
    """At which prompt lengths, for how many sequences at once the grid is timed, and how often."""

    PANEL: ClassVar = "Timing"

    prompt_tokens: Annotated[tuple[int, ...], Option("tokens of the prompt; repeat it for more")] = (128, 512)
    generation_tokens: Annotated[int, Option("tokens generated behind it")] = 16
    concurrency: Annotated[tuple[int, ...], Option("sequences at once; repeat it for more")] = (1,)
    rounds: Annotated[int, Option("timed rounds; each times all configurations in turn")] = 5

    @property
    def workloads(self) -> list[Workload]:
        """Each of them once."""
        return [
            Workload(prompt, self.generation_tokens, at_once, self.rounds)
            for prompt in dict.fromkeys(self.prompt_tokens)
            for at_once in dict.fromkeys(self.concurrency)
        ]

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` as `Workload.check` does."""
        for workload in self.workloads:
            workload.check(model)


@dataclass(frozen=True)
class PaperOptions:
    """What the benchmarks are run on, and what is measured beside them."""

    PANEL: ClassVar = "Benchmarks"

    generate_all: Annotated[
        bool,
        Option("run tasks that generate text on all configurations, not only those of 33 %", ("--generate-all",)),
    ] = False
    diagnostics: Diagnostics = False


def run_paper(
    subject: Subject,
    tasks: TaskChoice,
    timing: TimingGrid = TimingGrid(),
    *,
    windows: Sequence[Tensor] = (),
    generate_all: bool = False,
    progress: Progress = silent,
) -> list[ClaimRecord]:
    """Benchmarks and times of the paper's grid and, on the subject's text, its Fig. 1; what became of its claims.

    Tasks that generate text are run on dense and the largest fraction only, unless `generate_all`. `windows` are those
    of the diagnostics, if they are wanted. What is finished stays in the folder, and the same call goes on from there.
    Writes paper.md, a .tex for each table, the claims among them, and a .csv for each kind of records. Raises as
    `Benchmarks`, `run_diagnostics` and `time_grid` do, before anything is computed.
    """
    from ..choosing.criteria.data_free import paper_grid

    timing.check(subject.model)
    rows = paper_grid(subject.structure)
    progress(0, 1, "reading the tasks")
    most = max(row.fraction for row in rows)
    generating = None if generate_all else [row for row in rows if row.fraction in (0.0, most)]
    asked = Benchmarks(subject, rows, tasks, generating) if tasks else None
    stages = Stages(progress, 1 + 20 * bool(asked) + 10 * bool(windows) + 10)
    with working_in(subject.out, "paper"):
        similarity = similarity_by_depth(subject, subject.provenance, stages.stage(1))
    benchmarks = asked.run(stages.stage(20)) if asked else []
    checks = diagnose(subject, rows[1:], windows, stages.stage(10)) if windows else []
    times = time_grid(subject, rows, timing, progress=stages.stage(10))
    return write_paper(subject.out, similarity, benchmarks, times, checks)


def time_grid(
    subject: Subject,
    rows: Sequence[Configured],
    timing: TimingGrid = TimingGrid(),
    *,
    measure: Measure | None = None,
    progress: Progress = silent,
) -> list[TimesRecord]:
    """Time all `rows` (the dense one first) in turn, for each workload of the grid; one record each.

    Writes to the folder when a workload is done, and takes what is there. Where so many sequences do not fit into
    memory half of them are timed, and the record's `concurrency` says so beside `asked_concurrency`. `measure`
    takes the times, by default `in_turn`.
    Raises as `compare` does, and `UsageError` when not even one sequence fits, and when another process works there.
    """
    from ..running.footprint import footprint

    asked = {"generation_tokens": timing.generation_tokens, "rounds": timing.rounds, "seed": subject.seed}
    about = Provenance.of(subject.provenance, **asked)
    with working_in(subject.out, "paper"):
        held = Ledger(subject.out, TimesRecord, about)
        stages = Stages(progress, len(timing.workloads))
        for workload in timing.workloads:
            telling = stages.stage(1)
            size = f"{workload.prompt_tokens} prompt tokens, {workload.concurrency} at once"
            telling(0, 1, f"timing {len(rows)} configurations at {size}")
            if _is_timed(held, workload, rows):
                continue
            fitted, timings = _fitting(partial(measure or in_turn, subject, rows, telling), workload)
            held.add(
                *(
                    TimesRecord(
                        **fields_of(row),
                        prompt_tokens=workload.prompt_tokens,
                        concurrency=fitted,
                        asked_concurrency=workload.concurrency,
                        times=timings[row.name].beside(timings[rows[0].name]),
                        footprint=footprint(subject.model, row.plan),
                        provenance=about,
                    )
                    for row in rows
                )
            )
        progress(stages.steps, stages.steps, "timed all configurations")
        return [held[_key(workload, row)] for workload in timing.workloads for row in rows]


def _key(workload: Workload, row: Configured) -> tuple[int, int, str, float, bool]:
    return workload.prompt_tokens, workload.concurrency, row.variant, row.fraction, row.keep_last


def _is_timed(held: Ledger[TimesRecord], workload: Workload, rows: Sequence[Configured]) -> bool:
    """Whether all rows are, at one number of sequences."""
    known = [held[key] for row in rows if (key := _key(workload, row)) in held and row.describes(held[key])]
    return len(known) == len(rows) and len({record.concurrency for record in known}) == 1


def in_turn(subject: Subject, rows: Sequence[Configured], progress: Progress, workload: Workload) -> dict[str, Timing]:
    """What each of `rows` takes, by its name."""
    from ..measuring.speed import compare
    from ..running.skipping import skip

    variants = {row.name: partial(skip, subject.model, row.plan) for row in rows}
    return compare(subject.model, variants, workload, seed=subject.seed, progress=progress)


Measure = Callable[[Subject, Sequence[Configured], Progress, Workload], "dict[str, Timing]"]


def _fitting(run: Callable[[Workload], dict[str, Timing]], workload: Workload) -> tuple[int, dict[str, Timing]]:
    """The largest halving of the sequences at once that memory holds, and its times."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    at_once = workload.concurrency
    while at_once:
        try:
            return at_once, run(replace(workload, concurrency=at_once))
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        at_once //= 2
    raise UsageError("one sequence takes more memory than there is; give a smaller dtype or shorter prompts")


# --- tables -----------------------------------------------------------------------------------------------------------

HEADINGS = {
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
}
ROUNDING = 1e-6  # probabilities of choices may add up to a little more than 1
LACKING = "–"


def heading_of(task: str) -> str:
    """What the leaderboard calls a task, or else the harness; local_ is of one that stands in for the harness's."""
    name = task.removeprefix("local_")
    return HEADINGS.get(name, name)


class Scoreboard:
    """Benchmark records by configuration and column; a column is a task, or task and metric where it has several."""

    def __init__(self, records: Iterable[BenchmarkRecord]) -> None:
        records = list(records)
        self.cells: dict[Configuration, dict[str, BenchmarkRecord]] = {}
        metrics: dict[str, set[str]] = {}
        for record in records:
            metrics.setdefault(record.task, set()).add(record.metric)
        for record in records:
            name = heading_of(record.task)
            column = name if len(metrics[record.task]) == 1 else f"{name}, {record.usual_metric}"
            self.cells.setdefault(record.configuration, {})[column] = record
        self.columns = list(dict.fromkeys(column for row in self.cells.values() for column in row))

    @property
    def shared(self) -> list[str]:
        """The columns that every configuration has, as shares of 0 to 1: what an average is taken over."""
        return [
            column
            for column in self.columns
            if all(column in row and _is_share(row[column]) for row in self.cells.values())
        ]

    def average(self, key: Configuration) -> float:
        from ..measuring.statistics import mean_and_error

        return mean_and_error([self.cells[key][column].value for column in self.shared])[0]

    def difference(self, key: Configuration, other: Configuration) -> tuple[float, float, float]:
        """The average of `key` less that of `other`, its standard error and p value, paired by document."""
        from ..measuring.statistics import mean_and_error, sign_flip_p_value

        means, errors, terms = [], [], list[float]()
        for column in self.shared:
            ours, theirs = self.cells[key][column], self.cells[other][column]
            means.append(ours.value - theirs.value)
            differences = [a - b for a, b in zip(_shares(ours), _shares(theirs))]
            errors.append(mean_and_error(differences)[1])
            terms += [one / len(differences) for one in differences]
        count = len(self.shared)
        error = math.sqrt(math.fsum(error**2 for error in errors)) / count
        return math.fsum(means) / count, error, sign_flip_p_value(terms)

    def averages(self) -> list[Average]:
        """One for each configuration."""
        found = []
        for key in self.cells if self.shared else ():
            delta, error, p_value = self.difference(key, DENSE)
            about = {"variant": key[0], "fraction": key[1], "keep_last": key[2], "tasks": len(self.shared)}
            found.append(
                Average(**about, value=self.average(key), delta=delta, delta_se=error, p_value=p_value)  # type: ignore[arg-type]
            )
        return found


def _is_share(record: TaskScore) -> bool:
    shares = _shares(record)
    if not is_number(record.value) or not shares or len(shares) < record.documents:
        return False
    return all(-ROUNDING <= value <= 1 + ROUNDING for value in shares)


def _shares(record: TaskScore) -> list[float]:
    """The metric of each document that has one."""
    return [value for value in record.values or () if is_number(value)]


Label = tuple[str, str]  # what is skipped, and how much of it


def _label(key: Configuration) -> Label:
    return KIND_NAMES[key[0]], f"{key[1]:.0%}"


def _table_of(rows: Mapping[Label, Mapping[str, str]]) -> Table:
    """A column for each name of a cell; what a row lacks is a dash."""
    names = dict.fromkeys(name for cells in rows.values() for name in cells)

    def named(name: str) -> Column[tuple[Label, Mapping[str, str]]]:
        return Column(name, lambda row: Cell(row[1].get(name), row[1].get(name, LACKING)))

    labels: list[Column[tuple[Label, Mapping[str, str]]]] = [
        words(column.heading, lambda row, place=place: row[0][place])  # type: ignore[misc]
        for place, column in enumerate(CONFIGURED[:2])
    ]
    return table("", [*labels, *map(named, names)], rows.items(), every=True)


def benchmark_table(board: Scoreboard, keep_last: bool) -> Table:
    """Values in per cent, with the paired difference to dense ± its standard error; * where p < 0.05."""
    rows = {}
    for key, cells in board.cells.items():
        if key != DENSE and key[2] != keep_last:
            continue
        row = {column: _score(cells.get(column)) for column in board.columns}
        if board.shared:
            row["average"] = _with_difference(board.average(key), *board.difference(key, DENSE), key)
        rows[_label(key)] = row
    return _table_of(rows)


def time_table(records: Iterable[TimesRecord], keep_last: bool, quantity: Literal["prefill", "decode"]) -> Table:
    """Milliseconds by prompt length: median, and how many times dense's speed.

    The speedup is the median of the rounds' own ratios, with its quartiles.
    """
    rows: dict[Label, dict[str, str]] = {}
    for record in records:
        if record.variant != "dense" and record.keep_last != keep_last:
            continue
        column = f"prompt {record.prompt_tokens}, batch {record.concurrency}"
        taken, speedup = _of_quantity(record.times, quantity)
        gain = f" ({_gain(speedup)})" if record.variant != "dense" else ""
        rows.setdefault(_label(record.configuration), {})[column] = f"{taken.median:.1f}{gain}"
    return _table_of(rows)


def _of_quantity(times: Times, quantity: str) -> tuple[Quartiles, Quartiles]:
    """Milliseconds, and the speedup."""
    if quantity == "prefill":
        return times.prefill_ms, times.speedup_prefill
    return times.decode_ms_per_token, times.speedup_decode


def _gain(speedup: Quartiles) -> str:
    return f"{speedup.median:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"


def diagnostics_table(records: Iterable[DiagnosticsRecord], keep_last: bool) -> Table:
    """Each check's value, with the paired difference to dense ± its standard error; * where it got worse beyond it."""
    dense: dict[str, str] = {}
    rows: dict[Label, dict[str, str]] = {_label(DENSE): dense}
    for record in records:
        if not (is_number(record.value) and is_number(record.delta)):  # of a model that overflows
            continue
        dense[record.check] = f"{record.value - record.delta:.3g}"
        if record.keep_last == keep_last:
            error = f"{record.delta_se:.2g}" if is_number(record.delta_se) else LACKING
            mark = "*" if record.worse else ""
            cell = f"{record.value:.3g} ({record.delta:+.2g}{mark} ± {error})"
            rows.setdefault(_label(record.configuration), {})[record.check] = cell
    return _table_of(rows)


def _score(record: BenchmarkRecord | None) -> str:
    if record is None or not is_number(record.value):
        return LACKING
    if not _is_share(record):
        return f"{record.value:.3g}"
    if record.variant == "dense":
        return f"{100 * record.value:.1f} ± {_percent(record.value_se)}"
    mark = "*" if record.p_value < SIGNIFICANT else ""
    delta = f"{100 * record.delta:+.1f}" if is_number(record.delta) else LACKING
    return f"{100 * record.value:.1f} ({delta}{mark} ± {_percent(record.delta_se)})"


def _with_difference(value: float, delta: float, error: float, p_value: float, key: Configuration) -> str:
    if key == DENSE:
        return f"{100 * value:.1f}"
    mark = "*" if p_value < SIGNIFICANT else ""
    return f"{100 * value:.1f} ({100 * delta:+.1f}{mark} ± {_percent(error)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if is_number(value) else LACKING


# --- claims -----------------------------------------------------------------------------------------------------------


def claims_of(
    similarity: Sequence[SimilarityRecord], board: Scoreboard | None, times: Sequence[TimesRecord]
) -> list[ClaimRecord]:
    """Every claim that the given figures bear on; of `times` those of the longest prompt and the fewest at once."""
    found = list(_similarity_claims(similarity))
    if board and board.shared:
        found += _quality_claims(board)
    if times:
        found += _time_claims(times)
    return found


def _judge(difference: float, error: float) -> Verdict:
    """Whether a difference that the claim says is positive is so, beyond its error."""
    if math.isnan(error) or abs(difference) <= ERRORS * error:
        return "inconclusive"
    return "holds" if difference > 0 else "does not hold"


def _similarity_claims(similarity: Sequence[SimilarityRecord]) -> Iterator[ClaimRecord]:
    blocks = sorted((row for row in similarity if row.kind == "block"), key=lambda row: row.layer)
    if len(blocks) < 4:
        return
    windows = min(_asked(row, "sequences") for row in blocks)

    def judged(claim: str, here: str, figure: float, error: float, judged: float, unit: str) -> ClaimRecord:
        few = windows < LEAST_WINDOWS
        here += f", on {windows} windows" if few else ""
        verdict: Verdict = "too few" if few else _judge(judged, error)
        return ClaimRecord(claim=claim, here=here, verdict=verdict, figure=figure, error=error, unit=unit)

    *inner, before, last = blocks
    inner.append(before)
    rho, error = rank_correlation([row.cosine for row in inner]), 1 / math.sqrt(len(inner) - 1)
    yield judged(
        "Fig. 1: features grow more similar to the previous layer's with depth (but for the last layer)",
        f"rank correlation of cosine and depth {rho:+.2f} ± {error:.2f}, over {len(inner)} layers",
        *(rho, error, rho, "rank correlation"),
    )
    if not (is_number(before.cosine) and is_number(last.cosine)):
        return
    change, error = last.cosine - before.cosine, math.hypot(before.cosine_se, last.cosine_se)
    yield judged(
        "Fig. 1: the very last layer is less similar than the one before it",
        f"cosine {last.cosine:.4f} after {before.cosine:.4f}: last less the one before {change:+.4f} ± {error:.4f}",
        *(change, error, -change, "cosine"),
    )


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, of values and their places, over those that are numbers; NaN where they are all alike."""
    places = [place for place, value in enumerate(values) if is_number(value)]
    ranks = _ranks([values[place] for place in places])
    middle = (len(places) + 1) / 2
    x, y = ([rank - middle for rank in some] for some in (range(1, len(places) + 1), ranks))
    spread = math.sqrt(math.fsum(a * a for a in x) * math.fsum(b * b for b in y))
    return math.fsum(a * b for a, b in zip(x, y)) / spread if spread else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; those of equal values are their mean."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _quality_claims(board: Scoreboard) -> Iterator[ClaimRecord]:
    most = max(fraction for _, fraction, _ in board.cells)
    fewest = min(row[column].documents for row in board.cells.values() for column in board.shared)
    share = f"{most:.0%}"

    def compare(claim: str, what: str, key: Configuration, other: Configuration, at_least: float = 0.0) -> ClaimRecord:
        """`what` is `key` less `other`, in words; the claim says that this is positive, or more than `at_least`."""
        difference, error, _ = board.difference(key, other)
        here = f"{what}: {100 * difference:+.1f} ± {100 * error:.1f} points of the average of {len(board.shared)} tasks"
        verdict: Verdict = _judge(difference - at_least, error)
        if fewest < LEAST_DOCUMENTS:
            here, verdict = f"{here}, with as few as {fewest} documents a task", "too few"
        return ClaimRecord(
            claim=claim, here=here, verdict=verdict, figure=100 * difference, error=100 * error, unit="points"
        )

    yield compare(
        f"skipping the deepest {share} of the attentions loses no more than 1.8 points of the average (13B)",
        *("attentions skipped less dense", ("attention", most, False), DENSE),
        at_least=-0.018,
    )
    for fraction in sorted({fraction for _, fraction, _ in board.cells} - {0.0}):
        yield compare(
            f"skipping {fraction:.0%} of the attentions costs less than as many MLPs",
            *("attentions skipped less MLPs skipped", ("attention", fraction, False), ("mlp", fraction, False)),
        )
    for variant in ("mlp", "block"):
        yield compare(
            f"keeping the last layer lowers quality when {share} of the {KIND_NAMES[variant]}s are skipped",
            *("last layer skipped less last layer kept", (variant, most, False), (variant, most, True)),
        )
    yield compare(
        f"keeping the last layer does not lower quality when {share} of the attentions are skipped",
        *("last layer kept less last layer skipped", ("attention", most, True), ("attention", most, False)),
    )


def _time_claims(times: Sequence[TimesRecord]) -> Iterator[ClaimRecord]:
    cells = {record.configuration: record for record in judged_times(times)}
    most = max(fraction for _, fraction, _ in cells)
    attention, mlp, block = (cells[variant, most, False] for variant in ("attention", "mlp", "block"))
    at = f"prompt {attention.prompt_tokens}, batch {attention.concurrency}, last layer skipped too"
    rounds = min(_asked(record, "rounds") for record in cells.values())

    def judged(claim: str, here: str, speedup: Quartiles, verdict: Verdict) -> ClaimRecord:
        if rounds < LEAST_ROUNDS:
            here, verdict = f"{here}, in {rounds} rounds", "too few"
        return ClaimRecord(
            claim=claim,
            here=here,
            verdict=verdict,
            figure=speedup.median,
            low=speedup.low,
            high=speedup.high,
            unit="times as fast",
        )

    for name in ("prefill", "decode"):
        of_attention, of_mlp, of_block = (_of_quantity(one.times, name)[1] for one in (attention, mlp, block))
        yield judged(
            f"skipping {most:.0%} of the attentions is about 18 % faster or more (13B): {name}, {at}",
            _gain(of_attention),
            of_attention,
            _by_quartiles(of_attention.low - 1.18, of_attention.high - 1.18),
        )
        for saver, word in ((of_attention, "attentions"), (of_block, "blocks")):
            yield judged(
                f"skipping {most:.0%} of the {word} saves more time than as many MLPs: {name}, {at}",
                f"{word} {_gain(saver)}, MLPs {_gain(of_mlp)}",
                saver,
                _by_quartiles(saver.low - of_mlp.high, saver.high - of_mlp.low),
            )


def judged_times(times: Sequence[TimesRecord]) -> list[TimesRecord]:
    """Those at the longest prompt and the fewest sequences at once."""
    longest = max((record.prompt_tokens for record in times), default=0)
    asked = [record for record in times if record.prompt_tokens == longest]
    fewest = min((record.concurrency for record in asked), default=0)
    return [record for record in asked if record.concurrency == fewest]


def _asked(record: Record, setting: str) -> int:
    """A number that a run was given, such as rounds; 0 where that was not written down."""
    return int(record.what.get(setting, 0))


def _by_quartiles(low: float, high: float) -> Verdict:
    return "holds" if low > 0 else "does not hold" if high < 0 else "inconclusive"


# --- files ------------------------------------------------------------------------------------------------------------

LAST = {False: "the last layer skipped too", True: "the last layer kept"}
ENDINGS = {False: "last-skipped", True: "last-kept"}
RATIOS = (
    "in brackets how many times the dense model's speed [quartiles]. These ratios are taken within a round, so that "
    "they may differ from those of the medians."
)
# Of each kind of table: what it shows, and what its cells say.
CAPTIONS = {
    "benchmarks": (
        "Benchmarks of",
        "Per cent ± standard error; in brackets the difference to the dense model, paired by document, ± its standard "
        "error. * p < 0.05 (McNemar's exact test for accuracies; flipped signs of documents' differences for the "
        "average), not corrected for the number of comparisons. The average is over the tasks that every row has.",
    ),
    "diagnostics": (
        "What accuracy hides of",
        "NLL in nats at so many tokens into a text, the share of passkeys found in texts of so many tokens, the "
        "expected calibration error of the next token, and greedy continuations beside the dense model's. In brackets "
        "the difference to the dense model ± its standard error; * worse, p < 0.05, not corrected for the number of "
        "comparisons.",
    ),
    "prefill": ("Prefill time (ms) of", f"Median of {{rounds}} rounds, each of all rows in turn; {RATIOS}"),
    "decode": (
        "Decode time per new token (ms) of",
        f"{{new}} new tokens. Median of {{rounds}} rounds, each of all rows in turn, with a real KV cache; {RATIOS}",
    ),
}


@dataclass(frozen=True)
class PaperTable:
    """A table with the caption under which it stands in a paper; `name` is its label, and its file without suffix."""

    name: str
    caption: str
    table: Table

    def latex(self) -> str:
        return as_latex(self.table, caption=self.caption, label=self.name)


def write_paper(
    out: Path,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[DiagnosticsRecord] = (),
) -> list[ClaimRecord]:
    """Tables and claims from what was measured, into `out`."""
    records: list[Record] = [*similarity, *times, *benchmarks]
    about = next(record.provenance for record in records if record.provenance)
    board = Scoreboard(benchmarks) if benchmarks else None
    tables = [made for keep_last in LAST for made in _tables(keep_last, board, benchmarks, times, checks)]
    claims = [claim.model_copy(update={"provenance": about}) for claim in claims_of(similarity, board, times)]
    if claims:
        of = _evidence(_model_of(about), similarity, benchmarks, times)
        caption = f"The claims of arXiv 2407.15516, as it makes them of Llama-2 7B and 13B, and our evidence on {of} "
        tables.append(PaperTable("claims", caption + JUDGED, table("claims", CLAIMS, claims)))
    out.mkdir(parents=True, exist_ok=True)
    for one in tables:
        (out / f"{one.name}.tex").write_text(one.latex(), encoding="utf-8")
    averages = board.averages() if board else []
    kinds = {"claims": claims, "benchmarks": benchmarks, "averages": averages, "times": times, "diagnostics": checks}
    for name, some in kinds.items():
        if some or name in ("benchmarks", "times"):
            (out / f"{name}.csv").write_text(as_csv(some), encoding="utf-8")
    _keep_claims(out, claims)
    (out / "paper.md").write_text(_story(about, tables, claims, bool(benchmarks)), encoding="utf-8")
    return claims


def _tables(
    keep_last: bool,
    board: Scoreboard | None,
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[DiagnosticsRecord],
) -> Iterator[PaperTable]:
    """Those of one half of the grid."""
    timed = times[0].what if times else {}
    numbers = {"rounds": str(timed.get("rounds", "?")), "new": str(timed.get("generation_tokens", "?"))}

    def made(kind: str, of: Sequence[Record], found: Table) -> PaperTable:
        told = {"model": _model_of(next(one.provenance for one in of if one.provenance)), "made": _made(of)}
        return PaperTable(f"{kind}-{ENDINGS[keep_last]}", caption_of(kind, keep_last, **told, **numbers), found)

    if board:
        yield made("benchmarks", benchmarks, benchmark_table(board, keep_last))
    if checks:
        yield made("diagnostics", checks, diagnostics_table(checks, keep_last))
    if times:
        yield made("prefill", times, time_table(times, keep_last, "prefill"))
        yield made("decode", times, time_table(times, keep_last, "decode"))


def caption_of(kind: str, keep_last: bool, *, model: str, rounds: str, new: str, made: str) -> str:
    """What a table says under itself, in sentences; `made` is how, and on what."""
    shows, note = CAPTIONS[kind]
    skipped = f"{model} with the deepest of its attentions, MLPs or blocks skipped, {LAST[keep_last]}"
    return f"{shows} {skipped}. {note.format(rounds=rounds, new=new)} {made}"


def _model_of(about: Provenance) -> str:
    return model_in_words(str(about.what.get("model")))


def _evidence(
    model: str,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
) -> str:
    """What the claims are judged by, in sentences."""
    parts = [f"{model}."]
    if similarity and "sequences" in similarity[0].what:
        parts.append(f"Similarity: {windows_in_words(similarity[0].what)}.")
    parts += [f"Benchmarks: {_made(benchmarks)}"] if benchmarks else []
    parts += [f"Times: {times[0].what.get('rounds', '?')} rounds, {_made(times)}"] if times else []
    return " ".join(parts)


def _made(records: Sequence[Record]) -> str:
    """How and where figures were measured, in sentences."""
    about = next((record.provenance for record in records if record.provenance), None)
    if about is None:
        return ""
    where = f"{about.what.get('dtype')} on {place_of(about.where.get('machine'), versions=False)}."
    asked = [record for record in records if isinstance(record, BenchmarkRecord)]
    return f"{_documents(asked)} {where}" if asked else where


def _documents(benchmarks: Sequence[BenchmarkRecord]) -> str:
    asked = {(record.task, record.metric): record for record in benchmarks}
    told = (
        f"{heading_of(one.task)}, {one.num_fewshot}-shot, {one.usual_metric} of {one.documents} documents"
        for one in asked.values()
    )
    return f"lm-evaluation-harness {benchmarks[0].what.get('lm_eval')}: {'; '.join(told)}."


def _keep_claims(out: Path, claims: Sequence[ClaimRecord]) -> None:
    """They follow from the other records, so that those of today take the place of earlier ones."""
    with working_in(out, "paper"):
        (out / ClaimRecord.file).unlink(missing_ok=True)
        if claims:
            Ledger(out, ClaimRecord).add(*claims)


def _story(about: Provenance, tables: Sequence[PaperTable], claims: Sequence[ClaimRecord], benchmarked: bool) -> str:
    """paper.md: the claims, and the tables that they are judged by."""
    lines = [
        f"# The evaluation of arXiv 2407.15516 on {_model_of(about)}",
        "",
        f"{about.what['dtype']} on {place_of(about.where.get('machine'))}. Weights: {about.what['revision']}.",
        *("", "## The paper's claims, and this model", ""),
        table("claims", CLAIMS, claims).markdown(),
        JUDGED,
        *("", "## Similarity", "", "![Similarity by depth](similarity.png)"),
    ]
    parts = (
        ("Benchmarks" * benchmarked, ["benchmarks"]),
        ("What accuracy hides", ["diagnostics"]),
        ("Times", ["prefill", "decode"]),
    )
    for title, kinds in parts:
        shown = [one for kind in kinds for one in tables if one.name.startswith(kind)]
        lines += ["", f"## {title}"] if title and shown else []
        for one in shown:
            lines += ["", one.caption, "", one.table.markdown().rstrip("\n")]
    return "\n".join([*lines, ""])


# --- on a page --------------------------------------------------------------------------------------------------------

BECAME = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "inconclusive": ("is inconclusive", "are inconclusive"),
    "too few": ("is open, on too few documents or rounds", "are open, on too few documents or rounds"),
}


@dataclass(frozen=True)
class Standing:
    """Of each configuration: the change of its average on the benchmarks with its error, its times, its nats lost.

    `tasks` is over how many benchmarks the average is; a share of 0 to 1, as its error. `documents` is how many the one
    of them with the fewest has. `nats` are the mean of what is lost at each depth of a long text.
    """

    tasks: int
    documents: int
    averages: Mapping[Configuration, tuple[float, float]]
    times: Mapping[Configuration, TimesRecord]
    nats: Mapping[Configuration, float]

    @classmethod
    def of(cls, folder: Folder) -> Standing:
        shared = _shared(folder.of(BenchmarkRecord))
        return cls(
            tasks=len({(one.task, one.metric) for one in shared}),
            documents=min((one.documents for one in shared), default=LEAST_DOCUMENTS),
            averages=_averages(shared),
            times={one.configuration: one for one in judged_times(folder.of(TimesRecord)) if one.variant != "dense"},
            nats=_nats(folder.of(DiagnosticsRecord)),
        )

    @property
    def headline(self) -> Configuration | None:
        """The fastest that is usable, as far as that is known; else the paper's own, the most attentions."""
        usable = [key for key in self.nats if self.usable(key) and key in self.times]
        if usable:
            return max(usable, key=lambda key: (self.times[key].times.speedup_decode.median, -self.nats[key]))
        known = [key for key in (*self.averages, *self.times) if key[0] == "attention"]
        return max(known, key=lambda key: (key[1], not key[2]), default=None)

    def usable(self, key: Configuration) -> bool | None:
        """Whether perplexity has at most doubled, where the diagnostics tell."""
        return self.nats[key] <= MOST_NATS if key in self.nats else None

    def told(self, key: Configuration) -> str:
        """What a configuration comes to, in words."""
        return joined([*self._parts(key)])

    def _parts(self, key: Configuration) -> Iterator[str]:
        if key in self.times:
            yield f"it decodes {self.times[key].times.speedup_decode.median:.2f}× as fast"
        if key in self.averages:
            change, error = self.averages[key]
            benchmarks = f"the average of {self.tasks} benchmarks" if self.tasks > 1 else "the one benchmark"
            is_few = self.documents < LEAST_DOCUMENTS
            few = f", from too few documents to say ({self.documents} a task)" if is_few else ""
            yield f"{benchmarks} changes by {100 * change:+.1f} ± {100 * error:.1f} points{few}"
        if key in self.nats:
            usable = "" if self.usable(key) else ": it is no longer usable"
            yield f"long texts take {self.nats[key]:+.2f} nats a token{usable}"


def _shared(benchmarks: Sequence[BenchmarkRecord]) -> list[BenchmarkRecord]:
    """Those of tasks that are shares and that every configuration has."""
    everything = {one.configuration for one in benchmarks}
    by_task: dict[tuple[str, str], list[BenchmarkRecord]] = {}
    for one in benchmarks:
        if is_number(one.value) and is_number(one.delta) and 0 <= one.value <= 1:
            by_task.setdefault((one.task, one.metric), []).append(one)
    return [one for some in by_task.values() if {one.configuration for one in some} == everything for one in some]


def _averages(shared: Sequence[BenchmarkRecord]) -> dict[Configuration, tuple[float, float]]:
    found: dict[Configuration, list[BenchmarkRecord]] = {}
    for one in shared:
        found.setdefault(one.configuration, []).append(one)

    def error(one: BenchmarkRecord) -> float:
        return one.delta_se if is_number(one.delta_se) else 0.0

    return {
        key: (
            math.fsum(one.delta for one in some) / len(some),
            math.sqrt(math.fsum(error(one) ** 2 for one in some)) / len(some),
        )
        for key, some in found.items()
    }


def _nats(checks: Sequence[DiagnosticsRecord]) -> dict[Configuration, float]:
    found: dict[Configuration, list[float]] = {}
    for one in checks:
        if one.check.startswith("NLL at"):
            found.setdefault(one.configuration, []).append(one.delta if is_number(one.delta) else math.inf)
    return {key: sum(lost) / len(lost) for key, lost in found.items()}


def became_of(claims: Sequence[ClaimRecord]) -> str:
    """Such as `5 hold, 2 do not hold and 8 are inconclusive`."""
    counts = Counter(str(claim.verdict) for claim in claims)
    return joined(
        [f"{counts[verdict]} {says[counts[verdict] > 1]}" for verdict, says in BECAME.items() if counts[verdict]]
    )


def in_words(key: Configuration) -> str:
    """A configuration, such as `the deepest 33% of its attentions`."""
    variant, fraction, keep_last = key
    return f"the deepest {fraction:.0%} of its {KIND_NAMES[variant]}s" + (" (the last layer kept)" if keep_last else "")


def shown(folder: Folder) -> Shown:
    """What a page says of the paper's evaluation."""
    benchmarks, checks, times = folder.of(BenchmarkRecord), folder.of(DiagnosticsRecord), folder.of(TimesRecord)
    claims, similarity = folder.of(ClaimRecord), folder.of(SimilarityRecord)
    if not (claims or benchmarks or checks or times):
        return Shown()
    standing = Standing.of(folder)
    every: dict[Configuration, Configured] = {}
    for one in (*times, *benchmarks, *checks):
        every.setdefault(one.configuration, one)
    place = {key: number for number, key in enumerate(every)}
    timed = {one.configuration: one for one in judged_times(times)}
    dense = timed[DENSE].footprint if DENSE in timed else None
    steps = tuple(
        Step(
            row.name,
            row.plan,
            times=timed[key].times if key in timed else None,
            footprint=timed[key].footprint if key in timed else None,
            dense=dense,
        )
        for key, row in every.items()
    )
    key = standing.headline
    return Shown(
        message=_message(folder, standing, claims),
        cards=tuple(_cards(standing, claims)),
        steps=steps,
        first=place[key] if key in place else max(len(steps) - 1, 0),
        sections=tuple(_sections(claims, similarity, benchmarks, checks, times, place)),
        similarity=similarity,
    )


def _message(folder: Folder, standing: Standing, claims: Sequence[ClaimRecord]) -> Message:
    model, key = shortened(folder.model, NAME_LETTERS), standing.headline
    parts = [f"of the paper's {len(claims)} claims {became_of(claims)} on {model}"] if claims else []
    if key is None:
        said = "; ".join(parts or [f"the evaluation of {model} has only begun"])
        command = next_command("paper", folder.model, out=folder.path)
        return Message(f"{said[:1].upper()}{said[1:]}.", None, "go on with it", command)
    variant, fraction, keep_last = key
    said = "; ".join([*parts, f"without {in_words(key)} {standing.told(key)}"])
    options = {"skip": f"{variant}:{fraction:g}", "keep_last": True if keep_last else None}
    command = next_command("eval", folder.model, **options)
    return Message(f"{said[:1].upper()}{said[1:]}.", standing.usable(key), "see what that costs on a text", command)


def _cards(standing: Standing, claims: Sequence[ClaimRecord]) -> Iterator[Card]:
    """How many claims hold, and what became of the configuration that the first sentence is about."""
    if claims:
        rest = [claim for claim in claims if claim.verdict != "holds"]
        yield Card("Claims that hold", f"{len(claims) - len(rest)} of {len(claims)}", "", became_of(rest))
    key = standing.headline
    if key is None:
        return
    without = f"without {in_words(key)}"
    if key in standing.times:
        timed = standing.times[key]
        told = f"{without}; prompt {timed.prompt_tokens}, batch {timed.concurrency}"
        for column in SPEEDUPS:
            cell = column.cell(timed.times)
            yield Card(column.heading.capitalize(), f"{cell.text}×", cell.beside, told)
    if key in standing.averages:
        change, error = standing.averages[key]
        told = f"{without}; the average of {several(standing.tasks, 'benchmark')}"
        yield Card("Benchmarks", f"{100 * change:+.1f}", f"± {100 * error:.1f} points", told)
    if key in standing.nats:
        yield Card("Long texts", f"{standing.nats[key]:+.2f}", "nats a token", without)


def _sections(
    claims: Sequence[ClaimRecord],
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    checks: Sequence[DiagnosticsRecord],
    times: Sequence[TimesRecord],
    place: Mapping[Configuration, int],
) -> Iterator[Section]:
    if claims:
        found = table("claims", CLAIMS, claims)
        yield Section("claims", "The paper's claims", table=found, note=JUDGED, opens=True)
    if similarity:
        yield similarity_section(similarity)
    if benchmarks:
        names = [f"{one.task}, {one.usual_metric}" for one in benchmarks]
        yield _by_plan("benchmarks-by-plan", "Benchmarks", benchmarks, names, place)
    if checks:
        names = [one.check for one in checks]
        yield _by_plan("diagnostics-by-plan", "What accuracy hides", checks, names, place)
    if benchmarks:
        yield _one_by_one("benchmarks", "Benchmarks, one by one", BENCHMARKS, benchmarks, place)
    if checks:
        yield _one_by_one("diagnostics", "What accuracy hides, check by check", DIAGNOSTICS, checks, place)
    if times:
        yield _one_by_one("times", "Times", TIMED, times, place)


R = TypeVar("R", BenchmarkRecord, DiagnosticsRecord, TimesRecord)


def _one_by_one(
    name: str, title: str, columns: Sequence[Column[R]], records: Sequence[R], place: Mapping[Configuration, int]
) -> Section:
    steps = tuple(place[one.configuration] for one in records)
    return Section(name, title, table=table(name, columns, records), steps=steps)


C = TypeVar("C", BenchmarkRecord, DiagnosticsRecord)
Beside = tuple[Configured, Mapping[str, Compared]]  # a configuration, and its figures by what they are of


def _by_plan(
    name: str,
    title: str,
    records: Sequence[C],
    names: Sequence[str],
    place: Mapping[Configuration, int],
) -> Section:
    """A row for each configuration, and a column for each task, or check, which `names` says of each record."""
    rows: dict[Configuration, tuple[Configured, dict[str, Compared]]] = {}
    for record, asked in zip(records, names):
        alone = {"delta": math.nan} if record.variant == "dense" else {}
        rows.setdefault(record.configuration, (record, {}))[1][asked] = record.model_copy(update=alone)

    def column(asked: str) -> Column[Beside]:
        return Column(asked, lambda row: BESIDE.cell(row[1][asked]) if asked in row[1] else EMPTY, note=BESIDE.note)

    configured: tuple[Column[Beside], ...] = within(CONFIGURED, lambda row: row[0])
    found = table(name, [*configured, *map(column, dict.fromkeys(names))], [*rows.values()])
    return Section(name, title, table=found, steps=tuple(place[key] for key in rows))
