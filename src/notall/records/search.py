"""What `notall search` writes down: every set that it evaluated, and the plans that it chose."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number, plain, with_spread
from .record import (
    QUALITY,
    SPENT,
    Amount,
    Count,
    Fields,
    Key,
    Number,
    Positive,
    QualityFields,
    Record,
    Skips,
    SpentFields,
    SublayerName,
)


class EvaluationRecord(Record, SpentFields):
    """One set of sublayers, evaluated; of the whole file the first line says by what."""

    file = "evaluations.jsonl"
    commands = ("search", "compare")
    key_fields = ("skipped", "batches")
    headed = True

    record: Literal["evaluation"] = "evaluation"
    skipped: tuple[SublayerName, ...] = Field(description="names of sublayers, sorted")
    batches: Count | Literal["all"] = Field(description="on how many of the objective's batches")
    cost: Number = Field(description="the objective; None where the model overflows without these")


class SpeedCheck(Fields):
    """The speedup that was predicted, and the one that was measured."""

    predicted_ms: Positive
    measured_ms: Positive
    predicted_speedup: Positive = Field(description="ratio to the dense model")
    speedup: Positive = Field(description="measured, the rounds' own ratios: median")
    speedup_low: Positive = Field(description="quartile")
    speedup_high: Positive = Field(description="quartile")
    off: float = Field(description="predicted over measured, less 1")


CHECK = (
    with_spread("speedup", "measured speedup", ".3f"),
    number("predicted_speedup", "predicted speedup", ".3f"),
    number("off", "off by", "+.1%"),
    number("measured_ms", "measured ms", ".0f"),
    number("predicted_ms", "predicted ms", ".0f"),
)


class Weighed(Fields):
    """What the plan leaves of the model, beside the dense model's."""

    weight_bytes: Count = Field(description="bytes of the weights that are left")
    dense_weight_bytes: Count
    kv_bytes_per_token: Count = Field(description="bytes of KV cache a token of one sequence takes")
    dense_kv_bytes_per_token: Count


class SearchRecord(Record, SpentFields, Skips):
    """A plan that was chosen, and what was measured of it, if anything."""

    file = "chosen.jsonl"
    commands = ("search",)
    key_fields = ("chosen", "plan", "evaluations", "in_time")  # times are never the same twice
    groups = ("quality", "check", "weighed")
    columns = (
        plain("chosen"),
        *QUALITY,
        *CHECK,
        number("cost", "objective on its text", ".4f"),
        number("dense_cost", "dense model's objective", ".4f"),
        plain("in_time", "search finished", lambda in_time: "yes" if in_time else "no"),
        *SPENT,
        plain("missed"),
    )

    record: Literal["search"] = "search"
    chosen: str = Field(description="how, by what, and how much")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in the order of choosing"
    )
    dense_cost: Number = Field(description="the objective of the dense model")
    cost: Number = Field(description="the objective of the plan")
    forwards: Amount = Field(description="executions in dense forward passes over the calibration text")
    in_time: bool = Field(description="found before the time was up")
    missed: str | None = Field(None, description="what was reached of a budget that was not; None where it was")
    quality: QualityFields | None = Field(None, description="on held-out text")
    check: SpeedCheck | None = Field(None, description="where a speedup was asked for")
    weighed: Weighed | None = Field(None, description="what that leaves")

    @property
    def key(self) -> Key:
        """Chosen again from the same text, it is the same choice."""
        return (*super().key, self.provenance and self.provenance.key)
