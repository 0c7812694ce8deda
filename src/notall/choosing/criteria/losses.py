"""By what the objective really rises by: of each unit alone, or of the best next one, step by step."""

from __future__ import annotations

from ..budget import Budget
from ..space import Skipped, Unit
from .setting import Chosen, Setting, UnitScores


def score_leave_one_out(setting: Setting) -> UnitScores:
    """The objective without this unit alone, less that of the dense model."""
    evaluator = setting.evaluator
    evaluator.stand_on(frozenset())
    dense = evaluator.cost(frozenset())
    scores = {}
    for place, unit in enumerate(setting.space.units):
        scores[unit] = evaluator.cost(frozenset(unit)) - dense
        setting.progress(place + 1, len(setting.space.units), f"leaving out {'+'.join(unit)}")
    return scores


def choose_greedily(setting: Setting, budget: Budget) -> Chosen:
    """Skip what raises the objective least, given what is skipped already; evaluate all that is left at each step.

    By NLL this is SLEB (arXiv 2402.09025, algorithm 1) for blocks and BlockPruner (arXiv 2406.10594, algorithm 1) for
    sublayers; by KL it is FinerCut (arXiv 2405.18218, algorithm 1). It is also the slow twin of the lazy search.
    """
    space, evaluator = setting.space, setting.evaluator
    skipped: Skipped = frozenset()
    order: list[Unit] = []
    dense = cost = evaluator.cost(skipped)
    while not budget.met(skipped):
        evaluator.stand_on(skipped)
        found = {unit: evaluator.cost(skipped.union(unit)) for unit in space.moves(skipped)}
        rates = {unit: budget.rate(unit, value - cost, skipped) for unit, value in found.items()}
        best = min(rates, key=rates.__getitem__, default=None)
        if best is None or found[best] - dense > budget.limit:
            break
        skipped, cost = skipped.union(best), found[best]
        order.append(best)
        setting.progress(min(budget.saved(skipped), budget.target), budget.target, f"greedy, {len(skipped)} skipped")
    return Chosen(skipped, tuple(order))
