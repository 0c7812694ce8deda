"""Refit of projections whose answers are added to the stream as they are, up to a factor: one least-squares problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .least_squares import Sums, sums_for
from .step import Refit, Seen


def refit_directly(seen: Seen, ridges: Sequence[float]) -> Refit | None:
    """With the ridge that leaves least on what is held out; None where all of them leave more than no change."""
    fitted, held = _sums(seen, held=False), _sums(seen, held=True)
    best, left = None, 1.0
    for ridge in ridges:
        change = fitted.solve(ridge)
        if change is not None and (now := held.left(change, seen.metric.to(change))) < left:
            best, left = ridge, now
    fitted = fitted + held  # no other sums are needed from here on, and they are large
    change = None if best is None else fitted.solve(best)
    if best is None or change is None:
        return None
    return Refit(best, left, _weights(seen, change))


def _sums(seen: Seen, held: bool) -> Sums:
    like = seen.features[0].new_empty(0, dtype=seen.exact)
    outputs = seen.target[0].shape[-1]
    sums = sums_for(seen.count, seen.features[0].shape[1], outputs, _biases(seen) > 0, like)
    for features, _, behind, target in seen.tokens(held):
        sums.add(features, target - behind, seen.counts(target))
    return sums


def _biases(seen: Seen) -> int:
    return sum(one.bias(seen.layer) is not None for one in seen.projections)


def _weights(seen: Seen, change: Tensor) -> dict[str, Tensor]:
    """Each projection's own columns, in the dtype of the model; of a bias that several share, each an equal part."""
    weights: dict[str, Tensor] = {}
    start = 0
    for one in seen.projections:
        old, bias = one.matrix(seen.layer), one.bias(seen.layer)
        own = change[:, start : start + old.shape[1]]
        start += old.shape[1]
        if bias is not None:
            bias = (bias.to(change) + change[:, -1] / (one.scale * _biases(seen))).to(bias.dtype)
        weights |= one.parameters(seen.layer, (old.to(change) + own).to(old.dtype), bias)
    return weights
