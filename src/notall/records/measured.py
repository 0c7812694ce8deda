"""What is kept of measuring a repair: a line for each text and model, before it and after it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number, plain
from .record import PLAN, QUALITY, Key, QualityFields, Record, Skips

State = Literal["skipped", "repaired", "healed"]


class MeasuredRecord(Record, QualityFields, Skips):
    """One plan, with its weights if it has any, on one text that they were not fitted to."""

    file = "measured.jsonl"
    commands = ("repair", "heal", "search", "eval")
    key_fields = ("text", "model")
    columns = (plain("text"), plain("model"), *QUALITY, number("sequences", "sequences", "d"), PLAN)

    record: Literal["measured"] = "measured"
    text: str = Field(description="its name")
    model: State = Field(description="what was made up for what the plan skips: nothing, by a repair, by a healing")

    @property
    def key(self) -> Key:
        """Of the same weights on the same windows it is the same measurement."""
        return (*super().key, self.provenance and self.provenance.key)
