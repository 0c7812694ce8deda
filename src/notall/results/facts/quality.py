"""The loss of a plan, and how much each layer changes the residual stream."""

import math
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..record import Count, Fact, LayerIndex, Loss, Number, Share, Unsigned
from ..table import Column, in_magnitude, number, with_error, words
from .added import Added


class Quality(Fact):
    """What a plan costs. `_se`: standard error over sequences; differences are paired
    with the original model's.
    """

    nll: Loss = Field(description="negative log-likelihood, nats per token")
    nll_se: Unsigned = Field(description="nats per token")
    delta_nll: Number = Field(
        description=(
            "nll less the original model's on the same sequences, nats per token"
        )
    )
    delta_nll_se: Unsigned = Field(
        description="of the paired differences, nats per token"
    )
    perplexity: Unsigned = Field(description="exp(nll)")
    kl: Number = Field(
        description="KL(dense || skipped) of the next token, nats per token"
    )
    kl_se: Unsigned = Field(description="nats per token")
    top1_agreement: Share = Field(
        description="share of tokens with the original model's first choice, 0 to 1"
    )
    top1_agreement_se: Unsigned = Field(description="0 to 1")
    sequences: Count = Field(
        description="how many sequences the quality was measured on"
    )

    @property
    def nats_lost(self) -> float:
        """`delta_nll`; infinite where the model overflows."""
        return self.delta_nll if math.isfinite(self.delta_nll) else math.inf


class Scores(Added):
    """Of one plan on a batch, a value a sequence: means over its predicted tokens."""

    nll: tuple[Loss, ...] = Field(description="nats per token")
    kl: tuple[Number, ...] = Field(description="KL(dense || skipped), nats per token")
    top1_agreement: tuple[Share, ...] = Field(description="0 to 1")

    @model_validator(mode="after")
    def _of_each_sequence(self) -> Self:
        if not len(self.nll) == len(self.kl) == len(self.top1_agreement):
            raise ValueError(
                "nll, kl and top1_agreement are of different numbers of sequences"
            )
        return self


NATS_PER_TOKEN = "nats per token"
DELTA_NLL: Column[Quality] = with_error(
    "NLL added", lambda q: (q.delta_nll, q.delta_nll_se), unit=NATS_PER_TOKEN
)
KL: Column[Quality] = with_error("KL", lambda q: (q.kl, q.kl_se), unit=NATS_PER_TOKEN)
TOP1: Column[Quality] = with_error(
    "top-1 agreement", lambda q: (q.top1_agreement, q.top1_agreement_se)
)
PERPLEXITY: Column[Quality] = number("perplexity", lambda q: q.perplexity, in_magnitude)
NLL: Column[Quality] = with_error(
    "NLL", lambda q: (q.nll, q.nll_se), unit=NATS_PER_TOKEN
)
QUALITY = (DELTA_NLL, KL, TOP1, PERPLEXITY, NLL)


class Similarity(Fact):
    """Cosine of the residual stream before and after one block or sublayer: mean over
    tokens, error over sequences.
    """

    layer: LayerIndex
    kind: Literal["block", "attention", "mlp"]
    cosine: Number = Field(description="-1 to 1")
    cosine_se: Unsigned = Field(description="standard error over sequences")
    mixer: str | None = Field(
        None,
        description="the kind of an attention, where the model has several",
        max_length=80,
    )


COSINE: Column[Similarity] = with_error(
    "cosine", lambda row: (row.cosine, row.cosine_se), ".4f"
)
SIMILARITY: tuple[Column[Similarity], ...] = (
    number("layer", lambda row: row.layer, "d"),
    words("kind", lambda row: row.kind),
    COSINE,
    words("mixer", lambda row: row.mixer),
)
