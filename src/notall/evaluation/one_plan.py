"""Everything there is to say about what one plan costs: on a text, on benchmarks, and in what accuracy hides."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..measuring.quality import evaluate
from ..progress import Progress, silent
from ..records.columns import Row
from ..records.ledger import Ledger, working_in
from ..records.measured import MeasuredRecord, State
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.repaired import RepairedPlan
from .battery import SIGNIFICANT, run_battery

if TYPE_CHECKING:
    from .tasks import Job, TaskShelf

GSM8K, GSM8K_DOCUMENTS = (
    "gsm8k",
    20,
)  # at most, unless --limit names it: it writes long texts


@dataclass(frozen=True)
class Evaluated:
    """Rows as tables show them: of quality on a text, of tasks, of the battery's checks."""

    quality: list[Row]
    tasks: list[Row] = field(default_factory=list)
    battery: list[Row] = field(default_factory=list)


def evaluate_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    tasks: Sequence[str] = (),
    limits: Sequence[str] = (),
    num_fewshot: int | None = None,
    task_path: str | Path | TaskShelf | None = None,
    truncate: bool = False,
    batch_size: int | Literal["auto"] = "auto",
    folder: Path | None = None,
    battery: Sequence[Tensor] | None = None,
    progress: Progress = silent,
) -> Evaluated:
    """Quality of `plan` on `batches` of token ids, (batch, tokens) each, then `tasks`, then the battery.

    The data of `tasks` is loaded and looked at before anything is computed.

    A repaired plan is set beside what it skips without its weights, each row saying which `model` it is of.
    `battery` are the windows for `run_battery`, None to leave it out; it ends with GSM8K, which is left out with a
    warning where its data can't be had. Raises as `evaluate`, `run_tasks` and `run_battery` do.
    """
    progress(0, 1, "reading the tasks")
    jobs = _jobs(tasks, limits, num_fewshot, task_path) if tasks else []
    progress(0, 1, "quality on the text")
    asked = {"dense": Plan(), "skipped": plan}
    if isinstance(plan, RepairedPlan):
        asked = {"dense": Plan(), "skipped": plan.unrepaired, "repaired": plan}
    found = evaluate(model, list(asked.values()), batches)
    quality = [{"model": name, **asdict(row)} for name, row in zip(asked, found)]
    del asked["dense"]
    how: dict[str, Any] = {"truncate": truncate, "batch_size": batch_size, "folder": folder, "progress": progress}
    rows = _tasks(model, tokenizer, asked, jobs, **how) if jobs else []
    checks = []
    if battery is not None:
        for check in run_battery(model, tokenizer, list(asked.values()), battery, progress=progress):
            dense = {"dense": check.value - check.delta, "worse": check.worse}
            checks.append(_named(asked, check.plan) | asdict(check) | dense)
        if not any(row["task"].endswith(GSM8K) for row in rows):
            from .tasks import Limits

            try:
                most = Limits.parse(limits).most or GSM8K_DOCUMENTS
                least = [str(min(most, GSM8K_DOCUMENTS)), *(word for word in limits if "=" in word)]
                rows += _tasks(model, tokenizer, asked, _jobs([GSM8K], least, None, task_path), **how)
            except UsageError as error:
                warnings.warn(f"the battery goes without {GSM8K}: {error}", stacklevel=2)
    return Evaluated(quality, rows, checks)


def keep(folder: Path, found: Evaluated, text: str, plans: Mapping[State, tuple[Plan, Provenance]]) -> None:
    """Write the quality on `text` into `folder`, a line for each of `plans`: with what decides its figures.

    Raises `UsageError` as `Ledger` does.
    """
    with working_in(folder, "eval"):
        kept = Ledger(folder, MeasuredRecord)
        for row in found.quality:
            if row["model"] in plans:
                plan, about = plans[row["model"]]
                record = MeasuredRecord(**row, text=text, plan=plan, provenance=about)
                if record.key not in kept:
                    kept.add(record)


def _named(plans: Mapping[str, Plan], number: int) -> Row:
    """Which of several plans a row is of; nothing where there is one."""
    return {"model": [*plans][number]} if len(plans) > 1 else {}


def _jobs(
    tasks: Sequence[str], limits: Sequence[str], num_fewshot: int | None, task_path: str | Path | TaskShelf | None
) -> list[Job]:
    from .tasks import Limits, TaskShelf

    return TaskShelf.of(task_path).jobs(tasks, num_fewshot, Limits.parse(limits))


def _tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    jobs: Sequence[Job],
    **how: Any,
) -> list[Row]:
    from .harness import run_jobs

    rows = []
    for result in run_jobs(model, tokenizer, list(plans.values()), jobs, **how):
        sign = {True: 1, False: -1}.get(result.higher_is_better, 0)  # type: ignore[arg-type]
        rows.append(
            _named(plans, result.number)
            | {
                "task": result.task,
                "metric": result.metric,
                "num_fewshot": result.num_fewshot,
                "documents": len(result.documents),
                "dense": result.value - result.delta,
                "value": result.value,
                "value_se": result.stderr,
                "delta": result.delta,
                "delta_se": result.delta_stderr,
                "p_value": result.p_value,
                "higher_is_better": result.higher_is_better,
                "worse": sign * result.delta < 0 and result.p_value < SIGNIFICANT,
            }
        )
    return rows
