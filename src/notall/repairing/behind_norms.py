"""Refit of a projection that a norm follows: what it adds to the stream is gain * W z / rms(W z).

A least-squares fit through the norm fails: a channel that the norm all but mutes would be asked for a huge output,
which the norm then takes from all the others. So (1) a channel's error counts by its readers' gains, as elsewhere;
(2) W z is aimed at what the norm would have to be given, were its scale the old one; (3) each channel goes only a part
of the way, the less the norm and its readers make of it; and (4) how far, and the ridge, is chosen by the true error
behind the norm, on sequences that were not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .least_squares import Sums, sums_for
from .readers import gain_of
from .step import Refit, Seen

STEPS = (0.003, 0.03, 0.3, 3.0)  # how much channels hold back, relative to the mean of what counts
EPSILON = 1e-12


def refit_behind_norm(seen: Seen, ridges: Sequence[float]) -> Refit | None:
    """With the ridge and the step that leave least on what is held out; None where all leave more than no change."""
    return _NormedFit(seen).best(ridges)


class _NormedFit:
    def __init__(self, seen: Seen) -> None:
        self.seen, (self.projection,) = seen, seen.projections
        assert self.projection.norm
        self.norm = seen.layer.get_submodule(self.projection.norm)
        self.metric = seen.metric.to(seen.exact)
        self.old = self.projection.matrix(seen.layer).to(seen.exact)
        bias = self.projection.bias(seen.layer)  # stays as it is
        self.bias = self.old.new_zeros(()) if bias is None else bias.to(seen.exact)
        self.gain = gain_of(self.norm, seen.before[0].new_ones(1, 1, len(self.old))).to(seen.exact)
        self.counting = self.metric * self.gain.square()

    def best(self, ridges: Sequence[float]) -> Refit | None:
        fitted, held = self._sums(held=False), self._sums(held=True)
        none, *_ = self._errors(torch.zeros_like(self.old))
        best, left = None, 1.0
        for ridge in ridges:
            change = fitted.solve(ridge)
            errors = self._errors(change) if change is not None and none else []
            for step, error in zip(STEPS, errors):
                if error / none < left:
                    best, left = (ridge, step), error / none
        fitted = fitted + held  # no other sums are needed from here on, and they are large
        change = None if best is None else fitted.solve(best[0])
        if best is None or change is None:
            return None
        new = self.old + self._shares(best[1])[:, None] * change
        new = new.to(self.projection.matrix(self.seen.layer).dtype)
        return Refit(best[0], left, self.projection.parameters(self.seen.layer, new, None))

    def _shares(self, step: float) -> Tensor:
        """How much of the way each channel goes, (hidden,)."""
        return self.counting / (self.counting + step * self.counting.mean())

    def _sums(self, held: bool) -> Sums:
        sums = sums_for(self.seen.count, self.old.shape[1], len(self.old), False, self.old.new_empty(0))
        gain = torch.where(self.gain.abs() < EPSILON, torch.inf, self.gain)
        for features, before, _, target in self.seen.tokens(held):
            answers = features @ self.old.T + self.bias
            size = answers.square().mean(-1).clamp_min(EPSILON).sqrt()
            lacking = size[:, None] * (target - before) / (self.projection.scale * gain) - answers
            sums.add(features, lacking, self.seen.counts(target) / size.square())
        return sums

    def _errors(self, change: Tensor) -> list[float]:
        """For each of `STEPS` the squared distance to the target behind the norm, over tokens that are held out."""
        totals = [0.0] * len(STEPS)
        for features, before, _, target in self.seen.tokens(held=True):
            answers, more = features @ self.old.T + self.bias, features @ change.T
            counts = self.seen.counts(target)
            for place, step in enumerate(STEPS):
                missed = before + self._added(answers + self._shares(step) * more) - target
                totals[place] += float(counts @ (missed.square() @ self.metric))
        return totals

    def _added(self, answers: Tensor) -> Tensor:
        rounded = answers.to(self.seen.before[0].dtype)
        return self.projection.scale * self.norm(rounded[None])[0].to(answers)
