"""Benchmarks and checks: which, on how many items, with how many examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ...errors import UsageError, shortened
from ...extras import need
from ...options import Option, option
from ...strict_json import Settings
from ..waiting import waiting
from .words import Words, words_of

if TYPE_CHECKING:
    from ...evaluation.limits import Limits
    from ...evaluation.tasks import Job, TaskShelf


QUESTIONS = 100  # of a task that is an objective, by default


def refuse_judging(
    tasks: TaskChoice, sources: Sequence[str], prompts: Path | None = None
) -> None:
    """Raise `UsageError` where tasks ask for prompts whose answers are in a text, or
    are `prompts` to choose by.
    """
    from ...models.texts import ANSWERS_TO, read_prompts

    files = [
        Path(source.removeprefix(ANSWERS_TO))
        for source in sources
        if source.startswith(ANSWERS_TO)
    ]
    used = {prompt for file in files for prompt in read_prompts(file)[::2]}
    used |= {*read_prompts(prompts)} if prompts else set()
    for name in tasks.names if used else ():
        kind, _, file = name.partition(":")
        if kind not in ("answers", "written") or not file:
            continue
        both = used.intersection(read_prompts(Path(file))[1::2])
        if both:
            raise UsageError(
                f"--tasks {shortened(name)} asks for what is chosen by or fitted to,"
                f" such as {shortened(min(both))!r}: give --text"
                f" {ANSWERS_TO}{shortened(file)}, which leaves every second prompt to"
                " --tasks, or other prompts"
            )


TaskPath = Annotated[
    Path | None,
    Option("folder with more tasks: YAML files of the harness, which may run code"),
]


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks of lm-evaluation-harness, on how many documents, with how many
    examples.
    """

    PANEL: ClassVar[str] = "Benchmarks"

    tasks: Words = option(
        (),
        "needles, passkey, retrieval, answers, written, reasoning, or answers:FILE with"
        " your own prompts; openllm, or tasks of lm-evaluation-harness; separated by"
        " commas; see `notall tasks`",
    )
    limit: Words = option(
        (),
        "documents of each task (default: all; 80 of a check, 100 of an objective),"
        " such as 40; mmlu=2 limits one task, or a group's",
    )
    num_fewshot: int | None = option(
        None, "examples to show (default: the task's own number)", least=0
    )
    task_path: TaskPath = None
    truncate: bool = option(
        False, "cut the beginning of what is longer than the context"
    )
    task_batch_size: str = option(
        "auto", "requests to run at a time: a number, or auto"
    )

    def check(self, *, objectives: Sequence[str] = ()) -> TaskChoice:
        """The tasks that there are; the data of `objectives` is read.

        Raises `UsageError` for names and numbers that are none, and where the harness
        is wanted and not installed.
        """
        word, wanted = self.task_batch_size, words_of(self.tasks)
        if word != "auto" and not re.fullmatch("[0-9]{1,9}", word):
            raise UsageError(
                f"--task-batch-size {shortened(word)} is neither a number nor auto;"
                " give one of them"
            )
        size: int | Literal["auto"] = "auto" if word == "auto" else int(word)
        if not (wanted or objectives):
            return TaskChoice(None, (), self.num_fewshot, size, self.truncate)
        need("lm_eval")
        with waiting("reading the harness's tasks"):
            from ...evaluation.limits import Limits
            from ...evaluation.tasks import TaskShelf

            limits = Limits.parse(words_of(self.limit))
            shelf = TaskShelf(self.task_path)
        names = shelf.names(wanted) if wanted else []
        others = shelf.names(objectives) if objectives else []
        limits.check([*names, *others])
        for name in others:
            shelf.build(name, 0, 1)
        return TaskChoice(
            shelf, tuple(names), self.num_fewshot, size, self.truncate, limits
        )


@dataclass(frozen=True)
class TaskChoice:
    """Tasks of the harness, by its names; without any there may be no `shelf` to take
    them from, and no limits.
    """

    shelf: TaskShelf | None
    names: tuple[str, ...]
    num_fewshot: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    truncate: bool = False
    limits: Limits | None = None
    # the share of the original model's score that each must keep
    recovery: float | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def how(self) -> Settings:
        """How requests are run, as `run_tasks` and `PlansLM` take it."""
        return {"batch_size": self.batch_size, "truncate": self.truncate}

    def limit_of(self, task: str) -> int | None:
        """How many documents of a task to ask for; None: all."""
        return self.limits.of(task) if self.limits else None

    @property
    def questions(self) -> int:
        """How many training questions an objective has of a task."""
        return (self.limits.most if self.limits else None) or QUESTIONS

    def build(self, name: str) -> Job:
        """Its data, loaded, and its requests, built. Raises `UsageError` as
        `TaskShelf.build` does.
        """
        assert self.shelf
        return self.shelf.build(name, self.num_fewshot, self.limit_of(name))

    def jobs(self) -> list[Job]:
        """All tasks, with their data. Raises as `build` does."""
        return [self.build(name) for name in self.names]

    def choosing(self) -> list[Job]:
        """Other items of its checks, and few of them, as each plan that is tried is
        asked.
        """
        from ...evaluation.checks import CHOOSING_ITEMS

        assert self.shelf
        most = [
            min(self.limit_of(name) or CHOOSING_ITEMS, CHOOSING_ITEMS)
            for name in self.names
        ]
        pairs = zip(self.names, most)
        return [
            self.shelf.build(name, self.num_fewshot, limit, choosing=True)
            for name, limit in pairs
        ]


DIAGNOSTICS_HELP = (
    "also measure what accuracy hides: NLL by position, passkey, calibration, writing"
)
Diagnostics = Annotated[bool, Option(DIAGNOSTICS_HELP, panel="Benchmarks")]
