"""What holds of each of the paper's claims."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...measuring.statistics import (
    LEAST_DOCUMENTS,
    LEAST_ROUNDS,
    LEAST_WINDOWS,
    Estimate,
    combined,
    of_ranks,
    of_rounds,
)
from ...plan import KIND_NAMES, several
from ...results.facts import Times
from ...results.record import Quartiles, is_number
from ..similarity import SimilarityRecord
from .records import DENSE, ClaimRecord, ClaimVerdict, Configuration, TimesRecord
from .scoreboard import Scoreboard

LEAST_LAYERS = 6  # whose order can tell a trend from chance


# What the paper reports of 13B without a third of the attentions, and how far off
# counts as equal to it: a full run of the benchmarks has an error of 0.3 to 0.4 points,
# times of one machine differ by 1 or 2 % from run to run.
PAPER_POINTS, POINTS_MARGIN = 1.8, 1.0
PAPER_SPEEDUP, SPEEDUP_MARGIN = 1.18, 0.03


def of_quantity(times: Times, quantity: str) -> tuple[Quartiles, Quartiles]:
    """Milliseconds, and the speedup."""
    if quantity == "prefill":
        return times.prefill_ms, times.speedup_prefill
    return times.decode_ms_per_token, times.speedup_decode


def claims_of(
    similarity: Sequence[SimilarityRecord],
    board: Scoreboard,
    times: Sequence[TimesRecord],
) -> list[ClaimRecord]:
    """Every claim that the given figures bear on; of `times` those of the longest
    prompt and the fewest at once.
    """
    return [
        *_similarity_claims(similarity),
        *(_quality_claims(board) if board.shared else ()),
        *(_time_claims(times) if times else ()),
    ]


@dataclass(frozen=True)
class _Claim:
    """A claim, and the figure that it is judged by: it holds above the threshold."""

    claim: str
    here: str  # the figures of this model
    found: Estimate
    unit: str
    threshold: float = 0.0
    form: str = "+.2f"  # of the interval's ends

    def judged(self, few: str) -> ClaimRecord:
        """The record; `few` says on how little it was measured, if that is too
        little.
        """
        low, high = self.found.ends()
        interval = ""
        if is_number(high - low):
            ends = f"{low:{self.form}} to {high:{self.form}}"
            interval = f", 95 % interval {ends}"
        return ClaimRecord(
            claim=self.claim,
            here=self.here + interval + few,
            verdict="too few" if few else self._verdict(low, high),
            figure=self.found.value,
            error=self.found.error,
            low=low,
            high=high,
            threshold=self.threshold,
            unit=self.unit,
        )

    def _verdict(self, low: float, high: float) -> ClaimVerdict:
        if low > self.threshold:
            return "holds"
        return "does not hold" if high < self.threshold else "inconclusive"


def _similarity_claims(similarity: Sequence[SimilarityRecord]) -> Iterator[ClaimRecord]:
    blocks = sorted(
        (row for row in similarity if row.kind == "block"), key=lambda row: row.layer
    )
    if len(blocks) < 4:
        return
    # a record that does not say how many windows it read counts as one of too few
    windows = min(int(row.what.get("sequences", 0)) for row in blocks)
    few = f", on {several(windows, 'window')}" if windows < LEAST_WINDOWS else ""
    *inner, last = blocks
    known = [row.cosine for row in inner if is_number(row.cosine)]
    rho, layers = _rank_correlation(known), several(len(known), "layer")
    few_layers = ", too few to tell a trend" if len(known) < LEAST_LAYERS else ""
    yield _Claim(
        "Fig. 1: features grow more similar to the previous layer's with depth (but for"
        " the last layer)",
        f"rank correlation of cosine and depth {rho:+.2f}, over {layers}",
        of_ranks(rho, len(known)),
        "rank correlation",
    ).judged(few + few_layers)
    before = inner[-1]
    less = _cosine_of(before, windows).less(_cosine_of(last, windows))
    if is_number(less.value):
        cosines = f"cosine {last.cosine:.4f} after {before.cosine:.4f}"
        yield _Claim(
            "Fig. 1: the very last layer is less similar than the one before it",
            f"{cosines}: {less.value:.4f} ± {less.error:.4f} less",
            less,
            "cosine",
            form="+.4f",
        ).judged(few)


def _cosine_of(row: SimilarityRecord, windows: int) -> Estimate:
    return Estimate(row.cosine, row.cosine_se, windows - 1)


def _rank_correlation(cosines: Sequence[float]) -> float:
    """Of the cosines with depth; nan where all are the same."""
    from scipy.stats import spearmanr

    if len(set(cosines)) < 2:
        return math.nan
    return float(spearmanr(range(len(cosines)), cosines).statistic)


class _Pair(NamedTuple):
    """A claim that the average of `first` less that of `second` exceeds a number of
    points.
    """

    claim: str
    difference: str  # in words
    first: Configuration
    second: Configuration
    threshold: float = 0.0


def _quality_claims(board: Scoreboard) -> Iterator[ClaimRecord]:
    few = ""
    if board.fewest < LEAST_DOCUMENTS:
        few = f", with as few as {several(board.fewest, 'document')} of a task"
    tasks = several(len(board.shared), "task")
    for pair in _pairs({fraction for _, fraction, _ in board.cells} - {0.0}):
        points = combined([(100.0, board.judged(pair.first, pair.second))])
        measured = f"{points.value:+.1f} ± {points.error:.1f} points"
        yield _Claim(
            pair.claim,
            f"{pair.difference}: {measured} of the average of {tasks}",
            points,
            "points",
            pair.threshold,
            "+.1f",
        ).judged(few)


def _pairs(fractions: set[float]) -> Iterator[_Pair]:
    """What the paper says of the average of benchmarks, as pairs of configurations."""
    most = max(fractions)
    margin = f"within {several(round(POINTS_MARGIN), 'point')}"
    attention: Configuration = ("attention", most, False)
    attentions = f"{most:.0%} of the attentions"
    yield _Pair(
        f"skipping the deepest {attentions} loses no more than {PAPER_POINTS:g} points"
        f" of the average (13B), {margin}",
        "attentions skipped less dense",
        attention,
        DENSE,
        -PAPER_POINTS - POINTS_MARGIN,
    )
    for fraction in sorted(fractions):
        yield _Pair(
            f"skipping {fraction:.0%} of the attentions costs less than as many MLPs",
            "attentions skipped less MLPs skipped",
            ("attention", fraction, False),
            ("mlp", fraction, False),
        )
    for kind in ("mlp", "block"):
        yield _Pair(
            f"keeping the last layer lowers quality when {most:.0%} of the"
            f" {KIND_NAMES[kind]}s are skipped",
            "last layer skipped less last layer kept",
            (kind, most, False),
            (kind, most, True),
        )
    yield _Pair(
        f"keeping the last layer does not lower quality when {attentions} are skipped,"
        f" {margin}",
        "last layer kept less last layer skipped",
        ("attention", most, True),
        attention,
        -POINTS_MARGIN,
    )


def _time_claims(times: Sequence[TimesRecord]) -> Iterator[ClaimRecord]:
    cells = {record.configuration: record for record in judged_times(times)}
    most = max(fraction for _, fraction, _ in cells)
    rows = [cells[variant, most, False] for variant in ("attention", "mlp", "block")]
    rounds = min(int(record.what.get("rounds", 0)) for record in cells.values())
    few = f", in {several(rounds, 'round')}" if rounds < LEAST_ROUNDS else ""
    size = f"prompt {rows[0].prompt_tokens}, batch {rows[0].concurrency}"
    by_how_much = f"about {100 * (PAPER_SPEEDUP - 1):.0f} % faster or more (13B)"
    for quantity in ("prefill", "decode"):
        at = f"{quantity}, {size}, last layer skipped too"
        attention, mlp, block = (
            of_rounds(of_quantity(one.times, quantity)[1]) for one in rows
        )
        yield _Claim(
            f"skipping {most:.0%} of the attentions is {by_how_much}, within"
            f" {SPEEDUP_MARGIN:g}: {at}",
            f"{attention.value:.2f}×",
            attention,
            "times as fast",
            PAPER_SPEEDUP - SPEEDUP_MARGIN,
            ".2f",
        ).judged(few)
        for word, saver in (("attentions", attention), ("blocks", block)):
            more = saver.less(mlp)
            speedups = f"{word} {saver.value:.2f}×, MLPs {mlp.value:.2f}×"
            yield _Claim(
                f"skipping {most:.0%} of the {word} saves more time than as many MLPs:"
                f" {at}",
                f"{speedups}: {more.value:+.2f}",
                more,
                "times as fast",
            ).judged(few)


def judged_times(times: Sequence[TimesRecord]) -> list[TimesRecord]:
    """Those at the longest prompt and the fewest sequences at once."""
    sizes = [(-record.prompt_tokens, record.concurrency) for record in times]
    return [record for record, size in zip(times, sizes) if size == min(sizes)]
