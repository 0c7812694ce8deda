"""By what is lost without each unit and without each two: the least sum, a binary
quadratic program for HiGHS.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from ..budget import Budget
from ..space import Choice, Unit, names_in
from .search import SCREENED
from .setting import Setting

Floats = NDArray[np.float64]

SOLVER_SECONDS = 60.0  # then the best that was found is taken
TIME_IS_UP = 1  # HiGHS's word, by scipy
WORST = 1e3  # nats: what a model that overflows loses; a sum has no use for more


def choose_quadratic(setting: Setting, budget: Budget) -> Choice:
    """The least sum of single and pairwise effects (after 2602.00161).

    a[i] over the units, what the objective rises by without i, and b[i, j] over each
    two, what it rises by without both, less a[i] and a[j], or 0 where that is negative.
    The source's binary program takes both from a Taylor expansion in a gate on each
    block; a gate that closes is too far away for that, so here they are measured.
    """
    if budget.met(frozenset()):
        return Choice(frozenset(), ())
    # a portable set is a union of pairs that follow each other, so these are its units
    units = [unit for unit in setting.space.moves(frozenset()) if budget.saved(unit)]
    sizes = np.array([budget.saved(unit) for unit in units])
    program = measure_program(setting, units)
    if budget.target < math.inf:
        chosen = _solve(program, sizes, budget.target)
        if chosen is None:
            raise UsageError(
                f"no set of the quadratic criterion saves {budget.description}: ask for"
                " less"
            )
        return _named(units, chosen)
    evaluator, best = setting.evaluator, Choice(frozenset(), ())
    most = evaluator.cost(frozenset()) + budget.limit
    for count in range(1, len(units) + 1):
        chosen = _solve(program, sizes, count * sizes.max())
        if (
            chosen is None
            or setting.late
            or evaluator.cost(_named(units, chosen).skipped) > most
        ):
            break
        best = _named(units, chosen)
    return best


def measure_program(setting: Setting, units: Sequence[Unit]) -> "QuadraticProgram":
    """What the objective rises by without each unit, and without two on top of that;
    those asked for late count as 0.
    """
    space, evaluator = setting.space, setting.evaluator
    evaluator.set_prefix(frozenset())
    dense = evaluator.cost(frozenset(), SCREENED)

    def rises(sets: list[Unit]) -> Floats:
        costs = evaluator.costs([frozenset(names) for names in sets], SCREENED)
        return np.minimum(np.array(costs) - dense, WORST)

    alone = rises([*units])  # (n,)
    together = np.zeros((len(units), len(units)))
    for i, unit in enumerate(units):
        fit = [
            j
            for j in range(i + 1, len(units))
            if space.allows(frozenset(unit + units[j]))
        ]
        together[i, i + 1 :] = np.inf
        if not fit or setting.late:
            together[i, fit] = 0
        else:
            more = rises([unit + units[j] for j in fit]) - alone[i] - alone[fit]
            # two that each ruin the model ruin it once: were they less than 0, many
            # pairs would add up to a gain
            together[i, fit] = np.maximum(more, 0)
        setting.progress(i + 1, len(units), f"leaving out {'+'.join(unit)} and another")
    counting = {f"attn.{index}" for index in space.structure.counting}
    counts = [len(counting.intersection(unit)) for unit in units]
    attentions = np.array(counts, dtype=float)
    return QuadraticProgram(alone, together + together.T, attentions, len(counting) - 1)


def _solve(
    program: "QuadraticProgram", sizes: Floats, target: float
) -> tuple[int, ...] | None:
    """The best that save `target`: as few as do, where all save the same, else less
    than one of them more.
    """
    if not len(sizes):
        return None
    largest = sizes.max()
    if sizes.min() >= largest * (1 - 1e-9):
        count = math.ceil(target / largest - 1e-9)
        return program.solve(np.ones(len(sizes)), count, count)
    slack = 1e-6  # what the solver takes for nothing
    return program.solve(
        sizes / largest, target / largest + slack, target / largest + 1
    )


def _named(units: Sequence[Unit], chosen: Sequence[int]) -> Choice:
    order = tuple(units[i] for i in chosen)
    return Choice(names_in(order), order)


@dataclass(frozen=True)
class QuadraticProgram:
    """What each costs alone, and two together; of numbers of which some count, the
    chosen have at most `limit`.
    """

    alone: Floats  # (n,)
    # what two cost on top of that, (n, n), symmetric; infinite: not both
    together: Floats
    limited: Floats  # (n,)
    limit: float

    def solve(
        self, sizes: Floats, least: float, most: float, seconds: float = SOLVER_SECONDS
    ) -> tuple[int, ...] | None:
        """The cheapest whose sizes, above 0, add up to `least` to `most`, or None.
        Raises when the time is up.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        n = len(sizes)
        costs = self.together[np.triu_indices(n, 1)]
        excluded = np.isinf(costs)
        found = milp(
            np.r_[self.alone, np.where(excluded, 0, costs)],
            integrality=np.r_[np.ones(n), np.zeros(len(costs))],
            bounds=Bounds(0, np.r_[np.ones(n), ~excluded]),
            constraints=[
                LinearConstraint(*row) for row in self._rows(sizes, least, most)
            ],
            options={"time_limit": seconds, "mip_rel_gap": 0},
        )
        if found.x is None and found.status == TIME_IS_UP:
            raise UsageError(
                f"no set was found in {seconds:g} s: choose among fewer, or by another"
                " criterion"
            )
        if found.x is None:
            return None
        return tuple(np.flatnonzero(found.x[:n] > 0.5).tolist())

    def _rows(
        self, sizes: Floats, least: float, most: float
    ) -> list[tuple[object, float, float]]:
        """Coefficients of each x[i] and of each product x[i] x[j], i < j, and between
        what their sum must lie.
        """
        from scipy import sparse

        first, second = np.triu_indices(len(sizes), 1)
        pairs = np.arange(len(first))
        one, other = (
            sparse.csr_array(
                (np.ones_like(pairs), (pairs, i)), (len(pairs), len(sizes))
            )
            for i in (first, second)
        )
        product = sparse.eye_array(len(pairs))
        # the size of the other of the two
        partners = one.T * sizes[second] + other.T * sizes[first]
        none = np.zeros(len(pairs))
        return [
            (sparse.hstack([one + other, -product]), -np.inf, 1),
            (np.r_[sizes, none], least, most),
            (np.r_[self.limited, none], -np.inf, self.limit),
            # the bounds on the sizes times each x[i]: with them the solver hardly
            # branches
            (sparse.hstack([sparse.diags_array(sizes - least), partners]), 0, np.inf),
            (sparse.hstack([sparse.diags_array(sizes - most), partners]), -np.inf, 0),
        ]
