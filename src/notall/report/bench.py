"""Times of a plan: table, sentence and page."""

from collections.abc import Sequence

from ..experiments.bench import BenchRecord, Timed
from ..experiments.next_commands import next_command
from ..plan import Plan, several
from ..results.facts import FOOTPRINT, PEAK, TIMES
from ..results.record import Fact
from ..results.table import Column, number, table, within, words
from .folder import Folder
from .parts import Message, PageParts, PageStep, Section
from .plans import step_verdict

NOTE = (
    "Plan and original model are timed in turn; a speedup is the median of the rounds'"
    " own ratios."
)


class BenchRow(Fact):
    """One of the two, as a table shows it."""

    plan_words: str
    model: Timed
    bench: BenchRecord


def bench_rows(records: Sequence[BenchRecord]) -> list[BenchRow]:
    """Two for each record: the original model, and the plan if it skips something."""
    return [
        BenchRow(plan_words=name, model=model, bench=record)
        for record in records
        for name, model in (
            ("dense", record.dense),
            (record.plan.in_words(), record.skipped),
        )
        if model
    ]


COLUMNS: tuple[Column[BenchRow], ...] = (
    words("skipped", lambda row: row.plan_words),
    *within(TIMES, lambda row: row.model.times),
    *within(FOOTPRINT, lambda row: row.model.footprint),
    *within((PEAK,), lambda row: row.model.times),
    number("prompt tokens", lambda row: row.bench.prompt_tokens, "d"),
    number("generated tokens", lambda row: row.bench.generation_tokens, "d"),
    number("at once", lambda row: row.bench.concurrency, "d"),
)


def workload_of(record: BenchRecord) -> str:
    """What was timed, such as `128 + 32 tokens, 1 at once`."""
    tokens = f"{record.prompt_tokens} + {record.generation_tokens} tokens"
    return f"{tokens}, {record.concurrency} at once"


def conclusion(record: BenchRecord) -> str:
    """What prompt and generated tokens take together, in a sentence, of a record that
    skips something.
    """
    assert record.skipped
    dense, skipped = _whole_ms(record, record.dense), _whole_ms(record, record.skipped)
    tokens = f"the prompt and {several(record.generation_tokens, 'new token')}"
    by = "by medians" if record.rounds > 1 else "in one round, which has no spread"
    whole = (
        f"Without {record.plan.in_words()} {tokens} take {skipped:,.0f} ms, where the"
        f" original model takes {dense:,.0f}: {dense / skipped:.2f} times as fast, {by}."
    )
    return f"{whole} {_first_token(record)}" if record.plan.prefill else whole


def _whole_ms(record: BenchRecord, model: Timed) -> float:
    """Milliseconds of the prompt and of all generated tokens, by medians."""
    times = model.times
    each = times.decode_ms_per_token.median
    return times.prefill_ms.median + record.generation_tokens * each


def _first_token(record: BenchRecord) -> str:
    assert record.skipped
    times, dense_ms = record.skipped.times, record.dense.times.prefill_ms.median
    speedup, decode = times.speedup_prefill, times.speedup_decode
    spread = f" [{speedup.low:.2f} to {speedup.high:.2f}]" if record.rounds > 1 else ""
    return (
        f"The first token comes after {times.prefill_ms.median:,.0f} ms, not"
        f" {dense_ms:,.0f}: {speedup.median:.2f} times as fast{spread}; each further one"
        f" {decode.median:.2f} times."
    )


def page_parts(folder: Folder) -> PageParts:
    """Times and bytes of each plan that was timed, and of the original model."""
    rows = bench_rows(folder.of(BenchRecord))
    steps = tuple(_step_of(row) for row in rows)
    results = Section(
        "results",
        "Results",
        table=table("results", COLUMNS, rows),
        steps=tuple(range(len(rows))),
        note=NOTE,
    )
    timed = [place for place, step in enumerate(steps) if step.plan]
    if not timed:
        last = max(len(rows) - 1, 0)
        return PageParts(steps=steps, first=last, sections=(results,))
    last = timed[-1]
    # Of random weights no loss is of interest.
    is_random = rows[last].bench.what.get("dummy_weights")
    model = "MODEL" if is_random else folder.model
    message = Message.of(
        step_verdict(steps[last], folder),
        "see what that costs",
        next_command("eval", model, *folder.plan_options),
    )
    return PageParts(message, steps=steps, first=last, sections=(results,))


def _step_of(row: BenchRow) -> PageStep:
    is_skipped = row.model is row.bench.skipped
    return PageStep(
        f"{row.plan_words}, {workload_of(row.bench)}",
        row.bench.plan if is_skipped else Plan(),
        times=row.model.times,
        footprint=row.model.footprint,
        dense=row.bench.dense.footprint,
    )
