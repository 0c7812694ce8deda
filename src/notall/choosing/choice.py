"""Choose a plan as `notall search` does: with a record of what was evaluated, so that it goes on when asked again."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..measuring.quality import Quality, evaluate
from ..progress import Progress, silent
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.record import QualityFields
from ..records.search import SearchRecord, SpeedCheck, Weighed
from ..running.footprint import Footprint, footprint
from ..structure.token_ids import all_checked, checked
from .after_repair import AfterRepair
from .budget import Budget
from .criteria import Setting, Way
from .criteria import criterion as criterion_of
from .evaluator import STATES_BYTES, Evaluator, Spent
from .joint import choose_within
from .latency import Prediction
from .objective import Objective, kl
from .searching import PATIENCE
from .space import Space, Unit


@dataclass(frozen=True)
class ChosenPlan:
    """A plan, the objective without and with it, what it took, and the order in which it came to be.

    `forwards` is `spent.executions` in dense forward passes over the calibration text; `in_time` says whether it was
    found before the time was up, and `missed`, where the plan is not what was asked for, what was reached. `times`
    are predicted and measured where a speedup was asked for; `weighed` is what the dense model and the plan weigh.
    """

    plan: Plan
    order: tuple[Unit, ...]
    dense_cost: float
    cost: float
    spent: Spent
    forwards: float
    in_time: bool
    held_out: tuple[Quality, Quality] | None = None  # dense, skipped
    times: Prediction | None = None
    missed: str | None = None
    weighed: tuple[Footprint, Footprint] | None = None  # likewise
    judged_by: str = "objective"

    def __str__(self) -> str:
        before, after = (round(cost, 3) + 0.0 for cost in (self.dense_cost, self.cost))  # none is -0.000
        return (
            f"skip {self.plan}: {self.judged_by} {before:.3f} without the plan, {after:.3f} with it; "
            f"{self.forwards:,.1f} forward passes over the text" + (f"; {self.missed}" if self.missed else "")
        )

    def record(self, about: Provenance) -> SearchRecord:
        """The record that is stored: the choice, what it took, and its measurements."""
        return SearchRecord(
            plan=self.plan,
            chosen=self.plan.note or "",
            order=tuple(tuple(unit) for unit in self.order),
            dense_cost=self.dense_cost,
            cost=self.cost,
            **vars(self.spent),
            forwards=self.forwards,
            in_time=self.in_time,
            missed=self.missed,
            quality=QualityFields(**asdict(self.held_out[1])) if self.held_out else None,
            check=_speed_check(self.times) if self.times else None,
            weighed=_weighed(*self.weighed) if self.weighed else None,
            provenance=about,
        )


def keep_choice(folder: Path, record: SearchRecord) -> None:
    """Write a choice into `folder`, unless the same one is there. Raises `UsageError` as `Ledger` does."""
    with working_in(folder, "search"):
        kept = Ledger(folder, SearchRecord)
        if record.key not in kept:
            kept.add(record)


def check_minutes(most: float | None) -> None:
    """Raise `UsageError` for a time that is none."""
    if most is not None and not most >= 0:
        raise UsageError(f"the search cannot end after {most} minutes: give 0 or more")


def _weighed(dense: Footprint, left: Footprint) -> Weighed:
    return Weighed(
        weight_bytes=left.weight_bytes,
        dense_weight_bytes=dense.weight_bytes,
        kv_bytes_per_token=left.kv_bytes_per_token,
        dense_kv_bytes_per_token=dense.kv_bytes_per_token,
    )


def _speed_check(times: Prediction) -> SpeedCheck:
    speedup = times.measured_speedup
    return SpeedCheck(
        predicted_ms=times.predicted_ms,
        measured_ms=times.measured_ms,
        predicted_speedup=times.predicted_speedup,
        speedup=speedup.median,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        off=times.off,
    )


def choose_plan(
    model: PreTrainedModel,
    criterion: Way,
    space: Space,
    budget: Budget,
    batches: Sequence[Tensor],
    objective: Objective | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    settings: Provenance | Mapping[str, Any] | None = None,
    max_minutes: float | None = None,
    patience: int = PATIENCE,
    seed: int = 0,
    states_bytes: int = STATES_BYTES,
    held_out: Sequence[Tensor] = (),
    after_repair: bool = False,
    progress: Progress = silent,
) -> ChosenPlan:
    """What `criterion` skips of `space` to meet `budget`: a name such as "search", a function or a `Criterion`.

    `batches` are token ids, (batch, tokens) each, which criteria such as cosine read. The `objective` brings its own
    text, mostly the same: without one, sets are judged by the KL to the dense model on `batches`. With a `folder` each
    evaluation is kept in it, and repeating the call resumes an interrupted run; `settings` identify the run, and a
    folder of another one is refused. With `max_minutes` the search ends with the best it has then, and with `patience`
    after so many evaluations that did not lower the objective. A plan for a speedup is timed, and chosen anew where it
    is too slow; where a budget has a limit too, the plan that saves most within it is the answer if both cannot be met,
    and `missed` says so. The plan is then measured on `held_out`, where given. With `after_repair` sets are judged by
    the KL that a cheap repair leaves on half of the sequences, to which it was not fitted, whatever the objective.

    Raises `UsageError` when the folder holds other work or is in use, for a criterion that fails or does not suit the
    space, and for a budget that cannot be met.
    """
    check_minutes(max_minutes)
    expect(space, Space, "a notall.Space, such as Space(notall.locate(model), 'attention')")
    expect(budget, Budget, "a budget, such as notall.choosing.budget.by_count(space, 3)")
    way, batches, held_out = criterion_of(criterion), all_checked(batches, model), [*checked(held_out, model)]
    objective = kl(batches) if objective is None else objective
    expect(objective, Objective, "an objective, such as notall.choosing.objective.kl(batches)")
    folder = None if folder is None else Path(folder)
    with working_in(folder, "search") if folder else nullcontext():
        if after_repair:
            evaluator: Evaluator = AfterRepair(
                model, batches, states_bytes=states_bytes, folder=folder, settings=settings
            )
        else:
            evaluator = Evaluator(model, objective, states_bytes=states_bytes, folder=folder, settings=settings)
        deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else float("inf")
        setting = Setting(model, space, batches, evaluator, seed, deadline, patience, progress)
        outcome = choose_within(way, setting, budget)
        chosen = outcome.chosen
        spent = Spent(**vars(evaluator.spent))
        dense, cost = evaluator.cost(frozenset()), evaluator.cost(chosen.skipped)  # for the record, not for the choice
    plan = space.plan(chosen.skipped, f"{way.name} by {evaluator.judged_by}: {budget.description}")
    return ChosenPlan(
        plan,
        chosen.order,
        dense,
        cost,
        spent,
        spent.executions / evaluator.forward,
        not setting.late,
        tuple(evaluate(model, [Plan(), plan], held_out)) if held_out else None,  # type: ignore[arg-type]
        outcome.check,
        outcome.missed,
        (footprint(model, Plan()), footprint(model, plan)),
        evaluator.judged_by,
    )
