"""Prune&Comp: the stream's magnitude behind a gap is made what it was, by weights (arXiv 2507.18212)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError
from ...plan import Plan
from ...progress import Progress, silent, tracked
from ...running.repaired import RepairedPlan
from ...structure.model_structure import Sublayer
from ...structure.observation import LayerCall
from ..projections import find_projection
from ..streams import DenseRun, gaps_of


@torch.no_grad()
def prune_and_comp(
    model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent
) -> RepairedPlan:
    """The stream before each gap is multiplied by a = mean over windows and channels of E|x_after| / E|x_before|.

    As in its repository's `magcomp.py`, E is over the tokens of a window, and gaps are closed one by one, each measured
    on what the ones before left. There the embedding and every `o_proj` and `down_proj` before the gap are
    multiplied by a. Here every output projection *behind* the gap is divided by it: norms read the stream, so the
    whole stream's scale tells nothing, and an embedding that is the head too (the default model's) can stay as it is.

    Raises `UsageError` where what is kept behind a gap ends in a norm or in no single matrix.
    """
    text = DenseRun(model, plan, batches)
    states, here, scale = text.stream.before(0)[0], 0, 1.0
    weights: dict[str, Tensor] = {}
    gaps = gaps_of(text.structure, plan)
    for number, gap in enumerate(tracked(gaps, "measuring magnitudes over the gaps", progress)):
        states = text.run(states, here, gap.start)
        ratio = _magnitude(states, text.run(states, gap.start, gap.end))
        states, here, scale = [ratio * state for state in states], gap.end, scale * ratio
        until = gaps[number + 1].start if number + 1 < len(gaps) else len(text.stream.lines)
        for line in text.stream.lines[gap.end : until]:
            for part in line.parts:
                weights |= _divided(text, part, scale)
    return RepairedPlan.of(plan, weights=weights)


def _magnitude(before: Sequence[Tensor], behind: Sequence[Tensor]) -> float:
    """By how much larger the stream is behind than before, a mean over windows and channels."""
    ratios = [
        to.double().abs().mean(1) / at.double().abs().mean(1).clamp_min(torch.finfo(torch.float32).tiny)
        for at, to in zip(before, behind)
    ]
    return float(torch.cat(ratios).mean())


def _divided(text: DenseRun, part: Sublayer, scale: float) -> dict[str, Tensor]:
    layer = text.layers[part.index]
    some = text.recordings[0]
    projection = find_projection(layer, part, some.embedded, LayerCall(some.arguments[part.index]))
    if projection is None or projection.norm:
        raise UsageError(
            f"what {part.name} adds to the stream goes through a norm or comes from more than one matrix, so that no "
            "weights rescale it; choose another repair than prune-and-comp"
        )
    matrix, bias = projection.matrix(layer), projection.bias(layer)
    new = projection.parameters(layer, matrix / scale, None if bias is None else bias / scale)
    return {f"{text.structure.layers}.{part.index}.{name}": weight for name, weight in new.items()}
