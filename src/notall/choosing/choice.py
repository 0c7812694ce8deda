"""Choose a plan as `notall search` does: what was evaluated is kept, and the speedup
asked for is the one measured.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import expect
from ..measuring.quality import evaluate
from ..models.texts import all_checked, checked
from ..models.windows import refuse_overlap
from ..plan import Plan
from ..progress import Progress, by_the_clock, silent
from ..results.facts import Footprint, Quality, SearchCost, SpeedCheck
from ..results.ledger import working_in
from ..running.skipping import footprint
from .budget import Budget
from .criteria import CriterionLike, Setting, criterion as criterion_of
from .evaluator import AfterRepair, Evaluator
from .in_prompts import WIDER, PromptRepair
from .objective import Objective, kl
from .outcomes import choose_within
from .recovering import Recovering, recovered
from .search_config import SearchConfig
from .space import Space, Unit


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
        before = round(self.dense_cost, 3) + 0.0  # which makes 0.000 of -0.000
        after = round(self.cost, 3) + 0.0
        missed = f"; {self.missed}" if self.missed else ""
        return (
            f"skip {self.plan}: {self.judged_by} {before:.3f} without the plan,"
            f" {after:.3f} with it; {self.forwards:,.1f} forward passes over the"
            f" text{missed}"
        )


def choose_plan(
    model: PreTrainedModel,
    criterion: CriterionLike,
    space: Space,
    budget: Budget,
    batches: Sequence[Tensor],
    objective: Objective | None = None,
    config: SearchConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> ChosenPlan:
    """What `criterion` skips of `space` to meet `budget`: a name such as "search", a
    function or a `Criterion`.

    `batches` are token ids, (batch, tokens) each, for criteria such as cosine. Without
    an `objective`, sets are judged by the KL to the original on `batches`. `config`
    says when the search ends, and what else judges what it finds. A folder `out` keeps
    evaluations, and the same call resumes. A plan for a speedup is timed, and chosen
    anew where it is too slow; with a limit too, where both cannot be met, it saves most
    within the limit (`missed`). Sets that a prompt alone skips are judged by what
    follows half of each sequence, or the prompt of the `objective`; after a repair the
    best of them are compared by the KL after a refit of keys and values, to which a
    limit applies.

    Raises `UsageError` for a folder that holds other work or is in use, a criterion
    that fails or does not suit the space, a budget that cannot be met, and held-out
    windows that overlap those that it is chosen by.
    """
    config = config or SearchConfig()
    expect(
        space, Space, "a notall.Space, such as Space(notall.locate(model), 'attention')"
    )
    expect(
        budget, Budget, "a budget, such as notall.choosing.budget.by_count(space, 3)"
    )
    expect(config, SearchConfig, "a notall.SearchConfig, such as SearchConfig(seed=1)")
    chosen_by = criterion_of(criterion)
    batches = all_checked(batches, model)
    held_out = [*checked(config.held_out, model)]
    is_of_prompts = space.phase == "prefill"
    if objective is None:
        half = batches[0].shape[1] // 2
        objective = kl(batches, prompt_tokens=half if is_of_prompts else None)
    expect(
        objective,
        Objective,
        "an objective, such as notall.choosing.objective.kl(batches)",
    )
    refuse_overlap(held_out, [*batches, *objective.windows], "the plan is chosen by")
    after_repair = config.after_repair
    recovering = config.recovering
    looked_at = budget  # with the limit that sets are looked at within
    if is_of_prompts and after_repair:
        repairing = PromptRepair.of(model, batches, objective.prompt_tokens)
        objective, after_repair = repairing.objective, False
        recovering = recovering or Recovering.after_repair(repairing, budget)
        if budget.target == math.inf:
            # a refit leaves less than the KL that is seen before it
            looked_at = replace(budget, limit=WIDER * budget.limit)
    folder = None if out is None else Path(out)
    with working_in(folder, "search"):
        plain = partial(Evaluator, model, objective, space=space)
        make = partial(AfterRepair, model, batches) if after_repair else plain
        evaluator = make(
            states_bytes=config.states_bytes,
            folder=folder,
            settings=config.provenance,
        )
        deadline = config.deadline_from(time.monotonic())
        setting = Setting(
            model,
            space,
            batches,
            evaluator,
            seed=config.seed,
            deadline=deadline,
            patience=config.patience,
            progress=by_the_clock(progress, deadline),
        )
        outcome = choose_within(chosen_by, setting, looked_at)
        spent = evaluator.spent  # for the choice, and not for the record
        note = f"{chosen_by.name} by {evaluator.judged_by}: {budget.description}"
        if recovering:
            outcome, addition = recovered(recovering, outcome, setting, budget)
            note += addition
        skipped = outcome.choice.skipped
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
