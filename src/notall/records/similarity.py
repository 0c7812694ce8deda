"""How similar the residual stream is before and after each layer and sublayer: a line each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .columns import number, plain, with_error
from .record import LayerIndex, Number, Record, Unsigned


class SimilarityRecord(Record):
    """Cosine before and after one block or sublayer: mean over tokens, error over sequences."""

    file = "similarity.jsonl"
    commands = ("sweep", "paper")
    key_fields = ("layer", "kind")
    columns = (
        number("layer", "layer", "d"),
        plain("kind"),
        with_error("cosine", "cosine", ".4f"),
        plain("mixer"),
    )

    record: Literal["similarity"] = "similarity"
    layer: LayerIndex
    kind: Literal["block", "attention", "mlp"]
    cosine: Number = Field(description="-1 to 1")
    cosine_se: Unsigned = Field(description="standard error over sequences")
    mixer: str | None = Field(None, description="the kind of an attention, where the model has several", max_length=80)
