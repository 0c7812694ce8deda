"""From a criterion to a set that meets a budget: once for what is counted; for a
speedup until the one that is measured is as fast as asked for.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

from ..progress import Progress, Stages
from ..results.facts import SpeedCheck
from .budget import Budget
from .criteria import CriterionLike, Setting, choose
from .criteria.search import SCREENED
from .evaluator import AfterRepair
from .latency import MOST_ERROR, SpeedBudget, check_times, saved_alike
from .space import Choice

FIRST = 0.6  # of the time: the rest is for the limit, where the first choice breaks it
CHOICES = 4  # the first, and those by times that were corrected
# Shares of the time, about: growing a set, its swaps, a check of the speed, and the
# next set by corrected times.
GROWING, SWAPPING, TIMING, AGAIN = 4, 3, 0.5, 0.1


@dataclass(frozen=True)
class Outcome:
    """A choice; how fast it is, where a speedup was asked for; and in words what was
    reached, where that is less than the budget.
    """

    choice: Choice
    check: SpeedCheck | None = None
    missed: str | None = None

    @property
    def met(self) -> bool:
        """Whether it is what the budget asks for."""
        return self.missed is None


def choose_within(
    criterion: CriterionLike, setting: Setting, budget: Budget
) -> Outcome:
    """Choose what meets `budget`; where that costs more than its limit, what saves most
    within the limit.
    """
    evaluator = setting.evaluator

    def rise(outcome: Outcome) -> float:
        """What an outcome costs, in nats over the original model."""
        cost = evaluator.cost(outcome.choice.skipped)
        return cost - evaluator.cost(frozenset())

    if math.inf in (budget.limit, budget.target):
        return choose_as_fast(criterion, setting, budget)
    unlimited = replace(budget, limit=math.inf)
    whole = choose_as_fast(criterion, setting.until(FIRST), unlimited)
    cost = rise(whole)
    if cost <= budget.limit:
        return whole
    most_saving = replace(budget, target=math.inf)
    choice = choose(criterion, setting, most_saving)
    within = outcome_of(choice, setting, budget, {})
    if within.met:
        return within
    missed = (
        f"{_as_much(budget, whole.choice, whole.check)} costs {cost:.3f} nats on the"
        f" text it was chosen by; at {rise(within):.3f} nats it is"
        f" {_as_much(budget, within.choice, within.check)}"
    )
    late = "; the time was up" if setting.late else ""
    return replace(within, missed=missed + late)


def choose_as_fast(
    criterion: CriterionLike, setting: Setting, budget: Budget
) -> Outcome:
    """Choose, for a speedup again by corrected times, until what is measured is as fast
    as asked for, and no more.

    Sets grow on a part of the text; swaps wait until the times hold; plans that leave
    as much are timed once.
    """
    if not isinstance(budget, SpeedBudget):
        return outcome_of(choose(criterion, setting, budget), setting, budget, {})
    if not isinstance(setting.evaluator, AfterRepair):
        # a part of that one's text would be too little to fit to
        setting = replace(setting, grown_on=SCREENED)
    # swaps and corrected times may change a set: it grows without swaps at first
    growing = replace(setting, patience=0)
    tried: list[Outcome] = []
    timed: dict[Hashable, SpeedCheck] = {}
    following = budget
    stages = Stages(setting.progress, GROWING + SWAPPING + 2 * (TIMING + AGAIN))
    # up to the last choice without swaps, and the last one with them
    for asked, most in ((growing, CHOICES - 1), (setting, CHOICES)):
        while len(tried) < most and not (tried and setting.late):
            if asked.patience:
                share = stages.steps - stages.given - TIMING
            else:
                share = AGAIN if tried else GROWING
            progress = _with_last_speed(stages.stage(share), budget, tried)
            asked = replace(asked, progress=progress)
            choice = choose(criterion, asked, following)
            # it was timed already, and is fast enough: no swap gained
            if any(one.met and one.choice.skipped == choice.skipped for one in tried):
                break
            timing = replace(asked, progress=stages.stage(TIMING))
            outcome = outcome_of(choice, timing, following, timed)
            tried.append(outcome)
            assert outcome.check
            if outcome.met and not _is_faster_than_asked(outcome.check, budget):
                break
            corrected = following.corrected(outcome.check)
            if corrected is None:
                break
            following = corrected
    met = [one for one in tried if one.met]
    if met:
        return min(met, key=lambda one: setting.evaluator.cost(one.choice.skipped))
    return max(tried, key=_speed)


def _is_faster_than_asked(check: SpeedCheck, budget: SpeedBudget) -> bool:
    """Whether a plan is faster than the budget by more than the error of its time."""
    measured = check.measured_speedup
    error = max(measured.error, MOST_ERROR * budget.faster)
    return measured.median - error > budget.faster


def _speed(outcome: Outcome) -> float:
    return outcome.check.measured_speedup.median if outcome.check else 0.0


def _with_last_speed(
    progress: Progress, budget: Budget, tried: list[Outcome]
) -> Progress:
    """`progress` of a choice, which shows how fast the last one was, too."""
    if not tried:
        return progress
    last = tried[-1]
    speed = _as_much(budget, last.choice, last.check)
    note = f"{len(last.choice.skipped)} skipped were {speed}"
    return lambda done, total, doing: progress(done, total, f"{doing}; {note}")


def outcome_of(
    choice: Choice, setting: Setting, budget: Budget, timed: dict[Hashable, SpeedCheck]
) -> Outcome:
    """Whether a choice saves as much as `budget` asks for; timed for longer where a few
    rounds leave a large error.

    `timed` has the checks of earlier choices, by what these leave of the model; a new
    one is added to it.
    """
    check = None
    is_met = budget.target == math.inf or budget.met(choice.skipped)
    if isinstance(budget, SpeedBudget):
        plan = setting.space.plan(choice.skipped)
        left = saved_alike(setting.space.structure, choice.skipped)
        if left not in timed:
            timed[left] = check_times(
                setting.model,
                plan,
                budget.times,
                error=MOST_ERROR * budget.faster,
                progress=setting.progress,
            )
        ms = budget.times.predicted_ms(plan)  # by these times, whenever it was timed
        predicted = {
            "predicted_ms": ms,
            "predicted_speedup": budget.times.dense_ms / ms,
        }
        check = timed[left].model_copy(update=predicted)
        is_met = budget.reached(check)
    return Outcome(choice, check, None if is_met else _missed(budget, choice, check))


def _missed(budget: Budget, choice: Choice, check: SpeedCheck | None) -> str:
    """In words what a choice saves, where that is not what was asked for, or not for
    certain.
    """
    reached = f"{_as_much(budget, choice, check)} is what was reached"
    is_fast = (
        check is not None
        and isinstance(budget, SpeedBudget)
        and check.measured_speedup.median >= budget.faster
    )
    if is_fast:
        return (
            f"{reached}; the times vary too much to tell: run it again on a quiet"
            " machine"
        )
    return reached


def _as_much(budget: Budget, choice: Choice, check: SpeedCheck | None) -> str:
    """In words what a choice saves, in the unit of the budget."""
    if check:
        speedup = check.measured_speedup
        return f"{speedup.median:.2f} ± {speedup.error:.2f} times as fast"
    return f"{budget.saved(choice.skipped):,.0f} of {budget.target:,.0f}"
