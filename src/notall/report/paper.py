"""The page of the paper's evaluation."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from ..errors import shortened
from ..experiments.benchmarks import BenchmarkRecord, DiagnosticsRecord
from ..experiments.next_commands import next_command
from ..experiments.paper.claims import judged_times
from ..experiments.paper.records import (
    DENSE,
    Average,
    ClaimRecord,
    ClaimVerdict,
    Configuration,
    TimesRecord,
)
from ..experiments.paper.scoreboard import Scoreboard
from ..experiments.similarity import SimilarityRecord
from ..experiments.verdict import MOST_NATS, NAME_LETTERS, listed
from ..measuring.statistics import LEAST_DOCUMENTS, LEAST_ROUNDS, of_rounds
from ..plan import KIND_NAMES, several
from ..results.facts import CONFIGURED, Configured
from ..results.record import is_number
from ..results.table import as_csv, formatted, pivot, table
from .folder import Folder
from .paper_tables import CAPTIONS, CLAIM_RULE, CLAIMS, caption_of, entries_of
from .parts import Message, PageParts, PageStep, Section
from .similarity import similarity_section


def page_parts(folder: Folder) -> PageParts:
    """The claims, Fig. 1 and the tables, and a sentence on the fastest usable row."""
    benchmarks, checks = folder.of(BenchmarkRecord), folder.of(DiagnosticsRecord)
    times, board = folder.of(TimesRecord), Scoreboard(benchmarks)
    rows: dict[Configuration, Configured] = {}
    for row in (*times, *benchmarks, *checks):
        rows.setdefault(row.configuration, row)
    averages = {one.configuration: one for one in board.averages()}
    timed = {one.configuration: one for one in judged_times(times)}
    lost = _nats_lost(checks)
    chosen = _headline(timed, averages, lost)
    sentences = []
    if claims := folder.of(ClaimRecord):
        sentences.append(_verdicts(claims, shortened(folder.model, NAME_LETTERS)))
    if chosen:
        measured = _measured(
            timed.get(chosen), averages.get(chosen), lost.get(chosen), board.fewest
        )
        which = f"without the deepest {_in_words(chosen)}"
        sentences.append(f"{which} {listed([*measured])}")
    steps, places = _steps(rows, timed), [*rows]
    return PageParts(
        message=_message(folder, sentences, chosen, lost),
        steps=tuple(steps),
        first=places.index(chosen) if chosen else max(len(steps) - 1, 0),
        sections=tuple(_sections(folder, board, places)),
        similarity=folder.of(SimilarityRecord),
    )


def _steps(
    rows: Mapping[Configuration, Configured],
    timed: Mapping[Configuration, TimesRecord],
) -> list[PageStep]:
    """Each configuration, with its times where it has some."""
    dense = timed[DENSE].footprint if DENSE in timed else None
    steps = []
    for key, row in rows.items():
        step = PageStep(row.name, row.plan, dense=dense)
        if key in timed:
            times, footprint = timed[key].times, timed[key].footprint
            step = replace(step, times=times, footprint=footprint)
        steps.append(step)
    return steps


def _message(
    folder: Folder,
    sentences: Sequence[str],
    chosen: Configuration | None,
    lost: Mapping[Configuration, float],
) -> Message:
    """What was found, and the command that evaluates what was chosen, or goes on."""
    begun = f"the evaluation of {shortened(folder.model, NAME_LETTERS)} has only begun"
    sentence = "; ".join(sentences) or begun
    sentence = f"{sentence[:1].upper()}{sentence[1:]}."
    if not chosen:
        command = next_command("paper", folder.model, out=folder.path)
        return Message(sentence, None, "go on with it", command)
    variant, fraction, keep_last = chosen
    skip = f"{variant}:{fraction:g}"
    command = next_command("eval", folder.model, skip=skip, keep_last=keep_last or None)
    usable = lost[chosen] <= MOST_NATS if chosen in lost else None
    return Message(sentence, usable, "see what that costs on a text", command)


def _verdicts(claims: Sequence[ClaimRecord], model: str) -> str:
    """How many claims hold, and how many do not."""
    counts = Counter(claim.verdict for claim in claims)
    verdicts = ", ".join(
        f"{name}: {counts[name]}" for name in get_args(ClaimVerdict) if counts[name]
    )
    return f"the paper's {len(claims)} claims on {model} ({verdicts})"


def _in_words(row: Configuration) -> str:
    variant, fraction, keep_last = row
    kept = " (the last layer kept)" if keep_last else ""
    return f"{fraction:.0%} of its {KIND_NAMES[variant]}s{kept}"


def _nats_lost(checks: Sequence[DiagnosticsRecord]) -> dict[Configuration, float]:
    """The mean of the nats that are lost at each depth of a long text."""
    found: dict[Configuration, list[float]] = {}
    for one in checks:
        if one.check.startswith("NLL at"):
            nats = one.delta if is_number(one.delta) else math.inf
            found.setdefault(one.configuration, []).append(nats)
    return {key: sum(some) / len(some) for key, some in found.items()}


def _headline(
    timed: Mapping[Configuration, TimesRecord],
    averages: Iterable[Configuration],
    lost: Mapping[Configuration, float],
) -> Configuration | None:
    """The fastest that is usable, as far as that is known; else the paper's own, the
    most attentions.
    """

    def pace(key: Configuration) -> tuple[float, float]:
        return timed[key].times.speedup_decode.median, -lost[key]

    def size(key: Configuration) -> tuple[float, bool]:
        _, fraction, keep_last = key
        return fraction, not keep_last

    usable = [key for key, nats in lost.items() if nats <= MOST_NATS and key in timed]
    usable = [key for key in usable if _rounds(timed[key]) >= LEAST_ROUNDS]
    if usable:
        return max(usable, key=pace)
    known = [key for key in (*averages, *timed) if key[0] == "attention"]
    return max(known, key=size, default=None)


def _rounds(timed: TimesRecord) -> int:
    return timed.times.speedup_decode.n


def _measured(
    timed: TimesRecord | None,
    average: Average | None,
    nats: float | None,
    documents: int,
) -> Iterator[str]:
    """What is known of a row, a clause each: its speed, its benchmarks, its loss."""
    if timed and _rounds(timed) < LEAST_ROUNDS:
        rounds = several(_rounds(timed), "round")
        yield f"it was timed in {rounds}, too few to say how fast it is"
    elif timed:
        speedup = timed.times.speedup_decode
        low, high = of_rounds(speedup).ends()
        interval = f"95 % interval {low:.2f} to {high:.2f}"
        yield f"it decodes {speedup.median:.2f}× as fast ({interval})"
    if average:
        change = formatted(100 * average.delta, "+.1f")
        error = formatted(100 * average.delta_se, ".1f")
        few = ""
        if documents < LEAST_DOCUMENTS:
            few = f", from too few documents to say ({documents} of a task)"
        yield (
            f"the average of {several(average.tasks, 'benchmark')} changes by {change}"
            f" ± {error} points{few}"
        )
    if nats is not None:
        unusable = "" if nats <= MOST_NATS else ": it is no longer usable"
        yield f"long texts take {nats:+.2f} nats a token{unusable}"


def _sections(
    folder: Folder, board: Scoreboard, places: Sequence[Configuration]
) -> Iterator[Section]:
    """The claims, Fig. 1, and of each kind of figures a table of all configurations;
    its CSV has every digit. `places` are the configurations of the page's steps.
    """
    if claims := folder.of(ClaimRecord):
        rows = table("claims", CLAIMS, claims)
        title = "The paper's claims"
        yield Section("claims", title, table=rows, note=CLAIM_RULE, opens=True)
    if similarity := folder.of(SimilarityRecord):
        yield similarity_section(similarity)
    measured = entries_of(
        board,
        folder.of(BenchmarkRecord),
        folder.of(TimesRecord),
        folder.of(DiagnosticsRecord),
    )
    for name, records, entries in measured:
        found, rows_of = pivot(name, CONFIGURED, entries, lambda row: row.configuration)
        keys = [row.configuration for row in rows_of]
        yield Section(
            name,
            CAPTIONS[name][0],
            table=replace(found, csv=as_csv(records)),
            steps=tuple(places.index(key) if key in places else None for key in keys),
            note=caption_of(name, records),
        )
