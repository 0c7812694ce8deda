"""What loops deep inside write down, so that a killed run goes on: evaluations,
answers, repairs, healings.
"""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator
from typing_extensions import Self

from ..plan import several
from .facts import QUALITY, Quality, SearchCost, State
from .record import Amount, Count, Number, Record, RecordKey, Share, Skips, SublayerName
from .table import Column, number, within, words

LEAST_REFIT_GAIN = 0.02  # of the error: refits that mend less fill screens


class EvaluationRecord(
    Record, kind="evaluation", key=("skipped", "batches"), headed=True
):
    """One set of sublayers, evaluated; of the whole file the first line says by
    what.
    """

    skipped: tuple[SublayerName, ...] = Field(description="names of sublayers, sorted")
    batches: Count | Literal["all"] = Field(
        description="on how many of the objective's batches"
    )
    cost: Number = Field(
        description="the objective; None where the model overflows without these"
    )
    spent: SearchCost


Said = (
    tuple[Number, bool] | Number | str
)  # log-likelihood and whether it is greedy, a log-likelihood, a text


class AnswersRecord(Record, kind="answers"):
    """Answers to some requests, by the requests' digests, each in the order of the
    plans' digests.
    """

    plans: tuple[str, ...]
    answers: dict[str, tuple[Said, ...]] = Field(description="one for each plan")

    @model_validator(mode="after")
    def _of_each_plan(self) -> Self:
        if any(len(texts) != len(self.plans) for texts in self.answers.values()):
            raise ValueError("there is not one answer for each plan")
        return self


class FittedText(BaseModel, frozen=True):
    """A text that weights were fitted to, or trained on."""

    text: Annotated[str, Field(max_length=300)]
    text_sha256: Annotated[str, Field(max_length=64)]


class RepairStep(BaseModel, frozen=True, extra="allow"):
    """What made the weights of a repaired plan, one command after another; beside this
    all of its settings.
    """

    by: Literal["repair", "heal"]
    texts: tuple[FittedText, ...] = ()
    sequences: int | None = Field(
        None, ge=1, description="windows of all texts together"
    )
    length: int | None = Field(None, ge=1, description="tokens a window")
    method: str = Field(
        "refit", max_length=100, description="how weights were repaired"
    )
    sampled: bool = Field(
        False,
        description=(
            "whether the original wrote the windows, from the texts' first words"
        ),
    )

    def __str__(self) -> str:
        repaired = (
            "refit in closed form"
            if self.method == "refit"
            else f"repaired by {self.method}"
        )
        verb = (
            repaired
            if self.by == "repair"
            else "trained to say what the original model says"
        )
        on = " and of ".join(one.text for one in self.texts)
        by = "that it wrote itself from the first words " if self.sampled else ""
        return (
            f"{verb} on {several(self.sequences or 0, 'window')} of {self.length}"
            f" tokens {by}of {on}"
            if on
            else verb
        )


class RefitRecord(Record, kind="refit", key=("sublayers",), headed=True):
    """One step of a plan, refit or left alone. Errors are of tokens that the ridge was
    chosen on, not fitted to.
    """

    sublayers: tuple[SublayerName, ...] = Field(
        min_length=1, description="a sublayer, or both of a parallel block"
    )
    ridge: Amount | None = Field(
        description=(
            "relative to each feature's own square; None where it was left alone"
        )
    )
    left: Number = Field(
        description=(
            "squared distance to the dense stream behind it, over the one without a"
            " refit"
        )
    )
    seconds: Amount = Field(description="CPU seconds of all threads")
    why: str = Field("", max_length=200, description="why it was left alone")
    sha256: str = Field(
        "", max_length=64, description="of its weights; none where it was left alone"
    )


REFITS: tuple[Column[RefitRecord], ...] = (
    words("sublayer", lambda refit: " ".join(refit.sublayers)),
    number("error left", lambda refit: refit.left, ".1%"),
    number("ridge", lambda refit: refit.ridge, "g"),
    number("CPU s", lambda refit: refit.seconds, ",.1f"),
    words("left alone because", lambda refit: refit.why),
)


class HealRecord(Record, kind="healing", key=("model", "tokens"), headed=True):
    """How far from the original model the healing is, or what it began with, on text
    that it does not train on.
    """

    model: State = Field(
        "healed", description="skipped, repaired or, after the first step, healed"
    )
    tokens: Count = Field(description="tokens trained on so far")
    held_out_kl: Number = Field(
        description="KL(dense || healed) of the next token, nats per token"
    )
    held_out_nll: Number = Field(
        math.nan, description="negative log-likelihood there, nats per token"
    )
    held_out_agreement: Share = Field(
        math.nan,
        description="share of the original model's first choices there, 0 to 1",
    )
    seconds: Amount = Field(
        description=(
            "CPU seconds so far of the first worker, also before a break, or of the"
            " repair"
        )
    )


HEALING: tuple[Column[HealRecord], ...] = (
    words("model", lambda look: look.model),
    number("tokens", lambda look: look.tokens, ","),
    number("held-out KL", lambda look: look.held_out_kl, ".4f"),
    number("held-out NLL", lambda look: look.held_out_nll, ".4f"),
    number("held-out top-1 agreement", lambda look: look.held_out_agreement, ".4f"),
    number("CPU min", lambda look: look.seconds / 60, ",.2f"),
)


class MeasuredRecord(Record, Skips, kind="measured", key=("text", "model")):
    """One plan, with its weights if it has any, on one text that they were not fitted
    to.
    """

    text: str = Field(description="its name")
    quality: Quality
    model: State = Field(
        description=(
            "what was made up for what the plan skips: nothing, by a repair, by a"
            " healing"
        )
    )

    @property
    def key(self) -> RecordKey:
        """Of the same weights on the same windows it is the same measurement."""
        return (*super().key, self.provenance and self.provenance.key)


MEASURED: tuple[Column[MeasuredRecord], ...] = (
    words("text", lambda one: one.text),
    words("model", lambda one: one.model),
    *within(QUALITY, lambda one: one.quality),
    number("sequences", lambda one: one.quality.sequences, "d"),
    words("skipped", lambda one: one.plan.in_words()),
)
