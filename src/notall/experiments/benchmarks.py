"""Benchmarks and diagnostics of plans, each task and part kept once it is done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ..plan import Plan
from ..progress import Progress, Stages, silent
from ..results.facts import GRID, Check, Configured, TaskScore
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Record
from .options.tasks import TaskChoice
from .subject import Subject

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.harness import PlansLM, TaskResult
    from ..evaluation.tasks import Job


class BenchmarkRecord(
    Record, TaskScore, Configured, kind="benchmark", key=("task", "metric", *GRID)
):
    """One configuration on one task, compared with the original model on the same
    documents.
    """


class DiagnosticsRecord(
    Record, Check, Configured, kind="diagnostics", key=("part", "check", *GRID)
):
    """One check of one configuration, compared with the original model."""

    part: str = Field(description="of the diagnostics")


def run_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plans: Sequence[Plan],
    jobs: Sequence[Job],
    choice: TaskChoice,
    folder: Path | None,
    progress: Progress,
) -> list[TaskResult]:
    """As `run_tasks` with the settings of `choice`; nothing where there are no jobs."""
    if not jobs:
        return []
    from ..evaluation.harness import run_tasks

    assert tokenizer
    return run_tasks(
        model, tokenizer, plans, jobs, folder=folder, progress=progress, **choice.how
    )


def benchmark(
    subject: Subject,
    rows: Sequence[Configured],
    choice: TaskChoice,
    generating_rows: Sequence[Configured] | None = None,
    stages: Stages | None = None,
) -> list[BenchmarkRecord]:
    """One record a task, metric and row (the dense one first), kept as soon as a task
    is done, and each answer at once.

    All data is read and checked before anything is computed, and what that takes is
    added to `stages`. Tasks that generate text are for `generating_rows`, where given.
    Raises `UsageError` as `run_tasks` does, and as `Ledger` does.
    """
    from ..evaluation.checks import prompts_digest
    from ..evaluation.harness import LM_EVAL_VERSION, PlansLM, evaluate_job

    settings = {
        "lm_eval": LM_EVAL_VERSION,
        "asked_fewshot": choice.num_fewshot,
        "truncate": choice.truncate,
    }
    about = Provenance.of(subject.provenance, **settings)
    abouts = {
        one: Provenance.of(
            about, asked=one, limit=choice.limit_of(one), **prompts_digest(one)
        )
        for one in choice.names
    }
    rows_of = {False: rows, True: generating_rows or rows}  # text: plan by plan

    def known(name: str) -> list[BenchmarkRecord]:
        """Of these rows, of the task that was asked for by this name."""
        asked = (record for record in held if record.what.get("asked") == name)
        return [
            record for record in asked if any(row.describes(record) for row in rows)
        ]

    @cache
    def model(of_few: bool) -> PlansLM:
        assert subject.tokenizer
        plans = [row.plan for row in rows_of[of_few]]
        return PlansLM(
            subject.model,
            subject.tokenizer,
            plans,
            subject.out,
            workers=subject.workers,
            **choice.how,
        )

    with working_in(subject.out, "paper"):
        held = Ledger(
            subject.out,
            BenchmarkRecord,
            lambda one: abouts.get(str(one.what.get("asked")), about),
        )
        asked: dict[str, tuple[Job, bool]] = {}
        for name in choice.names:
            found = known(name)
            if not found or len(found) != found[0].what.get("records"):
                job = choice.build(name)
                asked[name] = job, _generates(job) and bool(generating_rows)
        for job, of_few in asked.values():
            model(of_few).check(job)
        stages = stages or Stages(silent, 0)
        steps = {
            name: job.steps(len(rows_of[of_few]))
            for name, (job, of_few) in asked.items()
        }
        stages.steps += sum(steps.values())
        for name, (job, of_few) in asked.items():
            lm = model(of_few)
            lm.progress = stages.stage(steps[name])
            answers = evaluate_job(lm, job)
            source = Provenance.of(abouts[name], records=len(answers))
            kept = {record.key for record in known(name)}
            made = (
                BenchmarkRecord.from_fact(
                    one.score, rows_of[of_few][one.number], provenance=source
                )
                for one in answers
            )
            held.add(*(record for record in made if record.key not in kept))
        return [record for name in choice.names for record in known(name)]


def _generates(job: Job) -> bool:
    """Whether some task of it generates text."""
    return any(task.OUTPUT_TYPE == "generate_until" for task in job.tasks.values())


def checking_steps(windows: Sequence[Tensor], plans: int) -> float:
    """What the diagnostics take so many plans, the original one among them, in tokens
    that are read.
    """
    from ..evaluation.diagnostics import progress_steps

    return sum(progress_steps(windows, plans).values())


def diagnose(
    subject: Subject,
    rows: Sequence[Configured],
    windows: Sequence[Tensor],
    progress: Progress,
) -> list[DiagnosticsRecord]:
    """One record a configuration and check; a part of the diagnostics is kept as soon
    as it is done.
    """
    from ..evaluation.diagnostics import KEYS, PARTS, progress_steps, run_diagnostics

    assert subject.tokenizer
    about = Provenance.of(
        subject.provenance,
        seed=subject.seed,
        windows=[len(windows), windows[0].numel()],
        passkeys=KEYS,
    )
    plans = [row.plan for row in rows]
    steps = progress_steps(windows, len(plans) + 1)
    with working_in(subject.out, "paper"):
        held = Ledger(subject.out, DiagnosticsRecord, about)
        stages = Stages(progress, sum(steps.values()))
        for part in PARTS:
            report = stages.stage(steps[part])
            report(0, 1, f"{part}, all configurations")
            counts = {
                sum(record.part == part and row.describes(record) for record in held)
                for row in rows
            }
            if len(counts) == 1 and counts != {0}:
                continue
            found = run_diagnostics(
                subject.model,
                subject.tokenizer,
                plans,
                windows,
                parts=[part],
                seed=subject.seed,
            )
            records = [
                DiagnosticsRecord.from_fact(check, row, part=part, provenance=about)
                for row, checks in zip(rows, found)
                for check in checks
            ]
            held.add(*records)
        progress(1, 1, "diagnostics")
        return [record for record in held if any(row.describes(record) for row in rows)]
