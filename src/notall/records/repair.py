"""What `notall repair` writes down: a line for each kept sublayer that it came to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number, plain
from .record import Amount, Number, Record, SublayerName


class RefitRecord(Record):
    """One step of a plan, refit or left alone. Errors are of tokens that the ridge was chosen on, not fitted to."""

    file = "refits.jsonl"
    commands = ("repair",)
    key_fields = ("sublayers",)
    headed = True
    columns = (
        plain("sublayers", "sublayer", " ".join),
        number("left", "error left", ".1%"),
        number("ridge", "ridge", "g"),
        number("seconds", "CPU s", ",.1f"),
        plain("why", "left alone because"),
    )

    record: Literal["refit"] = "refit"
    sublayers: tuple[SublayerName, ...] = Field(description="a sublayer, or both of a parallel block")
    ridge: Amount | None = Field(description="relative to each feature's own square; None where it was left alone")
    left: Number = Field(description="squared distance to the dense stream behind it, over the one without a refit")
    seconds: Amount = Field(description="CPU seconds of all threads")
    why: str = Field("", max_length=200, description="why it was left alone")
