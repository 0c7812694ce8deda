"""Benchmarks of many configurations in a folder: one record for each task and configuration, resumable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..plan import Configuration
from ..records import ledger
from .harness import ANSWERS, LM_EVAL_VERSION, PlansLM, Progress, TaskResult, evaluate_job
from .tasks import Job, Limits, TaskShelf

if TYPE_CHECKING:
    from .ray_workers import Workers

BENCHMARKS = "benchmarks.jsonl"


class BenchmarkRecord(BaseModel):
    """One configuration on one task, beside the dense model on the same documents. What is no number is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="as the harness names it")
    metric: str = Field(description="metric,filter of the harness")
    variant: Literal["dense", "attention", "mlp", "block", "plan"] = Field(description="what is skipped")
    fraction: float = Field(ge=0, le=1, description="share of the layers that was asked for, 0 to 1")
    keep_last: bool = Field(description="whether the last layer is preserved")
    plan: dict[Literal["attention", "mlp"], list[int]] = Field(description="indices of the skipped layers, from 0")
    num_fewshot: int = Field(description="examples shown before a question")
    documents: int = Field(description="how many were evaluated")
    value: float | None = Field(description="the harness's own figure")
    value_se: float | None = Field(description="its standard error over documents, as the harness has it")
    delta: float | None = Field(description="value less the dense model's")
    delta_se: float | None = Field(description="standard error of delta, paired by document")
    p_value: float | None = Field(description="of no difference: McNemar's exact test for accuracies, else normal")
    higher_is_better: bool | None
    values: list[float] | None = Field(description="the metric of each document in order, where it is a number")
    provenance: dict[str, Any] = Field(description="model, dtype, limit, versions: what to repeat it with")


def run_benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Configuration],
    tasks: Sequence[str],
    out: Path,
    provenance: Mapping[str, Any],
    *,
    generating_rows: Sequence[Configuration] | None = None,
    num_fewshot: int | None = None,
    limits: Limits | None = None,
    task_path: str | Path | None = None,
    batch_size: int | Literal["auto"] = "auto",
    truncate: bool = False,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Evaluate `rows` (the dense one first) on `tasks`, as `run_tasks` does; one record a task, metric and row.

    Tasks that generate text take a pass for each row: they are run on `generating_rows`, where given. Writes
    `out/benchmarks.jsonl`, the records of a task as soon as it is done, and each answer as it comes: the same call
    goes on where it stopped. Raises `UsageError` as `run_tasks` does, when `out` holds the results of other settings,
    and when another process works in it.
    """
    limits = limits or Limits()
    shelf = TaskShelf(task_path)
    names = shelf.names(tasks)
    settings = {name: value for name, value in provenance.items() if name != "threads"} | {
        "lm_eval": LM_EVAL_VERSION,
        "asked_fewshot": num_fewshot,
        "truncate": truncate,
    }
    with ledger.lock(out):
        records = ledger.read(out / BENCHMARKS, BenchmarkRecord)
        for record in records:
            ledger.check_same(record["provenance"], settings, out, ignoring=("limit", "asked"))
        models: dict[tuple[str, ...], PlansLM] = {}

        def lm_for(chosen: Sequence[Configuration]) -> PlansLM:
            key = tuple(row.name for row in chosen)
            if key not in models:
                models[key] = PlansLM(
                    model,
                    tokenizer,
                    [row.plan for row in chosen],
                    out / ANSWERS,
                    batch_size=batch_size,
                    truncate=truncate,
                    progress=progress,
                    workers=workers,
                )
            return models[key]

        for name in names:
            about = settings | {"asked": name, "limit": limits.of(name)}
            held = [record for record in records if record["provenance"]["asked"] == name]
            for record in held:
                ledger.check_same(record["provenance"], about, out)
            if held and len(held) == held[0]["provenance"]["records"]:
                continue
            job = shelf.build(name, num_fewshot, limits.of(name))
            chosen = generating_rows if generating_rows and generates(job) else rows
            found = evaluate_job(lm_for(chosen), job)
            about["records"] = len(found)
            every = [_record(chosen[result.number], result, about) for result in found]
            fresh = [record for record in every if _key(record) not in set(map(_key, held))]
            ledger.append(out / BENCHMARKS, *fresh)
            records += fresh
        return [record for record in records if record["provenance"]["asked"] in names]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("task", "metric", "variant", "fraction", "keep_last"))


def generates(job: Job) -> bool:
    """Whether a task of `job` has the model write text, which costs a pass for each configuration."""
    return any(task.OUTPUT_TYPE == "generate_until" for task in job.tasks.values())


def _record(row: Configuration, result: TaskResult, about: dict[str, Any]) -> dict[str, Any]:
    values = [document.value for document in result.documents]
    numeric = all(isinstance(value, int | float) for value in values)
    return {
        "task": result.task,
        "metric": result.metric,
        "variant": row.variant,
        "fraction": row.fraction,
        "keep_last": row.keep_last,
        "plan": row.plan.indices,
        "num_fewshot": result.num_fewshot,
        "documents": len(result.documents),
        "value": _or_none(result.value),
        "value_se": _or_none(result.stderr),
        "delta": _or_none(result.delta),
        "delta_se": _or_none(result.delta_stderr),
        "p_value": _or_none(result.p_value),
        "higher_is_better": result.higher_is_better,
        "values": [float(value) for value in values] if numeric else None,
        "provenance": about,
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
