"""Time prefill and decode of the original and the skipped model, interleaved in one
run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ..errors import UsageError
from ..options import Workload, option
from ..plan import Plan, several
from ..progress import Progress, silent
from ..results.facts import FOOTPRINT, PEAK, TIMES, Footprint, Times
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Count, Fact, Record, Skips
from ..results.table import Column, number, table, within, words
from .folder import Folder, Section, Shown, Step
from .options import ModelOptions
from .verdict import Verdict, next_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Timed(Fact):
    """A model that was timed: how long it takes, and what it weighs."""

    times: Times
    footprint: Footprint


class BenchRecord(Record, Skips, kind="bench"):
    """A plan and the original model, timed in one run. Every measurement is one of its
    own.
    """

    prompt_tokens: Count
    generation_tokens: Count
    concurrency: Count = Field(description="sequences at once")
    rounds: Count = Field(description="how often both were timed, in turn")
    dense: Timed
    skipped: Timed | None = Field(
        None, description="without what the plan skips; None where it skips nothing"
    )

    @property
    def told(self) -> str:
        return (
            f"{self.prompt_tokens} + {self.generation_tokens} tokens,"
            f" {self.concurrency} at once"
        )


class BenchRow(Fact):
    """One of the two, as a table shows it."""

    plan_words: str
    model: Timed
    bench: BenchRecord


def rows_of(records: Sequence[BenchRecord]) -> list[BenchRow]:
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


@dataclass(frozen=True)
class ShapeOptions:
    """A model of random weights in place of a real one."""

    PANEL: ClassVar = "Model"

    shape: str | None = option(
        None, "instead of MODEL: llama-2-7b, llama-2-13b, llama-2-70b or a config.json"
    )
    dummy_weights: bool = option(
        False, "use random weights, so that nothing is downloaded", ("--dummy-weights",)
    )

    def load(self, model: ModelOptions, seed: int) -> "PreTrainedModel":
        """The model that is named, or one of random weights."""
        if not (self.shape or self.dummy_weights):
            return model.load()[0]
        if not self.dummy_weights:
            raise UsageError("--shape has no weights of its own: add --dummy-weights")
        from ..models.configs import load_config
        from ..models.devices import resolve_device, resolve_dtype
        from ..models.weightless import build_random

        place, spec = resolve_device(model.device), self.shape or model.model
        config = load_config(
            spec, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        return build_random(
            config, dtype=resolve_dtype(model.dtype, place), device=place, seed=seed
        )


def bench(
    model: "PreTrainedModel",
    plan: Plan,
    workload: Workload,
    provenance: Provenance,
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> BenchRecord:
    """`plan` and the original, timed; kept in the folder `out`, if given, or
    `UsageError` before anything is timed.
    """
    from ..measuring.speed import time_plans
    from ..running.skipping import footprint

    with working_in(out, "bench"):
        kept = Ledger(out, BenchRecord) if out else None
        times = time_plans(
            model,
            {"skipped": plan} if plan else {},
            workload,
            seed=seed,
            progress=progress,
        )
        dense = Timed(times=times["dense"], footprint=footprint(model, Plan()))
        skipped = (
            Timed(times=times["skipped"], footprint=footprint(model, plan))
            if plan
            else None
        )
        source = Provenance.of(provenance, seed=seed)
        record = BenchRecord(
            plan=plan, **vars(workload), dense=dense, skipped=skipped, provenance=source
        )
        if kept is not None:
            kept.add(record)
    return record


def conclusion(record: BenchRecord) -> str:
    """What prompt and generated tokens take together, of a record that skips
    something.
    """
    assert record.skipped
    dense, skipped = (
        one.times.prefill_ms.median
        + record.generation_tokens * one.times.decode_ms_per_token.median
        for one in (record.dense, record.skipped)
    )
    tokens, faster = (
        f"the prompt and {several(record.generation_tokens, 'new token')}",
        f"{dense / skipped:.2f} times as fast",
    )
    told = f"Without {record.plan.in_words()} {tokens} take {skipped:,.0f} ms"
    by = "by medians" if record.rounds > 1 else "in one round, which has no spread"
    first = f" {_first_token(record)}" if record.plan.prefill else ""
    return (
        f"{told}, where the original model takes {dense:,.0f}: {faster}, {by}.{first}"
    )


def _first_token(record: BenchRecord) -> str:
    assert record.skipped
    dense, skipped = record.dense.times.prefill_ms, record.skipped.times.prefill_ms
    faster, decode = (
        record.skipped.times.speedup_prefill,
        record.skipped.times.speedup_decode,
    )
    told = (
        f"The first token comes after {skipped.median:,.0f} ms, not {dense.median:,.0f}"
    )
    spread = f" [{faster.low:.2f} to {faster.high:.2f}]" if record.rounds > 1 else ""
    return (
        f"{told}: {faster.median:.2f} times as fast{spread}; each further one"
        f" {decode.median:.2f} times."
    )


def shown(folder: Folder) -> Shown:
    rows = rows_of(folder.of(BenchRecord))
    steps = []
    for row in rows:
        plan = row.bench.plan if row.model is row.bench.skipped else Plan()
        name, dense = f"{row.plan_words}, {row.bench.told}", row.bench.dense.footprint
        steps.append(
            Step(name, plan, None, row.model.times, row.model.footprint, dense)
        )
    note = (
        "Plan and original model are timed in turn; a speedup is the median of the"
        " rounds' own ratios."
    )
    results = Section(
        "results",
        "Results",
        (),
        table("results", COLUMNS, rows),
        tuple(range(len(rows))),
        note,
    )
    timed = [place for place, step in enumerate(steps) if step.plan]
    if not timed:
        return Shown(
            steps=tuple(steps), first=max(len(rows) - 1, 0), sections=(results,)
        )
    # Of random weights no loss is of interest.
    real = "MODEL" if rows[timed[-1]].bench.what.get("dummy_weights") else folder.model
    command = next_command("eval", real, *folder.plan_options)
    message = Verdict.of(steps[timed[-1]], folder).message(
        "see what that costs", command
    )
    return Shown(message, (), tuple(steps), timed[-1], (results,))
