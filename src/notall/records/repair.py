"""What `notall repair` writes down: a line for each kept sublayer that it came to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .columns import number, plain
from .record import Amount, Number, Record, SublayerName

LITTLE = 0.02  # of the error: refits that mend less fill screens


class FittedText(BaseModel):
    """A text that weights were fitted to, or trained on."""

    model_config = ConfigDict(frozen=True)

    text: Annotated[str, Field(max_length=300)]
    text_sha256: Annotated[str, Field(max_length=64)]


class RepairStep(BaseModel):
    """What made the weights of a repaired plan, one command after another; beside this all of its settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    by: Literal["repair", "heal"]
    texts: tuple[FittedText, ...] = ()
    sequences: int | None = Field(None, ge=1, description="windows of all texts together")
    length: int | None = Field(None, ge=1, description="tokens a window")
    method: str = Field("refit", max_length=100, description="how weights were repaired")
    sampled: bool = Field(False, description="whether the dense model wrote the windows, from the texts' first words")

    def __str__(self) -> str:
        repaired = "refit in closed form" if self.method == "refit" else f"repaired by {self.method}"
        verb = repaired if self.by == "repair" else "trained to say what the dense model says"
        on = " and of ".join(one.text for one in self.texts)
        by = "that it wrote itself from the first words " if self.sampled else ""
        return f"{verb} on {self.sequences} windows of {self.length} tokens {by}of {on}" if on else verb


class RefitRecord(Record):
    """One step of a plan, refit or left alone. Errors are of tokens that the ridge was chosen on, not fitted to."""

    file = "refits.jsonl"
    commands = ("repair",)
    key_fields = ("sublayers",)
    headed = True
    columns = (
        plain("sublayers", "sublayer", " ".join),
        number("left", "error left", ".1%"),
        number("ridge", "ridge", "g"),
        number("seconds", "CPU s", ",.1f"),
        plain("why", "left alone because"),
    )

    record: Literal["refit"] = "refit"
    sublayers: tuple[SublayerName, ...] = Field(min_length=1, description="a sublayer, or both of a parallel block")
    ridge: Amount | None = Field(description="relative to each feature's own square; None where it was left alone")
    left: Number = Field(description="squared distance to the dense stream behind it, over the one without a refit")
    seconds: Amount = Field(description="CPU seconds of all threads")
    why: str = Field("", max_length=200, description="why it was left alone")
