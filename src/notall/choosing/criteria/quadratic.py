"""By what is lost without each unit and without each two of them: the set for which the sum of both is least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from ...errors import UsageError
from ..budget import Budget
from ..searching import SCREENED
from ..space import Unit, names_in
from .quadratic_program import Floats, QuadraticProgram
from .setting import Chosen, Setting

WORST = 1e3  # nats: what a model that overflows loses; a sum has no use for more


def choose_quadratic(setting: Setting, budget: Budget) -> Chosen:
    """The set that meets the budget with the least sum of a[i] over its units and b[i, j] over each two of them.

    a[i] is what the objective rises by without i; b[i, j] is what it rises by without both, less a[i] and a[j], or 0
    where that is negative. Source: the constrained binary program of arXiv 2602.00161, which takes a and b from a
    Taylor expansion of the loss in a gate on each block. A gate that closes is too far away for that (the loss would
    fall without the first attention), so here both are measured, like the guesses of `search`, on a part of the text.

    Where the budget is a limit on the objective, ever more is skipped, and the last set within the limit is taken.
    Raises `UsageError` without scipy, and where no set saves as much.
    """
    if not find_spec("scipy"):
        raise UsageError("the quadratic criterion needs scipy; pip install 'notall[solver]'")
    if budget.met(frozenset()):
        return Chosen(frozenset(), ())
    # a portable set is a union of pairs that follow each other, so these are its units
    units = [unit for unit in setting.space.moves(frozenset()) if budget.saved(unit)]
    sizes = np.array([budget.saved(unit) for unit in units])
    program = measure(setting, units)
    if budget.target < math.inf:
        chosen = _solve(program, sizes, budget.target)
        if chosen is None:
            raise UsageError(f"no set of the quadratic criterion saves {budget.description}: ask for less")
        return _named(units, chosen)
    evaluator, best = setting.evaluator, Chosen(frozenset(), ())
    most = evaluator.cost(frozenset()) + budget.limit
    for count in range(1, len(units) + 1):
        chosen = _solve(program, sizes, count * sizes.max())
        if chosen is None or setting.late or evaluator.cost(_named(units, chosen).skipped) > most:
            break
        best = _named(units, chosen)
    return best


def measure(setting: Setting, units: Sequence[Unit]) -> QuadraticProgram:
    """What the objective rises by without each unit, and without two beside that; those asked for late count as 0."""
    space, evaluator = setting.space, setting.evaluator
    evaluator.stand_on(frozenset())
    dense = evaluator.cost(frozenset(), SCREENED)

    def rises(sets: list[Unit]) -> Floats:
        costs = evaluator.costs([frozenset(names) for names in sets], SCREENED)
        return np.minimum(np.array(costs) - dense, WORST)

    alone = rises([*units])
    together = np.zeros((len(units), len(units)))
    for i, unit in enumerate(units):
        behind = range(i + 1, len(units))
        fit = [j for j in behind if space.allows(frozenset(unit + units[j]))]
        together[i, i + 1 :] = np.inf
        if not fit or setting.late:
            together[i, fit] = 0
        else:  # two that each ruin the model ruin it once: were they less than 0, many pairs would add up to a gain
            together[i, fit] = np.maximum(rises([unit + units[j] for j in fit]) - alone[i] - alone[fit], 0)
        setting.progress(i + 1, len(units), f"leaving out {'+'.join(unit)} and another")
    counting = {f"attn.{index}" for index in space.anatomy.counting}
    attentions = np.array([len(counting.intersection(unit)) for unit in units], dtype=float)
    return QuadraticProgram(alone, together + together.T, attentions, len(counting) - 1)


def _solve(program: QuadraticProgram, sizes: Floats, target: float) -> tuple[int, ...] | None:
    """The best that save `target`: as few as do, where all save the same, else less than one of them more."""
    if not len(sizes):
        return None
    largest = sizes.max()
    if sizes.min() >= largest * (1 - 1e-9):
        count = math.ceil(target / largest - 1e-9)
        return program.solve(np.ones(len(sizes)), count, count)
    slack = 1e-6  # what the solver takes for nothing
    return program.solve(sizes / largest, target / largest + slack, target / largest + 1)


def _named(units: Sequence[Unit], chosen: Sequence[int]) -> Chosen:
    order = tuple(units[i] for i in chosen)
    return Chosen(names_in(order), order)
