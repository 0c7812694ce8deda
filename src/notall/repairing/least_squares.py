"""Ridge regression with any ridge from what was seen once.

From sums over the tokens (`Moments`), which take memory and work by the features alone,
or, where there are fewer tokens than features, from the tokens (`Rows`). Both have the
same result.
"""

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

# of the mean square: features that are always 0 are held back as if they had that much
DEAD = 1e-6
S = TypeVar("S", bound="Sums")


class Sums(Protocol):
    """What is known of tokens with features z, (tokens, features), and residuals r to
    their target, (tokens, outputs), each token with a weight; see `Moments`.
    """

    def add(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Some tokens more: (tokens, features), (tokens, outputs) and (tokens,)."""

    def __add__(self: S, other: S) -> S: ...

    def left(self, change: Tensor, metric: Tensor) -> float:
        """The share of the squared residuals that a map leaves, weighted by channel."""

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """The map of least error with a ridge, (outputs, features)."""


def sums_for(
    tokens: int, features: int, outputs: int, biased: bool, like: Tensor
) -> Sums:
    """No tokens yet: `Rows` where there will be fewer tokens than features, else
    `Moments`; of the dtype and device of `like`.
    """
    if tokens < features:
        return Rows(biased)
    return Moments.none(features, outputs, biased, like)


@dataclass
class Moments:
    """Sums over weighted tokens with features z and residuals r: of z z', r z' and r^2.

    With them a map C from features to residuals is found by least squares.
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
        inputs = features + biased
        return cls(
            gram=like.new_zeros(inputs, inputs),
            cross=like.new_zeros(outputs, inputs),
            square=like.new_zeros(outputs),
            biased=biased,
        )

    def add(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Some tokens more: (tokens, features), (tokens, outputs) and (tokens,)."""
        roots = weights.sqrt()[:, None]  # (tokens, 1)
        if self.biased:
            features = torch.cat([features, torch.ones_like(roots)], 1)
        features = features * roots
        residuals = residuals * roots
        self.gram.addmm_(features.T, features)
        self.cross.addmm_(residuals.T, features)
        self.square += residuals.square().sum(0)

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
        # |r|^2 - |r - C z|^2, (outputs,)
        explained = 2 * (change * self.cross).sum(1)
        explained -= ((change @ self.gram) * change).sum(1)
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

    def add(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Some tokens more: (tokens, features), (tokens, outputs) and (tokens,)."""
        roots = weights.sqrt()[:, None]  # (tokens, 1)
        self.kernels.clear()
        self.seen.append((features * roots, residuals * roots, roots))

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(self.biased, self.seen + other.seen)

    def left(self, change: Tensor, metric: Tensor) -> float:
        """As of `Moments`."""
        features, residuals, roots = self._together()
        inputs = torch.cat([features, roots], 1) if self.biased else features
        total = metric @ residuals.square().sum(0)
        if not total > 0:
            return 1.0
        off = residuals - inputs @ change.T  # (tokens, outputs)
        return float(metric @ off.square().sum(0) / total)

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """As of `Moments`: with H the diagonal of what features are held back by, C =
        r' (z H^-1 z' + 1)^-1 z H^-1.
        """
        features, residuals, roots = self._together()
        kernel = self._kernel(features, alike) / ridge  # (tokens, tokens)
        kernel.diagonal().add_(1)
        lower, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            return None
        shares = torch.cholesky_solve(torch.cat([residuals, roots], 1), lower)
        shares, by_bias = shares[:, :-1], shares[:, -1:]
        # which makes the shares orthogonal to the bias, (1, outputs)
        bias = (roots.T @ shares) / (roots.T @ by_bias)
        if self.biased:
            shares = shares - by_bias @ bias
        sizes = features.square().sum(0)
        change = shares.T @ (features / _held_back(sizes, ridge, alike))
        if self.biased:
            change = torch.cat([change, bias.T], 1)
        return change if change.isfinite().all() else None

    def _kernel(self, features: Tensor, alike: bool) -> Tensor:
        """z H^-1 z' for a ridge of 1, (tokens, tokens); for another it is less by that
        factor.
        """
        if alike not in self.kernels:
            sizes = features.square().sum(0)
            held = features / _held_back(sizes, 1.0, alike)
            self.kernels[alike] = features @ held.T
        return self.kernels[alike]

    def _together(self) -> tuple[Tensor, ...]:
        """Features, residuals and roots of all tokens seen."""
        if len(self.seen) > 1:
            self.seen[:] = [tuple(map(torch.cat, zip(*self.seen)))]
        return self.seen[0]


def _held_back(sizes: Tensor, ridge: float, alike: bool) -> Tensor:
    """By how much each feature is held back, (features,), whose squares have the sums
    `sizes`.
    """
    if alike:
        return torch.full_like(sizes, ridge)
    return ridge * (sizes + DEAD * sizes.mean())
