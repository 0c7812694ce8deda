"""A choice by what plans keep of the model's abilities, as a number, compared with
what the objective says of them.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from ..plan import Plan
from ..results.facts import SpeedCheck
from .budget import Budget, deepest_run
from .criteria import Setting
from .in_prompts import PromptRepair
from .latency import saved_alike
from .outcomes import Outcome, outcome_of
from .space import Choice, Skipped, Space, names_in

OTHER_SETS = 3  # other sets that save enough, of which more may be kept


@dataclass(frozen=True)
class Recovering:
    """How much a plan keeps of what the original model can do, as a number, and how
    much it is to keep.

    `as_long_as` is that in words, for a limit alone.
    """

    kept: Callable[[Plan], float]
    least: float
    as_long_as: str = "recovery is kept"

    @classmethod
    def after_repair(cls, repairing: PromptRepair, budget: Budget) -> "Recovering":
        """Compares sets by the KL after a refit: all of them, or for a limit alone
        those within it.
        """
        least = -budget.limit if budget.target == math.inf else math.inf
        return cls(repairing.kept, least, "the KL after a refit allows")


def recovered(
    recovering: Recovering, found: Outcome, setting: Setting, budget: Budget
) -> tuple[Outcome, str]:
    """What is chosen of what was found by what it keeps, and a note on that.

    For a limit alone it is the longest beginning that keeps enough, as halving finds
    it, and at least the first unit; for what is to be saved the cheapest of some sets
    that keeps enough, or else the one that keeps most.
    """
    if budget.target == math.inf:
        kept = longest_that_keeps(recovering, found.choice, setting.space)
        note = (
            f"; the first {len(kept.order)} of {len(found.choice.order)}, as far as"
            f" {recovering.as_long_as}"
        )
        return replace(found, choice=kept), note
    if not found.met:
        return found, ""
    found, judged = _keeping_most(recovering, found, setting, budget)
    return found, f"; sets judged by what they keep: {judged}"


def _keeping_most(
    recovering: Recovering, first: Outcome, setting: Setting, budget: Budget
) -> tuple[Outcome, int]:
    """Of `first` and the next cheapest sets that meet the budget: which keeps enough,
    or most; and of how many.
    """
    space = setting.space
    timed: dict[Hashable, SpeedCheck] = {}
    if first.check:
        timed[saved_alike(space.structure, first.choice.skipped)] = first.check
    found: list[tuple[float, Outcome]] = []
    for choice in (first.choice, *_others(first.choice, setting, budget)[:OTHER_SETS]):
        outcome = first
        if choice is not first.choice:
            outcome = outcome_of(choice, setting, budget, timed)
        if outcome.met:
            kept = recovering.kept(space.plan(choice.skipped))
            found.append((kept, outcome))
            if kept >= recovering.least:
                break
    _, best = max(found, key=lambda pair: pair[0])
    return best, len(found)


def _others(first: Choice, setting: Setting, budget: Budget) -> list[Choice]:
    """Other sets that meet the budget within its limit, the cheapest first; of a prompt
    the deepest sublayers, and the deepest MLPs, before all.
    """
    space, evaluator = setting.space, setting.evaluator
    most = evaluator.cost(frozenset()) + budget.limit

    def is_other(skipped: Skipped) -> bool:
        return (
            budget.met(skipped)
            and space.allows(skipped)
            and evaluator.cost(skipped) <= most
            and skipped != first.skipped
        )

    sets: list[Skipped] = []
    if space.phase == "prefill":
        tails = (deepest_run(space, budget, kind) for kind in ("", "mlp"))
        sets += filter(is_other, filter(None, map(names_in, tails)))
    sets += evaluator.cheapest(is_other)
    return [
        Choice(one, tuple(filter(one.issuperset, space.units)))
        for one in dict.fromkeys(sets)
    ]


def longest_that_keeps(recovering: Recovering, choice: Choice, space: Space) -> Choice:
    """The longest beginning of a choice that keeps what is asked for, as halving finds
    it; else the shortest one.
    """
    order = choice.order
    begun = [names_in(order[: end + 1]) for end in range(len(order))]
    allowed = [number for number, skipped in enumerate(begun) if space.allows(skipped)]
    if not allowed:
        return choice
    low, high = -1, len(allowed) - 1
    while low < high:
        middle = (low + high + 1) // 2
        kept = recovering.kept(space.plan(begun[allowed[middle]]))
        if kept >= recovering.least:
            low = middle
        else:
            high = middle - 1
    last = allowed[max(low, 0)]
    return Choice(begun[last], order[: last + 1])
