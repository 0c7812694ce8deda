"""What `notall sweep` writes down: the paper's grid, the scores behind it, and what some of its plans say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .record import (
    CONFIGURED,
    DELTA_NLL,
    KL,
    PEAK,
    PERPLEXITY,
    SIZE,
    SPEEDUPS,
    TOP1,
    Configured,
    Fields,
    Number,
    QualityFields,
    Record,
    SizeFields,
    TimeFields,
)


class SweepRecord(Record, SizeFields, TimeFields, QualityFields, Configured):
    """One configuration, measured."""

    file = "results.jsonl"
    commands = ("sweep",)
    key_fields = ("variant", "fraction", "keep_last")
    columns = (*CONFIGURED, DELTA_NLL, *SPEEDUPS, KL, TOP1, PERPLEXITY, *SIZE, PEAK)

    record: Literal["sweep"] = "sweep"
    peak_bytes: int | None = Field(description="most CUDA memory allocated while timing; None without CUDA")


class SequenceScores(Fields):
    """Of one configuration on one batch, a value a sequence."""

    nll: tuple[Number, ...] = Field(description="nats per token")
    kl: tuple[Number, ...] = Field(description="nats per token")
    top1_agreement: tuple[Number, ...] = Field(description="0 to 1")


class ScoresRecord(Record):
    """The scores of every configuration of the grid, in its order, on one batch of token ids."""

    file = "scores.jsonl"
    commands = ("sweep",)
    key_fields = ("batch",)

    record: Literal["scores"] = "scores"
    batch: int = Field(ge=0, description="its number, from 0")
    scores: tuple[SequenceScores, ...]


class Sample(Fields):
    """A prompt, and how a plan goes on with it."""

    prompt: str
    said: str


class SampleRecord(Record, Configured):
    """What one plan says."""

    file = "samples.jsonl"
    commands = ("sweep",)
    key_fields = ("variant", "fraction", "keep_last", "plan")

    record: Literal["samples"] = "samples"
    samples: tuple[Sample, ...]
