"""What the paper measured, on any model: its grid on benchmarks and by the clock, its
Fig. 1, and what holds of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import Field

from ..errors import UsageError, shortened
from ..files import write_whole
from ..measuring.statistics import (
    LEAST_DOCUMENTS,
    LEAST_ROUNDS,
    LEAST_WINDOWS,
    Estimate,
    combined,
    mean_and_error,
    of_ranks,
    of_rounds,
    paired_difference,
    sign_flip_p_value,
    summed,
)
from ..models.names import model_in_words
from ..options import Workload, option
from ..plan import KIND_NAMES, Plan, several
from ..progress import Progress, Stages, silent
from ..results.facts import (
    CONFIGURED,
    GRID,
    SIGNIFICANT,
    Compared,
    Configured,
    Footprint,
    TaskScore,
    Times,
)
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance, place_of
from ..results.record import Count, Fact, Number, Quartiles, Record, Unsigned, is_number
from ..results.table import (
    EMPTY,
    Cell,
    Column,
    Table,
    as_csv,
    as_latex,
    pivot,
    table,
    words,
    written,
)
from .driver import (
    BenchmarkRecord,
    DiagnosticsRecord,
    SimilarityRecord,
    Subject,
    benchmark,
    checking_steps,
    diagnose,
    similarities,
)
from .folder import Folder, Message, Section, Shown, Step
from .options import Diagnostics, TaskChoice
from .pages import similarity_section
from .verdict import MOST_NATS, NAME_LETTERS, joined, next_command

if TYPE_CHECKING:
    from torch import Tensor

LEAST_LAYERS = 6  # whose order can tell a trend from chance
# What the paper reports of 13B without a third of the attentions, and how far off
# counts as equal to it: a full run of the benchmarks has an error of 0.3 to 0.4 points,
# times of one machine differ by 1 or 2 % from run to run.
POINTS, POINTS_MARGIN = 1.8, 1.0
FASTER, FASTER_MARGIN = 1.18, 0.03
JUDGED = (
    "A claim holds where the whole 95 % interval of its figure is on the claim's side"
    " of a threshold, does not hold where it is on the other side, and else is"
    " inconclusive. The threshold is 0, or lies a margin away from it, or from what"
    f" the paper reports: {POINTS_MARGIN:g} point of an average, {FASTER_MARGIN:g} of a"
    " speedup. Intervals are Student's t, and not corrected for the number of claims."
    f" Too few: fewer than {LEAST_DOCUMENTS} documents of a task, {LEAST_ROUNDS} timed"
    f" rounds, {LEAST_WINDOWS} windows of text, or {LEAST_LAYERS} layers."
)

Configuration = tuple[
    str, float, bool
]  # variant, fraction, whether the last layer is kept
DENSE: Configuration = ("dense", 0.0, False)
DENSE_ROW = Configured(variant="dense", fraction=0.0, keep_last=False, plan=Plan())
Verdict = Literal["holds", "does not hold", "inconclusive", "too few"]


class TimesRecord(
    Record, Configured, kind="times", key=("prompt_tokens", "asked_concurrency", *GRID)
):
    """One configuration at one prompt length and number of sequences at once."""

    prompt_tokens: Count
    concurrency: Count = Field(description="sequences at once, as many as memory held")
    asked_concurrency: Count
    times: Times
    footprint: Footprint


class ClaimRecord(Record, kind="claim", key=("claim",)):
    """A claim of arXiv 2407.15516, the figures that bear on it here, and what they say
    of it.
    """

    claim: str
    here: str = Field(description="the figures of this model")
    verdict: Verdict = Field(
        description=(
            "too few: documents, rounds or windows, below the least for a verdict"
        )
    )
    figure: Number = Field(
        math.nan,
        description=(
            "what is judged: a difference, a correlation, how many times as fast"
        ),
    )
    error: Unsigned = Field(math.nan, description="its standard error")
    low: Number = Field(math.nan, description="the lower end of its 95 % interval")
    high: Number = Field(math.nan, description="the upper end")
    threshold: Number = Field(math.nan, description="above which the claim holds")
    unit: str | None = Field(None, description="of these")


class Average(Compared, Configured):
    """Of a configuration over tasks, beside the original model's."""

    tasks: Count = Field(description="over how many")


CLAIMS: tuple[Column[ClaimRecord], ...] = (
    words("claim", lambda one: one.claim),
    words("verdict", lambda one: one.verdict),
    words("here", lambda one: one.here),
)


