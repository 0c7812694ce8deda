"""By what the objective really rises by: of each unit alone, of the best next one, or
of sets that evolve.
"""

import random

from ..budget import Budget
from ..space import Choice, Skipped, Unit
from .setting import Setting, UnitScores

OFFSPRING, GENERATIONS = 16, 20  # of the evolution
STAGES = ((0.25, 4), (1.0, 1))  # on what share of the text, and how many survive


def score_leave_one_out(setting: Setting) -> UnitScores:
    """Rise of the objective when only this unit is skipped."""
    evaluator = setting.evaluator
    evaluator.set_prefix(frozenset())
    dense = evaluator.cost(frozenset())
    scores = {}
    for place, unit in enumerate(setting.space.units):
        scores[unit] = evaluator.cost(frozenset(unit)) - dense
        setting.progress(
            place + 1, len(setting.space.units), f"leaving out {'+'.join(unit)}"
        )
    return scores


def choose_greedily(setting: Setting, budget: Budget) -> Choice:
    """The objective, step by step (algorithms 1 of SLEB 2402.09025, BlockPruner
    2406.10594, FinerCut 2405.18218).
    """
    space, evaluator = setting.space, setting.evaluator
    skipped: Skipped = frozenset()
    order: list[Unit] = []
    dense = cost = evaluator.cost(skipped)
    while not budget.met(skipped):
        evaluator.set_prefix(skipped)
        found = {
            unit: evaluator.cost(skipped.union(unit)) for unit in space.moves(skipped)
        }
        rates = {
            unit: budget.rate(unit, value - cost, skipped)
            for unit, value in found.items()
        }
        best = min(rates, key=rates.__getitem__, default=None)
        if best is None or found[best] - dense > budget.limit:
            break
        skipped, cost = skipped.union(best), found[best]
        order.append(best)
        setting.progress(
            min(budget.saved(skipped), budget.target),
            budget.target,
            f"greedy, {len(skipped)} skipped",
        )
    return Choice(skipped, tuple(order))


def choose_by_evolution(setting: Setting, budget: Budget) -> Choice:
    """Sets that swap and are selected on ever more text, in a (1 + 16) evolution
    (EvoPress 2410.14649, section 3.3).
    """
    draw = random.Random(setting.seed)
    parent = _random_set(setting, budget, draw)
    setting.evaluator.set_prefix(frozenset())
    for generation in range(GENERATIONS):
        if setting.late:
            break
        pool = list(
            dict.fromkeys(
                _mutated(setting, budget, parent, draw) for _ in range(OFFSPRING)
            )
        )
        for share, survivors in STAGES:
            pool += [parent] if share == 1 and parent not in pool else []
            costs = dict(zip(pool, setting.evaluator.costs(pool, share)))
            pool = sorted(pool, key=costs.__getitem__)[:survivors]
        parent = pool[0]
        setting.progress(
            generation + 1, GENERATIONS, f"generation {generation + 1} of {GENERATIONS}"
        )
    return Choice(parent, tuple((name,) for name in setting.space.sorted(parent)))


def _random_set(setting: Setting, budget: Budget, draw: random.Random) -> Skipped:
    skipped: Skipped = frozenset()
    dense = setting.evaluator.cost(skipped)
    while not budget.met(skipped) and (moves := setting.space.moves(skipped)):
        grown = skipped.union(draw.choice(moves))
        if (
            budget.limit < float("inf")
            and setting.evaluator.cost(grown) - dense > budget.limit
        ):
            break
        skipped = grown
    return skipped


def _mutated(
    setting: Setting, budget: Budget, parent: Skipped, draw: random.Random
) -> Skipped:
    """The parent with a few units swapped; itself, where no swap that was drawn saves
    as much.
    """
    child = parent
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        back = setting.space.returns(child)
        if not back:
            break
        less = child.difference(draw.choice(back))
        moves = setting.space.moves(less)
        if moves and budget.saved(
            swapped := less.union(draw.choice(moves))
        ) >= budget.counted(parent):
            child = swapped
    return child
