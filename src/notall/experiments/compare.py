"""Criteria side by side: what each skips at each budget, what that costs on held-out
text, and what it took to find.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ..digests import digest_of
from ..entry_points import source_of
from ..errors import UsageError, shortened
from ..extras import FIGURES, installed, need
from ..files import write_whole
from ..measuring.statistics import mean_and_error
from ..options import Workload, option
from ..plan import SET_NAMES, Plan, refuse_prefill, several, several_of
from ..progress import Progress, Stages, silent
from ..results.facts import (
    DECODE_MS,
    PREFILL_MS,
    QUALITY,
    SPEEDUPS,
    Footprint,
    SearchCost,
    TaskScore,
    Times,
)
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import (
    Amount,
    Count,
    Key,
    Number,
    Record,
    Scalar,
    Skips,
    SublayerName,
    SublayerNames,
    Unsigned,
    is_number,
)
from ..results.repairs import EvaluationRecord
from ..results.table import (
    Column,
    Table,
    as_csv,
    as_latex,
    number,
    size,
    table,
    with_delta,
    with_error,
    within,
    words,
)
from ..strict_json import Settings
from .driver import (
    UNREPAIRED,
    HeldScores,
    RepairName,
    Scored,
    Subject,
    run_choice,
    scored_as,
    time_plan,
)
from .folder import Card, Figure, Folder, Section, Shown
from .options import SkipAmount, TaskChoice, Words, read_plans, space_of
from .pages import MeasuredPlan, points_of, results, shown_plans
from .repair import REFIT
from .search import tasks_of
from .verdict import is_usable, next_command, on_the_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..charts.losses import Point
    from ..choosing.criteria import UnitScores
    from ..choosing.objective import Objective
    from ..choosing.space import Space
    from ..running.repaired import RepairedPlan


class Answered(Skips):
    """What one criterion chose, going by an objective, to skip so many of a space; and
    what that took.
    """

    criterion: str = Field(description="the way to choose")
    objective: str = Field(description="the objective that it goes by")
    space: str = Field(description="what it chooses among")
    count: Count = Field(description="how many it skips")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in order of choosing"
    )
    calibration_tokens: Count = Field(description="of the text that was chosen by")
    spent: SearchCost
    forwards: Amount = Field(
        description="executions in dense forward passes over that text"
    )
    calibration_delta: Number = Field(
        math.nan, description="the objective's rise on that text, where it is known"
    )


RUN = ("criterion", "objective", "space", "count")
SKIP = "attention:4,8"  # by default
GIVEN = "given plan"  # what plans of files are among
COMMAND = ["notall", "compare"]
ALIKE = (
    "revision",
    "dtype",
    "seed",
    "text_sha256",
    "held_out_sha256",
    "length",
    "sequences",
)  # where they are joined


class ChoiceRecord(Record, Answered, kind="choice", key=RUN):
    """What one run chose."""


class PlanTimesRecord(Record, kind="plan_times", key=("footprint", "in_prompt")):
    """The times of a plan; plans that leave as much of a model take as long, and are
    timed once.
    """

    footprint: Footprint
    in_prompt: SublayerNames = Field(
        "", description="what only the prompt skips, which no footprint tells"
    )
    times: Times


class ComparisonRecord(
    MeasuredPlan, Record, Answered, kind="comparison", key=(*RUN, "repair")
):
    """One choice, measured on the held-out text; once more for each way that made up
    for what it skips.
    """

    repair: RepairName = Field(
        UNREPAIRED, description="what made up for what is skipped"
    )
    behind: Number = Field(
        math.nan,
        description="NLL beyond that of the least, of as many and repaired alike",
    )
    behind_se: Unsigned = Field(
        math.nan, description="its standard error, paired by window of text"
    )
    added_bytes: Count = Field(
        0, description="of matrices that the repair keeps at run time"
    )
    tasks: tuple[TaskScore, ...] = ()
    folder: str | None = Field(
        None, exclude=True, description="where it was joined from"
    )

    @property
    def is_given(self) -> bool:
        """Whether it is of a plan in a file, and nothing was chosen."""
        return self.space == GIVEN

    @property
    def group(self) -> tuple[str, int]:
        """What it stands beside: as many of the same space, or the other plans that
        were given.
        """
        return self.space, 0 if self.is_given else self.count

    @property
    def among(self) -> str:
        """Its group in words."""
        return (
            "plans that were given"
            if self.is_given
            else several_of(self.space, self.count)
        )

    @property
    def run(self) -> Key:
        return self.key[: len(RUN)]

    @property
    def way(self) -> str:
        """Such as `search by kl, refit`."""
        return self.chosen_by + (
            f", {self.repair}" if self.repair != UNREPAIRED else ""
        )

    @property
    def chosen_by(self) -> str:
        """What evaluates nothing but the original model goes by no objective."""
        return self.criterion + (f" by {self.objective}" if self.by_objective else "")

    @property
    def by_objective(self) -> bool:
        return self.spent.evaluations > 1

    @property
    def name(self) -> str:
        return (
            self.way
            if self.is_given
            else f"{self.way}: {several_of(self.space, self.count)}"
        )

    def figures(self) -> dict[str, Scalar]:
        return super().figures() | {
            f"{name_of(one)} {field}": value
            for one in self.tasks
            for field, value in (
                ("value", one.value),
                ("delta", one.delta),
                ("delta_se", one.delta_se),
            )
            if is_number(value)
        }


def name_of(score: TaskScore) -> str:
    """Of a task and its metric, in a heading."""
    return f"{score.task} {score.metric.partition(',')[0]}"


BEHIND: Column[ComparisonRecord] = with_error(
    "behind the best", lambda one: (one.behind, one.behind_se)
)
FORWARDS: Column[ComparisonRecord] = number(
    "forward passes", lambda one: one.forwards, ",.1f"
)
CHOSEN: tuple[Column[ComparisonRecord], ...] = (
    words("criterion", lambda one: one.criterion),
    words("by", lambda one: one.objective if one.by_objective else ""),
    words("among", lambda one: one.space),
    words(
        "count", lambda one: one.count
    ),  # a part of the question: no answer that a narrow terminal would end with
)


def columns_of(
    records: Sequence[ComparisonRecord],
) -> tuple[Column[ComparisonRecord], ...]:
    """The columns of a comparison; those of the tasks of `records` follow the quality.

    Milliseconds are among them where a plan skips in the prompt alone: to the first
    token, and of each further one.
    """
    of_prompt = any(one.plan.prefill for one in records)
    return (
        *CHOSEN,
        words("folder", lambda one: one.folder),
        words("repair", lambda one: one.repair if one.repair != UNREPAIRED else ""),
        *within(QUALITY, lambda one: one.quality),
        *(with_delta(name, partial(_compared, name)) for name in _tasks_of(records)),
        BEHIND,
        size("added", lambda one: one.added_bytes or None),
        *within(SPEEDUPS, lambda one: one.times),
        *(within((PREFILL_MS, DECODE_MS), lambda one: one.times) if of_prompt else ()),
        number("evaluations", lambda one: one.spent.evaluations, ",d"),
        FORWARDS,
        number("CPU s", lambda one: one.spent.seconds, ",.1f"),
        number("wall s", lambda one: one.spent.wall_seconds or None, ",.1f"),
        number("on the text it chose by", lambda one: one.calibration_delta, "+.3f"),
        number(
            "calibration tokens",
            lambda one: one.calibration_tokens if one.spent.evaluations else None,
            ",d",
        ),
    )


def _compared(name: str, record: ComparisonRecord) -> tuple[float, float, float] | None:
    return next(
        (
            (one.value, one.delta, one.delta_se)
            for one in record.tasks
            if name_of(one) == name
        ),
        None,
    )


def _tasks_of(records: Sequence[ComparisonRecord]) -> list[str]:
    return list(dict.fromkeys(name_of(score) for one in records for score in one.tasks))


@dataclass(frozen=True)
class CompareOptions:
    """Which criteria choose how many of what, going by which objectives, and what makes
    up for it.
    """

    PANEL: ClassVar = "What is compared"

    skip: Words = option(
        (),
        "attention, mlp, block, period, sublayer or portable, and counts; repeat it"
        f" for more (default: {SKIP}, if no plan is given)",
        metavar="KIND:COUNT[,...]",
    )
    plan: tuple[Path, ...] = option(
        (),
        "also compare this plan file, folder of a repair, or published:NAME; repeat it"
        " for more",
    )
    criterion: Words = option(
        (),
        "a name of `notall criteria`, or module:function; repeat it for more (default:"
        " all)",
    )
    objective: Words = option(
        ("kl",),
        "nll, kl, answers, task:NAME, or a sum; repeat it for more",
        (),
        "OBJECTIVE",
    )
    repair: Words = option(
        (),
        "also judge plans after a repair with --text: refit, replaceme, prune-and-comp,"
        " nbl, ghosted, or your own module:function; repeat it for more",
    )
    keep_first: bool = option(False, "preserve the first layer", ("--keep-first",))
    keep_last: bool = option(False, "preserve the last layer", ("--keep-last",))
    prompts: Path | None = option(
        None, "prompts of the objective `answers`: one a line, or a .jsonl"
    )

    def check(self) -> list[str]:
        """The tasks of the harness that objectives go by. Raises `UsageError` for what
        is refused without a model.
        """
        from ..choosing.criteria import criterion
        from ..repairing.methods import method

        need(*(module for name in self.criterion for module in criterion(name).needs))
        for name in self.repair:
            method(name)
            for plan in self.given.values() if name not in (REFIT, UNREPAIRED) else ():
                refuse_prefill(plan, f"a repair by {name}")
        for amount in self.amounts:
            if not amount.amounts or any(one < 1 or one % 1 for one in amount.amounts):
                raise UsageError(
                    f"--skip {shortened(amount)} is no kind and counts: write"
                    " attention:4,8"
                )
        return tasks_of(self.objective, self.prompts)

    @property
    def amounts(self) -> list[SkipAmount]:
        return [
            SkipAmount.parse(text)
            for text in self.skip or (() if self.plan else (SKIP,))
        ]

    @cached_property
    def given(self) -> dict[str, Plan]:
        """The plans of files, by their names. Raises `UsageError` as `read_plans`
        does.
        """
        return read_plans(self.plan)

    def prompt_of(self, length: int) -> int | None:
        """Half of each window of `length`, where a given plan skips in the prompt
        alone; else None: all is scored.

        Raises `UsageError` where nothing would be skipped in so short a prompt.
        """
        skips = [plan.prefill for plan in self.given.values() if plan.prefill]
        if not skips:
            return None
        whole = max(one.last_tokens for one in skips)
        if length // 2 <= whole:
            told = (
                f"half of a window of {length} tokens is the prompt, whose last {whole}"
                " run whole"
            )
            raise UsageError(f"{told}: give a --length of {2 * whole + 2} or more")
        return length // 2

    def runs(self, model: PreTrainedModel) -> list[Run]:
        """What is to be chosen. Raises `UsageError` where there is nothing of a kind to
        choose among.
        """
        from ..choosing.criteria import every_criterion

        every = [
            name
            for name, one in every_criterion().items()
            if installed(*one.needs) and one.fits(model)
        ]
        ends = self.keep_first, self.keep_last
        spaces = [
            (space_of(model, one.kind, *ends), [*map(int, one.amounts)])
            for one in self.amounts
        ]
        return runs_of(self.criterion or every, self.objective, spaces)

    def objectives(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batches: Sequence[Tensor],
        tasks: TaskChoice,
    ) -> dict[str, CalibratedObjective]:
        """By their names; those of tasks have as many documents as --limit says, or a
        hundred.
        """
        from ..choosing.objective import build_objective

        build = partial(
            build_objective,
            prompts=self.prompts,
            task_path=tasks.shelf,
            task_limit=tasks.questions,
        )
        return {
            name: CalibratedObjective(build(name, model, tokenizer, batches), batches)
            for name in self.objective
        }


@dataclass(frozen=True)
class CalibratedObjective:
    """What a criterion goes by: an objective, and the calibration text, (batch, tokens)
    token ids each.
    """

    objective: Objective
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """What `criterion` skips, going by the objective of this name, to skip `count` of
    `space`.
    """

    criterion: str
    objective: str
    space: Space
    count: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.criterion, self.objective, str(self.space), self.count

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key))


def runs_of(
    criteria: Sequence[str],
    goals: Sequence[str],
    spaces: Sequence[tuple[Space, Sequence[int]]],
) -> list[Run]:
    """Every criterion at every count of every space that it can choose from; by each
    objective where it goes by one.
    """
    from ..choosing.criteria import criterion, suits

    return [
        Run(name, objective, space, count)
        for space, counts in spaces
        for name in criteria
        for objective in (goals if criterion(name).reads == "objective" else goals[:1])
        for count in counts
        if suits(name, space)
    ]


def check_runs(
    model: PreTrainedModel, runs: Sequence[Run], workload: Workload | None
) -> None:
    """Raise `UsageError` for what cannot be skipped or timed, before any text is
    read.
    """
    from ..choosing.budget import by_count

    if workload:
        workload.check(model)
    for run in runs:
        by_count(run.space, run.count)


def compare_criteria(
    subject: Subject,
    runs: Sequence[Run],
    objectives: Mapping[str, CalibratedObjective],
    *,
    tasks: TaskChoice = TaskChoice(None, ()),
    workload: Workload | None = None,
    repairs: Sequence[str] = (),
    repair_text: Sequence[Tensor] = (),
    given: Mapping[str, Plan] = MappingProxyType({}),
    prompt_tokens: int | None = None,
    progress: Progress = silent,
) -> list[ComparisonRecord]:
    """Choose as `runs` say, then score, ask and time all plans; one record a run. The
    subject's text is held out.

    Behind them come the `given` plans, by their names; one with weights as it is, and
    as it was without them. With `repairs`, one more for each of them, behind the run's
    own: its plan, repaired with batches of `repair_text`. With `prompt_tokens` all are
    scored behind so many tokens of each sequence, which plans with a prefill part need.
    Goes on where it stopped. Raises `UsageError` when the folder holds work of other
    settings, and as `choose` does.
    """
    from ..choosing.criteria import criterion
    from ..running.skipping import footprint

    ways = [name for name in dict.fromkeys(repairs) if name != UNREPAIRED]
    check_runs(subject.model, runs, workload)
    check_given(subject.model, given.values())
    jobs, about = tasks.jobs(), Provenance.of(subject.provenance, seed=subject.seed)
    if prompt_tokens:
        about = Provenance.of(about, prompt_tokens=prompt_tokens)
    source = Provenance.of(about, fingerprint=subject.structure.fingerprint)
    costs = {run: criterion(run.criterion).cost(run.space, run.count) for run in runs}
    repaired_in = 0.3 * (chosen_in := sum(costs.values()) or 1.0) * len(ways)
    stages = Stages(
        progress, 1.5 * chosen_in + repaired_in
    )  # what is measured takes half as much again
    with working_in(subject.out, "compare"):
        asked = [(run, stages.stage(cost)) for run, cost in costs.items()]
        choices: list[Answered] = [
            *_Choosing(subject, objectives, about).choices(asked)
        ]
        choices += [_answer(name, plan) for name, plan in given.items()]
        plans = list(dict.fromkeys(choice.plan for choice in choices))
        own = [(name, plan) for name, plan in given.items() if plan.state == "repaired"]
        held = HeldScores(subject, Provenance.of(about, held_out_tokens=subject.tokens))
        scored = {
            scored_as(plan, UNREPAIRED, prompt_tokens): plan
            for plan in (Plan(), *plans)
        }
        scored |= {
            scored_as(plan, own_weights(plan), prompt_tokens): plan for _, plan in own
        }
        held.measure(
            scored, "scoring plans on held-out text", stages.stage(0.3 * chosen_in)
        )
        added = _repaired(
            subject,
            plans,
            ways,
            repair_text,
            held,
            stages.stage(repaired_in),
            prompt_tokens,
        )
        answering, timing = stages.stage(0.1 * chosen_in), stages.stage(0.1 * chosen_in)
        asked_of = [*plans, *(plan for _, plan in own)]
        answers = run_choice(
            subject.model,
            subject.tokenizer,
            asked_of,
            jobs,
            tasks,
            folder=subject.out / "answers",
            progress=answering,
        )
        rows: list[tuple[Answered, str, Plan]] = []  # with what tasks are asked of it
        for choice in choices:
            rows += [(choice, repair, choice.plan) for repair in (UNREPAIRED, *ways)]
            rows += [
                (choice, own_weights(plan), plan)
                for name, plan in own
                if name == choice.criterion
            ]
        times = (
            shared_times(subject, plans, workload, about, timing) if workload else {}
        )
        records = [
            ComparisonRecord.from_fact(
                choice,
                **_repair_facts(repair, added.get((repair, choice.plan), 0)),
                quality=held.quality(scored_as(choice.plan, repair, prompt_tokens)),
                footprint=footprint(subject.model, choice.plan),
                tasks=tuple(
                    one.score
                    for one in answers
                    if one.plan == asked_plan and repair not in ways
                ),
                # What adds matrices takes other times.
                times=(
                    None if added.get((repair, choice.plan)) else times.get(choice.plan)
                ),
                provenance=Provenance.of(
                    source,
                    **({} if choice.space == GIVEN else source_of(choice.criterion)),
                ),
            )
            for choice, repair, asked_plan in rows
        ]
        found = _done(
            records, Ledger(subject.out, ComparisonRecord), held, prompt_tokens
        )
        progress(
            stages.steps, stages.steps, f"compared {several(len(records), 'choice')}"
        )
        return found


def check_given(model: PreTrainedModel, plans: Iterable[Plan]) -> None:
    """Raise `UsageError` for a plan, or a repair, of another model."""
    from ..running.repaired import RepairedPlan
    from ..structure.locating import locate

    for plan in plans:
        plan.check(locate(model))
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(model)


def own_weights(plan: Plan) -> str:
    """What a repair that a plan brings is called: by its weights."""
    return f"own-{plan.digest[:8]}"


def _answer(name: str, plan: Plan) -> Answered:
    """A plan of a file as what a criterion of its name would have answered."""
    return Answered(
        plan=plan.unrepaired,
        criterion=name,
        objective="",
        space=GIVEN,
        count=len(plan) + len(plan.prefill),
        order=(),
        calibration_tokens=0,
        spent=SearchCost(),
        forwards=0.0,
    )


def _repair_facts(repair: str, added: int) -> Settings:
    return {"repair": repair, "added_bytes": added} if repair != UNREPAIRED else {}


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
    from ..running.skipping import footprint

    about = Provenance.of(about, workload=asdict(workload))
    held = Ledger(subject.out, PlanTimesRecord, about)
    found = {}
    for done, plan in enumerate(plans):
        left, in_prompt = (
            footprint(subject.model, plan),
            " ".join(plan.prefill.marked_names),
        )
        if (left, in_prompt) not in held:
            progress(done, len(plans), f"timing {plan}")
            times = time_plan(subject, plan, workload)
            more = {"in_prompt": in_prompt} if in_prompt else {}
            held.add(
                PlanTimesRecord(footprint=left, times=times, **more, provenance=about)
            )
        found[plan] = held[left, in_prompt].times
    return found


def _repaired(
    subject: Subject,
    plans: Sequence[Plan],
    ways: Sequence[str],
    text: Sequence[Tensor],
    held: HeldScores,
    progress: Progress,
    prompt_tokens: int | None = None,
) -> dict[tuple[str, Plan], int]:
    """By repair and plan the bytes added at run time; scores are held, and repaired
    weights of one plan at a time.
    """
    from ..repairing.methods import kept_repair

    found: dict[tuple[str, Plan], int] = {}
    for done, plan in enumerate(plans):
        repaired: dict[str, RepairedPlan] = {}
        for name in ways:
            progress(done, len(plans), f"{name} of {plan}")
            repaired[name] = kept_repair(
                subject.out / "repairs", name, subject.model, plan, text
            )[0]
        scored = {
            scored_as(plan, name, prompt_tokens): one for name, one in repaired.items()
        }
        held.measure(scored, f"scoring repairs of {plan}")
        found |= {(name, plan): one.added_bytes for name, one in repaired.items()}
    return found


def _done(
    rows: Sequence[ComparisonRecord],
    kept: Ledger[ComparisonRecord],
    held: HeldScores,
    prompt_tokens: int | None,
) -> list[ComparisonRecord]:
    """The same beside the best of as many of the same space, repaired alike; what is
    new of these is written down.
    """
    asked = {record.key for record in rows}
    every = [*rows, *(record for record in kept if record.key not in asked)]
    groups: dict[Key, list[ComparisonRecord]] = {}

    def place_of(one: ComparisonRecord) -> Scored:
        return scored_as(one.plan, one.repair, prompt_tokens)

    for record in every:
        if is_number(record.quality.delta_nll) and held.has(place_of(record)):
            groups.setdefault((*record.group, _alike(record)), []).append(record)
    behind: dict[Key, tuple[float, float]] = {}
    for group in groups.values():
        best, *others = sorted(group, key=lambda one: one.quality.delta_nll)
        least = held.scores(place_of(best)).nll
        for one in others:
            mine = held.scores(place_of(one)).nll
            behind[one.key] = mean_and_error([a - b for a, b in zip(mine, least)])
    for place, record in enumerate(every):
        more, error = behind.get(record.key, (math.nan, math.nan))
        every[place] = record.model_copy(update={"behind": more, "behind_se": error})
    kept.renew(every)
    return every[: len(rows)]


def _alike(record: ComparisonRecord) -> str:
    """How it is repaired, for what stands beside it: each given plan has weights of its
    own, or none.
    """
    return "" if record.is_given else record.repair


class _Choosing:
    """What each run is answered, taken from the folder where it is there."""

    def __init__(
        self,
        subject: Subject,
        objectives: Mapping[str, CalibratedObjective],
        about: Provenance,
    ) -> None:
        self.subject, self.objectives, self.about = subject, objectives, about
        self.scored: dict[tuple[str, str, str], tuple[UnitScores, SearchCost]] = {}
        self.held = Ledger(
            subject.out,
            ChoiceRecord,
            lambda record: self._about(record.criterion, record.objective),
        )

    def choices(self, asked: Sequence[tuple[Run, Progress]]) -> list[ChoiceRecord]:
        for run, progress in asked:
            if run.key not in self.held:
                self.held.add(self._choose(run, progress))
            progress(1, 1, run.name)
        return [self.held[run.key] for run, _ in asked]

    def _about(self, criterion: str, objective: str) -> Provenance:
        """Where a choice by these comes from; nothing is held against those that are
        not asked for.
        """
        by = self.objectives.get(objective)
        told = {"by": f"{by.objective.name} {by.objective.digest()}"} if by else {}
        return Provenance.of(self.about, **told, **source_of(criterion))

    def _choose(self, run: Run, progress: Progress) -> ChoiceRecord:
        """Scores are shared between counts."""
        from ..choosing.budget import by_count
        from ..choosing.criteria import Setting, choose, criterion, take
        from ..choosing.evaluator import Evaluator
        from ..choosing.space import plan_of

        by, model, one = (
            self.objectives[run.objective],
            self.subject.model,
            criterion(run.criterion),
        )
        evaluates = one.reads == "objective"
        folder = (
            self.subject.out / Path(EvaluationRecord.file).stem if evaluates else None
        )
        name = (  # what goes by the same shares evaluations
            f"{_file_name(f'{run.criterion} {run.objective}')}.jsonl"
        )
        evaluator = Evaluator(
            model, by.objective, folder=folder, name=name, settings=self.about
        )

        def tell(done: float, total: float, doing: str) -> None:
            progress(done, total, f"{run.name}: {doing}")

        setting = Setting(
            model, run.space, by.batches, evaluator, self.subject.seed, progress=tell
        )
        budget, rise = by_count(run.space, run.count), math.nan
        if one.score:
            if run.key[:3] not in self.scored:
                self.scored[run.key[:3]] = one.scores(setting), evaluator.spent
            scores, spent = self.scored[run.key[:3]]
            chosen = take(setting, scores, budget)
        else:
            chosen, spent = choose(run.criterion, setting, budget), evaluator.spent
            if evaluates:  # known already, or one evaluation more
                rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
        asked: Settings = dict(zip(RUN, run.key))
        return ChoiceRecord(
            **asked,
            plan=plan_of(chosen.skipped),
            order=tuple(tuple(unit) for unit in chosen.order),
            calibration_tokens=sum(tokens.numel() for tokens in by.batches),
            spent=spent,
            forwards=spent.executions / evaluator.forward,
            calibration_delta=rise,
            provenance=self._about(run.criterion, run.objective),
        )


def _file_name(words: str) -> str:
    """A digest tells names apart that differ in what no file name may hold, or are too
    long.
    """
    short = re.sub(r"[^\w.+*-]", "-", words)[:80]
    return f"{short}-{digest_of([words])[:8]}"


TOLD = (
    "By: the objective that a criterion goes by, if by one. NLL and KL in nats a token;"
    " behind the best: NLL beyond that of the best row that is repaired alike, paired"
    " by window. Forward passes: over the text that is chosen by."
)
TIMED_ONCE = (
    "Plans that leave equal parameters, weights and KV cache take equal time: one was"
    " timed for all of them."
)


def write_comparison(
    records: Sequence[ComparisonRecord], out: Path, title: str, made: str
) -> None:
    """`out/table.md`, .tex, .csv, each plan in `out/plans`, a figure; `made` says how
    and on what it was measured.
    """
    names = {one.heading for one in (*CHOSEN[:2], BEHIND, FORWARDS)} | {
        one.heading for one in QUALITY[:3]
    }
    names |= {"repair", *_tasks_of(records), SPEEDUPS[0].heading}
    columns = [column for column in columns_of(records) if column.heading in names]
    note = f"\n{TIMED_ONCE}\n" if timed_once(records) else ""
    latex = [
        as_latex(
            part,
            caption=f"{title}. {made} {name} skipped. {TOLD} {part.legend}",
            label=name.replace(" ", "-"),
        )
        for name, part in _parts(columns, records)
    ]
    markdown = f"# {title}\n\n{made}\n\n{comparison_table(records)}{note}"
    for suffix, text in {
        "md": markdown,
        "tex": "\n".join(latex),
        "csv": as_csv(records),
    }.items():
        write_whole(out / f"table.{suffix}", text)
    (out / "plans").mkdir(exist_ok=True)
    for record in records:
        about = {
            "fingerprint": record.what.get("fingerprint"),
            "note": record.chosen_by,
        }
        record.plan.model_copy(update=about).save(plan_file(out, record))
    if installed(*FIGURES):
        from ..charts.losses import losses_in_panels
        from ..charts.style import save

        save(losses_in_panels(drawn_points(records), title), out / "front")


def timed_once(records: Sequence[ComparisonRecord]) -> bool:
    """Whether plans of different sublayers show the same measurement of time."""
    timed = [record for record in records if record.times]
    return len({record.plan for record in timed}) > len(
        {(one.footprint, one.plan.prefill) for one in timed}
    )


def comparison_table(records: Sequence[ComparisonRecord]) -> str:
    """The comparison in Markdown, a part for each space and count, what loses least
    first.
    """
    columns = [column for column in columns_of(records) if column not in CHOSEN[2:]]
    parts = [*_parts([*columns, words("skips", lambda one: one.plan or None)], records)]
    legend = next((part.legend for _, part in parts), "")
    return "\n".join(
        [f"{legend}\n", *(f"### {name}\n\n{part.markdown()}" for name, part in parts)]
    )


def _parts(
    columns: Sequence[Column[ComparisonRecord]], records: Sequence[ComparisonRecord]
) -> Iterator[tuple[str, Table]]:
    """A table for each space and count, all of the same columns."""
    ranked = [records[place] for place in best_first(records)]
    whole = table("", columns, ranked)
    for _, rows in groupby(zip(ranked, whole.rows), key=lambda row: row[0].group):
        some = [*rows]
        yield some[0][0].among, replace(whole, rows=tuple(cells for _, cells in some))


def best_first(records: Sequence[ComparisonRecord]) -> list[int]:
    """Places of records: by space and count, then by loss, what is repaired beside what
    is not.
    """
    lost: dict[Key, float] = {}
    for one in records:
        lost[one.run] = min(one.quality.nats_lost, lost.get(one.run, math.inf))
    spaces = [*dict.fromkeys(one.space for one in records)]
    ranks = [
        (
            spaces.index(one.space),
            one.group[1],
            lost[one.run],
            one.run,
            one.quality.nats_lost,
        )
        for one in records
    ]
    return sorted(range(len(records)), key=ranks.__getitem__)


def plan_file(folder: Path, record: ComparisonRecord) -> Path:
    return folder / "plans" / f"{_file_name('-'.join(map(str, record.run)))}.json"


def drawn_points(records: Sequence[ComparisonRecord]) -> list[Point]:
    """A point for each record with a loss; a criterion is named with its objective, or
    folder, if it has several.
    """
    also = ("objective", "folder")
    many = Counter(
        key[:2]
        for key in {
            (one.criterion, what, getattr(one, what))
            for one in records
            for what in also
        }
    )

    def look(one: ComparisonRecord) -> Settings:
        name = ", ".join(
            [
                one.criterion,
                *(getattr(one, what) for what in also if many[one.criterion, what] > 1),
            ]
        )
        return {
            "count": one.count,
            "colour": name,
            "shape": one.repair,
            "panel": one.space,
        }

    return points_of(records, look)


def joined(folders: Sequence[Folder]) -> Folder:
    """Several folders as one comparison, unpaired. Raises `UsageError` for none, or
    another model, text or windows.
    """
    records: list[ComparisonRecord] = []
    for folder in folders:
        if (
            not (held := folder.of(ComparisonRecord))
            or folder.provenance.command[:2] != COMMAND
        ):
            raise UsageError(
                f"{folder.path} holds no results of notall compare, and only those are"
                " joined"
            )
        ours, theirs = (
            one.what | {"sequences": one.quality.sequences}
            for one in ((records or held)[0], held[0])
        )
        if other := next(
            (name for name in ALIKE if ours.get(name) != theirs.get(name)), None
        ):
            told = f"{folders[0].path} and {folder.path} differ in {other}"
            raise UsageError(
                f"{told}: {shortened(str(ours.get(other)))} and"
                f" {shortened(str(theirs.get(other)))}"
            )
        here = {"folder": str(folder.path), "behind": math.nan, "behind_se": math.nan}
        records += [one.model_copy(update=here) for one in held]
    return Folder(folders[0].path, {ComparisonRecord.kind_name: tuple(records)})


def shown(folder: Folder) -> Shown:
    records = folder.of(ComparisonRecord)
    found = shown_plans(folder, records, _sections(records), _found_again)
    again = [
        (
            ""
            if one.is_given
            else next_command(
                "reproduce", one.folder or folder.path, row=one.name, out="again"
            )
        )
        for one in records
    ]
    again = again if folder.provenance.command[:2] == COMMAND else [""] * len(records)
    steps = tuple(
        replace(step, order=one.order, again=by)
        for step, one, by in zip(found.steps, records, again)
    )
    return replace(found, cards=tuple(_cards(records)), steps=steps)


def _found_again(folder: Folder, record: ComparisonRecord) -> tuple[str, str]:
    """What makes the model of a choice: from its plan, or else by a search for the
    same.
    """
    plan = plan_file(Path(record.folder or folder.path), record)
    if record.is_given:
        return "see what that saves", next_command("bench", folder.model, plan=plan)
    if not plan.is_file():
        way = record.criterion if record.criterion != "search" else None
        by = record.objective if record.objective in ("nll", "kl", "answers") else None
        options = {
            "skip": f"{record.space}:{record.count}",
            "criterion": way,
            "objective": by,
        }
        then = "" if record.repair == UNREPAIRED else ", then repair it"
        return f"make that plan{then}", next_command(
            "search", folder.model, **options, out="plan.json"
        )
    if record.repair == UNREPAIRED:
        command = next_command(
            "export", folder.model, plan=plan, repair="refit", to="hf", out="smaller"
        )
        return "repair it, and write that model", command
    kept = (
        record.repair == "refit" or record.added_bytes
    )  # what adds matrices cannot be served
    mend = {
        "repair": None if kept else record.repair,
        **on_the_text(folder.provenance, "sequences", "length"),
    }
    return "repair that plan", next_command(
        "repair", folder.model, plan=plan, **mend, out="repaired"
    )


def _sections(records: Sequence[ComparisonRecord]) -> Iterator[Section]:
    from ..charts.losses import colours_of, losses_by_count, tradeoff
    from ..charts.style import on_page

    order, points = best_first(records), drawn_points(records)
    colours = colours_of(points)
    figures = []
    for space in dict.fromkeys(point.panel for point in points):
        drawn = on_page(
            losses_by_count(
                [point for point in points if point.panel == space], colours
            ),
            340,
        )
        data = as_csv([one for one in records if one.space == space])
        told = f"quality lost by the number of {SET_NAMES.get(space, space)}s skipped"
        figures.append(Figure(drawn, told, title=space, csv=data))
    shapes = {UNREPAIRED: ""}
    of_prompt = {
        number
        for number, one in enumerate(records)
        if one.plan.prefill and not len(one.plan)
    }
    timed = [
        replace(one, shape=one.panel + shapes.get(one.shape, f", {one.shape}"))
        for one in points
        if one.speedup
        and one.plan not in of_prompt  # which decodes as the original does
    ]
    if timed:
        chart = tradeoff(timed, colours, colour="criterion", shape="among")
        figures.append(
            Figure(
                on_page(chart),
                "quality lost against decode speedup",
                title="against decode speedup",
            )
        )
    yield results(
        records,
        columns_of(records),
        order,
        figures,
        TIMED_ONCE if timed_once(records) else "",
    )


def _cards(records: Sequence[ComparisonRecord]) -> Iterator[Card]:
    """What loses least at the largest usable count of each space."""
    known = [one for one in records if one.plan and is_number(one.quality.delta_nll)]
    for space in list(dict.fromkeys(record.space for record in known))[:4]:
        asked = [record for record in known if record.space == space]
        group = max(
            record.group
            for record in [one for one in asked if is_usable(one.quality)] or asked
        )
        best = min(
            (one for one in asked if one.group == group),
            key=lambda one: one.quality.delta_nll,
        )
        told = best.way + (
            "" if best.is_given else f", {best.forwards:,.1f} forward passes to find"
        )
        told += "" if is_usable(best.quality) else "; no longer usable"
        yield Card.of_loss(f"Loses least: {best.among}", best.quality, told)