@dataclass(frozen=True)
class TimingGrid:
    """At which prompt lengths, for how many sequences at once the grid is timed, and
    how often.
    """

    PANEL: ClassVar = "Timing"

    prompt_tokens: tuple[int, ...] = option(
        (128, 512), "tokens of the prompt; repeat it for more"
    )
    generation_tokens: int = option(16, "tokens generated behind it")
    concurrency: tuple[int, ...] = option((1,), "sequences at once; repeat it for more")
    rounds: int = option(5, "timed rounds; each times all configurations in turn")

    @property
    def workloads(self) -> list[Workload]:
        sizes = product(
            dict.fromkeys(self.prompt_tokens), dict.fromkeys(self.concurrency)
        )
        return [
            Workload(prompt, self.generation_tokens, at_once, self.rounds)
            for prompt, at_once in sizes
        ]


@dataclass(frozen=True)
class PaperOptions:
    """What the benchmarks are run on, and what is measured beside them."""

    PANEL: ClassVar = "Benchmarks"

    generate_all: bool = option(
        False, "run generating tasks everywhere, not only at 33 %", ("--generate-all",)
    )
    diagnostics: Diagnostics = False


def run_paper(
    subject: Subject,
    tasks: TaskChoice,
    timing: TimingGrid = TimingGrid(),
    *,
    windows: "Sequence[Tensor]" = (),
    generate_all: bool = False,
    progress: Progress = silent,
) -> list[ClaimRecord]:
    """Benchmarks and times of the paper's grid and, on the subject's text, its Fig. 1;
    what became of its claims.

    Goes on from what the folder holds. Tasks that generate text are run on dense and
    the largest fraction only, unless `generate_all`; `windows` are those of the
    diagnostics. Raises as `benchmark` and `time_grid`, before it computes.
    """
    from ..choosing.criteria.data_free import paper_grid

    for workload in timing.workloads:
        workload.check(subject.model)
    rows = paper_grid(subject.structure)
    progress(0, 1, "reading the tasks")
    most = max(row.fraction for row in rows)
    generating = (
        None if generate_all else [row for row in rows if row.fraction in (0.0, most)]
    )
    timed = sum(workload.steps for workload in timing.workloads) * len(rows)
    checking = checking_steps(windows, len(rows)) if windows else 0
    stages = Stages(progress, subject.tokens + checking + timed)
    benchmarks = benchmark(subject, rows, tasks, generating, stages) if tasks else []
    with working_in(subject.out, "paper"):
        similarity = similarities(
            subject, subject.provenance, stages.stage(subject.tokens)
        )
    checks = (
        diagnose(subject, rows[1:], windows, stages.stage(checking)) if windows else []
    )
    times = time_grid(subject, rows, timing, progress=stages.stage(timed))
    return write_paper(subject.out, similarity, benchmarks, times, checks)


def in_turn(
    subject: Subject, rows: Sequence[Configured], progress: Progress, workload: Workload
) -> dict[str, Times]:
    """What each of `rows` takes, by its name; the dense one is among them."""
    from ..measuring.speed import time_plans

    plans = {row.name: row.plan for row in rows if row.variant != "dense"}
    return time_plans(
        subject.model, plans, workload, seed=subject.seed, progress=progress
    )


def time_grid(
    subject: Subject,
    rows: Sequence[Configured],
    timing: TimingGrid = TimingGrid(),
    *,
    measure: Callable[
        [Subject, Sequence[Configured], Progress, Workload], dict[str, Times]
    ] = in_turn,
    progress: Progress = silent,
) -> list[TimesRecord]:
    """Time all `rows` (the dense one first) for each workload of the grid, or take what
    the folder holds.

    Where memory does not hold so many sequences half of them are timed, and
    `concurrency` says so. Raises `UsageError` when not even one fits, and when another
    process works there.
    """
    from ..running.skipping import footprint

    asked = {
        "generation_tokens": timing.generation_tokens,
        "rounds": timing.rounds,
        "seed": subject.seed,
    }
    about = Provenance.of(subject.provenance, **asked)

    def known(workload: Workload) -> list[TimesRecord]:
        """Of all rows, at one number of sequences; [] where one lacks."""
        size = (workload.prompt_tokens, workload.concurrency)
        found = [
            held[key]
            for row in rows
            if (key := (*size, *row.configuration)) in held and row.describes(held[key])
        ]
        return (
            found
            if len(found) == len(rows) and len({one.concurrency for one in found}) == 1
            else []
        )

    with working_in(subject.out, "paper"):
        held = Ledger(subject.out, TimesRecord, about)
        stages = Stages(progress, sum(workload.steps for workload in timing.workloads))
        for workload in timing.workloads:
            telling = stages.stage(workload.steps)
            at = (
                f"{several(workload.prompt_tokens, 'prompt token')},"
                f" {workload.concurrency} at once"
            )
            telling(0, 1, f"timing {len(rows)} configurations at {at}")
            if known(workload):
                continue
            fitted, times = _fitting(partial(measure, subject, rows, telling), workload)
            size = {
                "prompt_tokens": workload.prompt_tokens,
                "asked_concurrency": workload.concurrency,
            }
            how = {**size, "concurrency": fitted, "provenance": about}
            left = {row.name: footprint(subject.model, row.plan) for row in rows}
            held.add(
                *(
                    TimesRecord.from_fact(
                        row, times=times[row.name], footprint=left[row.name], **how
                    )
                    for row in rows
                )
            )
        progress(stages.steps, stages.steps, "timed all configurations")
        return [record for workload in timing.workloads for record in known(workload)]


