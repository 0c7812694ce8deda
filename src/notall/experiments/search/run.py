"""Choose a plan, repair it where that is wanted, and measure it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...files import refuse_others
from ...options import Workload
from ...plan import Plan
from ...progress import Progress, Stages
from ...results.lines import refuse_unwritable
from ..folder import check_folder
from ..options.model import ModelOptions
from ..options.tasks import TaskChoice, refuse_judging
from ..options.text import HeldOutOptions
from ..recovery import RecoveryOptions
from ..repair import REFIT, RepairOptions
from .one_phase import OnePhase, Searched
from .options import (
    BudgetChoice,
    BudgetOptions,
    ObjectiveOptions,
    SpaceOptions,
    tasks_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """All that a search is asked for; `out` is the plan's file, with a folder of
    evaluations next to it.
    """

    model: ModelOptions
    space: SpaceOptions
    text: HeldOutOptions
    budget: BudgetOptions
    workload: Workload
    by: ObjectiveOptions
    repair: RepairOptions
    tasks: RecoveryOptions
    out: Path
    seed: int = 0
    # the answers to tasks of another search, which asked the original model
    shared: Path | None = None

    @property
    def folder(self) -> Path:
        """Of evaluations, next to the plan's file."""
        return self.out.with_name(f"{self.out.stem}.search")

    @property
    def answers(self) -> Path:
        """The folder of answers to tasks."""
        return self.shared or self.folder / "answers"

    @property
    def repaired(self) -> Path:
        """The folder of the plan with its weights."""
        return self.out.with_name(f"{self.out.stem}.repaired")

    def check(self) -> BudgetChoice:
        """The budget. Raises `UsageError` for whatever is wrong that can be known
        without a model.
        """
        check_folder(self.folder, "search")
        refuse_others(self.out, Plan.load, "plan")
        refuse_unwritable(self.out.parent)
        if self.repair and (self.by.objective or self.budget.max_nll is not None):
            raise UsageError(
                "--repair judges sets by the KL that it leaves: leave --objective out,"
                " and --max-nll"
            )
        if (
            self.repair
            and self.space.phase == "prefill"
            and self.repair.repair != REFIT
        ):
            raise UsageError(
                f"keys and values of a prompt are refit: give --repair {REFIT}"
            )
        if self.space.last_tokens and self.space.phase != "prefill":
            raise UsageError(
                "--last-tokens says how much of a prompt runs whole: add --phase"
                " prefill"
            )
        self.by.check()
        wanted = self.budget.check(self.space.amount, self.tasks.recovery)
        self.text.check()
        self.repair.check(self.repaired)
        return wanted

    def asks_for_both(self, wanted: BudgetChoice) -> bool:
        """Whether the answer is one for every token and one for the prompt alone: a
        recovery, and nothing else.
        """
        from ...choosing.objective import OF_TEXT, terms_of

        if self.space.phase or not self.tasks.recovery or wanted.saving:
            return False
        if self.repair and self.repair.repair != REFIT:
            return False
        if self.space.amount.kind in ("portable", "period"):
            return False
        if not self.by.objective:
            return True
        terms = terms_of(self.by.objective, self.by.prompts)
        return all(name in OF_TEXT for _, name in terms)

    @property
    def of_prompt(self) -> bool:
        """Whether only the prompt's tokens skip."""
        return self.space.phase == "prefill"

    @property
    def in_the_prompt(self) -> Search:
        """The same for the prompt's tokens alone, in files of its own."""
        out = self.out.with_name(f"{self.out.stem}-prefill{self.out.suffix}")
        return replace(
            self,
            space=replace(self.space, phase="prefill"),
            out=out,
            shared=self.answers,
        )

    def run(self, progress: Progress) -> list[Searched]:
        """Load the model, choose, repair where that is wanted, and measure. Raises as
        `choose_plan` does.

        A recovery without a phase is answered twice: for every token, and then for the
        prompt's alone.
        """
        wanted, searches = self.check(), [self]
        if self.asks_for_both(wanted):
            each = self._with_minutes(0.5)
            searches = [each, each.in_the_prompt]
            each.in_the_prompt.check()
        # once: to read those of the harness takes ten seconds
        tasks = self._tasks(wanted)
        model, tokenizer = self.model.load()
        if len(searches) > 1:
            reason = _not_in_the_prompt(searches[1].space, model)
            if reason:
                logger.info("note: for every token alone: %s", reason)
                searches = [self]
        stages = Stages(progress, len(searches))
        return [
            OnePhase(one, model, tokenizer, tasks, stages.stage(1)).run()
            for one in searches
        ]

    def _with_minutes(self, share: float) -> Search:
        """The same in a share of the minutes, where they are limited."""
        minutes = self.by.max_minutes
        if minutes is None:
            return self
        return replace(self, by=replace(self.by, max_minutes=share * minutes))

    def judged_by(self, wanted: BudgetChoice) -> str:
        """The objective; the mix's retrieval has no prompt."""
        text = "" if self.of_prompt else self.text.text
        return self.by.objective or wanted.objective(text)

    def _tasks(self, wanted: BudgetChoice) -> TaskChoice:
        """Those that judge, none of which asks for what is chosen by or fitted to."""
        objective = self.judged_by(wanted)
        tasks = self.tasks.check(objectives=tasks_of([objective], self.by.prompts))
        texts = [self.text.text, *(self.repair.sources if self.repair else ())]
        prompts = self.by.prompts if "answers" in objective else None
        refuse_judging(tasks, texts, prompts)
        return tasks


def _not_in_the_prompt(space: SpaceOptions, net: PreTrainedModel) -> str:
    """Why nothing can be chosen that the prompt alone skips; "" where it can."""
    try:
        space.of(net)
    except UsageError as error:
        return str(error)
    return ""
