"""Refit of projections whose answers are added to the stream as they are, up to a factor: one least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .least_squares import Moments
from .step import Refit, Seen


def refit_directly(seen: Seen, ridges: Sequence[float]) -> Refit | None:
    """With the ridge that leaves least on what is held out; None where all of them leave more than no change."""
    fitted, held = _moments(seen, held=False), _moments(seen, held=True)
    best, left = None, 1.0
    for ridge in ridges:
        change = fitted.solve(ridge)
        if change is not None and (now := held.left(change, seen.metric.to(change))) < left:
            best, left = ridge, now
    change = None if best is None else (fitted + held).solve(best)
    if best is None or change is None:
        return None
    weights, moved = _weights(seen, change)
    return Refit(best, left, weights, [_behind(seen, number, moved) for number in range(len(seen.behind))])


def _moments(seen: Seen, held: bool) -> Moments:
    like = seen.features[0].new_empty(0, dtype=seen.exact)
    outputs = seen.target[0].shape[-1]
    moments = Moments.none(seen.features[0].shape[1], outputs, _biases(seen) > 0, like)
    for features, _, behind, target in seen.tokens(held):
        moments.add(features, target - behind, seen.counts(target))
    return moments


def _biases(seen: Seen) -> int:
    return sum(one.bias(seen.layer) is not None for one in seen.projections)


def _weights(seen: Seen, change: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The weights in the dtype of the model, and by how much they really moved, as `change` has it."""
    weights: dict[str, Tensor] = {}
    moved, start = torch.zeros_like(change), 0
    for one in seen.projections:
        old, bias = one.matrix(seen.layer), one.bias(seen.layer)
        columns = slice(start, start + old.shape[1])
        new = (old.to(change) + change[:, columns]).to(old.dtype)
        moved[:, columns] = new.to(change) - old.to(change)
        start = columns.stop
        if bias is not None:  # what several share each takes an equal part of
            shifted = (bias.to(change) + change[:, -1] / (one.scale * _biases(seen))).to(bias.dtype)
            moved[:, -1] += one.scale * (shifted.to(change) - bias.to(change))
            bias = shifted
        weights |= one.parameters(seen.layer, new, bias)
    return weights, moved


def _behind(seen: Seen, number: int, moved: Tensor) -> Tensor:
    """The stream of a batch behind the step, whose weights moved so much."""
    features, behind = seen.features[number].to(moved), seen.behind[number]
    more = features @ moved[:, : features.shape[1]].T
    if moved.shape[1] > features.shape[1]:
        more += moved[:, -1]
    return (behind.to(moved) + more.view(behind.shape)).to(behind.dtype)