def _fitting(
    run: Callable[[Workload], dict[str, Times]], workload: Workload
) -> tuple[int, dict[str, Times]]:
    """The largest halving of the sequences at once that memory holds, and its times."""
    from accelerate.utils.memory import clear_device_cache

    from ..evaluation.scoring import unless_out_of_memory

    at_once = workload.concurrency
    while at_once:
        if times := unless_out_of_memory(
            partial(run, replace(workload, concurrency=at_once))
        ):
            return at_once, times
        clear_device_cache(garbage_collection=True)
        at_once //= 2
    raise UsageError(
        "one sequence takes more memory than there is; give a smaller dtype or shorter"
        " prompts"
    )


HEADINGS = {
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
}
ROUNDING = 1e-6  # probabilities of choices may add up to a little more than 1


def heading_of(task: str) -> str:
    """What the leaderboard calls a task, or else the harness; local_ is of one that
    stands in for the harness's.
    """
    return HEADINGS.get(name := task.removeprefix("local_"), name)


class Scoreboard:
    """Benchmark records by configuration and column; a column is a task, or task and
    metric where it has several.
    """

    def __init__(self, records: Sequence[BenchmarkRecord]) -> None:
        self.cells: dict[Configuration, dict[str, BenchmarkRecord]] = {}
        metrics = Counter(
            task for task, _ in {(record.task, record.metric) for record in records}
        )
        for record in records:
            name = heading_of(record.task)
            column = (
                name if metrics[record.task] == 1 else f"{name}, {record.usual_metric}"
            )
            self.cells.setdefault(record.configuration, {})[column] = record

    @cached_property
    def shared(self) -> list[str]:
        """The columns that every configuration has, as shares of 0 to 1: what an
        average is taken over.
        """
        every = [
            {column for column, one in row.items() if _is_share(one)}
            for row in self.cells.values()
        ]
        return [
            column
            for column in self.cells.get(DENSE, ())
            if all(column in row for row in every)
        ]

    @property
    def fewest(self) -> int:
        """Of the documents of a task; questions on one passage count as one."""
        scores = (row[column] for row in self.cells.values() for column in self.shared)
        counts = (
            len(set(one.sources)) if one.sources else one.documents for one in scores
        )
        return min(counts, default=0)

    def difference(
        self, key: Configuration, other: Configuration
    ) -> tuple[float, float, float]:
        """The average of `key` less that of `other`, its standard error and p value,
        paired by document where known.
        """
        errors, terms = [], list[float]()
        for column in self.shared:
            ours, theirs = self.cells[key][column], self.cells[other][column]
            differences = [a - b for a, b in zip(_shares(ours), _shares(theirs))]
            beside = ours.delta_se if other == DENSE else math.nan
            errors.append(
                mean_and_error(differences, ours.sources)[1] if differences else beside
            )
            terms += summed(
                [one / len(differences) for one in differences], ours.sources
            )
        count = len(self.shared)
        error = math.sqrt(math.fsum(error**2 for error in errors)) / count
        p_value = sign_flip_p_value(terms) if terms else math.nan
        return self.judged(key, other).value, error, p_value

    def judged(self, key: Configuration, other: Configuration) -> Estimate:
        """The average of `key` less that of `other`, with the error that claims are
        judged by.
        """
        parts = []
        for column in self.shared:
            ours, theirs = self.cells[key][column], self.cells[other][column]
            if ours.values and theirs.values:
                one = paired_difference(_shares(ours), _shares(theirs), ours.sources)
            else:
                error = ours.delta_se if other == DENSE else math.nan
                one = Estimate(ours.value - theirs.value, error, ours.documents - 1)
            parts.append((1 / len(self.shared), one))
        return combined(parts)

    def averages(self) -> list[Average]:
        """One for each configuration; none where nothing is shared."""
        found = []
        for key, row in self.cells.items() if self.shared else ():
            value, _ = mean_and_error([row[column].value for column in self.shared])
            delta, error, p_value = self.difference(key, DENSE)
            shown = {
                name: getattr(next(iter(row.values())), name)
                for name in Configured.model_fields
            }
            figures = {
                "value": value,
                "delta": delta,
                "delta_se": error,
                "p_value": p_value,
            }
            found.append(Average(**shown | figures, tasks=len(self.shared)))
        return found


