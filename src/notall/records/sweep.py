"""What `notall sweep` writes down: the paper's grid, the scores behind it, and what some of its plans say."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

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
    Count,
    Fields,
    Loss,
    Number,
    QualityFields,
    Record,
    Share,
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
    peak_bytes: Count | None = Field(description="most CUDA memory allocated while timing; None without CUDA")


class SequenceScores(Fields):
    """Of one configuration on one batch, a value a sequence."""

    nll: tuple[Loss, ...] = Field(description="nats per token")
    kl: tuple[Number, ...] = Field(description="nats per token")
    top1_agreement: tuple[Share, ...] = Field(description="0 to 1")

    @model_validator(mode="after")
    def _of_each_sequence(self) -> SequenceScores:
        if not len(self.nll) == len(self.kl) == len(self.top1_agreement):
            raise ValueError("nll, kl and top1_agreement are of different numbers of sequences")
        return self


class ScoresRecord(Record):
    """The scores of every configuration of the grid, in its order, on one batch of token ids."""

    file = "scores.jsonl"
    commands = ("sweep",)
    key_fields = ("batch",)

    record: Literal["scores"] = "scores"
    batch: Count = Field(description="its number, from 0")
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
