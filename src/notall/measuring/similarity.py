"""How similar each layer's features are to the previous layer's (the paper's Fig. 1), and each sublayer's likewise."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..models.texts import checked
from ..results.facts import Similarity
from ..running.passages import Passage, walk
from ..structure.locating import locate
from .statistics import mean_and_error


def measure_similarity(model: PreTrainedModel, batches: Iterable[Tensor]) -> list[Similarity]:
    """Cosine similarity of the residual stream before and after each block, attention and MLP of the dense model.

    `batches` are token ids, (batch, tokens) each. The last block is compared before the final norm. Costs less than a
    forward pass, since no head is run, and keeps one block's hidden states at a time.
    Raises `UsageError` for what are no token ids.
    Source: arXiv 2407.15516, Fig. 1: cos(h[l], h[l-1]), averaged over tokens.
    """
    found: dict[tuple[int, Literal["block", "attention", "mlp"]], list[Tensor]] = {}

    def look(passage: Passage) -> None:
        pairs = {"block": (passage.before, passage.after)} | passage.around
        for kind, (before, after) in pairs.items():
            cosine = cosine_similarity(before.float(), after.float(), dim=-1).mean(dim=-1)  # (batch,)
            found.setdefault((passage.block.index, kind), []).append(cosine)  # type: ignore[arg-type]

    with torch.no_grad():
        for tokens in checked(batches, model):
            walk(model, look, input_ids=tokens)
    structure, rows = locate(model), []
    several = structure.sublayers if len(structure.mixers) > 1 else ()
    mixers: dict[tuple[int, str], str | None] = {(part.index, part.kind): part.mixer for part in several}
    for at, values in found.items():
        mean, error = mean_and_error(torch.cat(values).tolist())
        rows.append(Similarity(layer=at[0], kind=at[1], cosine=mean, cosine_se=error, mixer=mixers.get(at)))
    return rows
