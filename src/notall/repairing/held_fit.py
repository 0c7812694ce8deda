"""A ridge regression of what a prompt needs, whose ridge is chosen on sequences that it
was not fitted to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .least_squares import Moments

# 100 has the same result, 1 a KL that is a quarter higher on the default model
SINK = 10.0


@dataclass
class HeldFit:
    """Of maps with a bias from inputs to residuals. `held` are the sequences of each
    batch that are held out, (batch,) of bool; `ridges` are tried.

    The first token of a sequence counts `SINK` times.
    """

    held: Sequence[Tensor]
    ridges: Sequence[float]
    # of sequences that are fitted, and of those held out; none before the first tokens
    sums: list[Moments] = field(default_factory=list)

    def add(
        self, number: int, inputs: Tensor, residuals: Tensor, stream: Tensor
    ) -> None:
        """The tokens of batch `number`, (tokens, inputs) and (tokens, rows); its
        `stream` is (batch, tokens, hidden).
        """
        here = inputs.device
        exact = torch.promote_types(inputs.dtype, torch.float32)
        if not self.sums:
            self.sums += [_none(inputs, residuals, exact) for _ in range(2)]
        held = self.held[number].to(here)  # (batch,)
        held = held[:, None].expand(stream.shape[:2]).flatten()  # (tokens,)
        counts = torch.ones(stream.shape[:2], dtype=exact, device=here)
        counts[:, 0] = SINK
        counts = counts.flatten()  # (tokens,)
        for one, rows in zip(self.sums, (~held, held)):
            one.add(inputs[rows].to(exact), residuals[rows].to(exact), counts[rows])

    @property
    def squares(self) -> Tensor:
        """The sums of squared residuals that are fitted, (rows,)."""
        return self.sums[0].square

    def best(self, counts: Tensor) -> tuple[float | None, float, Tensor | None]:
        """The ridge that leaves least on what is held out, that share, and the change,
        (rows, inputs + 1); `counts`, (rows,), is how much each row counts.
        """
        fitted, held = self.sums
        best, least = None, 1.0
        for ridge in self.ridges:
            change = _solved(fitted, ridge)
            if change is not None and (left := held.left(change, counts)) < least:
                best, least = ridge, left
        return best, least, None if best is None else _solved(fitted + held, best)


def _solved(sums: Moments, ridge: float) -> Tensor | None:
    """The change that a ridge leaves, relative to the mean square of features, (rows,
    inputs + 1), if there is one.
    """
    return sums.solve(ridge * float(sums.gram.diagonal()[:-1].mean()), alike=True)


def _none(inputs: Tensor, residuals: Tensor, exact: torch.dtype) -> Moments:
    """Sums of no tokens yet, for inputs, (tokens, inputs), and residuals, (tokens,
    rows).
    """
    like = inputs.new_empty(0, dtype=exact)
    return Moments.none(inputs.shape[1], residuals.shape[1], True, like)
