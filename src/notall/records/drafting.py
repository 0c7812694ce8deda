"""What `notall draft` writes down: what a plan brings as a draft model, a line for each way to decode and draft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .columns import Column, number, plain, with_error, with_spread
from .record import PLAN, Count, Positive, Record, Share, Skips, Unsigned

Decoding = Literal["greedy", "sampled"]


class DraftRecord(Record, Skips):
    """Rounds of so many drafted tokens and a check of them. Every measurement is one of its own."""

    file = "drafts.jsonl"
    commands = ("draft",)
    key_fields = ()
    columns = (
        plain("decoding"),
        number("drafted", "drafted", "d", unit="tokens a round"),
        with_spread("predicted", "predicted speedup", ".2f"),
        with_spread("measured", "measured speedup", ".2f"),
        with_error("tokens_per_round", "tokens a round", ".2f"),
        with_error("acceptance", "the last accepted", ".2f"),
        number("draft_ms", "draft ms", ".1f"),
        number("check_ms", "check ms", ".1f"),
        number("dense_ms", "dense ms", ".1f"),
        Column(("same_texts", "texts"), "same texts", str, "of {}".format),
        plain("model"),
        PLAN,
    )

    record: Literal["draft"] = "draft"
    model: Literal["skipped", "repaired"] = Field(description="which model drafts")
    decoding: Decoding = Field(description="the likeliest token each time, or sampled at temperature 1")
    drafted: Count = Field(description="tokens that are drafted a round")
    acceptance: Share = Field(description="how likely the last of them is accepted once those before it were, 0 to 1")
    acceptance_se: Unsigned = Field(description="over texts")
    tokens_per_round: Positive = Field(description="tokens that a round gives, with the dense model's own one")
    tokens_per_round_se: Unsigned = Field(description="over texts")
    dense_ms: Positive = Field(description="milliseconds of a decode step of the dense model, median of the rounds")
    draft_ms: Positive = Field(description="likewise of the draft model")
    check_ms: Positive = Field(
        description="likewise of the dense model's check of a draft: one step of drafted + 1 tokens"
    )
    predicted: Positive = Field(
        description="speedup of decoding by these times, one ratio a round, median; > 1: faster"
    )
    predicted_low: Positive = Field(description="quartile")
    predicted_high: Positive = Field(description="quartile")
    measured: Positive | None = Field(
        None,
        description="likewise of transformers' generate with the draft model, prefill and all; greedy, at the best",
    )
    measured_low: Positive | None = Field(None, description="quartile")
    measured_high: Positive | None = Field(None, description="quartile")
    same_texts: Count | None = Field(
        None, description="how many of the texts have the very tokens that they have without"
    )
    texts: Count = Field(description="how many prompts were continued")
    rounds: Count = Field(description="how often all was timed, in turn")

    @model_validator(mode="after")
    def _measured_whole(self) -> DraftRecord:
        measured = (self.measured, self.measured_low, self.measured_high, self.same_texts)
        if len({value is None for value in measured}) > 1:
            raise ValueError("what was measured lacks a part")
        return self
