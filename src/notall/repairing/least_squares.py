"""Ridge regression from sums: once features and targets were seen, any ridge is tried without seeing them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = 1e-6  # of the mean square: features that are always 0 are held back as if they had that much


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
        """The share of |r|^2 that a map, (outputs, features), leaves: 1 for none, 0 for one that makes up for all.

        `metric`, (outputs,), says by how much a square counts in each output.
        """
        explained = 2 * (change * self.cross).sum(1) - ((change @ self.gram) * change).sum(1)
        total = metric @ self.square
        return float(1 - metric @ explained / total) if total > 0 else 1.0

    def solve(self, ridge: float, *, alike: bool = False) -> Tensor | None:
        """argmin over C of sum |r - C z|^2 + ridge * sum_i C_i^2 sum z_i^2, (outputs, features); None: there are many.

        Each feature is held back by its own size, so that a ridge means the same for small and for massive ones;
        with `alike`, by ridge * |C|^2.
        """
        sizes = self.gram.diagonal()[: len(self.gram) - self.biased]
        held_back = torch.zeros_like(self.gram[0])
        held_back[: len(sizes)] = ridge if alike else ridge * (sizes + DEAD * sizes.mean())
        lower, failed = torch.linalg.cholesky_ex(self.gram + held_back.diag())
        if failed:
            return None
        change = torch.cholesky_solve(self.cross.T, lower).T
        return change if change.isfinite().all() else None
