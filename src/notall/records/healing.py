"""What `notall heal` writes down: a line for each time that it looked at how far it is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number
from .record import Amount, Count, Number, Record, Share


class HealRecord(Record):
    """How far from the dense model the healing is, on text that it does not train on."""

    file = "healing.jsonl"
    commands = ("heal",)
    key_fields = ("tokens",)
    headed = True
    columns = (
        number("tokens", "tokens", ","),
        number("held_out_kl", "held-out KL", ".4f"),
        number("held_out_nll", "held-out NLL", ".4f"),
        number("held_out_agreement", "held-out top-1 agreement", ".4f"),
        number("seconds", "CPU s", ",.1f"),
    )

    record: Literal["healing"] = "healing"
    tokens: Count = Field(description="tokens trained on so far")
    held_out_kl: Number = Field(description="KL(dense || healed) of the next token, nats per token")
    held_out_nll: Number = Field(None, description="negative log-likelihood there, nats per token")
    held_out_agreement: Share = Field(
        None, description="share of first choices there that are the dense model's, 0 to 1"
    )
    seconds: Amount = Field(
        description="CPU seconds of all threads so far, also before an interruption; of several workers the first one's"
    )
