"""Ridge regression from what was seen once, tried with any ridge: from sums, or, of few tokens, from the tokens.

Both come to the same. Sums take memory and work by the features alone, however many tokens there are; where there are
fewer tokens than features, their own products are the smaller matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

DEAD = 1e-6  # of the mean square: features that are always 0 are held back as if they had that much
S = TypeVar("S", bound="Sums")


class Sums(Protocol):
    """What is known of tokens with features z and what their target lacks r, each weighted; see `Moments`."""

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None: ...
    def __add__(self: S, other: S) -> S: ...
    def left(self, change: Tensor, metric: Tensor) -> float: ...
    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None: ...


def sums_for(tokens: int, features: int, outputs: int, biased: bool, like: Tensor) -> Sums:
    """What takes less for so many tokens, with none seen yet. Of the dtype and device of `like`."""
    return Rows(biased) if tokens < features else Moments.none(features, outputs, biased, like)


@dataclass
class Moments:
    """Of tokens with features z and what their target lacks r, each weighted: the sums of z z', r z' and r^2.

    `gram` is (features, features), `cross` (outputs, features), `square` (outputs,). A last feature that is 1 for each
    token stands for a bias; the ridge does not hold it back.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    biased: bool

    @classmethod
    def none(cls, features: int, outputs: int, biased: bool, like: Tensor) -> Moments:
        """No tokens yet; a column is added to `features` where it is `biased`. Of the dtype and device of `like`."""
        wide = features + biased
        return cls(like.new_zeros(wide, wide), like.new_zeros(outputs, wide), like.new_zeros(outputs), biased)

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None:
        """Some tokens more: (tokens, features), (tokens, outputs) and (tokens,)."""
        roots = weights.sqrt()[:, None]
        if self.biased:
            features = torch.cat([features, torch.ones_like(roots)], 1)
        features, lacking = features * roots, lacking * roots
        self.gram.addmm_(features.T, features)
        self.cross.addmm_(lacking.T, features)
        self.square += lacking.square().sum(0)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.square + other.square, self.biased)

    def left(self, change: Tensor, metric: Tensor) -> float:
        """The share of |r|^2, weighted by `metric` (outputs,), that a map, (outputs, features), leaves: 1 for none."""
        explained = 2 * (change * self.cross).sum(1) - ((change @ self.gram) * change).sum(1)
        total = metric @ self.square
        return float(1 - metric @ explained / total) if total > 0 else 1.0

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """argmin over C of sum |r - C z|^2 + ridge * sum_i C_i^2 sum z_i^2, (outputs, features); None: there are many.

        Each feature is held back by its own size, so that a ridge means the same for small and for massive ones;
        with `alike`, by ridge * |C|^2.
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
    """As `Moments`, with the tokens themselves: z, r and the roots of their weights, which stand for the bias."""

    biased: bool
    features: list[Tensor] = field(default_factory=list)
    lacking: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)
    kernels: dict[bool, Tensor] = field(default_factory=dict)

    def add(self, features: Tensor, lacking: Tensor, weights: Tensor) -> None:
        roots = weights.sqrt()[:, None]
        self.kernels.clear()
        self.features.append(features * roots)
        self.lacking.append(lacking * roots)
        self.roots.append(roots)

    def __add__(self, other: Rows) -> Rows:
        return Rows(self.biased, self.features + other.features, self.lacking + other.lacking, self.roots + other.roots)

    def left(self, change: Tensor, metric: Tensor) -> float:
        features, lacking, roots = self._together()
        total = metric @ lacking.square().sum(0)
        known = torch.cat([features, roots], 1) if self.biased else features
        missed = metric @ (lacking - known @ change.T).square().sum(0)
        return float(missed / total) if total > 0 else 1.0

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """As of `Moments`: with H the diagonal of what features are held back by, C = r' (z H^-1 z' + 1)^-1 z H^-1."""
        features, lacking, roots = self._together()
        scaled = features / _held_back(features.square().sum(0), ridge, alike)
        if alike not in self.kernels:  # z H^-1 z' for a ridge of 1, (tokens, tokens): for any other it is less by that
            self.kernels[alike] = features @ (features / _held_back(features.square().sum(0), 1.0, alike)).T
        kernel = self.kernels[alike] / ridge
        kernel.diagonal().add_(1)
        lower, failed = torch.linalg.cholesky_ex(kernel)
        if failed:
            return None
        shares = torch.cholesky_solve(torch.cat([lacking, roots], 1), lower)
        shares, by_bias = shares[:, :-1], shares[:, -1:]
        bias = (roots.T @ shares) / (roots.T @ by_bias)  # what makes the shares orthogonal to it
        change = ((shares - by_bias @ bias) if self.biased else shares).T @ scaled
        change = torch.cat([change, bias.T], 1) if self.biased else change
        return change if change.isfinite().all() else None

    def _together(self) -> tuple[Tensor, Tensor, Tensor]:
        for parts in (self.features, self.lacking, self.roots):
            parts[:] = [torch.cat(parts)]
        return self.features[0], self.lacking[0], self.roots[0]


def _held_back(sizes: Tensor, ridge: float, alike: bool) -> Tensor:
    """By how much each feature is, whose squares sum up to `sizes`."""
    return torch.full_like(sizes, ridge) if alike else ridge * (sizes + DEAD * sizes.mean())
