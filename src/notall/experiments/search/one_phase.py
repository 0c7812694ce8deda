"""A search of one phase: for every token, or for the prompt's tokens alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from ...errors import UsageError
from ...models.names import USAGE_MIX
from ...plan import Plan
from ...progress import Progress
from ...results.facts import PlanScore
from ...results.provenance import Provenance, behind
from ...results.repairs import MeasuredRecord, State
from ...strict_json import Settings
from ..next_commands import LITTLE_NATS, next_command, what_next
from ..options.tasks import TaskChoice
from ..options.text import Split
from ..recovery import TASKS, judge_recovery, keep_scores, last_state
from ..verdict import Verdict
from .records import SearchRecord, keep_choice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...choosing.budget import Budget
    from ...choosing.choice import ChosenPlan
    from ...choosing.objective import Objective
    from ...choosing.recovering import Recovering
    from ...choosing.space import Space
    from ...repairing.texts import RepairTexts
    from ...structure.model_structure import ModelStructure
    from .options import BudgetChoice
    from .run import Search

logger = logging.getLogger(__name__)
READS = "reads the prompt"  # of a speedup, before how many times as fast


class Searched(NamedTuple):
    """What a search found, for which budget, what that costs before a repair and after
    it, and the plan's file.
    """

    record: SearchRecord
    budget: str
    measured: Sequence[MeasuredRecord]
    scores: Sequence[PlanScore]
    verdict: Verdict
    out: Path


@dataclass(frozen=True)
class OnePhase:
    """What a search is asked for, with the model in memory; `tasks` judge the plan."""

    asked: Search
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tasks: TaskChoice
    progress: Progress

    def run(self) -> Searched:
        """Choose a plan, repair it where that is wanted, and measure it. Raises as
        `choose_plan` does.
        """
        asked = self.asked
        wanted = asked.check()  # again, as what was asked for is read there
        space = self._space(wanted)
        wanted.check(self.model, space, asked.workload)
        split, texts = self._texts()
        settings, not_deciding = self._provenance(split)
        goal = self._objective(asked.judged_by(wanted), split.calibration)
        budget = wanted.of(self.model, space, asked.workload, self.progress)
        found = self._choose(space, budget, goal, split, texts, settings)
        self._save(found.plan)
        about = Provenance.of(
            settings, **not_deciding, fingerprint=found.plan.fingerprint
        )
        record = keep_choice(asked.folder, found, about)
        plans: dict[State, Plan] = {"skipped": found.plan}
        measured = list[MeasuredRecord]()
        if texts:
            plans["repaired"] = self._repair(
                found.plan, texts, asked.repaired, settings
            )
            measured = self._measure(plans, split, texts, settings)
        scores = self._scores(plans, settings)
        verdict = self._verdict(found, record, plans, measured, scores, split, budget)
        return Searched(
            record, budget.description, measured, scores, verdict, asked.out
        )

    def _space(self, wanted: BudgetChoice) -> Space:
        """What is chosen among; a prompt's last tokens run whole, as many as suit the
        prompts that are scored and timed.
        """
        from ...choosing.in_prompts import last_tokens_of

        space = self.asked.space.of(self.model)
        if self.prompt_tokens is None or self.asked.space.last_tokens is not None:
            return space
        prompts = [self.prompt_tokens]
        if wanted.is_timed:
            prompts.append(self.asked.workload.prompt_tokens)
        return replace(space, last_tokens=last_tokens_of(min(prompts)))

    @property
    def prompt_tokens(self) -> int | None:
        """How many first tokens of each window are its prompt; None: all is scored."""
        return self.asked.text.length // 2 if self.asked.of_prompt else None

    def _texts(self) -> tuple[Split, RepairTexts | None]:
        """Windows to choose by and to measure on, and to repair with, if it repairs."""
        asked = self.asked
        twice = 2 if asked.repair else 1  # half of them to fit to
        wide = replace(asked.text, sequences=twice * asked.text.sequences)
        split = wide.split(self.model, self.tokenizer, seed=asked.seed, fewer=True)
        if not asked.repair:
            return split, None
        texts = asked.repair.texts(
            self.model,
            self.tokenizer,
            self.progress,
            seed=asked.seed,
            used=[split.own],
        )
        # other windows of the same text were drawn apart from what is fitted to
        if asked.text.held_out:
            split = split.apart_from(texts.fitted)
        return split, texts

    def _provenance(self, split: Split) -> tuple[Provenance, Settings]:
        """What decides the choice, and what is recorded without deciding it."""
        about = split.described
        not_deciding: Settings = {
            name: about.pop(name)
            for name in ("held_out", "held_out_sha256")
            if name in about
        }
        if self.asked.seed:  # a record without one is of seed 0
            not_deciding["seed"] = self.asked.seed
        if self.prompt_tokens:
            about["prompt_tokens"] = self.prompt_tokens
        return self.asked.model.provenance(self.model, **about), not_deciding

    def _objective(self, name: str, batches: Sequence[Tensor]) -> Objective:
        from ...choosing.objective import build_objective

        return build_objective(
            name,
            self.model,
            self.tokenizer,
            batches,
            prompts=self.asked.by.prompts,
            task_path=self.tasks.shelf,
            task_limit=self.tasks.questions,
            prompt_tokens=self.prompt_tokens,
        )

    def _choose(
        self,
        space: Space,
        budget: Budget,
        goal: Objective,
        split: Split,
        texts: RepairTexts | None,
        settings: Provenance,
    ) -> ChosenPlan:
        from ...choosing.choice import choose_plan

        asked = self.asked
        recovering = self._recovering(texts, settings) if self.tasks.recovery else None
        config = replace(
            asked.by.config(asked.seed),
            after_repair=bool(asked.repair),
            recovering=recovering,
            held_out=split.evaluation,
            provenance=settings,
        )
        return choose_plan(
            self.model,
            asked.by.criterion,
            space,
            budget,
            split.calibration,
            goal,
            config,
            out=asked.folder,
            progress=self.progress,
        )

    def _recovering(
        self, texts: RepairTexts | None, settings: Provenance
    ) -> Recovering:
        """The share that a plan, after the repair if there is one, keeps of the task of
        which it keeps least.

        The items are few, and none of those that judge it, so that it is to keep half
        of what it may lose.
        """
        from ...choosing.recovering import Recovering
        from ...evaluation.checks import is_check

        assert self.tasks.shelf
        assert self.tasks.recovery
        # checks have items to choose by
        names = tuple(filter(is_check, self.tasks.names))
        names = names or tuple(self.tasks.shelf.names(TASKS))
        checks = replace(self.tasks, names=names)
        jobs = checks.choosing()

        def kept(plan: Plan) -> float:
            with TemporaryDirectory() as folder:
                if texts:
                    out = Path(folder) / "repaired"
                    plan = self._repair(plan, texts, out, settings)
                found = judge_recovery(
                    self.model,
                    self.tokenizer,
                    {plan.state: plan},
                    jobs,
                    checks,
                    self.asked.answers,
                    self.progress,
                )
            shares = (
                one.recovery.share if one.recovery else 0.0 for one in last_state(found)
            )
            return min(shares, default=0.0)

        return Recovering(kept, (1 + self.tasks.recovery) / 2)

    def _repair(
        self, plan: Plan, texts: RepairTexts, out: Path, settings: Provenance
    ) -> Plan:
        repair = self.asked.repair
        return repair.apply(self.model, plan, texts, out, settings, self.progress)

    def _save(self, plan: Plan) -> None:
        out = self.asked.out
        with suppress(UsageError):
            before = Plan.load(out)
            if before.identity != plan.identity:
                logger.info("note: %s skipped %s before, and is replaced", out, before)
        plan.save(out)

    def _measure(
        self,
        plans: Mapping[State, Plan],
        split: Split,
        texts: RepairTexts,
        settings: Provenance,
    ) -> list[MeasuredRecord]:
        """The plan before the repair and after it, on the text that is held out."""
        from ...repairing.texts import measure_on_texts

        windows = texts.other
        if self.asked.text.held_out:
            windows = {split.measured_on: split.evaluation}
        folder = self.asked.folder
        return measure_on_texts(
            self.model, plans, windows, folder, settings, self.progress
        )

    def _scores(
        self, plans: Mapping[State, Plan], settings: Provenance
    ) -> list[PlanScore]:
        """What the plan scores on tasks, kept in the folder."""
        # where no tasks were asked for
        tasks = self.tasks or self._retrieval(plans["skipped"])
        jobs, answers = tasks.jobs(), self.asked.answers
        scores = judge_recovery(
            self.model, self.tokenizer, plans, jobs, tasks, answers, self.progress
        )
        keep_scores(self.asked.folder, plans, scores, settings)
        return scores

    def _retrieval(self, plan: Plan) -> TaskChoice:
        """Passkeys, where what the plan skips may be what finds things again:
        perplexity does not see it.
        """
        from ...structure.locating import locate

        may_lose = may_lose_retrieval(locate(self.model), plan)
        tasks = ("passkey",) if may_lose and find_spec("lm_eval") else ()
        # few, as they were not asked for
        asked = replace(self.asked.tasks, tasks=tasks, limit=("16",), truncate=True)
        return asked.check()

    def _verdict(
        self,
        found: ChosenPlan,
        record: SearchRecord,
        plans: Mapping[State, Plan],
        measured: Sequence[MeasuredRecord],
        scores: Sequence[PlanScore],
        split: Split,
        budget: Budget,
    ) -> Verdict:
        spec = self.asked.model.model
        if measured:
            last = measured[-1]
            verdict = Verdict.on(
                self.model, plans["repaired"], last.quality, last.text, spec=spec
            )
        else:
            text = f"{split.measured_on}{behind(self.prompt_tokens)}"
            verdict = Verdict.on(
                self.model, found.plan, record.quality, text, spec=spec
            )
        missed = f"{budget.description}: {found.missed}" if found.missed else None
        verdict = replace(
            verdict,
            speedup=found.times.measured_speedup if found.times else None,
            verb=READS if self.asked.of_prompt else "runs",
            missed=missed,
            late=not found.in_time,
        ).judged(scores, self.tasks.recovery)
        return replace(verdict, next=self._next(verdict))

    def _next(self, verdict: Verdict) -> str:
        from ...structure.locating import locate

        asked = self.asked
        spec, made = asked.model.model, asked.repaired if asked.repair else asked.out
        if not verdict.plan:
            return next_command("search", spec, max_nll=LITTLE_NATS, out=asked.out)
        # layers that stay are neither cut out of a checkpoint nor repaired
        if locate(self.model).stubbed:
            return next_command("bench", spec, plan=made)
        text = None if asked.text.text == USAGE_MIX else asked.text.text
        _, command = what_next(verdict, spec, made, text)
        return command


def may_lose_retrieval(structure: ModelStructure, plan: Plan) -> bool:
    """Whether `plan` takes an attention with keys and values from a model whose other
    mixers keep states alone.
    """
    has_states = any(
        part.state_bytes and not part.kv_bytes_per_token for part in structure.sublayers
    )
    return has_states and any(
        part.kv_bytes_per_token and part.index in plan.attention
        for part in structure.sublayers
    )
