"""Those of many that cost least, alone and in pairs: a binary quadratic program, made linear for HiGHS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError

Floats = NDArray[np.float64]

SECONDS = 60.0  # then the best that was found is taken
TIME_IS_UP = 1  # HiGHS's word, by scipy


@dataclass(frozen=True)
class QuadraticProgram:
    """`alone` is what each costs, (n,), `together` what two cost beside that, (n, n), symmetric, with a diagonal of 0.

    Two whose cost together is infinite exclude each other. Of `limited` (n,), a number each, the chosen have at most
    `limit` in all.
    """

    alone: Floats
    together: Floats
    limited: Floats
    limit: float

    def cost(self, chosen: tuple[int, ...]) -> float:
        """What these cost."""
        return float(self.alone[[*chosen]].sum() + self.together[np.ix_(chosen, chosen)].sum() / 2)

    def solve(self, sizes: Floats, least: float, most: float, seconds: float = SECONDS) -> tuple[int, ...] | None:
        """The cheapest whose sizes add up to `least` to `most`, by their numbers; None where there are no such.

        Each size is above 0. Raises `UsageError` when it finds none in `seconds`.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        n = len(sizes)
        costs = self.together[np.triu_indices(n, 1)]
        excluded = np.isinf(costs)
        found = milp(
            np.r_[self.alone, np.where(excluded, 0, costs)],
            integrality=np.r_[np.ones(n), np.zeros(len(costs))],
            bounds=Bounds(0, np.r_[np.ones(n), ~excluded]),
            constraints=[LinearConstraint(*row) for row in self._rows(sizes, least, most)],
            options={"time_limit": seconds, "mip_rel_gap": 0},
        )
        if found.x is None and found.status == TIME_IS_UP:
            raise UsageError(f"no set was found in {seconds:g} s: choose among fewer, or by another criterion")
        return None if found.x is None else tuple(np.flatnonzero(found.x[:n] > 0.5).tolist())

    def _rows(self, sizes: Floats, least: float, most: float) -> list[tuple[Any, float, float]]:
        """Coefficients of each x[i] and of each product x[i] x[j], i < j, and between what their sum must lie.

        The last two are the bounds on the sizes times each x[i]. They keep a product at 0 where one of the two is 0,
        and make the bounds that the solver finds with fractions so good that it mostly needs no branching.
        """
        from scipy import sparse

        first, second = np.triu_indices(len(sizes), 1)
        pairs = np.arange(len(first))
        one, other = (
            sparse.csr_array((np.ones_like(pairs), (pairs, i)), (len(pairs), len(sizes))) for i in (first, second)
        )
        product = sparse.eye_array(len(pairs))
        partners = one.T * sizes[second] + other.T * sizes[first]  # the size of the other of the two
        none = np.zeros(len(pairs))
        return [
            (sparse.hstack([one + other, -product]), -np.inf, 1),
            (np.r_[sizes, none], least, most),
            (np.r_[self.limited, none], -np.inf, self.limit),
            (sparse.hstack([sparse.diags_array(sizes - least), partners]), 0, np.inf),
            (sparse.hstack([sparse.diags_array(sizes - most), partners]), -np.inf, 0),
        ]
