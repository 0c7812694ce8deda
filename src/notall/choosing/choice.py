"""Choose a plan as `notall search` does: what was evaluated is kept, and the speedup
asked for is the one measured.
"""

import math
import os
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..measuring.quality import evaluate
from ..models.texts import all_checked, checked
from ..models.windows import refuse_overlap
from ..plan import Plan
from ..progress import Progress, Stages, by_the_clock, silent
from ..results.facts import Footprint, Quality, SearchCost, SpeedCheck
from ..results.ledger import working_in
from ..results.provenance import Provenance
from ..running.skipping import footprint
from .budget import Budget, deepest_run
from .criteria import CriterionLike, Setting, choose, criterion as criterion_of
from .criteria.search import SCREENED
from .criteria.setting import PATIENCE
from .evaluator import STATES_BYTES, AfterRepair, Evaluator
from .in_prompts import WIDER, PromptRepair, fitting, with_last_tokens
from .latency import MOST_ERROR, SpeedBudget, check_times, saved_alike
from .objective import Objective, kl
from .space import Choice, Skipped, Space, Unit, names_in

FIRST = 0.6  # of the time: the rest is for the limit, where the first choice breaks it
CHOICES = 4  # the first, and those by times that were corrected
BESIDE = 3  # other sets that save enough, of which more may be kept
GROWING, SWAPPING, TIMING, AGAIN = (
    4,
    3,
    0.5,
    0.1,
)  # shares of the time, about: a set, its swaps, a check, the next set


@dataclass(frozen=True)
class Recovering:
    """How much a plan keeps of what the original model can do, as a number, and how
    much it is to keep.

    `as_long_as` is that in words, for a limit alone.
    """

    kept: Callable[[Plan], float]
    least: float
    as_long_as: str = "recovery is kept"


@dataclass(frozen=True)
class ChosenPlan:
    """A plan, the objective without and with it, what it took, and the order in which
    it came to be.

    `forwards` is `spent.executions` in dense forward passes over the calibration text;
    `in_time` says whether it was found before the time was up, and `missed`, where the
    plan is not what was asked for, what was reached. `times` are predicted and measured
    where a speedup was asked for; `weighed` is what the original model and the plan
    weigh.
    """

    plan: Plan
    order: tuple[Unit, ...]
    dense_cost: float
    cost: float
    spent: SearchCost
    forwards: float
    in_time: bool
    held_out: tuple[Quality, Quality] | None = None  # dense, skipped
    times: SpeedCheck | None = None
    missed: str | None = None
    weighed: tuple[Footprint, Footprint] | None = None  # likewise
    judged_by: str = "objective"

    def __str__(self) -> str:
        before, after = (
            round(cost, 3) + 0.0 for cost in (self.dense_cost, self.cost)
        )  # none is -0.000
        costs = f"{self.judged_by} {before:.3f} without the plan, {after:.3f} with it"
        took = f"{self.forwards:,.1f} forward passes over the text"
        return (
            f"skip {self.plan}: {costs};"
            f" {took}{f'; {self.missed}' if self.missed else ''}"
        )


def check_minutes(most: float | None) -> None:
    """Raise `UsageError` for a time that is none."""
    if most is not None and not most >= 0:
        raise UsageError(
            f"the search cannot end after {most} minutes by the clock: give 0 or more"
        )


