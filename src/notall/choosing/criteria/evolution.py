"""By evolution: sets that change places, and the fittest goes on."""

from __future__ import annotations

import random

from ..budget import Budget
from ..space import Skipped
from .setting import Chosen, Setting

OFFSPRING, GENERATIONS = 16, 20
STAGES = ((0.25, 4), (1.0, 1))  # on what share of the text, and how many survive


def choose_by_evolution(setting: Setting, budget: Budget) -> Chosen:
    """A (1 + 16) evolution of sets of the same size, by swaps; offspring are selected in stages on more and more text.

    A child swaps one or a few units, the smaller of two draws from 1 to 3. The parent competes in the last stage, so it
    never gets worse. Source: EvoPress, arXiv 2410.14649, algorithm 1 and section 3.3 (level switches, multi-step
    selection).
    """
    draw = random.Random(setting.seed)
    parent = _random_set(setting, budget, draw)
    setting.evaluator.stand_on(frozenset())
    for generation in range(GENERATIONS):
        if setting.late:
            break
        children = [_mutated(setting, budget, parent, draw) for _ in range(OFFSPRING)]
        pool = list(dict.fromkeys(children))
        for share, survivors in STAGES:
            pool += [parent] if share == 1 and parent not in pool else []
            costs = dict(zip(pool, setting.evaluator.costs(pool, share)))
            pool = sorted(pool, key=costs.__getitem__)[:survivors]
        parent = pool[0]
        setting.progress(generation + 1, GENERATIONS, f"generation {generation + 1} of {GENERATIONS}")
    return Chosen(parent, tuple((name,) for name in setting.space.sorted(parent)))


def _random_set(setting: Setting, budget: Budget, draw: random.Random) -> Skipped:
    skipped: Skipped = frozenset()
    dense = setting.evaluator.cost(skipped)
    while not budget.met(skipped) and (moves := setting.space.moves(skipped)):
        grown = skipped.union(draw.choice(moves))
        if budget.limit < float("inf") and setting.evaluator.cost(grown) - dense > budget.limit:
            break
        skipped = grown
    return skipped


def _mutated(setting: Setting, budget: Budget, parent: Skipped, draw: random.Random) -> Skipped:
    """The parent with a few units swapped; itself, where no swap that was drawn saves as much."""
    child = parent
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        back = setting.space.returns(child)
        if not back:
            break
        less = child.difference(draw.choice(back))
        moves = setting.space.moves(less)
        if moves and budget.saved(swapped := less.union(draw.choice(moves))) >= min(
            budget.saved(parent), budget.target * (1 - 1e-9)
        ):
            child = swapped
    return child
