"""What `notall compare` writes down: what each way to choose skips, what that costs, and what it took to find."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from .columns import Column, Row, number, plain, size, with_difference, with_error
from .record import (
    QUALITY,
    SPEEDUPS,
    SPENT,
    Amount,
    Count,
    Fields,
    Number,
    QualityFields,
    Record,
    Share,
    SizeFields,
    Skips,
    SpentFields,
    SublayerName,
    SublayerNames,
    TimeFields,
    Unsigned,
)
from .sweep import SequenceScores


class Asked(Fields):
    """One question."""

    criterion: str = Field(description="the way to choose")
    aim: str = Field(description="the objective that it goes by")
    space: str = Field(description="what it chooses among")
    count: Count = Field(description="how many it skips")


ASKED = ("criterion", "aim", "space", "count")
UNREPAIRED = "none"
RepairName = Annotated[str, Field(pattern=r"^[\w.:-]{1,120}$")]  # also module:function


class Answered(SpentFields, Asked):
    """What was chosen, and what that took."""

    skipped: SublayerNames = Field(description="names of sublayers, in the model's order")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in the order of choosing"
    )
    calibration_tokens: Count = Field(description="of the text that was chosen by")
    forwards: Amount = Field(description="executions in dense forward passes over that text")
    forwards_in_full: Amount = Field(description="what they would be without shared states")
    calibration_delta: Number = Field(description="the objective's rise on that text, where it is known")


class ChoiceRecord(Record, Answered):
    """What one question was answered."""

    file = "choices.jsonl"
    commands = ("compare",)
    key_fields = ASKED

    record: Literal["choice"] = "choice"


class HeldOutRecord(Record):
    """Scores on one batch of the held-out text, by what was skipped; of the dense model by nothing."""

    file = "held_out.jsonl"
    commands = ("compare",)
    key_fields = ("batch", "repair", "names")

    record: Literal["held_out"] = "held_out"
    batch: Count = Field(description="its number, from 0")
    repair: RepairName = Field(UNREPAIRED, description="what made up for what was skipped")
    scores: dict[SublayerNames, SequenceScores]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scores)


class PlanTimesRecord(Record, SizeFields):
    """The times of a plan; plans that leave as much of a model take as long, and are timed once."""

    file = "plan_times.jsonl"
    commands = ("compare",)
    key_fields = ("params", "weight_bytes", "kv_bytes_per_token")

    record: Literal["plan_times"] = "plan_times"
    times: TimeFields


class TaskFigure(Fields):
    """A metric of a task, paired with the dense model by document."""

    value: Number
    stderr: Unsigned = Field(None, description="standard error of value, as the harness has it")
    delta: Number = Field(description="value less the dense model's")
    delta_stderr: Unsigned = Field(description="standard error of delta")
    p_value: Share = None
    num_fewshot: Count | None = None
    documents: Count | None = None


class ComparisonRecord(Record, SizeFields, QualityFields, Skips, Answered):
    """One answer, measured on the held-out text; once more for each way that made up for what it skips."""

    file = "comparison.jsonl"
    commands = ("compare",)
    key_fields = (*ASKED, "repair")
    groups = ("times",)
    columns = (
        *(plain("criterion"), plain("aim", "by"), plain("space", "among"), plain("count"), plain("repair")),
        *QUALITY,
        with_error("behind", "behind the best"),
        size("added_bytes", "added"),
        *SPEEDUPS,
        *SPENT,
        number("forwards_in_full", "without sharing", ",.1f"),
        number("calibration_delta", "on the text it chose by", "+.3f"),
        number("calibration_tokens", "calibration tokens", ",d"),
    )

    record: Literal["comparison"] = "comparison"
    repair: RepairName = Field(UNREPAIRED, description="what made up for what was skipped")
    behind: Number = Field(
        None, description="NLL beyond that of the least, of as many and repaired alike; of that one itself nothing"
    )
    behind_se: Unsigned = Field(None, description="its standard error, paired by window of text")
    added_bytes: Count = Field(0, description="of matrices that the repair keeps at run time")
    tasks: dict[str, TaskFigure] = Field(description="by task and metric")
    times: TimeFields | None = Field(None, description="where plans were timed")


def with_tasks(row: Row) -> Row:
    """A row with the figures of its tasks beside its others."""
    figures = {
        f"{task} {name}": figure[field]
        for task, figure in row.get("tasks", {}).items()
        for field, name in (("value", "value"), ("delta", "delta"), ("delta_stderr", "delta_se"))
    }
    return row | figures


def columns_of(rows: Sequence[Row]) -> tuple[Column, ...]:
    """The columns of a comparison; those of the tasks of `rows`, as `with_tasks` has them, follow the quality."""
    tasks = dict.fromkeys(task for row in rows for task in row.get("tasks", ()))
    place = 1 + ComparisonRecord.columns.index(QUALITY[-1])
    return (*ComparisonRecord.columns[:place], *map(with_difference, tasks), *ComparisonRecord.columns[place:])