def choose_plan(
    model: PreTrainedModel,
    criterion: CriterionLike,
    space: Space,
    budget: Budget,
    batches: Sequence[Tensor],
    objective: Objective | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, object] | None = None,
    max_minutes: float | None = None,
    patience: int = PATIENCE,
    seed: int = 0,
    states_bytes: int = STATES_BYTES,
    held_out: Sequence[Tensor] = (),
    after_repair: bool = False,
    recovering: Recovering | None = None,
    last_tokens: Sequence[int] = (),
    progress: Progress = silent,
) -> ChosenPlan:
    """What `criterion` skips of `space` to meet `budget`: a name such as "search", a
    function or a `Criterion`.

    `batches` are token ids, (batch, tokens) each, for criteria such as cosine. Without
    an `objective`, sets are judged by the KL to the original on `batches`; with
    `after_repair` by the KL that a cheap repair leaves on half of them, to which it was
    not fitted. A folder `out` keeps evaluations, and the same call with the same
    `provenance` resumes. The search ends after `max_minutes` by the clock, or
    `patience` evaluations that brought nothing. A plan for a speedup is timed, and
    chosen anew where it is too slow; with a limit too, where both cannot be met, it
    saves most within the limit (`missed`). With `recovering` it is the one that keeps
    enough. Sets that a prompt alone skips are judged by what follows half of each
    sequence, or the prompt of the `objective`; `after_repair` then compares the best of
    them by the KL after a refit of keys and values, to which a limit applies, and of
    `last_tokens` so many last tokens of the prompt run whole as lower the KL. The
    windows `held_out` measure it in the end.

    Raises `UsageError` for a folder that holds other work or is in use, a criterion
    that fails or does not suit the space, a budget that cannot be met, and held-out
    windows that overlap those that it is chosen by.
    """
    check_minutes(max_minutes)
    expect(
        space, Space, "a notall.Space, such as Space(notall.locate(model), 'attention')"
    )
    expect(
        budget, Budget, "a budget, such as notall.choosing.budget.by_count(space, 3)"
    )
    way, batches, held_out = (
        criterion_of(criterion),
        all_checked(batches, model),
        [*checked(held_out, model)],
    )
    if objective is None:
        objective = kl(
            batches,
            prompt_tokens=(
                batches[0].shape[1] // 2 if space.phase == "prefill" else None
            ),
        )
    expect(
        objective,
        Objective,
        "an objective, such as notall.choosing.objective.kl(batches)",
    )
    refuse_overlap(held_out, [*batches, *objective.windows], "the plan is chosen by")
    prompt = objective.prompt_tokens if space.phase == "prefill" else None
    repairing = (
        PromptRepair.of(model, batches, prompt)
        if space.phase == "prefill" and after_repair
        else None
    )
    if repairing:
        objective, after_repair = repairing.objective, False
        recovering = recovering or _after(repairing, budget)
    folder = None if out is None else Path(out)
    with working_in(folder, "search"):
        plain = partial(Evaluator, model, objective, space=space)
        make = partial(AfterRepair, model, batches) if after_repair else plain
        evaluator = make(states_bytes=states_bytes, folder=folder, settings=provenance)
        deadline = (
            time.monotonic() + 60 * max_minutes if max_minutes is not None else math.inf
        )
        telling = by_the_clock(progress, deadline)
        setting = Setting(
            model, space, batches, evaluator, seed, deadline, patience, telling
        )
        wide = (
            replace(budget, limit=WIDER * budget.limit)
            if repairing and budget.target == math.inf
            else budget
        )
        outcome = choose_within(way, setting, wide)
        spent = evaluator.spent  # for the choice, and not for the record
        outcome, how = (
            _recovered(recovering, outcome, setting, budget)
            if recovering
            else (outcome, "")
        )
        skipped = outcome.choice.skipped
        note = f"{way.name} by {evaluator.judged_by}: {budget.description}{how}"
        if prompt and skipped and len(tried := fitting(last_tokens, prompt)) > 1:
            space, outcome = _running_last(
                space, outcome, setting, budget, tried, repairing
            )
        if space is not setting.space:
            evaluator = plain(space=space)
        plan = space.plan(skipped, note)
        return ChosenPlan(
            plan=plan,
            order=outcome.choice.order,
            dense_cost=evaluator.cost(frozenset()),
            cost=evaluator.cost(skipped),
            spent=spent,
            forwards=spent.executions / evaluator.forward,
            in_time=not setting.late,
            held_out=_measured(model, plan, held_out, objective) if held_out else None,
            times=outcome.check,
            missed=outcome.missed,
            weighed=(footprint(model, Plan()), footprint(model, plan)),
            judged_by=evaluator.judged_by,
        )


def _measured(
    model: PreTrainedModel, plan: Plan, held_out: Sequence[Tensor], objective: Objective
) -> tuple[Quality, Quality]:
    """Of the original model and of the plan, behind a prompt as long as the objective's
    where that has one.
    """
    dense, skipped = evaluate(model, [Plan(), plan], held_out, objective.prompt_tokens)
    return dense, skipped


def _after(repairing: PromptRepair, budget: Budget) -> Recovering:
    """What compares sets after a repair: all of them, or for a limit alone those that
    keep it.
    """
    least = -budget.limit if budget.target == math.inf else math.inf
    return Recovering(repairing.kept, least, "the KL after a refit allows")


def _running_last(
    space: Space,
    found: "Outcome",
    setting: Setting,
    budget: Budget,
    tried: Sequence[int],
    repairing: PromptRepair | None,
) -> "tuple[Space, Outcome]":
    """As many last tokens as are worth it run whole, and what was found with them,
    timed where it is to be fast.
    """
    checked = dict[int, Outcome]()

    def reached(plan: Plan) -> bool:
        more = replace(
            setting, space=replace(space, last_tokens=plan.prefill.last_tokens)
        )
        checked[plan.prefill.last_tokens] = outcome = _outcome(
            found.choice, more, budget, {}
        )
        return outcome.met

    goal, plan = setting.evaluator.objective, space.plan(found.choice.skipped)
    plan = repairing.repaired(plan) if repairing else plan
    assert goal.prompt_tokens
    best = with_last_tokens(
        setting.model, plan, tried, goal.windows, goal.prompt_tokens, reached
    )
    last = best.prefill.last_tokens
    return (
        space if last == space.last_tokens else replace(space, last_tokens=last)
    ), checked.get(last, found)


