"""What becomes of one step of a repair, given what was seen of it on the calibration
text.

Where a projection's answers are added to the stream, that is one least-squares problem.
Where a norm follows, which adds gain * W z / rms(W z), (1) a channel's error counts by
its readers' gains, as elsewhere; (2) W z is aimed at what the norm would have to be
given, were its scale the old one; (3) each channel goes only a part of the way, the
less the norm and its readers make of it; (4) how far, and the ridge, is chosen by the
true error behind the norm.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .least_squares import Sums, sums_for
from .projections import OutputProjection, gain_of

# how much channels hold back, relative to the mean of what counts
STEP_SIZES = (0.003, 0.03, 0.3, 3.0)
EPSILON = 1e-12


@dataclass
class Fit:
    """A step's streams and features on all of the text, a tensor a batch, to fit
    answers that are added as they are.

    They may be anywhere, also in files; whatever is computed of them is on the device
    of the projections.
    """

    layer: nn.Module
    projections: tuple[OutputProjection, ...]
    before: list[Tensor]  # the skipped stream before the step, (batch, tokens, hidden)
    behind: list[Tensor]  # and behind it as it is
    target: list[Tensor]  # what that should be
    # (batch x tokens, features), of all projections in one row, times their scales
    features: list[Tensor]
    held: list[Tensor]  # which sequences choose the ridge, (batch,)
    metric: Tensor  # how much each channel counts, (hidden,), about 1
    # so many ridges in a row without a gain end the search for one
    patience: ClassVar[float] = 2

    def __post_init__(self) -> None:
        # what is computed in
        self.exact = torch.promote_types(self.features[0].dtype, torch.float32)
        self.device = self.projections[0].matrix(self.layer).device
        self.metric = self.metric.to(self.device, self.exact)
        self.count = sum(len(features) for features in self.features)  # of all tokens
        self.biases = sum(one.bias(self.layer) is not None for one in self.projections)

    def best(
        self, ridges: Sequence[float]
    ) -> tuple[float | None, float, dict[str, Tensor]]:
        """The ridge that leaves least on what is held out, that share, new weights;
        None, 1 and {} without a gain.

        They are tried from the strongest one down, until some in a row gain nothing:
        with less ridge ever more is fitted, first what holds for other text, then what
        does not.
        """
        fitted, held = self.sums(held=False), self.sums(held=True)
        best: float | None = None
        best_step, least, without_gain = 1.0, 1.0, 0
        for ridge in sorted(ridges, reverse=True):
            change = fitted.solve(ridge)
            without_gain += 1
            if change is not None:
                found = [(left, step) for step, left in self.left(change, held)]
                left, step = min(found, default=(least, 1.0))
                if left < least:
                    best, best_step, least = ridge, step, left
                    without_gain = 0
            if without_gain == self.patience:
                break
        if best is None:
            return None, 1.0, {}
        fitted = fitted + held  # no other sums are needed, and they are large
        change = fitted.solve(best)
        if change is None:
            return None, 1.0, {}
        return best, least, self.weights(change, best_step)

    def tokens(self, held: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Features, `before`, `behind` and `target` of the tokens that are held out, or
        of those that are not.
        """
        for number, rows in enumerate(self.held):
            chosen = rows if held else ~rows  # (batch,)
            if not chosen.any():
                continue
            batch, tokens, _ = self.target[number].shape
            streams = (
                self.features[number].view(batch, tokens, -1),
                self.before[number],
                self.behind[number],
                self.target[number],
            )
            taken = (stream[chosen].flatten(0, 1) for stream in streams)
            features, before, behind, target = (
                stream.to(self.device, self.exact) for stream in taken
            )  # (tokens, features), then (tokens, hidden)
            yield features, before, behind, target

    def counts(self, target: Tensor) -> Tensor:
        """How much each token counts, (tokens,): by the mean square of its target, so
        that no few of them own all.
        """
        least = torch.finfo(target.dtype).tiny ** 0.5
        return 1 / (target.square() @ self.metric).clamp_min(least)

    def sums(self, held: bool) -> Sums:
        """What is known of the tokens that are held out, or of those that are not."""
        like = torch.empty(0, dtype=self.exact, device=self.device)
        sums = sums_for(
            self.count,
            self.features[0].shape[1],
            self.target[0].shape[-1],
            self.biases > 0,
            like,
        )
        for features, _, behind, target in self.tokens(held):
            sums.add(features, target - behind, self.counts(target))
        return sums

    def left(self, change: Tensor, held: Sums) -> Iterable[tuple[float, float]]:
        """How far to go, and the share of the squared error that is then left on what
        is held out.
        """
        return [(1.0, held.left(change, self.metric))]

    def weights(self, change: Tensor, step: float) -> dict[str, Tensor]:
        """Each projection's own columns, in its dtype; of a bias that several share,
        each an equal part.
        """
        weights: dict[str, Tensor] = {}
        start = 0
        for one in self.projections:
            matrix, bias = one.matrix(self.layer), one.bias(self.layer)
            columns = change[:, start : start + matrix.shape[1]]
            start += matrix.shape[1]
            if bias is not None:
                share = change[:, -1] / (one.scale * self.biases)
                bias = (bias.to(change) + share).to(bias.dtype)
            new = (matrix.to(change) + columns).to(matrix.dtype)
            weights |= one.parameters(self.layer, new, bias)
        return weights


