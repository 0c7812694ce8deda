"""What becomes of one step of a repair, given what was seen of it on the calibration
text.

Where a projection's answers are added to the stream, that is one least-squares problem.
Where a norm follows, which adds gain * W z / rms(W z), (1) a channel's error counts by
its readers' gains, as elsewhere; (2) W z is aimed at what the norm would have to be
given, were its scale the old one; (3) each channel goes only a part of the way, the
less the norm and its readers make of it; (4) how far, and the ridge, is chosen by the
true error behind the norm.

A ridge regression is tried with any ridge from what was seen once: from sums, which
take memory and work by the features alone, or, where there are fewer tokens than
features, from the tokens. Both come to the same.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .projections import OutputProjection, gain_of

# of the mean square: features that are always 0 are held back as if they had that much
DEAD = 1e-6
STEPS = (
    0.003,
    0.03,
    0.3,
    3.0,
)  # how much channels hold back, relative to the mean of what counts
EPSILON = 1e-12
S = TypeVar("S", bound="Sums")


class Sums(Protocol):
    """What is known of tokens with features z and what their target lacks r, each
    weighted; see `Moments`.
    """

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None: ...
    def __add__(self: S, other: S) -> S: ...
    def left(self, change: Tensor, metric: Tensor) -> float: ...
    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None: ...


def sums_for(
    tokens: int, features: int, outputs: int, biased: bool, like: Tensor
) -> Sums:
    """What takes less for so many tokens, with none seen yet. Of the dtype and device
    of `like`.
    """
    return (
        Rows(biased)
        if tokens < features
        else Moments.none(features, outputs, biased, like)
    )


@dataclass
class Moments:
    """Of tokens with features z and what their target lacks r, each weighted: the sums
    of z z', r z' and r^2.
    """

    gram: Tensor  # (features, features)
    cross: Tensor  # (outputs, features)
    square: Tensor  # (outputs,)
    # whether a last feature, 1 for each token, stands for a bias; the ridge does not
    # hold it back
    biased: bool

    @classmethod
    def none(cls, features: int, outputs: int, biased: bool, like: Tensor) -> "Moments":
        """No tokens yet; a column is added to `features` where it is `biased`. Of the
        dtype and device of `like`.
        """
        wide = features + biased
        return cls(
            like.new_zeros(wide, wide),
            like.new_zeros(outputs, wide),
            like.new_zeros(outputs),
            biased,
        )

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None:
        """Some tokens more: (tokens, features), (tokens, outputs) and (tokens,)."""
        roots = weights.sqrt()[:, None]
        if self.biased:
            features = torch.cat([features, torch.ones_like(roots)], 1)
        features, lacking = features * roots, lacking * roots
        self.gram.addmm_(features.T, features)
        self.cross.addmm_(lacking.T, features)
        self.square += lacking.square().sum(0)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.biased,
        )

    def left(self, change: Tensor, metric: Tensor) -> float:
        """The share of |r|^2, weighted by `metric` (outputs,), that a map, (outputs,
        features), leaves: 1 for none.
        """
        explained = 2 * (change * self.cross).sum(1) - (
            (change @ self.gram) * change
        ).sum(1)
        total = metric @ self.square
        return float(1 - metric @ explained / total) if total > 0 else 1.0

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """argmin over C of sum |r - C z|^2 + ridge * sum_i C_i^2 sum z_i^2, (outputs,
        features); None: there are many.

        Each feature is held back by its own size, so that a ridge means the same for
        small and for massive ones; with `alike`, by ridge * |C|^2.
        """
        sizes = self.gram.diagonal()[: len(self.gram) - self.biased]
        damped = self.gram.clone()
        damped.diagonal()[: len(sizes)] += _held_back(sizes, ridge, alike)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # as large as all that is known
        if failed:
            return None
        change = torch.cholesky_solve(self.cross.T, lower).T
        return change if change.isfinite().all() else None


@dataclass
class Rows:
    """As `Moments`, with the tokens themselves: z, r and the roots of their weights,
    which stand for the bias.
    """

    biased: bool
    seen: list[tuple[Tensor, ...]] = field(default_factory=list)
    kernels: dict[bool, Tensor] = field(default_factory=dict)

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None:
        roots = weights.sqrt()[:, None]
        self.kernels.clear()
        self.seen.append((features * roots, lacking * roots, roots))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.biased, self.seen + other.seen)

    def left(self, change: Tensor, metric: Tensor) -> float:
        features, lacking, roots = self._together()
        total = metric @ lacking.square().sum(0)
        known = torch.cat([features, roots], 1) if self.biased else features
        return (
            float(metric @ (lacking - known @ change.T).square().sum(0) / total)
            if total > 0
            else 1.0
        )

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """As of `Moments`: with H the diagonal of what features are held back by, C =
        r' (z H^-1 z' + 1)^-1 z H^-1.
        """
        features, lacking, roots = self._together()
        scaled = features / _held_back(features.square().sum(0), ridge, alike)
        if (
            alike not in self.kernels
            # z H^-1 z' for a ridge of 1, (tokens, tokens): for any other it is less by
            # that
        ):
            self.kernels[alike] = (
                features
                @ (features / _held_back(features.square().sum(0), 1.0, alike)).T
            )
        kernel = self.kernels[alike] / ridge
        kernel.diagonal().add_(1)
        lower, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            return None
        shares = torch.cholesky_solve(torch.cat([lacking, roots], 1), lower)
        shares, by_bias = shares[:, :-1], shares[:, -1:]
        bias = (roots.T @ shares) / (
            roots.T @ by_bias
        )  # what makes the shares orthogonal to it
        change = ((shares - by_bias @ bias) if self.biased else shares).T @ scaled
        change = torch.cat([change, bias.T], 1) if self.biased else change
        return change if change.isfinite().all() else None

    def _together(self) -> tuple[Tensor, ...]:
        if len(self.seen) > 1:
            self.seen[:] = [tuple(map(torch.cat, zip(*self.seen)))]
        return self.seen[0]


def _held_back(sizes: Tensor, ridge: float, alike: bool) -> Tensor:
    """By how much each feature is, whose squares sum up to `sizes`."""
    return (
        torch.full_like(sizes, ridge)
        if alike
        else ridge * (sizes + DEAD * sizes.mean())
    )


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
    features: list[
        Tensor
        # (batch x tokens, features), those of all projections side by side, times their
        # scales
    ]
    held: list[Tensor]  # which sequences choose the ridge, (batch,)
    metric: Tensor  # how much each channel counts, (hidden,), about 1
    patience: ClassVar[float] = (
        2  # ridges in a row without a gain that end the search for one
    )

    def __post_init__(self) -> None:
        self.exact = torch.promote_types(
            self.features[0].dtype, torch.float32
        )  # what is computed in
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
        best, least, waited = None, 1.0, 0
        for ridge in sorted(ridges, reverse=True):
            change = fitted.solve(ridge)
            tried = (
                []
                if change is None
                else [(left, step) for step, left in self.left(change, held)]
            )
            left, step = min(tried, default=(least, 1.0))
            waited += 1
            if left < least:
                best, least, waited = (ridge, step), left, 0
            if waited == self.patience:
                break
        fitted = (
            fitted + held
        )  # no other sums are needed from here on, and they are large
        change = None if best is None else fitted.solve(best[0])
        return (
            (None, 1.0, {})
            if best is None or change is None
            else (best[0], least, self.weights(change, best[1]))
        )

    def tokens(self, held: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Features, `before`, `behind` and `target` of the tokens that are held out, or
        of those that are not.
        """
        for number, rows in enumerate(self.held):
            chosen = rows if held else ~rows
            if chosen.any():
                features = self.features[number].view(
                    *self.target[number].shape[:2], -1
                )
                streams = (
                    features,
                    self.before[number],
                    self.behind[number],
                    self.target[number],
                )
                taken = (stream[chosen].flatten(0, 1) for stream in streams)
                features, before, behind, target = (
                    stream.to(self.device, self.exact) for stream in taken
                )
                yield features, before, behind, target

    def counts(self, target: Tensor) -> Tensor:
        """How much each token counts, (tokens,): by the mean square of its target, so
        that no few of them own all.
        """
        return 1 / (target.square() @ self.metric).clamp_min(
            torch.finfo(target.dtype).tiny ** 0.5
        )

    def sums(self, held: bool) -> Sums:
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
            old, bias = one.matrix(self.layer), one.bias(self.layer)
            own = change[:, start : start + old.shape[1]]
            start += old.shape[1]
            if bias is not None:
                bias = (bias.to(change) + change[:, -1] / (one.scale * self.biases)).to(
                    bias.dtype
                )
            weights |= one.parameters(
                self.layer, (old.to(change) + own).to(old.dtype), bias
            )
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
        sums = sums_for(
            self.count, self.old.shape[1], len(self.old), False, self.old.new_empty(0)
        )
        gain = torch.where(self.gain.abs() < EPSILON, torch.inf, self.gain)
        for features, before, _, target in self.tokens(held):
            answers = features @ self.old.T + self.bias
            size = answers.square().mean(-1).clamp_min(EPSILON).sqrt()
            lacking = (
                size[:, None] * (target - before) / (self.projection.scale * gain)
                - answers
            )
            sums.add(features, lacking, self.counts(target) / size.square())
        return sums

    def left(self, change: Tensor, held: Sums) -> Iterable[tuple[float, float]]:
        return (
            zip(STEPS, [error / self.none for error in self._errors(change)])
            if self.none
            else ()
        )

    def weights(self, change: Tensor, step: float) -> dict[str, Tensor]:
        new = self.old + self._shares(step)[:, None] * change
        return self.projection.parameters(
            self.layer, new.to(self.projection.matrix(self.layer).dtype), None
        )

    def _shares(self, step: float) -> Tensor:
        """How much of the way each channel goes, (hidden,)."""
        return self.counting / (self.counting + step * self.counting.mean())

    def _errors(self, change: Tensor) -> list[float]:
        """For each of `STEPS` the squared distance to the target behind the norm, over
        tokens that are held out.
        """
        totals = [0.0] * len(STEPS)
        for features, before, _, target in self.tokens(held=True):
            answers, more = features @ self.old.T + self.bias, features @ change.T
            counts = self.counts(target)
            for place, step in enumerate(STEPS):
                given = (answers + self._shares(step) * more).to(self.before[0].dtype)
                added = self.projection.scale * self.norm(given[None])[0].to(answers)
                totals[place] += float(
                    counts @ ((before + added - target).square() @ self.metric)
                )
        return totals
