"""What leaving out each sublayer alone costs: a line each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .record import Count, LayerIndex, Number, Record, Unsigned


class LeaveOneOutRecord(Record):
    """One sublayer left out, on a few sequences."""

    file = "leave_one_out.jsonl"
    commands = ("sweep",)
    key_fields = ("kind", "layer")

    record: Literal["leave_one_out"] = "leave_one_out"
    kind: Literal["attention", "mlp"]
    layer: LayerIndex
    delta_nll: Number = Field(description="nll less the dense model's, nats per token")
    delta_nll_se: Unsigned = Field(None, description="of the paired differences, nats per token")
    sequences: Count | None = Field(None, description="on how many")
