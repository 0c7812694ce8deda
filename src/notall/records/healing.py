"""What `notall heal` writes down: a line for each time that it looked at how far it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number
from .record import Amount, Count, Number, Record


class HealRecord(Record):
    """How far from the dense model the healing is, on text that it does not train on."""

    file = "healing.jsonl"
    commands = ("heal",)
    key_fields = ("tokens",)
    headed = True
    columns = (
        number("tokens", "tokens", ","),
        number("kl", "KL held out", ".4f"),
        number("seconds", "CPU s", ",.1f"),
    )

    record: Literal["healing"] = "healing"
    tokens: Count = Field(description="tokens trained on so far")
    kl: Number = Field(description="KL(dense || healed) of the next token, nats per token")
    seconds: Amount = Field(description="CPU seconds of all threads so far, of this process")