def _recovered(
    recovering: Recovering, found: "Outcome", setting: Setting, budget: Budget
) -> "tuple[Outcome, str]":
    """What is chosen of what was found by what it keeps, and how that is told.

    For a limit alone it is the longest beginning that keeps enough, as halving finds
    it, and at least the first unit; for what is to be saved the cheapest of some sets
    that keeps enough, or else the one that keeps most.
    """
    if budget.target == math.inf:
        kept = _as_long_as(recovering, found.choice, setting.space)
        told = (
            f"; the first {len(kept.order)} of {len(found.choice.order)}, as far as"
            f" {recovering.as_long_as}"
        )
        return replace(found, choice=kept), told
    if not found.met:
        return found, ""
    found, judged = _keeping_most(recovering, found, setting, budget)
    return found, f"; sets judged by what they keep: {judged}"


def _keeping_most(
    recovering: Recovering, first: "Outcome", setting: Setting, budget: Budget
) -> "tuple[Outcome, int]":
    """Of `first` and the next cheapest sets that meet the budget: which keeps enough,
    or most; and of how many.
    """
    space, evaluator, found = (
        setting.space,
        setting.evaluator,
        list[tuple[float, Outcome]](),
    )
    most = evaluator.cost(frozenset()) + budget.limit

    def is_other(skipped: Skipped) -> bool:
        is_met = (
            budget.met(skipped)
            and space.allows(skipped)
            and evaluator.cost(skipped) <= most
        )
        return is_met and skipped != first.choice.skipped

    tail = (
        names_in(deepest_run(space, budget)) if space.phase == "prefill" else Skipped()
    )
    sets = dict.fromkeys(
        [*filter(is_other, [tail] if tail else []), *evaluator.cheapest(is_other)]
    )
    others = [Choice(one, tuple(filter(one.issuperset, space.units))) for one in sets]
    timed = (
        {saved_alike(space.structure, first.choice.skipped): first.check}
        if first.check
        else {}
    )
    for choice in (first.choice, *others[:BESIDE]):
        outcome = (
            first
            if choice is first.choice
            else _outcome(choice, setting, budget, timed)
        )
        if outcome.met:
            kept = recovering.kept(space.plan(choice.skipped))
            found.append((kept, outcome))
            if kept >= recovering.least:
                break
    return max(found, key=lambda one: one[0])[1], len(found)


def _as_long_as(recovering: Recovering, choice: Choice, space: Space) -> Choice:
    """The longest beginning of a choice that keeps what is asked for, as halving finds
    it; else the shortest one.
    """
    order = choice.order
    begun = [names_in(order[: end + 1]) for end in range(len(order))]
    allowed = [number for number, skipped in enumerate(begun) if space.allows(skipped)]
    low, high = -1, len(allowed) - 1
    while low < high:
        middle = (low + high + 1) // 2
        keeps = recovering.kept(space.plan(begun[allowed[middle]])) >= recovering.least
        low, high = (middle, high) if keeps else (low, middle - 1)
    if not allowed:
        return choice
    last = allowed[max(low, 0)]
    return Choice(begun[last], order[: last + 1])


@dataclass(frozen=True)
class Outcome:
    """What was chosen, how fast it is where a speedup was asked for, and what was
    reached, where that is less.
    """

    choice: Choice
    check: SpeedCheck | None = None
    missed: str | None = None

    @property
    def met(self) -> bool:
        return self.missed is None


def choose_within(
    criterion: CriterionLike, setting: Setting, budget: Budget
) -> Outcome:
    """Choose what meets `budget`; where that costs more than its limit, what saves most
    within the limit.
    """

    def rise(outcome: Outcome) -> float:
        return setting.evaluator.cost(outcome.choice.skipped) - setting.evaluator.cost(
            frozenset()
        )

    if math.inf in (budget.limit, budget.target):
        return choose_as_fast(criterion, setting, budget)
    whole = choose_as_fast(
        criterion, setting.until(FIRST), replace(budget, limit=math.inf)
    )
    if (cost := rise(whole)) <= budget.limit:
        return whole
    within = _outcome(
        choose(criterion, setting, replace(budget, target=math.inf)),
        setting,
        budget,
        {},
    )
    if within.met:
        return within
    costs = (
        f"{_as_much(budget, whole.choice, whole.check)} costs {cost:.3f} nats on the"
        " text it was chosen by"
    )
    at = (
        f"{rise(within):.3f} nats it is {_as_much(budget, within.choice, within.check)}"
    )
    return replace(
        within, missed=f"{costs}; at {at}{'; the time was up' if setting.late else ''}"
    )