def _is_share(record: TaskScore) -> bool:
    shares = [record.value] if record.values is None else _shares(record)
    known = is_number(record.value) and (
        record.values is None or len(shares) >= record.documents
    )
    return known and all(-ROUNDING <= value <= 1 + ROUNDING for value in shares)


def _shares(record: TaskScore) -> list[float]:
    return [value for value in record.values or () if is_number(value)]


Figure = tuple[Configured, str, Cell]  # of a configuration, under a heading


def benchmark_figures(board: Scoreboard) -> Iterator[Figure]:
    """Values in per cent, and their average; what is no share is as it is."""
    for row in board.cells.values():
        for column, one in row.items():
            plain = (
                Cell(one.value, f"{one.value:.3g}") if is_number(one.value) else EMPTY
            )
            shown = (
                _beside_dense(one, ".1f", one.p_value < SIGNIFICANT, 100)
                if _is_share(one)
                else plain
            )
            yield one, column, shown
    for average in board.averages():
        yield (
            average,
            "average",
            _beside_dense(average, ".1f", average.p_value < SIGNIFICANT, 100),
        )


def diagnostics_figures(records: Iterable[DiagnosticsRecord]) -> Iterator[Figure]:
    """Each check, marked where it got worse beyond its error."""
    for one in records:
        if is_number(one.value) and is_number(
            one.delta
        ):  # not of a model that overflows
            dense = one.value - one.delta
            yield DENSE_ROW, one.check, Cell(dense, f"{dense:.3g}")
            yield one, one.check, _beside_dense(one, ".3g", one.worse)


def time_figures(
    records: Iterable[TimesRecord], quantity: Literal["prefill", "decode"]
) -> Iterator[Figure]:
    """Milliseconds by prompt length: median, and how many times dense's speed, of the
    rounds' own ratios.
    """
    for one in records:
        taken, speedup = _of_quantity(one.times, quantity)
        cell = Cell(
            taken.median,
            f"{taken.median:.1f}",
            f"({_gain(speedup)})" if one.variant != "dense" else "",
        )
        yield one, f"prompt {one.prompt_tokens}, batch {one.concurrency}", cell


def _beside_dense(
    one: Average | BenchmarkRecord | DiagnosticsRecord,
    form: str,
    marked: bool,
    scale: int = 1,
) -> Cell:
    """A value, with its difference to dense ± its standard error; of dense itself with
    its own.
    """
    if not is_number(one.value):
        return EMPTY
    text = written(scale * one.value, form)
    if one.variant == "dense":
        return Cell(
            one.value,
            text,
            (
                f"± {written(scale * one.value_se, form)}"
                if is_number(one.value_se)
                else ""
            ),
        )
    delta = written(scale * one.delta, f"+{form}") + "*" * marked
    return Cell(one.value, text, f"({delta} ± {written(scale * one.delta_se, form)})")


def _of_quantity(times: Times, quantity: str) -> tuple[Quartiles, Quartiles]:
    """Milliseconds, and the speedup."""
    if quantity == "prefill":
        return times.prefill_ms, times.speedup_prefill
    return times.decode_ms_per_token, times.speedup_decode


def _gain(speedup: Quartiles) -> str:
    return f"{speedup.median:.2f}× [{speedup.low:.2f}, {speedup.high:.2f}]"


def half(figures: Iterable[Figure], keep_last: bool, title: str = "") -> Table:
    """A row for each configuration of half of the grid; dense is of both halves."""
    of = [
        one
        for one in figures
        if one[0].variant == "dense" or one[0].keep_last == keep_last
    ]
    return pivot(title, CONFIGURED[:2], of, lambda row: row.configuration)[0]


def claims_of(
    similarity: Sequence[SimilarityRecord],
    board: Scoreboard,
    times: Sequence[TimesRecord],
) -> list[ClaimRecord]:
    """Every claim that the given figures bear on; of `times` those of the longest
    prompt and the fewest at once.
    """
    quality = _quality_claims(board) if board.shared else ()
    return [
        *_similarity_claims(similarity),
        *quality,
        *(_time_claims(times) if times else ()),
    ]


