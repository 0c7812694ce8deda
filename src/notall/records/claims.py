"""What `notall paper` says of the paper's claims: one line each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import plain
from .record import Record

LEAST_DOCUMENTS = 30  # of each task: from fewer a standard error is a guess
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
    verdict: Verdict = Field(description="too few: documents or rounds, below the least that a verdict is given on")