def choose_as_fast(
    criterion: CriterionLike, setting: Setting, budget: Budget
) -> Outcome:
    """Choose, for a speedup again by corrected times, until what is measured is as fast
    as asked for, and no more.

    Sets grow on a part of the text; swaps wait until the times hold; plans that leave
    as much are timed once.
    """
    if not isinstance(budget, SpeedBudget):
        return _outcome(choose(criterion, setting, budget), setting, budget, {})
    if not isinstance(
        setting.evaluator, AfterRepair
    ):  # a part of its text is too little to fit to
        setting = replace(
            setting, grown_on=SCREENED
        )  # swaps and corrected times may change it
    tried, timed, following = list[Outcome](), dict[Hashable, SpeedCheck](), budget
    stages = Stages(setting.progress, GROWING + SWAPPING + 2 * (TIMING + AGAIN))
    for asked, most in (
        (replace(setting, patience=0), CHOICES - 1),
        (setting, CHOICES),
    ):
        while len(tried) < most and not (tried and setting.late):
            left = stages.steps - stages.given - TIMING
            stage = stages.stage(
                left if asked.patience else AGAIN if tried else GROWING
            )
            asked = replace(asked, progress=_beside(stage, budget, tried))
            choice = choose(criterion, asked, following)
            if any(one.met and one.choice.skipped == choice.skipped for one in tried):
                break
            tried.append(
                outcome := _outcome(
                    choice,
                    replace(asked, progress=stages.stage(TIMING)),
                    following,
                    timed,
                )
            )
            assert outcome.check
            measured = outcome.check.measured_speedup
            if (
                outcome.met
                and measured.median - max(measured.error, MOST_ERROR * budget.faster)
                <= budget.faster
            ):
                break
            if (corrected := following.corrected(outcome.check)) is None:
                break
            following = corrected
    if met := [
        one for one in tried if one.met
    ]:  # the one that costs least, or else the fastest
        return min(met, key=lambda one: setting.evaluator.cost(one.choice.skipped))
    return max(
        tried, key=lambda one: one.check.measured_speedup.median if one.check else 0.0
    )


def _beside(progress: Progress, budget: Budget, tried: Sequence[Outcome]) -> Progress:
    """What tells of a choice, and how fast the last one was."""
    if not tried:
        return progress
    last = (
        f"{len(tried[-1].choice.skipped)} skipped were"
        f" {_as_much(budget, tried[-1].choice, tried[-1].check)}"
    )
    return lambda done, total, doing: progress(done, total, f"{doing}; {last}")


def _outcome(
    choice: Choice, setting: Setting, budget: Budget, timed: dict[Hashable, SpeedCheck]
) -> Outcome:
    """Whether a choice saves as much as `budget` asks for; timed for longer where a few
    rounds leave a large error.
    """
    check, is_met = None, budget.target == math.inf or budget.met(choice.skipped)
    if isinstance(budget, SpeedBudget):
        plan, error = setting.space.plan(choice.skipped), MOST_ERROR * budget.faster
        if (left := saved_alike(setting.space.structure, choice.skipped)) not in timed:
            timed[left] = check_times(
                setting.model,
                plan,
                budget.times,
                error=error,
                progress=setting.progress,
            )
        ms = budget.times.predicted_ms(plan)  # by these times, whenever it was timed
        check = timed[left].model_copy(
            update={"predicted_ms": ms, "predicted_speedup": budget.times.dense_ms / ms}
        )
        is_met = budget.reached(check)
    return Outcome(choice, check, None if is_met else _missed(budget, choice, check))


def _missed(budget: Budget, choice: Choice, check: SpeedCheck | None) -> str:
    """In words what a choice saves that is not what was asked for, or not for
    certain.
    """
    is_open = (
        check
        and isinstance(budget, SpeedBudget)
        and check.measured_speedup.median >= budget.faster
    )
    noise = (
        "; the times vary too much to tell: run it again on a quiet machine"
        if is_open
        else ""
    )
    return f"{_as_much(budget, choice, check)} is what was reached{noise}"


def _as_much(budget: Budget, choice: Choice, check: SpeedCheck | None) -> str:
    """In words what a choice saves, in the unit of the budget."""
    if check:
        return (
            f"{check.measured_speedup.median:.2f} ± {check.measured_speedup.error:.2f}"
            " times as fast"
        )
    return f"{budget.saved(choice.skipped):,.0f} of {budget.target:,.0f}"