def _claim(
    claim: str,
    here: str,
    few: str,
    found: Estimate,
    unit: str,
    threshold: float = 0.0,
    form: str = "+.2f",
) -> ClaimRecord:
    """Whether `found` is above `threshold`; `few` says on how little it was measured,
    if that is too little.
    """
    low, high = found.ends()
    verdict = "inconclusive"
    if few:
        verdict = "too few"
    elif low > threshold:
        verdict = "holds"
    elif high < threshold:
        verdict = "does not hold"
    told = (
        f", 95 % interval {low:{form}} to {high:{form}}"
        if is_number(high - low)
        else ""
    )
    return ClaimRecord.model_validate(
        {
            "claim": claim,
            "here": here + told + few,
            "verdict": verdict,
            "figure": found.value,
            "error": found.error,
            "low": low,
            "high": high,
            "threshold": threshold,
            "unit": unit,
        }
    )


def _similarity_claims(similarity: Sequence[SimilarityRecord]) -> Iterator[ClaimRecord]:
    blocks = sorted(
        (row for row in similarity if row.kind == "block"), key=lambda row: row.layer
    )
    if len(blocks) < 4:
        return
    from scipy.stats import spearmanr

    windows = min(int(row.what.get("sequences", 0)) for row in blocks)
    few = f", on {several(windows, 'window')}" if windows < LEAST_WINDOWS else ""
    *inner, last = blocks
    known = [row.cosine for row in inner if is_number(row.cosine)]
    rho = (
        float(spearmanr(range(len(known)), known).statistic)
        if len(set(known)) > 1
        else math.nan
    )
    claim = (
        "Fig. 1: features grow more similar to the previous layer's with depth (but for"
        " the last layer)"
    )
    here = (
        f"rank correlation of cosine and depth {rho:+.2f}, over"
        f" {several(len(known), 'layer')}"
    )
    few_layers = ", too few to tell a trend" if len(known) < LEAST_LAYERS else ""
    yield _claim(
        claim, here, few + few_layers, of_ranks(rho, len(known)), "rank correlation"
    )
    ends = [
        Estimate(row.cosine, row.cosine_se, windows - 1) for row in (inner[-1], last)
    ]
    less = ends[0].less(ends[1])
    if is_number(less.value):
        claim = "Fig. 1: the very last layer is less similar than the one before it"
        here = (
            f"cosine {last.cosine:.4f} after {inner[-1].cosine:.4f}: {less.value:.4f} ±"
            f" {less.error:.4f} less"
        )
        yield _claim(claim, here, few, less, "cosine", form="+.4f")


def _quality_claims(board: Scoreboard) -> Iterator[ClaimRecord]:
    fractions = sorted({fraction for _, fraction, _ in board.cells} - {0.0})
    most = fractions[-1]
    documents = several(board.fewest, "document")
    few = (
        f", with as few as {documents} of a task"
        if board.fewest < LEAST_DOCUMENTS
        else ""
    )
    margin = f"within {several(round(POINTS_MARGIN), 'point')}"
    attention = ("attention", most, False)
    attentions = f"{most:.0%} of the attentions"
    claim = (
        f"skipping the deepest {attentions} loses no more than {POINTS:g} points of the"
        " average (13B)"
    )
    # What is claimed, the first configuration less the second in words, both of them,
    # and what that exceeds.
    least = -POINTS - POINTS_MARGIN
    asked = [
        (f"{claim}, {margin}", "attentions skipped less dense", attention, DENSE, least)
    ]
    for fraction in fractions:
        claim = (
            f"skipping {fraction:.0%} of the attentions costs less than as many MLPs"
        )
        pair = ("attention", fraction, False), ("mlp", fraction, False)
        asked.append((claim, "attentions skipped less MLPs skipped", *pair, 0.0))
    for kind in ("mlp", "block"):
        claim = (
            f"keeping the last layer lowers quality when {most:.0%} of the"
            f" {KIND_NAMES[kind]}s are skipped"
        )
        asked.append(
            (
                claim,
                "last layer skipped less last layer kept",
                (kind, most, False),
                (kind, most, True),
                0.0,
            )
        )
    claim = (
        f"keeping the last layer does not lower quality when {attentions} are skipped,"
        f" {margin}"
    )
    kept = ("attention", most, True)
    asked.append(
        (
            claim,
            "last layer kept less last layer skipped",
            kept,
            attention,
            -POINTS_MARGIN,
        )
    )
    for claim, what, ours, theirs, threshold in asked:
        found = combined([(100.0, board.judged(ours, theirs))])
        tasks = several(len(board.shared), "task")
        here = (
            f"{what}: {found.value:+.1f} ± {found.error:.1f} points of the average of"
            f" {tasks}"
        )
        yield _claim(claim, here, few, found, "points", threshold, "+.1f")


