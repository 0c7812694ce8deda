"""Choose by each criterion, then score, ask and time all plans."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...entry_points import hash_of_source
from ...measuring.statistics import mean_and_error
from ...options import Workload
from ...plan import Plan, several
from ...progress import Progress, Stages, silent
from ...results.facts import SearchCost, Times
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ...results.record import RecordKey, is_number
from ...strict_json import Settings
from ..benchmarks import run_choice
from ..held_scores import UNREPAIRED, HeldScores, Scored, scored_as
from ..options.tasks import TaskChoice
from ..subject import Subject, time_plan
from .choosing import Choosing
from .options import AskedChoice, CalibratedObjective, check_runs
from .records import (
    GIVEN_PLAN,
    Answered,
    ComparisonRecord,
    PlanTimesRecord,
    own_weights_name,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ...evaluation.harness import TaskResult
    from ...evaluation.tasks import Job


@dataclass(frozen=True)
class Measuring:
    """What is measured of each plan that is chosen, and which plans join them.

    With `repairs` each plan is measured once more for each of them, repaired with
    batches of `repair_text`. The `given` plans are called by their names. With
    `prompt_tokens` all are scored behind so many tokens of each sequence, which plans
    with a prefill part need.
    """

    tasks: TaskChoice = TaskChoice(None, ())
    workload: Workload | None = None
    repairs: Sequence[str] = ()
    repair_text: Sequence[Tensor] = ()
    given: Mapping[str, Plan] = field(default_factory=dict)
    prompt_tokens: int | None = None

    @property
    def methods(self) -> list[str]:
        """Each of the repairs once, without none."""
        return [name for name in dict.fromkeys(self.repairs) if name != UNREPAIRED]

    @property
    def repaired(self) -> list[tuple[str, Plan]]:
        """The given plans that bring weights, by their names."""
        return [one for one in self.given.items() if one[1].state == "repaired"]

    def scored_as(self, plan: Plan, repair: str = UNREPAIRED) -> Scored:
        """What held-out scores of a plan are kept by."""
        return scored_as(plan, repair, self.prompt_tokens)


def compare_criteria(
    subject: Subject,
    runs: Sequence[AskedChoice],
    objectives: Mapping[str, CalibratedObjective],
    how: Measuring = Measuring(),
    *,
    progress: Progress = silent,
) -> list[ComparisonRecord]:
    """Choose as `runs` say, then score, ask and time all plans; one record a run. The
    subject's text is held out.

    Behind them come the given plans; one with weights as it is, and as it was without
    them. Repaired plans are behind the run's own. Goes on where it stopped. Raises
    `UsageError` when the folder holds work of other settings, and as `choose` does.
    """
    from ...choosing.criteria import criterion

    check_runs(subject.model, runs, how.workload)
    check_given(subject.model, how.given.values())
    jobs, about = how.tasks.jobs(), Provenance.of(subject.provenance, seed=subject.seed)
    if how.prompt_tokens:
        about = Provenance.of(about, prompt_tokens=how.prompt_tokens)
    costs = {run: criterion(run.criterion).cost(run.space, run.count) for run in runs}
    choosing = sum(costs.values()) or 1.0
    repairing = 0.3 * choosing * len(how.methods)
    # what is measured takes half as much again
    stages = Stages(progress, 1.5 * choosing + repairing)
    with working_in(subject.out, "compare"):
        asked = [(run, stages.stage(cost)) for run, cost in costs.items()]
        choices: list[Answered] = [*Choosing(subject, objectives, about).choices(asked)]
        choices += [_answer(name, plan) for name, plan in how.given.items()]
        comparison = _Comparison(subject, how, about, choices)
        comparison.score(stages.stage(0.3 * choosing))
        added = comparison.repair(stages.stage(repairing))
        answering, timing = stages.stage(0.1 * choosing), stages.stage(0.1 * choosing)
        answers = comparison.ask(jobs, answering)
        times = comparison.time(timing)
        records = [
            comparison.record(row, added, answers, times) for row in comparison.rows
        ]
        found = comparison.ranked(records)
        compared = f"compared {several(len(records), 'choice')}"
        progress(stages.steps, stages.steps, compared)
        return found


class _Row(NamedTuple):
    """A choice, its repair, and the plan that tasks are asked of."""

    choice: Answered
    repair: str
    asked: Plan


class _Comparison:
    """All that is measured of the plans of `choices`, each kept in the folder."""

    def __init__(
        self,
        subject: Subject,
        how: Measuring,
        about: Provenance,
        choices: Sequence[Answered],
    ) -> None:
        self.subject, self.how, self.about, self.choices = subject, how, about, choices
        self.plans = list(dict.fromkeys(choice.plan for choice in choices))
        scores_about = Provenance.of(about, held_out_tokens=subject.tokens)
        self.held = HeldScores(subject, scores_about)
        self.fingerprint = subject.structure.fingerprint

    @property
    def rows(self) -> list[_Row]:
        """Each choice as it is, after each repair, and with weights of its own."""
        rows: list[_Row] = []
        for choice in self.choices:
            for repair in (UNREPAIRED, *self.how.methods):
                rows.append(_Row(choice, repair, choice.plan))
            for name, plan in self.how.repaired:
                if name == choice.criterion:
                    rows.append(_Row(choice, own_weights_name(plan.digest), plan))
        return rows

    def score(self, progress: Progress) -> None:
        """Each plan on the held-out text, and the given ones with their weights."""
        scored = {self.how.scored_as(plan): plan for plan in (Plan(), *self.plans)}
        for _, plan in self.how.repaired:
            scored[self.how.scored_as(plan, own_weights_name(plan.digest))] = plan
        self.held.measure(scored, "scoring plans on held-out text", progress)

    def repair(self, progress: Progress) -> dict[tuple[str, Plan], int]:
        """By repair and plan the bytes added at run time; scores are held, and repaired
        weights of one plan at a time.
        """
        from ...repairing.methods import kept_repair

        model, folder = self.subject.model, self.subject.out / "repairs"
        found: dict[tuple[str, Plan], int] = {}
        for done, plan in enumerate(self.plans):
            scored: dict[Scored, Plan] = {}
            for name in self.how.methods:
                progress(done, len(self.plans), f"{name} of {plan}")
                repaired, *_ = kept_repair(
                    folder, name, model, plan, self.how.repair_text
                )
                scored[self.how.scored_as(plan, name)] = repaired
                found[name, plan] = repaired.added_bytes
            self.held.measure(scored, f"scoring repairs of {plan}")
        return found

    def ask(self, jobs: Sequence[Job], progress: Progress) -> list[TaskResult]:
        """What each plan scores on the tasks."""
        asked = [*self.plans, *(plan for _, plan in self.how.repaired)]
        return run_choice(
            self.subject.model,
            self.subject.tokenizer,
            asked,
            jobs,
            self.how.tasks,
            folder=self.subject.out / "answers",
            progress=progress,
        )

    def time(self, progress: Progress) -> dict[Plan, Times]:
        """Of each plan, where a workload is timed."""
        if not self.how.workload:
            return {}
        return shared_times(
            self.subject, self.plans, self.how.workload, self.about, progress
        )

    def record(
        self,
        row: _Row,
        added: Mapping[tuple[str, Plan], int],
        answers: Sequence[TaskResult],
        times: Mapping[Plan, Times],
    ) -> ComparisonRecord:
        """All that was measured of a row."""
        from ...running.skipping import footprint

        plan, added_bytes = row.choice.plan, added.get((row.repair, row.choice.plan), 0)
        facts: Settings = {}
        if row.repair != UNREPAIRED:
            facts = {"repair": row.repair, "added_bytes": added_bytes}
        is_own = row.repair not in self.how.methods
        functions = (
            {}
            if row.choice.space == GIVEN_PLAN
            else hash_of_source(row.choice.criterion)
        )
        return ComparisonRecord.from_fact(
            row.choice,
            **facts,
            quality=self.held.quality(self.how.scored_as(plan, row.repair)),
            footprint=footprint(self.subject.model, plan),
            tasks=tuple(
                one.score for one in answers if one.plan == row.asked and is_own
            ),
            # what adds matrices takes other times
            times=None if added_bytes else times.get(plan),
            provenance=Provenance.of(
                self.about, fingerprint=self.fingerprint, **functions
            ),
        )

    def ranked(self, rows: Sequence[ComparisonRecord]) -> list[ComparisonRecord]:
        """The same, with how far each is behind the best of as many of the same space,
        repaired alike; what is new of these is written down.
        """
        kept = Ledger(self.subject.out, ComparisonRecord)
        asked = {record.key for record in rows}
        every = [*rows, *(record for record in kept if record.key not in asked)]
        behind = self._behind(every)
        for place, record in enumerate(every):
            more, error = behind.get(record.key, (math.nan, math.nan))
            update = {"behind": more, "behind_se": error}
            every[place] = record.model_copy(update=update)
        kept.renew(every)
        return every[: len(rows)]

    def _behind(
        self, records: Iterable[ComparisonRecord]
    ) -> dict[RecordKey, tuple[float, float]]:
        """Of each but the best of its group how much more it loses, with the error."""

        def scores(one: ComparisonRecord) -> Scored:
            return self.how.scored_as(one.plan, one.repair)

        groups: dict[RecordKey, list[ComparisonRecord]] = {}
        for record in records:
            if is_number(record.quality.delta_nll) and self.held.has(scores(record)):
                # each given plan has weights of its own, or none
                repair = "" if record.is_given else record.repair
                groups.setdefault((*record.group, repair), []).append(record)
        behind: dict[RecordKey, tuple[float, float]] = {}
        for group in groups.values():
            best, *others = sorted(group, key=lambda one: one.quality.delta_nll)
            least = self.held.scores(scores(best)).nll
            for one in others:
                own = self.held.scores(scores(one)).nll
                behind[one.key] = mean_and_error([a - b for a, b in zip(own, least)])
        return behind


def check_given(model: PreTrainedModel, plans: Iterable[Plan]) -> None:
    """Raise `UsageError` for a plan, or a repair, of another model."""
    from ...running.repaired import RepairedPlan
    from ...structure.locating import locate

    for plan in plans:
        plan.check(locate(model))
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(model)


def _answer(name: str, plan: Plan) -> Answered:
    """A plan of a file as what a criterion of its name would have answered."""
    return Answered(
        plan=plan.unrepaired,
        criterion=name,
        objective="",
        space=GIVEN_PLAN,
        count=len(plan) + len(plan.prefill),
        order=(),
        calibration_tokens=0,
        spent=SearchCost(),
        forwards=0.0,
    )


def shared_times(
    subject: Subject,
    plans: Sequence[Plan],
    workload: Workload,
    about: Provenance,
    progress: Progress,
) -> dict[Plan, Times]:
    """Of each plan, in turn with the original model; plans that leave as much of each
    kind are timed once.
    """
    from ...running.skipping import footprint

    about = Provenance.of(about, workload=asdict(workload))
    held = Ledger(subject.out, PlanTimesRecord, about)
    found = {}
    for done, plan in enumerate(plans):
        left = footprint(subject.model, plan)
        in_prompt = " ".join(plan.prefill.marked_names)
        if (left, in_prompt) not in held:
            progress(done, len(plans), f"timing {plan}")
            times = time_plan(subject, plan, workload)
            more = {"in_prompt": in_prompt} if in_prompt else {}
            held.add(
                PlanTimesRecord(footprint=left, times=times, **more, provenance=about)
            )
        found[plan] = held[left, in_prompt].times
    return found
