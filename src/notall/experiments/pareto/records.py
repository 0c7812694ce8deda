"""What is recorded of models in an engine."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from ...engines import Memory
from ...results.facts import Times
from ...results.record import (
    Count,
    Fact,
    Loss,
    Number,
    Positive,
    Record,
    SublayerNames,
    Unsigned,
)

NAMED = ("model", "repaired", "type")
Name = Annotated[str, Field(min_length=1, max_length=80)]


class Represented(Fact):
    """A model, and how its weights are represented: what an engine measures."""

    model: Name = Field(description="dense, the name of a plan, or another model")
    repaired: bool = Field(
        description="whether what it keeps was refit before it was quantised"
    )
    type: Name = Field(
        description="how its weights are represented, as the engine calls it"
    )

    @property
    def named(self) -> str:
        """Such as `less 4 attentions, repaired, Q8_0`."""
        repaired = ["repaired"] if self.repaired else []
        return ", ".join([self.model, *repaired, self.type])


class EngineScoresRecord(Record, Represented, kind="engine_scores", key=NAMED):
    """What one model loses on each window of the held-out text, and what its file
    weighs.
    """

    file_bytes: Count = Field(description="of weights on disk")
    nll: tuple[Number, ...] = Field(description="nats per token, a mean a window")
    tokens: tuple[Count, ...] = Field(
        description="that were to be predicted, of each window"
    )
    text_bytes: tuple[Count, ...] = Field(description="what those tokens are in UTF-8")
    tokens_as_dense: bool = Field(
        description="whether its tokens are the original's, so that nats are comparable"
    )

    @property
    def bits_per_byte(self) -> list[float]:
        """Of each window; a token of which the engine reports nothing counts as its
        mean.
        """
        return [
            nll * count / size / math.log(2) if size else math.nan
            for nll, count, size in zip(self.nll, self.tokens, self.text_bytes)
        ]


class EngineTimesRecord(
    Record, Represented, kind="engine_times", key=(*NAMED, "round")
):
    """What one model took in one round; in a round each model is timed once."""

    round: Count = Field(description="its number, from 0")
    prefill_ms: Positive = Field(
        description="milliseconds from the prompt to the first new token"
    )
    decode_ms_per_token: Positive = Field(description="milliseconds")
    memory_bytes: Count = Field(
        description="by which the engine's process grew, or most on devices"
    )
    memory_of: Memory = Field(
        "process",
        description="whose memory that is: the process's, or that of CUDA devices",
    )


class ParetoRecord(Record, Represented, kind="pareto", key=NAMED):
    """One model compared with the dense one; differences are paired by window, speedups
    by round.
    """

    skipped: SublayerNames = Field(
        "", description="names of sublayers that it leaves out"
    )
    nll: Loss = Field(
        math.nan,
        description="as the engine computes it on held-out text, nats per token",
    )
    nll_se: Unsigned = Field(math.nan, description="over windows")
    delta_nll: Number = Field(
        math.nan,
        description="nll less the original model's; none where its tokens are others",
    )
    delta_nll_se: Unsigned = Field(
        math.nan, description="of the paired differences, over windows"
    )
    bits_per_byte: Loss = Field(
        math.nan, description="of the predicted text: comparable between tokenizers"
    )
    bits_per_byte_se: Unsigned = Field(math.nan, description="over windows")
    delta_bits: Number = Field(
        math.nan, description="bits_per_byte less the original model's"
    )
    delta_bits_se: Unsigned = Field(
        math.nan, description="of the paired differences, over windows"
    )
    windows: Count | None = Field(None, description="of held-out text")
    tokens: Count | None = Field(None, description="predicted, of all windows")
    file_bytes: Count | None = Field(None, description="of weights on disk")
    memory_bytes: Count | None = Field(
        None, description="see `memory_of`; median of the rounds"
    )
    memory_of: Memory | None = Field(
        None, description="the process: by how much it grew; devices: most allocated"
    )
    times: Times | None = Field(
        None,
        description="speedups over the plain original, alike for models of one shape",
    )
    rounds: Count | None = Field(None, description="in which it was timed")
    round_ms: tuple[Positive, ...] = Field(
        (), description="of a decode step in each round, as all of its shape"
    )
    best: bool = Field(
        False,
        description="whether it is faster than what loses less, at the level 0.95",
    )
    failed: str | None = Field(
        None, description="what the engine said, where it could not run it"
    )

    def loss(self, *, by_bits: bool) -> tuple[float, float]:
        """What it loses to the original model, with its error: bits per byte, or nats
        per token.
        """
        if by_bits:
            return self.delta_bits, self.delta_bits_se
        return self.delta_nll, self.delta_nll_se

    @property
    def faster(self) -> float:
        """How many times as fast as the original model it decodes; nan where it was not
        timed.
        """
        return self.times.speedup_decode.median if self.times else math.nan
