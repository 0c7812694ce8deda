"""ReplaceMe: what a gap did, as a linear map, folded into the output projection before it (arXiv 2505.02819)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...plan import Plan
from ...progress import Progress, silent, tracked
from ...running.repaired import RepairedPlan
from ...structure.observation import LayerCall
from ..projections import features_of, find_projection
from ..streams import DenseRun, LiveStep, run_all, steps_of
from .linear_maps import least_squares

RIDGE = 0.0  # `alpha` of its repository's `lstsq` configuration


@torch.no_grad()
def replaceme(
    model: PreTrainedModel, plan: Plan, batches: Sequence[Tensor], progress: Progress = silent
) -> RepairedPlan:
    """The least-squares variant: T = (M'M + aI)^-1 M'(h_n + M - h_i), and T'W in place of W; all of the dense model.

    M is what the projection W adds to the stream, h_i the stream behind it, h_n the one behind the gap. The paper skips
    blocks, so that W is a `down_proj`; here it is that of whatever is kept before the gap. A gap with nothing before
    it stays, and so does one behind a sublayer that a norm or no single matrix ends.
    """
    dense = DenseRun(model, plan, batches)
    steps = [step for step in steps_of(dense.structure, plan) if step.gap]
    weights: dict[str, Tensor] = {}
    for step in tracked(steps, "folding maps into what is before the gaps", progress):
        weights |= _folded(dense, step)
    return RepairedPlan.of(plan, weights=weights)


def _folded(dense: DenseRun, step: LiveStep) -> dict[str, Tensor]:
    index = step.block.index
    layer = dense.layers[index]
    before, wanted = dense.stream.before(step.line, step.behind)
    part = max(step.parts, key=lambda part: part.kind == "mlp")  # of a parallel block the MLP, as in its Falcon
    projection = find_projection(layer, part, before[0], LayerCall(dense.recordings[0].arguments[index]))
    if projection is None or projection.norm:
        return {}
    with features_of(layer, [projection]) as features:
        behind = list(run_all(dense.layers, step, before, dense.recordings))
    matrix, bias = projection.matrix(layer), projection.bias(layer)
    added = [inner.double() @ matrix.double().T for inner in features()]
    if bias is not None:
        added = [m + projection.scale * bias.double() for m in added]
    target = [to.flatten(0, 1).double() + m - at.flatten(0, 1) for to, m, at in zip(wanted, added, behind)]
    through = least_squares(added, target, ridge=RIDGE)
    new_bias = None if bias is None else (through @ bias.double()).to(bias.dtype)
    new = (through @ matrix.double()).to(matrix.dtype)
    return {
        f"{dense.structure.layers}.{index}.{name}": w for name, w in projection.parameters(layer, new, new_bias).items()
    }
