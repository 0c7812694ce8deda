"""What is recorded of such a run."""

from pydantic import Field

from ...results.record import Record


class SlimRecord(Record, kind="slim", key=("found",)):
    """What the search of such a run found: its files tell the rest."""

    found: tuple[str, ...] = Field(description="the plans, by the names of their files")