def _time_claims(times: Sequence[TimesRecord]) -> Iterator[ClaimRecord]:
    cells = {record.configuration: record for record in judged_times(times)}
    most = max(fraction for _, fraction, _ in cells)
    rows = [cells[variant, most, False] for variant in ("attention", "mlp", "block")]
    rounds = min(int(record.what.get("rounds", 0)) for record in cells.values())
    few = f", in {several(rounds, 'round')}" if rounds < LEAST_ROUNDS else ""
    faster = f"is about {FASTER - 1:.0%} faster or more (13B), within {FASTER_MARGIN:g}".replace(
        "%", " %"
    )
    for name in ("prefill", "decode"):
        at = (
            f"{name}, prompt {rows[0].prompt_tokens}, batch {rows[0].concurrency}, last"
            " layer skipped too"
        )
        attention, mlp, block = (
            of_rounds(_of_quantity(one.times, name)[1]) for one in rows
        )
        claim = f"skipping {most:.0%} of the attentions {faster}: {at}"
        here = f"{attention.value:.2f}×"
        yield _claim(
            claim, here, few, attention, "times as fast", FASTER - FASTER_MARGIN, ".2f"
        )
        for word, saver in (("attentions", attention), ("blocks", block)):
            more = saver.less(mlp)
            claim = (
                f"skipping {most:.0%} of the {word} saves more time than as many MLPs:"
                f" {at}"
            )
            here = (
                f"{word} {saver.value:.2f}×, MLPs {mlp.value:.2f}×: {more.value:+.2f}"
            )
            yield _claim(claim, here, few, more, "times as fast")


def judged_times(times: Sequence[TimesRecord]) -> list[TimesRecord]:
    """Those at the longest prompt and the fewest sequences at once."""
    sizes = [(-record.prompt_tokens, record.concurrency) for record in times]
    return [record for record, size in zip(times, sizes) if size == min(sizes)]


ENDINGS = {False: "last-skipped", True: "last-kept"}
RATIOS = (
    "in brackets how many times the original model's speed [quartiles]. These ratios"
    " are taken within a round, so that they may differ from those of the medians."
)
# Of each kind of table: its title, and what its cells say.
CAPTIONS = {
    "benchmarks": (
        "Benchmarks",
        (
            "Per cent ± standard error; in brackets the difference to the original,"
            " paired by document, ± its standard error. * p < 0.05 (McNemar's exact"
            " test for accuracies; flipped signs of documents' differences for others"
            " and the average), not corrected for the number of comparisons. The"
            " average is over the tasks that every row has."
        ),
    ),
    "diagnostics": (
        "What accuracy hides",
        (
            "NLL in nats at so many tokens into a text, the share of passkeys found in"
            " texts of so many tokens, the expected calibration error of the next"
            " token, and greedy continuations beside the original's. In brackets the"
            " difference to the original model ± its standard error; * worse, p < 0.05,"
            " not corrected for the number of comparisons."
        ),
    ),
    "prefill": (
        "Prefill time (ms)",
        f"Median of {{rounds}}, each of all rows in turn; {RATIOS}",
    ),
    "decode": (
        "Decode time per new token (ms)",
        (
            "{generation_tokens}. Median of {rounds}, each of all rows in turn,"
            f" with a real KV cache; {RATIOS}"
        ),
    ),
}
CAPTION_COUNTS = {"rounds": "round", "generation_tokens": "new token"}


