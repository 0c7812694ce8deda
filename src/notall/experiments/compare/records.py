"""What is recorded of a comparison."""

from __future__ import annotations

import math

from pydantic import Field

from ...plan import several_of
from ...results.facts import Footprint, SearchCost, TaskScore, Times
from ...results.record import (
    Amount,
    Count,
    Number,
    Record,
    RecordKey,
    Scalar,
    Skips,
    SublayerName,
    SublayerNames,
    Unsigned,
    is_number,
)
from ..held_scores import UNREPAIRED, RepairName
from ..subject import MeasuredPlan


class Answered(Skips):
    """What one criterion chose, going by an objective, to skip so many of a space; and
    what that took.
    """

    criterion: str = Field(description="the way to choose")
    objective: str = Field(description="the objective that it goes by")
    space: str = Field(description="what it chooses among")
    count: Count = Field(description="how many it skips")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in order of choosing"
    )
    calibration_tokens: Count = Field(description="of the text that was chosen by")
    spent: SearchCost
    forwards: Amount = Field(
        description="executions in dense forward passes over that text"
    )
    calibration_delta: Number = Field(
        math.nan, description="the objective's rise on that text, where it is known"
    )


CHOICE_FIELDS = ("criterion", "objective", "space", "count")
GIVEN_PLAN = "given plan"  # what plans of files are among


class ChoiceRecord(Record, Answered, kind="choice", key=CHOICE_FIELDS):
    """What one run chose."""


class PlanTimesRecord(Record, kind="plan_times", key=("footprint", "in_prompt")):
    """The times of a plan; plans that leave as much of a model take as long, and are
    timed once.
    """

    footprint: Footprint
    in_prompt: SublayerNames = Field(
        "", description="what only the prompt skips, which no footprint tells"
    )
    times: Times


class ComparisonRecord(
    MeasuredPlan, Record, Answered, kind="comparison", key=(*CHOICE_FIELDS, "repair")
):
    """One choice, measured on the held-out text; once more for each way that made up
    for what it skips.
    """

    repair: RepairName = Field(
        UNREPAIRED, description="what made up for what is skipped"
    )
    behind: Number = Field(
        math.nan,
        description="NLL beyond that of the least, of as many and repaired alike",
    )
    behind_se: Unsigned = Field(
        math.nan, description="its standard error, paired by window of text"
    )
    added_bytes: Count = Field(
        0, description="of matrices that the repair keeps at run time"
    )
    tasks: tuple[TaskScore, ...] = ()
    folder: str | None = Field(
        None, exclude=True, description="where it was joined from"
    )

    @property
    def is_given(self) -> bool:
        """Whether it is of a plan in a file, and nothing was chosen."""
        return self.space == GIVEN_PLAN

    @property
    def group(self) -> tuple[str, int]:
        """What it is compared with: as many of the same space, or the other plans that
        were given.
        """
        return self.space, 0 if self.is_given else self.count

    @property
    def among(self) -> str:
        """Its group in words."""
        if self.is_given:
            return "plans that were given"
        return several_of(self.space, self.count)

    @property
    def run(self) -> RecordKey:
        """What was asked for, whatever the repair."""
        return self.key[: len(CHOICE_FIELDS)]

    @property
    def way(self) -> str:
        """Such as `search by kl, refit`."""
        if self.repair == UNREPAIRED:
            return self.chosen_by
        return f"{self.chosen_by}, {self.repair}"

    @property
    def chosen_by(self) -> str:
        """The criterion, with its objective if it has one."""
        if self.by_objective:
            return f"{self.criterion} by {self.objective}"
        return self.criterion

    @property
    def by_objective(self) -> bool:
        """Whether it evaluated more than the original model."""
        return self.spent.evaluations > 1

    @property
    def name(self) -> str:
        """Such as `search by kl, refit: 4 attentions`."""
        if self.is_given:
            return self.way
        return f"{self.way}: {several_of(self.space, self.count)}"

    def figures(self) -> dict[str, Scalar]:
        """With each task's value and difference, by its name and metric."""
        return super().figures() | {
            f"{task_heading(one)} {field}": value
            for one in self.tasks
            for field, value in (
                ("value", one.value),
                ("delta", one.delta),
                ("delta_se", one.delta_se),
            )
            if is_number(value)
        }


def own_weights_name(digest: str) -> str:
    """The name of a repair that a plan brings: by the digest of its weights."""
    return f"own-{digest[:8]}"


def task_heading(score: TaskScore) -> str:
    """The name of a task and its metric, as a heading."""
    return f"{score.task} {score.metric.partition(',')[0]}"
