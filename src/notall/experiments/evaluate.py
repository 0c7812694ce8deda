"""What one plan costs: on a text, on benchmarks, and in what accuracy hides."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..plan import Plan
from ..progress import Progress, silent
from ..results.facts import QUALITY, PlanCheck, PlanScore, Quality
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Fact
from ..results.repairs import MeasuredRecord, State
from ..results.table import Column, number, within, words
from .folder import Folder
from .measured import shown_measured
from .options import PlanOptions, TaskChoice
from .shown import Shown
from .verdict import asking_for_less, mending, next_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import Job

GSM8K = "gsm8k"  # what the diagnostics end with
GSM8K_DOCUMENTS = 20  # at most, unless --limit names it: it writes long texts


class ModelQuality(Fact):
    """The quality of the dense, the skipped or the repaired model."""

    model: str
    quality: Quality


QUALITIES: tuple[Column[ModelQuality], ...] = (
    words("model", lambda one: one.model),
    *within(QUALITY, lambda one: one.quality),
    number("sequences", lambda one: one.quality.sequences, "d"),
)


@dataclass(frozen=True)
class Evaluated:
    """Of the dense model and of each state of the plan the quality on a text, and of those its scores and checks."""

    quality: list[ModelQuality]
    scores: list[PlanScore]
    checks: list[PlanCheck]


@dataclass(frozen=True)
class Evaluation:
    """A plan to evaluate; a repaired one beside what it skips without its weights.

    `diagnostics` are windows for `run_diagnostics`, None to leave them out; they end with GSM8K, which is left out with
    a warning where its data can't be had. Answers to tasks are kept in the folder `out`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    tasks: TaskChoice
    diagnostics: Sequence[Tensor] | None = None
    out: Path | None = None
    progress: Progress = silent

    @property
    def states(self) -> dict[State, Plan]:
        """What is measured of the plan: without what it skips, and repaired where it is."""
        states: dict[State, Plan] = {"skipped": self.plan.unrepaired}
        return states | ({"repaired": self.plan} if self.plan.state == "repaired" else {})

    def run(self, batches: Sequence[Tensor]) -> Evaluated:
        """On `batches` of token ids, (batch, tokens) each, then on the tasks, whose data is loaded first.

        Raises as `evaluate`, `run_tasks` and `run_diagnostics` do.
        """
        from ..evaluation.diagnostics import run_diagnostics
        from ..measuring.quality import evaluate

        self.progress(0, 1, "reading the tasks")
        jobs = self.tasks.jobs()
        self.progress(0, 1, "quality on the text")
        plans = [*self.states.values()]
        qualities = zip(("dense", *self.states), evaluate(self.model, [Plan(), *plans], batches))
        quality = [ModelQuality(model=name, quality=found) for name, found in qualities]
        scores = self._scores(jobs)
        if self.diagnostics is None:
            return Evaluated(quality, scores, [])
        found = run_diagnostics(self.model, self.tokenizer, plans, self.diagnostics, progress=self.progress)
        checks = [PlanCheck(model=name, **dict(one)) for some in zip(*found) for name, one in zip(self.states, some)]
        if not any(score.task.endswith(GSM8K) for score in scores):
            scores += self._gsm8k()
        return Evaluated(quality, scores, checks)

    def _scores(self, jobs: Sequence[Job]) -> list[PlanScore]:
        if not jobs:
            return []
        from ..evaluation.harness import run_tasks

        found = run_tasks(
            *(self.model, self.tokenizer, [*self.states.values()], jobs),
            folder=self.out,
            batch_size=self.tasks.batch_size,
            truncate=self.tasks.truncate,
            progress=self.progress,
        )
        names = [*self.states]
        return [PlanScore(model=names[result.number], **dict(result.score)) for result in found]

    def _gsm8k(self) -> list[PlanScore]:
        """On a few documents, unless --limit names it; nothing where its data can't be had."""
        limits, shelf = self.tasks.limits, self.tasks.shelf
        if shelf is None:
            return []
        most = min((limits.most if limits else None) or GSM8K_DOCUMENTS, GSM8K_DOCUMENTS)
        try:
            return self._scores([shelf.build(GSM8K, None, limits.by_task.get(GSM8K, most) if limits else most)])
        except UsageError as error:
            warnings.warn(f"the diagnostics go without {GSM8K}: {error}", stacklevel=2)
            return []


def records_of(found: Evaluated, text: str, plans: Mapping[State, tuple[Plan, Provenance]]) -> list[MeasuredRecord]:
    """The quality on `text`, a record for each of `plans`: with what decides its figures."""
    by_name = {one.model: one.quality for one in found.quality}
    return [
        MeasuredRecord(text=text, model=state, plan=plan, quality=by_name[state], provenance=about)
        for state, (plan, about) in plans.items()
    ]


def keep(out: Path, records: Sequence[MeasuredRecord]) -> None:
    """Write records into `out`, unless the same are there. Raises `UsageError` as `Ledger` does."""
    with working_in(out, "eval"):
        kept = Ledger(out, MeasuredRecord)
        kept.add(*(record for record in records if record.key not in kept))


def mend_of(spec: str, asked: PlanOptions, plan: Plan) -> str:
    """The command that may find something better than what was asked for."""
    if asked.skip:
        return next_command("search", spec, skip=asked.amount, out="better.json")
    return mending(spec, asked.plan, plan.state == "repaired")


def shown(folder: Folder) -> Shown:
    """What a page says of an evaluation."""
    timed = "see what that saves", next_command("bench", folder.model, *folder.plan_options)
    return shown_measured(folder, lambda verdict: timed if verdict.usable else asking_for_less(folder.model))
