"""What `notall bench` writes down: times of the dense model and of a plan beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from .columns import number
from .record import PEAK, PLAN, SIZE, TIMES, Count, Record, SizeFields, Skipped, Skips, TimeFields

PROMPT, BATCH = number("prompt_tokens", "prompt tokens", "d"), number("batch_size", "batch", "d")


class BenchRecord(Record, SizeFields, TimeFields, Skips):
    """The dense model, or the skipped one of the same run. Every measurement is one of its own."""

    file = "bench.jsonl"
    commands = ("bench",)
    key_fields = ()
    columns = (PLAN, *TIMES, *SIZE, PEAK, PROMPT, number("new_tokens", "new tokens", "d"), BATCH)

    record: Literal["bench"] = "bench"
    model: Literal["dense", "skipped"]
    beside: Skipped | None = Field(None, description="of the dense model, the plan it was timed in turn with")
    prompt_tokens: Count
    new_tokens: Count
    batch_size: Count = Field(description="sequences at once")
    rounds: Count = Field(description="how often both were timed, in turn")
    peak_bytes: Count | None = Field(description="most CUDA memory allocated while timing; None without CUDA")


def pairs_of(records: Iterable[BenchRecord]) -> list[BenchRecord]:
    """`records` without a dense model whose plan was never written, since writing both was interrupted."""
    found = list(records)
    torn = {
        place
        for place, record in enumerate(found)
        if record.beside and (place + 1 == len(found) or found[place + 1].plan != record.beside)
    }
    if torn:
        warnings.warn(
            "times of a dense model without those of its plan, torn by an interruption, are dropped", stacklevel=2
        )
    return [record for place, record in enumerate(found) if place not in torn]
