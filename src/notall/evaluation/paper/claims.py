"""What the paper says of Llama-2, beside what a model shows: it holds, does not, or is left open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from ...records.benchmarks import TimesRecord
from ...records.claims import LEAST_DOCUMENTS, LEAST_ROUNDS, LEAST_WINDOWS, ClaimRecord, Verdict
from ...records.record import VARIANTS, Record
from ...records.similarity import SimilarityRecord
from .scoreboard import ConfigurationKey, Scoreboard, key_of

ERRORS = 2  # how many standard errors a difference must be away from zero to be told from it
JUDGED = (
    f"A difference counts if it exceeds {ERRORS} standard errors, a speed if both quartiles lie on one side; else it "
    f"is within error. Too few: fewer than {LEAST_DOCUMENTS} documents of a task, {LEAST_ROUNDS} timed rounds, or "
    f"{LEAST_WINDOWS} windows of text."
)


def claims_of(
    similarity: Sequence[SimilarityRecord], board: Scoreboard | None, times: Sequence[TimesRecord]
) -> list[ClaimRecord]:
    """Every claim that the given figures bear on.

    `similarity` rows are as in `measure_similarity`; `times` as in `time_grid`: those of the longest prompt and the
    smallest batch are used.
    """
    found = list(_similarity_claims(similarity))
    if board and board.shared:
        found += _quality_claims(board)
    if times:
        found += _time_claims(times)
    return found


def _judge(difference: float, error: float) -> Verdict:
    """Whether a difference that the claim says is positive is so, beyond its error."""
    if math.isnan(error) or abs(difference) <= ERRORS * error:
        return "within error"
    return "holds" if difference > 0 else "does not hold"


def _similarity_claims(similarity: Sequence[SimilarityRecord]) -> Iterable[ClaimRecord]:
    blocks = sorted((row for row in similarity if row.kind == "block"), key=lambda row: row.layer)
    if len(blocks) < 4:
        return
    inner = pd.DataFrame({"layer": range(len(blocks) - 1), "cosine": [row.cosine for row in blocks[:-1]]})
    rho = float(inner.corr(method="spearman").loc["layer", "cosine"])
    windows = min(_asked(row, "sequences") for row in blocks)

    def judged(claim: str, here: str, figure: float, error: float, judged: float, unit: str) -> ClaimRecord:
        few = windows < LEAST_WINDOWS
        here += f", on {windows} windows" if few else ""
        verdict: Verdict = "too few" if few else _judge(judged, error)
        return ClaimRecord(claim=claim, here=here, verdict=verdict, figure=figure, error=error, unit=unit)

    error = 1 / math.sqrt(len(inner) - 1)
    yield judged(
        "Fig. 1: features grow more similar to the previous layer's with depth (but for the last layer)",
        f"rank correlation of cosine and depth {rho:+.2f} ± {error:.2f}, over {len(inner)} layers",
        *(rho, error, rho, "rank correlation"),
    )
    before, last = blocks[-2], blocks[-1]
    if before.cosine is None or last.cosine is None:
        return
    change = last.cosine - before.cosine
    error = math.hypot(before.cosine_se or math.nan, last.cosine_se or math.nan)
    yield judged(
        "Fig. 1: the very last layer is less similar than the one before it",
        f"cosine {last.cosine:.4f} after {before.cosine:.4f}: last less the one before {change:+.4f} ± {error:.4f}",
        *(change, error, -change, "cosine"),
    )


def _quality_claims(board: Scoreboard) -> Iterable[ClaimRecord]:
    most = max(fraction for _, fraction, _ in board.cells)
    dense: ConfigurationKey = ("dense", 0.0, False)
    fewest = min(row[column].documents for row in board.cells.values() for column in board.shared)
    share = f"{most:.0%}"

    def compare(
        claim: str, what: str, key: ConfigurationKey, other: ConfigurationKey, at_least: float = 0.0
    ) -> ClaimRecord:
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
        *("attentions skipped less dense", ("attention", most, False), dense),
        at_least=-0.018,
    )
    for fraction in sorted({fraction for _, fraction, _ in board.cells} - {0.0}):
        yield compare(
            f"skipping {fraction:.0%} of the attentions costs less than as many MLPs",
            *("attentions skipped less MLPs skipped", ("attention", fraction, False), ("mlp", fraction, False)),
        )
    for variant in ("mlp", "block"):
        yield compare(
            f"keeping the last layer lowers quality when {share} of the {VARIANTS[variant]}s are skipped",
            *("last layer skipped less last layer kept", (variant, most, False), (variant, most, True)),
        )
    yield compare(
        f"keeping the last layer does not lower quality when {share} of the attentions are skipped",
        *("last layer kept less last layer skipped", ("attention", most, True), ("attention", most, False)),
    )


def _time_claims(times: Sequence[TimesRecord]) -> Iterable[ClaimRecord]:
    longest = max(record.prompt_tokens for record in times)
    smallest = min(record.batch_size for record in times if record.prompt_tokens == longest)
    cells = {
        key_of(record): record for record in times if (record.prompt_tokens, record.batch_size) == (longest, smallest)
    }
    most = max(fraction for _, fraction, _ in cells)
    attention, mlp, block = (cells[variant, most, False] for variant in ("attention", "mlp", "block"))
    at = f"prompt {longest}, batch {smallest}, last layer skipped too"
    rounds = min(_asked(record, "rounds") for record in cells.values())

    def judged(claim: str, here: str, record: TimesRecord, name: str, verdict: Verdict) -> ClaimRecord:
        if rounds < LEAST_ROUNDS:
            here, verdict = f"{here}, in {rounds} rounds", "too few"
        figure, low, high = (getattr(record, name + end) for end in ("", "_low", "_high"))
        return ClaimRecord(
            claim=claim, here=here, verdict=verdict, figure=figure, low=low, high=high, unit="times as fast"
        )

    for name in ("prefill", "decode"):
        gain = f"speedup_{name}"
        yield judged(
            f"skipping {most:.0%} of the attentions is about 18 % faster or more (13B): {name}, {at}",
            _gain(attention, gain),
            *(attention, gain),
            _by_quartiles(getattr(attention, f"{gain}_low") - 1.18, getattr(attention, f"{gain}_high") - 1.18),
        )
        for saver, word in ((attention, "attentions"), (block, "blocks")):
            slowest = getattr(saver, f"{gain}_low") - getattr(mlp, f"{gain}_high")
            fastest = getattr(saver, f"{gain}_high") - getattr(mlp, f"{gain}_low")
            yield judged(
                f"skipping {most:.0%} of the {word} saves more time than as many MLPs: {name}, {at}",
                f"{word} {_gain(saver, gain)}, MLPs {_gain(mlp, gain)}",
                *(saver, gain),
                _by_quartiles(slowest, fastest),
            )


def _asked(record: Record, setting: str) -> int:
    """A number that a run was given, such as rounds; 0 where that was not written down."""
    return int(record.provenance.what.get(setting, 0)) if record.provenance else 0


def _by_quartiles(low: float, high: float) -> Verdict:
    return "holds" if low > 0 else "does not hold" if high < 0 else "within error"


def _gain(record: TimesRecord, name: str) -> str:
    return f"{getattr(record, name):.2f}× [{getattr(record, f'{name}_low'):.2f}, {getattr(record, f'{name}_high'):.2f}]"
