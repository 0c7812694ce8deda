"""Everything there is to say about what one plan costs: on a text, on benchmarks, and in what accuracy hides."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..measuring.quality import evaluate
from ..progress import Progress, silent
from ..records.columns import Row
from ..records.plan import Plan
from ..running.repaired import RepairedPlan
from .battery import SIGNIFICANT, run_battery

GSM8K, GSM8K_DOCUMENTS = "gsm8k", 20  # what the battery asks of it unless --limit says more


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
    task_path: str | Path | None = None,
    truncate: bool = False,
    batch_size: int | Literal["auto"] = "auto",
    folder: Path | None = None,
    battery: Sequence[Tensor] | None = None,
    progress: Progress = silent,
) -> Evaluated:
    """Quality of `plan` on `batches` of token ids, (batch, tokens) each, then `tasks`, then the battery.

    A repaired plan is set beside what it skips without its weights, each row saying which `model` it is of.
    `battery` are the windows for `run_battery`, None to leave it out; it ends with GSM8K, which is left out with a
    warning where its data can't be had. Raises as `evaluate`, `run_tasks` and `run_battery` do.
    """
    progress(0, 1, "quality on the text")
    asked = {"dense": Plan(), "skipped": plan}
    if isinstance(plan, RepairedPlan):
        asked = {"dense": Plan(), "skipped": plan.unrepaired, "repaired": plan}
    found = evaluate(model, list(asked.values()), batches)
    quality = [{"model": name, **asdict(row)} for name, row in zip(asked, found)]
    how: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "task_path": task_path,
        "truncate": truncate,
        "batch_size": batch_size,
        "folder": folder,
    }
    del asked["dense"]
    rows = _tasks(model, tokenizer, asked, tasks, limits, progress, **how) if tasks else []
    checks = []
    if battery is not None:
        for check in run_battery(model, tokenizer, list(asked.values()), battery, progress=progress):
            dense = {"dense": check.value - check.delta, "worse": check.worse}
            checks.append(_named(asked, check.plan) | asdict(check) | dense)
        if not any(row["task"].endswith(GSM8K) for row in rows):
            try:
                least = [str(GSM8K_DOCUMENTS), *limits]
                rows += _tasks(model, tokenizer, asked, [GSM8K], least, progress, **how | {"num_fewshot": None})
            except UsageError as error:
                warnings.warn(f"the battery goes without {GSM8K}: {error}", stacklevel=2)
    return Evaluated(quality, rows, checks)


def _named(plans: Mapping[str, Plan], number: int) -> Row:
    """Which of several plans a row is of; nothing where there is one."""
    return {"model": [*plans][number]} if len(plans) > 1 else {}


def _tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    tasks: Sequence[str],
    limits: Sequence[str],
    progress: Progress,
    **how: Any,
) -> list[Row]:
    from .harness import run_tasks
    from .tasks import Limits

    rows = []
    for result in run_tasks(
        model,
        tokenizer,
        list(plans.values()),
        tasks,
        limit=Limits.parse(limits),
        progress=progress,
        **how,
    ):
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
