"""What `notall front` writes down: models in an engine, skipped and quantised; what each loses, weighs and takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from .columns import Row, plain, size, with_error
from .record import (
    DELTA_NLL,
    NATS,
    SPEEDUPS,
    TIMES,
    Count,
    Fields,
    Key,
    Loss,
    Number,
    Positive,
    Record,
    SublayerNames,
    TimeFields,
    Unsigned,
)

DENSE = "dense"
DELTA_BITS = with_error("delta_bits", "bits added", unit="bits per byte")
NAMED = ("model", "repaired", "type")
Name = Annotated[str, Field(min_length=1, max_length=80)]


class Variant(Fields):
    """A model as an engine runs it."""

    model: Name = Field(description="dense, the name of a plan, or another model")
    repaired: bool = Field(description="whether what it keeps was refit before it was quantised")
    type: Name = Field(description="how its weights are held, as the engine calls it")


class EngineScoresRecord(Record, Variant):
    """What one model loses on each window of the held-out text, and what its file weighs."""

    file = "engine_scores.jsonl"
    commands = ("front",)
    key_fields = NAMED

    record: Literal["engine_scores"] = "engine_scores"
    file_bytes: Count = Field(description="of weights on disk")
    nll: tuple[Number, ...] = Field(description="nats per token, a mean a window")
    tokens: tuple[Count, ...] = Field(description="that were to be predicted, of each window")
    text_bytes: tuple[Count, ...] = Field(description="what those tokens are in UTF-8")
    tokens_as_dense: bool = Field(description="whether its tokens are the dense model's, so that nats are comparable")


class EngineTimesRecord(Record, Variant):
    """What one model took in one round; in a round each model is timed once."""

    file = "engine_times.jsonl"
    commands = ("front",)
    key_fields = (*NAMED, "round")

    record: Literal["engine_times"] = "engine_times"
    round: Count = Field(description="its number, from 0")
    prefill_ms: Positive = Field(description="milliseconds from the prompt to the first new token")
    decode_ms_per_token: Positive = Field(description="milliseconds")
    memory_bytes: Count = Field(description="by which the engine's process grew")


def _how_many(names: str) -> str:
    count = len(names.split())
    return f"{count} sublayer{'s' if count > 1 else ''}" if count else ""


class FrontRecord(Record, Variant):
    """One model beside the dense one; differences are paired by window, speedups by round."""

    file = "front.jsonl"
    commands = ("front",)
    key_fields = NAMED
    groups = ("times",)
    columns = (
        plain("model"),
        plain("type"),
        plain("repaired", write=lambda repaired: "yes" if repaired else ""),
        DELTA_NLL,
        SPEEDUPS[0],
        SPEEDUPS[1],
        plain("on_front", "on the front", lambda on_front: "yes" if on_front else ""),
        size("file_bytes", "file"),
        size("memory_bytes", "memory"),
        with_error("bits_per_byte", "bits per byte"),
        DELTA_BITS,
        with_error("nll", "NLL", unit=NATS),
        *TIMES[2:],
        plain("skipped", "without", _how_many),
        plain("failed", "not measured"),
    )

    record: Literal["front"] = "front"
    skipped: SublayerNames = Field("", description="names of sublayers that it leaves out")
    nll: Loss = Field(None, description="as the engine computes it on held-out text, nats per token")
    nll_se: Unsigned = Field(None, description="over windows")
    delta_nll: Number = Field(None, description="nll less the dense model's; None where its tokens are others")
    delta_nll_se: Unsigned = Field(None, description="of the paired differences, over windows")
    bits_per_byte: Loss = Field(None, description="of the text that was predicted: comparable between tokenizers")
    bits_per_byte_se: Unsigned = Field(None, description="over windows")
    delta_bits: Number = Field(None, description="bits_per_byte less the dense model's")
    delta_bits_se: Unsigned = Field(None, description="of the paired differences, over windows")
    windows: Count | None = Field(None, description="of held-out text")
    tokens: Count | None = Field(None, description="predicted, of all windows")
    file_bytes: Count | None = Field(None, description="of weights on disk")
    memory_bytes: Count | None = Field(None, description="by which the engine's process grew, median of the rounds")
    times: TimeFields | None = Field(
        None,
        description="speedups are over the dense model in the engine's plain type; models of one shape share theirs",
    )
    rounds: Count | None = Field(None, description="in which it was timed")
    on_front: bool = Field(False, description="whether what loses less is slower, beyond the spread of the rounds")
    failed: str | None = Field(None, description="what the engine said, where it could not run it")


def loss_of(row: Mapping[str, object], *, by_bits: bool) -> float | None:
    """What a row loses to the dense model: bits a byte, or nats a token; None where that is not known."""
    value = row.get("delta_bits" if by_bits else "delta_nll")
    return value if isinstance(value, float) else None


def goes_by_bits(rows: Sequence[Row]) -> bool:
    """Whether some model has other tokens, so that all are compared by bits a byte."""
    return any(row.get("bits_per_byte") is not None and row.get("delta_nll") is None for row in rows)


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that lose less than any that is as fast, from the slowest to the fastest.

    Faster is what is so by quartiles: its lower one is above the upper one of the other. What may be as fast, by the
    spread of the rounds, is not worth a greater loss.
    """
    by_bits = goes_by_bits(rows)
    measured = [
        (value, -row["speedup_decode"], row)
        for row in rows
        if "speedup_decode" in row and (value := loss_of(row, by_bits=by_bits)) is not None
    ]
    found: list[Row] = []
    for _, _, row in sorted(measured, key=lambda one: one[:2]):
        if not found or row["speedup_decode_low"] > found[-1]["speedup_decode_high"]:
            found.append(row)
    return found


def key_of(row: Row) -> Key:
    """Which record it is of."""
    return tuple(row[name] for name in NAMED)


def named(row: Row) -> str:
    """A row in words, such as `less 4 attention, repaired, Q8_0`."""
    return ", ".join([row["model"], *(["repaired"] if row["repaired"] else []), row["type"]])
