"""Benchmarks of many configurations in a folder: one record for each task and configuration, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..progress import Progress, Stages, silent
from ..records.benchmarks import BenchmarkRecord
from ..records.ledger import Ledger, refuse_foreign, working_in
from ..records.provenance import Provenance
from .harness import LM_EVAL_VERSION, PlansLM, TaskResult, evaluate_job
from .paper.grid import Configuration
from .tasks import Job, Limits, TaskShelf, check_fewshot

if TYPE_CHECKING:
    from .ray_workers import Workers


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Configuration],
    tasks: Sequence[str],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    progress: Progress = silent,
    **how: Any,
) -> list[BenchmarkRecord]:
    """`Benchmarks` with these options, run."""
    return Benchmarks(model, tokenizer, rows, tasks, out, provenance, **how).run(progress)


class Benchmarks:
    """Some tasks for `rows` (the dense one first): their data is read, and all is checked, before anything is computed.

    Tasks that generate text take a pass for each row: they are for `generating_rows`, where given. Raises `UsageError`
    as `run_tasks` does, and when `out` holds the results of other settings or of another command.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Configuration],
        tasks: Sequence[str],
        out: Path,
        provenance: Provenance | Mapping[str, Any],
        *,
        generating_rows: Sequence[Configuration] | None = None,
        num_fewshot: int | None = None,
        limits: Limits | None = None,
        task_path: str | Path | TaskShelf | None = None,
        batch_size: int | Literal["auto"] = "auto",
        truncate: bool = False,
        workers: Workers | None = None,
    ) -> None:
        check_fewshot(num_fewshot)
        limits, shelf = limits or Limits(), TaskShelf.of(task_path)
        self.rows, self.generating_rows, self.out = rows, generating_rows, out
        self.names = shelf.names(tasks)
        settings = {"lm_eval": LM_EVAL_VERSION, "asked_fewshot": num_fewshot, "truncate": truncate}
        self.about = Provenance.of(provenance, **settings)
        self.abouts = {name: Provenance.of(self.about, asked=name, limit=limits.of(name)) for name in self.names}
        refuse_foreign(out, "paper")
        records = self._records()
        lacking = [name for name in self.names if not self._is_done(records, name)]
        self.jobs = {name: shelf.build(name, num_fewshot, limits.of(name)) for name in lacking}
        how = {"batch_size": batch_size, "truncate": truncate, "workers": workers}
        self.models = _Models(model, tokenizer, out, how)
        for job in self.jobs.values():
            self.models.of(self._rows_of(job), silent).check(job)

    def run(self, progress: Progress = silent) -> list[BenchmarkRecord]:
        """One record a task, metric and row.

        Writes to `out` the records of a task as soon as it is done, and each answer as it comes: the same call goes on
        where it stopped. Raises `UsageError` when another process works in `out`, and when it cannot be written.
        """
        with working_in(self.out, "paper"):
            records = self._records()
            stages = Stages(progress, len(self.names))
            for name in self.names:
                telling = stages.stage(1)
                if name not in self.jobs or self._is_done(records, name):
                    continue
                chosen = self._rows_of(self.jobs[name])
                found = evaluate_job(self.models.of(chosen, telling), self.jobs[name])
                source = Provenance.of(self.abouts[name], records=len(found))
                every = [_record(chosen[result.number], result, source) for result in found]
                known = {record.key for record in _held(records, name, self.rows)}
                records.add(*(record for record in every if record.key not in known))
            progress(len(self.names), len(self.names), "benchmarks")
            return [record for name in self.names for record in _held(records, name, self.rows)]

    def _records(self) -> Ledger[BenchmarkRecord]:
        return Ledger(
            self.out, BenchmarkRecord, lambda record: self.abouts.get(str(_what(record).get("asked")), self.about)
        )

    def _is_done(self, records: Ledger[BenchmarkRecord], name: str) -> bool:
        held = _held(records, name, self.rows)
        return bool(held) and len(held) == _what(held[0]).get("records")

    def _rows_of(self, job: Job) -> Sequence[Configuration]:
        return self.generating_rows if self.generating_rows and generates(job) else self.rows


def _held(records: Iterable[BenchmarkRecord], name: str, rows: Sequence[Configuration]) -> list[BenchmarkRecord]:
    """What is known of these rows, of the task that was asked for by this name."""
    asked = (record for record in records if _what(record).get("asked") == name)
    return [record for record in asked if any(row.describes(record) for row in rows)]


def _what(record: BenchmarkRecord) -> Mapping[str, Any]:
    return record.provenance.what if record.provenance else {}


class _Models:
    """A harness model for each choice of configurations, made when it is first needed."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, how: Mapping[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.out, self.how = model, tokenizer, out, how
        self.made: dict[tuple[str, ...], PlansLM] = {}

    def of(self, rows: Sequence[Configuration], progress: Progress) -> PlansLM:
        key = tuple(row.name for row in rows)
        if key not in self.made:
            self.made[key] = PlansLM(self.model, self.tokenizer, [row.plan for row in rows], self.out, **self.how)
        self.made[key].progress = progress
        return self.made[key]


def generates(job: Job) -> bool:
    """Whether a task of `job` has the model write text, which costs a pass for each configuration."""
    return any(task.OUTPUT_TYPE == "generate_until" for task in job.tasks.values())


def _record(row: Configuration, result: TaskResult, about: Provenance) -> BenchmarkRecord:
    values = [document.value for document in result.documents]
    numeric = all(isinstance(value, int | float) for value in values)
    return BenchmarkRecord(
        task=result.task,
        metric=result.metric,
        variant=row.variant,
        fraction=row.fraction,
        keep_last=row.keep_last,
        plan=row.plan,
        num_fewshot=result.num_fewshot,
        documents=len(result.documents),
        value=result.value,
        value_se=result.stderr,
        delta=result.delta,
        delta_se=result.delta_stderr,
        p_value=result.p_value,
        higher_is_better=result.higher_is_better,
        values=tuple(map(float, values)) if numeric else None,
        provenance=about,
    )
