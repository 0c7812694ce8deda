"""What is compared: criteria, objectives, budgets and plans of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError, shortened
from ...extras import installed, need
from ...options import Workload, option
from ...plan import Plan, refuse_prefill
from ..held_scores import UNREPAIRED
from ..options.plan import SkipAmount, read_plans, space_of
from ..options.tasks import TaskChoice
from ..options.words import Words
from ..repair import REFIT
from ..search.options import tasks_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...choosing.objective import Objective
    from ...choosing.space import Space


SKIP = "attention:4,8"  # by default


@dataclass(frozen=True)
class CompareOptions:
    """Which criteria choose how many of what, going by which objectives, and what makes
    up for it.
    """

    PANEL: ClassVar[str] = "What is compared"

    skip: Words = option(
        (),
        "attention, mlp, block, period, sublayer or portable, and counts; repeat it"
        f" for more (default: {SKIP}, if no plan is given)",
        metavar="KIND:COUNT[,...]",
    )
    plan: tuple[Path, ...] = option(
        (),
        "also compare this plan file, folder of a repair, or published:NAME; repeat it"
        " for more",
    )
    criterion: Words = option(
        (),
        "a name of `notall criteria`, or module:function; repeat it for more (default:"
        " all)",
    )
    objective: Words = option(
        ("kl",),
        "nll, kl, answers, task:NAME, or a sum; repeat it for more",
        (),
        "OBJECTIVE",
    )
    repair: Words = option(
        (),
        "also judge plans after a repair with --text: refit, replaceme, prune-and-comp,"
        " nbl, ghosted, or your own module:function; repeat it for more",
    )
    keep_first: bool = option(False, "preserve the first layer", ("--keep-first",))
    keep_last: bool = option(False, "preserve the last layer", ("--keep-last",))
    prompts: Path | None = option(
        None, "prompts of the objective `answers`: one a line, or a .jsonl"
    )

    def check(self) -> list[str]:
        """The tasks of the harness that objectives go by. Raises `UsageError` for what
        is refused without a model.
        """
        from ...choosing.criteria import criterion
        from ...repairing.methods import method

        need(*(module for name in self.criterion for module in criterion(name).needs))
        for name in self.repair:
            method(name)
            for plan in self.given.values() if name not in (REFIT, UNREPAIRED) else ():
                refuse_prefill(plan, f"a repair by {name}")
        for amount in self.amounts:
            if not amount.amounts or any(one < 1 or one % 1 for one in amount.amounts):
                raise UsageError(
                    f"--skip {shortened(amount)} is no kind and counts: write"
                    " attention:4,8"
                )
        return tasks_of(self.objective, self.prompts)

    @property
    def amounts(self) -> list[SkipAmount]:
        """What is skipped, and the counts of each. Raises `UsageError` for what is no
        number.
        """
        default = () if self.plan else (SKIP,)
        return [SkipAmount.parse(text) for text in self.skip or default]

    @cached_property
    def given(self) -> dict[str, Plan]:
        """The plans of files, by their names. Raises `UsageError` as `read_plans`
        does.
        """
        return read_plans(self.plan)

    def prompt_of(self, length: int) -> int | None:
        """Half of each window of `length`, where a given plan skips in the prompt
        alone; else None: all is scored.

        Raises `UsageError` where nothing would be skipped in so short a prompt.
        """
        skips = [plan.prefill for plan in self.given.values() if plan.prefill]
        if not skips:
            return None
        whole = max(one.last_tokens for one in skips)
        if length // 2 <= whole:
            raise UsageError(
                f"half of a window of {length} tokens is the prompt, whose last {whole}"
                f" run whole: give a --length of {2 * whole + 2} or more"
            )
        return length // 2

    def runs(self, model: PreTrainedModel) -> list[AskedChoice]:
        """What is to be chosen. Raises `UsageError` where there is nothing of a kind to
        choose among.
        """
        from ...choosing.criteria import every_criterion

        every = [
            name
            for name, one in every_criterion().items()
            if installed(*one.needs) and one.fits(model)
        ]
        ends = self.keep_first, self.keep_last
        spaces = [
            (space_of(model, one.kind, *ends), [*map(int, one.amounts)])
            for one in self.amounts
        ]
        return runs_of(self.criterion or every, self.objective, spaces)

    def objectives(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batches: Sequence[Tensor],
        tasks: TaskChoice,
    ) -> dict[str, CalibratedObjective]:
        """By their names; those of tasks have as many documents as --limit says, or a
        hundred.
        """
        from ...choosing.objective import build_objective

        build = partial(
            build_objective,
            prompts=self.prompts,
            task_path=tasks.shelf,
            task_limit=tasks.questions,
        )
        return {
            name: CalibratedObjective(build(name, model, tokenizer, batches), batches)
            for name in self.objective
        }


@dataclass(frozen=True)
class CalibratedObjective:
    """What a criterion goes by: an objective, and the calibration text, (batch, tokens)
    token ids each.
    """

    objective: Objective
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class AskedChoice:
    """What `criterion` skips, going by the objective of this name, to skip `count` of
    `space`.
    """

    criterion: str
    objective: str
    space: Space
    count: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Criterion, objective, space and count, as records have them."""
        return self.criterion, self.objective, str(self.space), self.count

    @property
    def name(self) -> str:
        """The key in words."""
        return " ".join(map(str, self.key))


def runs_of(
    criteria: Sequence[str],
    goals: Sequence[str],
    spaces: Sequence[tuple[Space, Sequence[int]]],
) -> list[AskedChoice]:
    """Every criterion at every count of every space that it can choose from; by each
    objective where it goes by one.
    """
    from ...choosing.criteria import criterion, suits

    return [
        AskedChoice(name, objective, space, count)
        for space, counts in spaces
        for name in criteria
        for objective in (goals if criterion(name).reads == "objective" else goals[:1])
        for count in counts
        if suits(name, space)
    ]


def check_runs(
    model: PreTrainedModel, runs: Sequence[AskedChoice], workload: Workload | None
) -> None:
    """Raise `UsageError` for what cannot be skipped or timed, before any text is
    read.
    """
    from ...choosing.budget import by_count

    if workload:
        workload.check(model)
    for run in runs:
        by_count(run.space, run.count)
