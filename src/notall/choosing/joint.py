"""A budget with a limit on what it may cost: both hold, or it is said what can be had of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from .budget import Budget
from .criteria import Chosen, Setting, Way, choose
from .latency import Prediction
from .speedups import SpeedBudget, choose_as_fast, timed

FIRST = 0.6  # of the time: the rest is for the limit, where the first choice breaks it


@dataclass(frozen=True)
class Outcome:
    """What was chosen, how fast it is where a speedup was asked for, and in words what a budget that was missed got."""

    chosen: Chosen
    check: Prediction | None = None
    missed: str | None = None


def choose_within(criterion: Way, setting: Setting, budget: Budget) -> Outcome:
    """Choose what saves as much as `budget` asks for; where that costs more than its limit, what saves most within it.

    Raises as `criteria.choose` does.
    """
    if math.inf in (budget.limit, budget.target):
        return _choose(criterion, setting, budget)
    whole = _choose(criterion, setting.until(FIRST), replace(budget, limit=math.inf))
    if (cost := _rise(setting, whole)) <= budget.limit:
        return whole
    costs = f"{_as_much(budget, whole)} costs {cost:.3f} nats on the text it was chosen by"
    within = Outcome(choose(criterion, setting, replace(budget, target=math.inf)))
    if isinstance(budget, SpeedBudget):
        within = replace(within, check=timed(setting, within.chosen, budget))
    if _reached(budget, within):
        return within
    at = f"{_rise(setting, within):.3f} nats it is {_as_much(budget, within)}"
    late = "; the time was up" if setting.late else ""
    return replace(within, missed=f"{costs}; at {at}{late}")


def _choose(criterion: Way, setting: Setting, budget: Budget) -> Outcome:
    if not isinstance(budget, SpeedBudget):
        return Outcome(choose(criterion, setting, budget))
    found = choose_as_fast(criterion, setting, budget)
    outcome = Outcome(found.chosen, found.check)
    return outcome if found.met else replace(outcome, missed=f"{_as_much(budget, outcome)} is what was reached")


def _rise(setting: Setting, outcome: Outcome) -> float:
    """What the objective rises by."""
    return setting.evaluator.cost(outcome.chosen.skipped) - setting.evaluator.cost(frozenset())


def _reached(budget: Budget, outcome: Outcome) -> bool:
    if isinstance(budget, SpeedBudget) and outcome.check:
        return budget.reached(outcome.check)
    return budget.met(outcome.chosen.skipped)


def _as_much(budget: Budget, outcome: Outcome) -> str:
    """In words what an outcome saves, in the unit of the budget."""
    if outcome.check:
        measured = outcome.check.measured_speedup
        return f"{measured.median:.2f} ± {measured.error:.2f} times as fast"
    return f"{budget.saved(outcome.chosen.skipped):,.0f} of {budget.target:,.0f}"
