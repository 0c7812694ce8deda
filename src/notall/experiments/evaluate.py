"""What one plan costs, before a repair and after it: on a text, on benchmarks, and in
what accuracy hides.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..measuring.statistics import Estimate
from ..options import KeepIn
from ..plan import Plan
from ..progress import Progress, Stages, reading, silent, tracked
from ..results.facts import PlanCheck, PlanScore, Quality, State
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Fact
from ..results.repairs import MeasuredRecord
from .options.tasks import Diagnostics, TaskChoice
from .options.text import PromptTokens
from .recovery import judge_recovery, keep_scores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelQuality(Fact):
    """The quality of the dense, the skipped or the repaired model."""

    model: str
    quality: Quality


@dataclass(frozen=True)
class EvalOptions:
    """What is scored, what is measured too, and where results are kept."""

    prompt_tokens: PromptTokens = None
    diagnostics: Diagnostics = False
    out: KeepIn = None

    def prompt_of(self, plan: Plan, length: int) -> int | None:
        """How many first tokens of each window are its prompt; None: all is scored."""
        if self.prompt_tokens:
            return self.prompt_tokens
        return length // 2 if plan.prefill else None


@dataclass(frozen=True)
class Evaluated:
    """The quality on a text of the original model and of each state of the plan, and
    the scores and checks of those states.
    """

    quality: list[ModelQuality]
    scores: list[PlanScore]
    checks: list[PlanCheck]


@dataclass(frozen=True)
class Evaluation:
    """A plan to evaluate; a repaired one also without its weights.

    `diagnostics` are windows, None to leave them out. Answers to tasks are kept in the
    folder `out`. Of each window of the text the first `prompt_tokens` are its prompt,
    and only what follows is scored; None: all of it is.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    plan: Plan
    tasks: TaskChoice
    diagnostics: "Sequence[Tensor] | None" = None
    out: Path | None = None
    seed: int = 0  # of what the diagnostics draw
    progress: Progress = silent
    prompt_tokens: int | None = None

    @property
    def states(self) -> dict[State, Plan]:
        """What is measured of the plan: without what it skips, and repaired where it
        is.
        """
        states: dict[State, Plan] = {"skipped": self.plan.unrepaired}
        if self.plan.state == "repaired":
            states["repaired"] = self.plan
        return states

    def run(self, batches: "Sequence[Tensor]") -> Evaluated:
        """On `batches` of token ids, (batch, tokens) each, then on the tasks, whose
        data is loaded first.
        """
        self.progress(0, 1, "reading the tasks")
        jobs = self.tasks.jobs()
        plans = len(self.states) + 1
        reads = reading(sum(batch.numel() for batch in batches), plans)
        asks = sum(job.steps(plans) for job in jobs)
        stages = Stages(self.progress, reads + asks)
        quality = self._quality(batches, stages.stage(reads))
        scores = judge_recovery(
            self.model,
            self.tokenizer,
            self.states,
            jobs,
            self.tasks,
            self.out,
            stages.stage(asks),
        )
        return Evaluated(quality, scores, self._checks())

    def _quality(
        self, batches: "Sequence[Tensor]", progress: Progress
    ) -> list[ModelQuality]:
        """Of the original model, then of each state of the plan."""
        from ..measuring.quality import evaluate

        read = tracked(batches, "quality on the text", progress)
        plans = [Plan(), *self.states.values()]
        found = evaluate(self.model, plans, read, self.prompt_tokens)
        return [
            ModelQuality(model=name, quality=quality)
            for name, quality in zip(("dense", *self.states), found)
        ]

    def _checks(self) -> list[PlanCheck]:
        """Each check of the diagnostics, of each state of the plan."""
        from ..evaluation.diagnostics import run_diagnostics

        if self.diagnostics is None:
            return []
        found = run_diagnostics(
            self.model,
            self.tokenizer,
            [*self.states.values()],
            self.diagnostics,
            seed=self.seed,
            progress=self.progress,
        )
        return [
            PlanCheck(model=name, **dict(check))
            for checks in zip(*found)
            for name, check in zip(self.states, checks)
        ]

    def records(
        self, found: Evaluated, batches: "Sequence[Tensor]", settings: Provenance
    ) -> list[MeasuredRecord]:
        """The quality that was found, a record for each state, with what decides its
        figures; in `out` too.
        """
        from ..repairing.texts import about_measured

        records = [
            MeasuredRecord(
                text=str(settings.what["text"]),
                model=state,
                plan=plan,
                quality=one.quality,
                provenance=about_measured(self.model, settings, plan, batches),
            )
            for (state, plan), one in zip(self.states.items(), found.quality[1:])
        ]
        if self.out:
            with working_in(self.out, "eval"):
                kept = Ledger(self.out, MeasuredRecord)
                kept.add(*(record for record in records if record.key not in kept))
            keep_scores(self.out, self.states, found.scores, settings)
        return records


def repair_warnings(measured: Sequence[MeasuredRecord]) -> Iterator[str]:
    """A warning for each text that loses more after a repair than before it: Student's
    t, one-sided at 0.025.

    As if the errors of both were independent; windows that are hard for both make the
    test a cautious one.
    """
    before = {one.text: one.quality for one in measured if one.model == "skipped"}
    for one in measured:
        if one.model != "repaired" or one.text not in before:
            continue
        quality, earlier = one.quality, before[one.text]
        overflows = math.isinf(quality.nats_lost) and math.isfinite(earlier.nats_lost)
        more = _loss_of(quality).less(_loss_of(earlier))
        if overflows or more.ends()[0] > 0:
            on = f" on {one.text}" if one.text else ""
            yield (
                f"the repair makes it worse{on}: {quality.nats_lost:.3f} nats where it"
                f" was {earlier.nats_lost:.3f}; repair with more text, in another way,"
                " or not at all"
            )


def _loss_of(quality: Quality) -> Estimate:
    return Estimate(quality.nats_lost, quality.delta_nll_se, quality.sequences - 1)
