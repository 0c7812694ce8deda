"""What `notall paper` says of the paper's claims: one line each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import plain
from .record import Number, Record, Unsigned

LEAST_DOCUMENTS = 30  # of each task: from fewer a standard error is a guess
LEAST_ROUNDS = 5  # three may lie on one side by chance: one time in four
LEAST_WINDOWS = 8  # of text
Verdict = Literal["holds", "does not hold", "within error", "too few"]


class ClaimRecord(Record):
    """A claim of arXiv 2407.15516, the figures that bear on it here, and what they say of it."""

    file = "claims.jsonl"
    commands = ("paper",)
    key_fields = ("claim",)
    columns = (plain("claim"), plain("verdict"), plain("here"))

    record: Literal["claim"] = "claim"
    claim: str
    here: str = Field(description="the figures of this model")
    verdict: Verdict = Field(description="too few: documents, rounds or windows, below the least for a verdict")
    figure: Number = Field(None, description="what is judged: a difference, a correlation, how many times as fast")
    error: Unsigned = Field(None, description="its standard error")
    low: Number = Field(None, description="its lower quartile, of a speed")
    high: Number = Field(None, description="its upper quartile")
    unit: str | None = Field(None, description="of these")