def write_paper(
    out: Path,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[DiagnosticsRecord] = (),
) -> list[ClaimRecord]:
    """Tables and claims from what was measured, into `out`; claims take the place of
    earlier ones.
    """
    about = next(
        one.provenance for one in (*similarity, *times, *benchmarks) if one.provenance
    )
    model, board = model_in_words(str(about.what.get("model"))), Scoreboard(benchmarks)
    evidence = (
        "The claims of arXiv 2407.15516, as it makes them of Llama-2 7B and 13B, and"
        f" our evidence on {model}."
    )
    claims = [
        claim.model_copy(update={"provenance": about})
        for claim in claims_of(similarity, board, times)
    ]
    tables = {"claims": table(f"{evidence} {JUDGED}", CLAIMS, claims)} if claims else {}
    story = [
        f"# The evaluation of arXiv 2407.15516 on {model}",
        (
            f"{about.what['dtype']} on {place_of(about.where.get('machine'))}. Weights:"
            f" {about.what['revision']}."
        ),
        (
            "## The paper's claims, and this"
            f" model\n\n{table('claims', CLAIMS, claims).markdown()}\n{JUDGED}"
        ),
        "## Similarity\n\n![Similarity by depth](similarity.png)",
    ]
    for kind, records, figures in tables_of(board, benchmarks, times, checks):
        story.append(f"## {CAPTIONS[kind][0]}")
        for keep_last, ending in ENDINGS.items():
            one = half(figures, keep_last, caption_of(kind, records, keep_last))
            tables[f"{kind}-{ending}"] = one
            story.append(f"{one.title}\n\n{one.markdown()}".rstrip("\n"))
    texts = {
        f"{name}.tex": as_latex(one, caption=one.title, label=name)
        for name, one in tables.items()
    }
    kept: dict[str, Sequence[Fact]] = {
        "claims": claims,
        "benchmarks": benchmarks,
        "averages": board.averages(),
    }
    kept |= {"times": times, "diagnostics": checks}
    texts |= {f"{name}.csv": as_csv(some) for name, some in kept.items() if some}
    with working_in(out, "paper"):
        for name, text in (texts | {"paper.md": "\n\n".join(story) + "\n"}).items():
            write_whole(out / name, text)
        (out / ClaimRecord.file).unlink(missing_ok=True)
        if claims:
            Ledger(out, ClaimRecord).add(*claims)
    return claims


def tables_of(
    board: Scoreboard,
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[DiagnosticsRecord],
) -> list[tuple[str, Sequence[Record], list[Figure]]]:
    """Of each kind of table that there is something for the records, and what is shown
    of them.
    """
    every: list[tuple[str, Sequence[Record], Iterator[Figure]]] = [
        ("benchmarks", benchmarks, benchmark_figures(board)),
        ("diagnostics", checks, diagnostics_figures(checks)),
        ("prefill", times, time_figures(times, "prefill")),
        ("decode", times, time_figures(times, "decode")),
    ]
    return [(name, records, [*figures]) for name, records, figures in every if records]


def caption_of(
    kind: str, records: Sequence[Record], keep_last: bool | None = None
) -> str:
    """What the cells of a table say, and how it was made; of half of the grid it begins
    with what is shown.
    """
    title, note = CAPTIONS[kind]
    asked = {
        name: _several(records[0].what.get(name), one)
        for name, one in CAPTION_COUNTS.items()
    }
    told = f"{note.format_map(asked)} {_made(records)}"
    if keep_last is None:
        return told
    of = f"{title} of {model_in_words(str(records[0].what.get('model')))}"
    last = "kept" if keep_last else "skipped too"
    return (
        f"{of} with the deepest of its attentions, MLPs or blocks skipped, the last"
        f" layer {last}. {told}"
    )


def _several(count: object, name: str) -> str:
    """Of a count that a record may lack, or have damaged."""
    return several(count, name) if isinstance(count, int) else f"? {name}s"


def _made(records: Sequence[Record]) -> str:
    about = records[0].provenance or Provenance(what={})
    where = (
        f"{about.what.get('dtype')} on"
        f" {place_of(about.where.get('machine'), versions=False)}."
    )
    asked = {
        (one.task, one.metric): one
        for one in records
        if isinstance(one, BenchmarkRecord)
    }
    told = "; ".join(
        f"{heading_of(one.task)}, {one.num_fewshot}-shot, {one.usual_metric} of"
        f" {several(one.documents, 'document')}"
        for one in asked.values()
    )
    return (
        f"lm-evaluation-harness {about.what.get('lm_eval')}: {told}. {where}"
        if asked
        else where
    )


def shown(folder: Folder) -> Shown:
    board, claims, times = (
        Scoreboard(folder.of(BenchmarkRecord)),
        folder.of(ClaimRecord),
        folder.of(TimesRecord),
    )
    checks = folder.of(DiagnosticsRecord)
    every: dict[Configuration, Configured] = {}
    for row in (*times, *folder.of(BenchmarkRecord), *checks):
        every.setdefault(row.configuration, row)
    averages = {one.configuration: one for one in board.averages()}
    timed, lost = {one.configuration: one for one in judged_times(times)}, _lost(checks)
    steps, dense = [], timed[DENSE].footprint if DENSE in timed else None
    for key, row in every.items():
        taken, left = (
            (timed[key].times, timed[key].footprint) if key in timed else (None, None)
        )
        steps.append(Step(row.name, row.plan, None, taken, left, dense))
    parts, model, place = [], shortened(folder.model, NAME_LETTERS), [*every]
    if claims:
        counts = Counter(claim.verdict for claim in claims)
        became = ", ".join(
            f"{name}: {counts[name]}" for name in get_args(Verdict) if counts[name]
        )
        parts.append(f"the paper's {len(claims)} claims on {model} ({became})")
    end, command = "go on with it", next_command("paper", folder.model, out=folder.path)
    if first := _headline(timed, averages, lost):
        found = _told(
            timed.get(first), averages.get(first), lost.get(first), board.fewest
        )
        variant, fraction, keep_last = first
        named = (
            f"{fraction:.0%} of its"
            f" {KIND_NAMES[variant]}s{' (the last layer kept)' if keep_last else ''}"
        )
        parts.append(f"without the deepest {named} {joined([*found])}")
        options = {"skip": f"{variant}:{fraction:g}", "keep_last": keep_last or None}
        end, command = (
            "see what that costs on a text",
            next_command("eval", folder.model, **options),
        )
    said = "; ".join(parts) or f"the evaluation of {model} has only begun"
    usable = lost[first] <= MOST_NATS if first in lost else None
    return Shown(
        message=Message(f"{said[:1].upper()}{said[1:]}.", usable, end, command),
        steps=tuple(steps),
        first=place.index(first) if first else max(len(steps) - 1, 0),
        sections=tuple(_sections(folder, board, place)),
        similarity=folder.of(SimilarityRecord),
    )