class NormedFit(Fit):
    """To fit answers that a norm is given; a bias stays as it is."""

    patience = math.inf  # behind a norm what is left falls and rises more than once

    def __post_init__(self) -> None:
        super().__post_init__()
        (self.projection,) = self.projections
        assert self.projection.norm
        self.norm = self.layer.get_submodule(self.projection.norm)
        self.old = self.projection.matrix(self.layer).to(self.exact)
        bias = self.projection.bias(self.layer)
        self.bias = self.old.new_zeros(()) if bias is None else bias.to(self.exact)
        ones = torch.ones(
            1, 1, len(self.old), dtype=self.before[0].dtype, device=self.device
        )
        self.gain = gain_of(self.norm, ones).to(self.exact)
        self.counting = self.metric * self.gain.square()
        self.none = self._errors(torch.zeros_like(self.old))[0]

    def sums(self, held: bool) -> Sums:
        """As of `Fit`, of what the norm would have to be given."""
        sums = sums_for(
            self.count, self.old.shape[1], len(self.old), False, self.old.new_empty(0)
        )
        gain = torch.where(self.gain.abs() < EPSILON, torch.inf, self.gain)
        for features, before, _, target in self.tokens(held):
            outputs = features @ self.old.T + self.bias  # (tokens, hidden)
            size = outputs.square().mean(-1).clamp_min(EPSILON).sqrt()  # (tokens,)
            wanted = target - before
            # what the norm would have to be given, were its scale the old one
            given = size[:, None] * wanted / (self.projection.scale * gain)
            residuals = given - outputs
            sums.add(features, residuals, self.counts(target) / size.square())
        return sums

    def left(self, change: Tensor, held: Sums) -> Iterable[tuple[float, float]]:
        """As of `Fit`, by the true error behind the norm, for each of `STEP_SIZES`."""
        if not self.none:
            return ()
        return zip(STEP_SIZES, [error / self.none for error in self._errors(change)])

    def weights(self, change: Tensor, step: float) -> dict[str, Tensor]:
        """The projection's matrix, in its dtype, with a part of the change by
        channel.
        """
        new = self.old + self._shares(step)[:, None] * change
        dtype = self.projection.matrix(self.layer).dtype
        return self.projection.parameters(self.layer, new.to(dtype), None)

    def _shares(self, step: float) -> Tensor:
        """How much of the way each channel goes, (hidden,)."""
        return self.counting / (self.counting + step * self.counting.mean())

    def _errors(self, change: Tensor) -> list[float]:
        """For each of `STEP_SIZES` the squared distance to the target behind the norm, over
        tokens that are held out.
        """
        totals = [0.0] * len(STEP_SIZES)
        for features, before, _, target in self.tokens(held=True):
            outputs = features @ self.old.T + self.bias  # (tokens, hidden)
            more = features @ change.T
            counts = self.counts(target)  # (tokens,)
            for place, step in enumerate(STEP_SIZES):
                given = (outputs + self._shares(step) * more).to(self.before[0].dtype)
                added = self.projection.scale * self.norm(given[None])[0].to(outputs)
                off = before + added - target  # (tokens, hidden)
                totals[place] += float(counts @ (off.square() @ self.metric))
        return totals
