"""Benchmarks of many configurations in a folder: one record for each task and configuration, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..progress import Progress, Stages, silent
from ..records.benchmarks import BenchmarkRecord
from ..records.ledger import Ledger, working_in
from ..records.provenance import Provenance
from .harness import LM_EVAL_VERSION, PlansLM, TaskResult, evaluate_job
from .paper.grid import Configuration
from .tasks import Job, Limits, TaskShelf

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
    generating_rows: Sequence[Configuration] | None = None,
    num_fewshot: int | None = None,
    limits: Limits | None = None,
    task_path: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
    truncate: bool = False,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> list[BenchmarkRecord]:
    """Evaluate `rows` (the dense one first) on `tasks`, as `run_tasks` does; one record a task, metric and row.

    Tasks that generate text take a pass for each row: they are run on `generating_rows`, where given. Writes to `out`
    the records of a task as soon as it is done, and each answer as it comes: the same call goes on where it stopped.
    Raises `UsageError` as `run_tasks` does, when `out` holds the results of other settings or of another command, and
    when another process works in it.
    """
    limits = limits or Limits()
    shelf = TaskShelf(task_path)
    names = shelf.names(tasks)
    settings = {"lm_eval": LM_EVAL_VERSION, "asked_fewshot": num_fewshot, "truncate": truncate}
    about = Provenance.of(provenance, **settings)
    abouts = {name: Provenance.of(about, asked=name, limit=limits.of(name)) for name in names}
    with working_in(out, "paper"):
        records = Ledger(out, BenchmarkRecord, lambda record: abouts.get(str(_what(record).get("asked")), about))
        how = {"batch_size": batch_size, "truncate": truncate, "workers": workers}
        models = _Models(model, tokenizer, out, how)
        stages = Stages(progress, len(names))
        for name in names:
            telling = stages.stage(1)
            held = _held(records, name, rows)
            if held and len(held) == _what(held[0]).get("records"):
                continue
            job = shelf.build(name, num_fewshot, limits.of(name))
            chosen = generating_rows if generating_rows and generates(job) else rows
            found = evaluate_job(models.of(chosen, telling), job)
            source = Provenance.of(abouts[name], records=len(found))
            every = [_record(chosen[result.number], result, source) for result in found]
            known = {record.key for record in held}
            records.add(*(record for record in every if record.key not in known))
        progress(len(names), len(names), "benchmarks")
        return [record for name in names for record in _held(records, name, rows)]


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
