"""The speedup asked for is the speedup measured: what was chosen is timed, and corrects the times it goes by."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

from ..errors import UsageError, expect
from .budget import Budget
from .criteria import Chosen, Setting, Way, choose
from .latency import Prediction, Times, check_times
from .space import Space, plan_of

CHOICES = 4  # the first, and those by times that were corrected
MOST_ERROR = 0.02  # of the speedup that is asked for: a noisy machine excuses no more
ROUNDS, MORE_ROUNDS = 5, 20  # to time a plan, and where that leaves a larger error


@dataclass(frozen=True, kw_only=True)
class SpeedBudget(Budget):
    """Milliseconds to save of a workload, by `times`, so that it runs `faster` times as fast."""

    faster: float
    space: Space
    times: Times

    def reached(self, check: Prediction) -> bool:
        """Whether what was measured is what was asked for, within its standard error and `MOST_ERROR`."""
        measured = check.measured_speedup
        return measured.median + min(measured.error, MOST_ERROR * self.faster) >= self.faster

    def exceeded(self, check: Prediction) -> bool:
        """Whether what was measured is faster than what was asked for, beyond its standard error and `MOST_ERROR`."""
        measured = check.measured_speedup
        return measured.median - max(measured.error, MOST_ERROR * self.faster) > self.faster

    def corrected(self, check: Prediction) -> SpeedBudget | None:
        """By times that tell what was measured: what sublayers save is scaled. None where that can't be enough."""
        predicted, measured = (1 - 1 / ratio for ratio in (check.predicted_speedup, check.measured_speedup.median))
        if not (predicted > 0 and measured > 0):
            return None
        scaled = {name: ms * measured / predicted for name, ms in self.times.sublayer_ms.items()}
        times = replace(self.times, sublayer_ms=scaled)
        return by_speedup(self.space, times, self.faster) if self.faster <= _fastest(self.space, times) else None


@dataclass(frozen=True)
class TimedChoice:
    """What was chosen, how fast that was measured to be, and whether it is what the budget asked for."""

    chosen: Chosen
    check: Prediction
    met: bool


def by_speedup(space: Space, times: Times, faster: float) -> SpeedBudget:
    """A budget: the workload of `times` must run `faster` times as fast. Raises `UsageError` where it cannot."""
    check_faster(faster)
    if faster > (most := _fastest(space, times)):
        raise UsageError(
            f"a speedup of {faster:g} is out of reach: without all that may be skipped it is {most:.2f}; "
            "choose among more sublayers, or a lower speedup"
        )
    w = times.workload
    described = f"{faster:g}x at prompt {w.prompt}, {w.new} new, batch {w.batch}"
    target = times.dense_ms * (1 - 1 / faster)
    return SpeedBudget(_saved_by(space, times), target, described, faster=faster, space=space, times=times)


def check_faster(faster: float) -> None:
    """Raise `UsageError` for what is no speedup."""
    expect(faster, Real, "how many times as fast, a number")
    if not 1 <= faster < math.inf:
        raise UsageError(f"a speedup of {faster} is none: give 1.3 for a model that is 1.3 times as fast")


def choose_as_fast(criterion: Way, setting: Setting, budget: SpeedBudget) -> TimedChoice:
    """Choose by the times, and again by corrected ones, until what is measured is as fast as asked for.

    What was evaluated for one choice is known for the next. Where a choice is much faster than it was asked to be, it
    gave up more than it had to: then, too, the times are corrected. Of what is as fast as asked for, the one that costs
    least comes back; where none of `CHOICES` is, before the setting gets late, the fastest.
    """
    tried: list[TimedChoice] = []
    following: SpeedBudget | None = budget
    while following is not None and len(tried) < CHOICES and not (tried and setting.late):
        chosen = choose(criterion, setting, following)
        if any(one.met and one.chosen.skipped == chosen.skipped for one in tried):
            break
        check = timed(setting, chosen, following)
        tried.append(TimedChoice(chosen, check, following.reached(check)))
        if tried[-1].met and not following.exceeded(check):
            break
        following = following.corrected(check)
    met = [one for one in tried if one.met]
    if met:
        return min(met, key=lambda one: setting.evaluator.cost(one.chosen.skipped))
    return max(tried, key=lambda one: one.check.measured_speedup.median)


def timed(setting: Setting, chosen: Chosen, budget: SpeedBudget) -> Prediction:
    """How fast a choice is, timed longer where a few rounds leave too large an error."""
    for rounds in (ROUNDS, MORE_ROUNDS):
        plan = plan_of(chosen.skipped)
        check = check_times(setting.model, plan, budget.times, rounds=rounds, seed=setting.seed)
        if check.measured_speedup.error <= MOST_ERROR * budget.faster:
            break
    return check


def _saved_by(space: Space, times: Times) -> dict[str, float]:
    return {name: max(times.sublayer_ms[name], 0.0) for name in space.names}


def _fastest(space: Space, times: Times) -> float:
    """How many times as fast the workload is without all that may be skipped."""
    left = times.dense_ms - sum(_saved_by(space, times).values())
    return times.dense_ms / left if left > 0 else math.inf