def _lost(checks: Sequence[DiagnosticsRecord]) -> dict[Configuration, float]:
    """The mean of the nats that are lost at each depth of a long text."""
    found: dict[Configuration, list[float]] = {}
    for one in checks:
        if one.check.startswith("NLL at"):
            found.setdefault(one.configuration, []).append(
                one.delta if is_number(one.delta) else math.inf
            )
    return {key: sum(some) / len(some) for key, some in found.items()}


def _headline(
    timed: Mapping[Configuration, TimesRecord],
    averages: Iterable[Configuration],
    lost: Mapping[Configuration, float],
) -> Configuration | None:
    """The fastest that is usable, as far as that is known; else the paper's own, the
    most attentions.
    """
    usable = [key for key, nats in lost.items() if nats <= MOST_NATS and key in timed]
    usable = [key for key in usable if _rounds(timed[key]) >= LEAST_ROUNDS]
    if usable:
        return max(
            usable, key=lambda key: (timed[key].times.speedup_decode.median, -lost[key])
        )
    known = [key for key in (*averages, *timed) if key[0] == "attention"]
    return max(known, key=lambda key: (key[1], not key[2]), default=None)


def _rounds(timed: TimesRecord) -> int:
    return timed.times.speedup_decode.n


def _told(
    timed: TimesRecord | None,
    average: Average | None,
    nats: float | None,
    documents: int,
) -> Iterator[str]:
    if timed and _rounds(timed) < LEAST_ROUNDS:
        yield (
            f"it was timed in {several(_rounds(timed), 'round')}, too few to say how"
            " fast it is"
        )
    elif timed:
        low, high = of_rounds(timed.times.speedup_decode).ends()
        middle = timed.times.speedup_decode.median
        yield (
            f"it decodes {middle:.2f}× as fast (95 % interval {low:.2f} to {high:.2f})"
        )
    if average:
        change, error = (
            written(100 * average.delta, "+.1f"),
            written(100 * average.delta_se, ".1f"),
        )
        few = (
            f", from too few documents to say ({documents} of a task)"
            if documents < LEAST_DOCUMENTS
            else ""
        )
        yield (
            f"the average of {several(average.tasks, 'benchmark')} changes by {change}"
            f" ± {error} points{few}"
        )
    if nats is not None:
        yield (
            f"long texts take {nats:+.2f} nats a"
            f" token{'' if nats <= MOST_NATS else ': it is no longer usable'}"
        )


def _sections(
    folder: Folder, board: Scoreboard, place: Sequence[Configuration]
) -> Iterator[Section]:
    """The claims, Fig. 1, and of each kind of figures a table of all configurations;
    its CSV has every digit.
    """
    if claims := folder.of(ClaimRecord):
        yield Section(
            "claims",
            "The paper's claims",
            (),
            table("claims", CLAIMS, claims),
            note=JUDGED,
            opens=True,
        )
    if similarity := folder.of(SimilarityRecord):
        yield similarity_section(similarity)
    kinds = (
        folder.of(BenchmarkRecord),
        folder.of(TimesRecord),
        folder.of(DiagnosticsRecord),
    )
    for name, records, figures in tables_of(board, *kinds):
        lines, rows = pivot(name, CONFIGURED, figures, lambda row: row.configuration)
        steps = tuple(
            place.index(row.configuration) if row.configuration in place else None
            for row in rows
        )
        lines = replace(lines, csv=as_csv(records))
        yield Section(
            name, CAPTIONS[name][0], (), lines, steps, caption_of(name, records)
        )
