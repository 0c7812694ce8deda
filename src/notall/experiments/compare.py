"""Criteria side by side: what each skips at each budget, what that costs on held-out text, and what it took to find.

In stages, each of which goes on where it was stopped: every criterion chooses, all plans are scored together on the
held-out text, repaired ones plan by plan, answer tasks together, are timed, and become a record each.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import UsageError, shortened
from ..extras import FIGURES, installed, need
from ..options import Option, Workload
from ..plan import KIND_NAMES, Plan, in_ranges
from ..progress import Progress, Stages, silent
from ..results.evaluations import EvaluationRecord
from ..results.facts import (
    BESIDE,
    DELTA_NLL,
    KL,
    QUALITY,
    SPEEDUPS,
    TOP1,
    Footprint,
    Quality,
    SearchCost,
    TaskScore,
    Times,
)
from ..results.latex import as_latex
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Amount, Count, Key, Number, Record, Scalar, Skips, SublayerName, Unsigned, is_number
from ..results.table import EMPTY, Cell, Column, Table, as_csv, number, size, table, with_error, within, words
from .costs import read_costs
from .driver import UNREPAIRED, HeldScores, RepairName, Subject, scored_as, shared_times, task_scores
from .folder import Folder
from .options import SkipAmount, TaskChoice, space_of
from .shown import Card, Figure, Section, Shown, Step, nats_in_words
from .verdict import is_usable, joined, next_command
from .which import fastest_card, first_shown, judged, mark_usable, on_the_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..charts.losses import Point
    from ..choosing.criteria import Choice, Setting, UnitScores
    from ..choosing.evaluator import Evaluator
    from ..choosing.objective import Objective
    from ..choosing.space import Space
    from ..running.repaired import RepairedPlan

TASK_LIMIT = 100  # documents of a task that is an objective, where nothing else is said
GOALS = ("nll", "kl", "answers")  # objectives that any text allows
MOST_CARDS = 5


# --- what is written down ---------------------------------------------------------------------------------------------


class Answered(Skips):
    """What one criterion chose, going by an objective, to skip so many of a space; and what that took."""

    criterion: str = Field(description="the way to choose")
    objective: str = Field(description="the objective that it goes by")
    space: str = Field(description="what it chooses among")
    count: Count = Field(description="how many it skips")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in the order of choosing"
    )
    calibration_tokens: Count = Field(description="of the text that was chosen by")
    spent: SearchCost
    forwards: Amount = Field(description="executions in dense forward passes over that text")
    calibration_delta: Number = Field(math.nan, description="the objective's rise on that text, where it is known")


RUN = ("criterion", "objective", "space", "count")


class ChoiceRecord(Record, Answered):
    """What one run chose."""

    file = "choices.jsonl"
    commands = ("compare",)
    key_fields = RUN

    record: Literal["choice"] = "choice"


class ComparisonRecord(Record, Answered):
    """One choice, measured on the held-out text; once more for each way that made up for what it skips."""

    file = "comparison.jsonl"
    commands = ("compare",)
    key_fields = (*RUN, "repair")

    record: Literal["comparison"] = "comparison"
    repair: RepairName = Field(UNREPAIRED, description="what made up for what is skipped")
    quality: Quality
    footprint: Footprint
    times: Times | None = Field(None, description="where plans were timed")
    behind: Number = Field(
        math.nan, description="NLL beyond that of the least, of as many and repaired alike; of that one itself nothing"
    )
    behind_se: Unsigned = Field(math.nan, description="its standard error, paired by window of text")
    added_bytes: Count = Field(0, description="of matrices that the repair keeps at run time")
    tasks: tuple[TaskScore, ...] = ()

    @property
    def way(self) -> str:
        """How its plan was chosen, and repaired, such as `search by kl, refit`."""
        return self.chosen_by + (f", {self.repair}" if self.repair != UNREPAIRED else "")

    @property
    def chosen_by(self) -> str:
        """What evaluates nothing but the dense model goes by no objective."""
        return self.criterion + (f" by {self.objective}" if self.by_objective else "")

    @property
    def by_objective(self) -> bool:
        return self.spent.evaluations > 1

    @property
    def name(self) -> str:
        return f"{self.way}: {self.count} {self.space}"

    def figures(self) -> dict[str, Scalar]:
        """Those of its tasks too."""
        tasks: dict[str, Scalar] = {}
        for one in self.tasks:
            named = (("value", one.value), ("delta", one.delta), ("delta_se", one.delta_se))
            tasks |= {f"{name_of(one)} {field}": value for field, value in named if is_number(value)}
        return super().figures() | tasks


def name_of(score: TaskScore) -> str:
    """Of a task and its metric, in a heading."""
    return f"{score.task} {score.metric.partition(',')[0]}"


BY: Column[ComparisonRecord] = words("by", lambda one: one.objective if one.by_objective else "")
BEHIND: Column[ComparisonRecord] = with_error("behind the best", lambda one: (one.behind, one.behind_se))
FORWARDS: Column[ComparisonRecord] = number("forward passes", lambda one: one.forwards, ",.1f")
REPAIR: Column[ComparisonRecord] = words("repair", lambda one: one.repair if one.repair != UNREPAIRED else "")
ASKED: tuple[Column[ComparisonRecord], ...] = (
    words("among", lambda one: one.space),
    words("count", lambda one: one.count),  # a part of the question: no answer that a narrow terminal would end with
)


def columns_of(records: Sequence[ComparisonRecord]) -> tuple[Column[ComparisonRecord], ...]:
    """The columns of a comparison; those of the tasks of `records` follow the quality."""
    return (
        words("criterion", lambda one: one.criterion),
        BY,
        *ASKED,
        REPAIR,
        *within(QUALITY, lambda one: one.quality),
        *_task_columns(records),
        BEHIND,
        size("added", lambda one: one.added_bytes or None),
        *within(SPEEDUPS, lambda one: one.times),
        number("evaluations", lambda one: one.spent.evaluations, ",d"),
        FORWARDS,
        number("CPU s", lambda one: one.spent.seconds, ",.1f"),
        number("on the text it chose by", lambda one: one.calibration_delta, "+.3f"),
        number("calibration tokens", lambda one: one.calibration_tokens if one.spent.evaluations else None, ",d"),
    )


def _task_columns(records: Sequence[ComparisonRecord]) -> list[Column[ComparisonRecord]]:
    return [_task_column(name) for name in dict.fromkeys(name_of(score) for one in records for score in one.tasks)]


def _task_column(name: str) -> Column[ComparisonRecord]:
    def cell(record: ComparisonRecord) -> Cell:
        return next((BESIDE.cell(score) for score in record.tasks if name_of(score) == name), EMPTY)

    return Column(name, cell, note=BESIDE.note)


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompareOptions:
    """Which criteria choose how many of what, going by which objectives, and what makes up for it."""

    PANEL: ClassVar = "What is compared"

    skip: Annotated[
        tuple[str, ...],
        Option(
            "attention, mlp, block, period, sublayer or portable, and counts; repeat it for more",
            metavar="KIND:COUNT[,...]",
        ),
    ] = ("attention:4,8",)
    criterion: Annotated[
        tuple[str, ...],
        Option("a name of `notall criteria`, or your own module:function; repeat it for more (default: all)"),
    ] = ()
    objective: Annotated[
        tuple[str, ...], Option("nll, kl, answers, task:NAME, or a sum; repeat it for more", metavar="OBJECTIVE")
    ] = ("kl",)
    repair: Annotated[
        tuple[str, ...],
        Option(
            "also judge plans after a repair with --text: refit, replaceme, prune-and-comp, nbl, ghosted, or your own "
            "module:function; repeat it for more"
        ),
    ] = ()
    keep_first: Annotated[bool, Option("preserve the first layer", ("--keep-first",))] = False
    keep_last: Annotated[bool, Option("preserve the last layer", ("--keep-last",))] = False
    prompts: Annotated[Path | None, Option("prompts of the objective `answers`: one a line, or a .jsonl")] = None

    def check(self) -> list[str]:
        """The tasks of the harness that objectives go by. Raises `UsageError` for what is refused without a model."""
        from ..choosing.criteria import criterion
        from ..choosing.objective import read_prompts, terms_of

        need(*(module for name in self.criterion for module in criterion(name).needs))
        Repairs(self.repair)
        for amount in self.amounts:
            if not amount.amounts or any(one < 1 or one % 1 for one in amount.amounts):
                raise UsageError(f"--skip {shortened(amount)} is no kind and counts: write attention:4,8")
        parts = [name for one in self.objective for _, name in terms_of(one, self.prompts)]
        if "answers" in parts and self.prompts:
            read_prompts(self.prompts)
        return [name.removeprefix("task:") for name in parts if name.startswith("task:")]

    @property
    def amounts(self) -> list[SkipAmount]:
        return [SkipAmount.parse(text) for text in self.skip]

    def runs(self, model: PreTrainedModel) -> list[Run]:
        """What is to be chosen. Raises `UsageError` where there is nothing of a kind to choose among."""
        from ..choosing.criteria import every_criterion

        every = [name for name, one in every_criterion().items() if installed(*one.needs) and one.fits(model)]
        spaces = [
            (space_of(model, one.kind, self.keep_first, self.keep_last), [*map(int, one.amounts)])
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
        """By their names; those of tasks have as many documents as --limit says, or a hundred."""
        from ..choosing.objective import build_objective

        how: dict[str, Any] = {"prompts": self.prompts, "task_path": tasks.shelf}
        how["task_limit"] = (tasks.limits.most if tasks.limits else None) or TASK_LIMIT
        return {
            name: CalibratedObjective(build_objective(name, model, tokenizer, batches, **how), batches)
            for name in self.objective
        }


@dataclass(frozen=True)
class CalibratedObjective:
    """What a criterion goes by: an objective, and the calibration text, (batch, tokens) token ids each."""

    objective: Objective
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Run:
    """What `criterion` skips, going by the objective of this name, to skip `count` of `space`."""

    criterion: str
    objective: str
    space: Space
    count: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """As in the records."""
        return self.criterion, self.objective, str(self.space), self.count

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key))


@dataclass(frozen=True)
class Repairs:
    """Ways to make up for what a plan skips, by name, and the text to do it with: (batch, tokens) token ids each."""

    methods: tuple[str, ...] = ()
    batches: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        from ..repairing.methods import method

        for name in self.methods:
            method(name)

    @property
    def others(self) -> tuple[str, ...]:
        """Each once, without the one that does nothing."""
        return tuple(name for name in dict.fromkeys(self.methods) if name != UNREPAIRED)


def runs_of(
    criteria: Sequence[str], objectives: Sequence[str], spaces: Sequence[tuple[Space, Sequence[int]]]
) -> list[Run]:
    """Every criterion at every count of every space that it can choose from; by each objective where it goes by one."""
    from ..choosing.criteria import criterion, suits

    return [
        Run(name, objective, space, count)
        for space, counts in spaces
        for name in criteria
        for objective in (objectives if criterion(name).reads == "objective" else objectives[:1])
        for count in counts
        if suits(name, space)
    ]


# --- the run ----------------------------------------------------------------------------------------------------------


def compare_criteria(
    subject: Subject,
    runs: Sequence[Run],
    objectives: Mapping[str, CalibratedObjective],
    *,
    tasks: TaskChoice | None = None,
    workload: Workload | None = None,
    repairs: Repairs | None = None,
    progress: Progress = silent,
) -> list[ComparisonRecord]:
    """Choose, score, ask and time as `runs` say; one record a run. The subject's text is the held-out one.

    With `repairs`, one more for each of them, behind the run's own: its plan, repaired, on the held-out text.
    Called again on the same folder it goes on where it stopped, and what was done of other runs stays. Raises
    `UsageError` when the folder holds work of other settings or of another command, is in use or cannot be written,
    and as `choose` does.
    """
    from ..choosing.budget import by_count
    from ..choosing.criteria import criterion

    if workload:
        workload.check(subject.model)
    for run in runs:
        by_count(run.space, run.count)
    jobs = tasks.jobs() if tasks else []
    about = Provenance.of(subject.provenance, seed=subject.seed)
    costs = {run: criterion(run.criterion).cost(run.space, run.count) for run in runs}
    chosen_in = sum(costs.values())
    repaired_in = 0.3 * chosen_in * len(repairs.others) if repairs else 0.0
    stages = Stages(progress, 1.5 * chosen_in + repaired_in)  # what is measured takes half as much again
    with working_in(subject.out, "compare"):
        kept = Ledger(subject.out, ComparisonRecord)
        choices = _Choosing(subject, objectives, about).choices(
            [(run, stages.stage(cost)) for run, cost in costs.items()]
        )
        plans = list(dict.fromkeys(choice.plan for choice in choices))
        held = HeldScores(subject, Provenance.of(about, held_out_tokens=subject.tokens))
        held.measure(
            {scored_as(plan): plan for plan in (Plan(), *plans)},
            "scoring plans on held-out text",
            stages.stage(0.3 * chosen_in),
        )
        added = _repaired(subject, plans, repairs, held, stages.stage(repaired_in)) if repairs else {}
        telling = stages.stage(0.1 * chosen_in)
        answers = task_scores(subject, plans, jobs, tasks, telling) if tasks and jobs else {}
        telling = stages.stage(0.1 * chosen_in)
        times = shared_times(subject, plans, workload, about, telling) if workload else {}
        measured = _Measured(subject, held, added, answers, times, about)
        records = [record for choice in choices for record in measured.records(choice, repairs)]
        asked = {record.key for record in records}
        every = _behind([*records, *(record for record in kept if record.key not in asked)], held)
        for record in every:
            if record.key not in kept or _without_place(kept[record.key]) != _without_place(record):
                kept.add(record)
        progress(stages.steps, stages.steps, f"compared {len(records)} choices")
        return every[: len(records)]


@dataclass(frozen=True)
class _Measured:
    """All that is known of plans, of which records are made."""

    subject: Subject
    held: HeldScores
    added: Mapping[tuple[str, Plan], int]  # bytes, by repair and plan
    answers: Mapping[Plan, tuple[TaskScore, ...]]
    times: Mapping[Plan, Times]
    about: Provenance

    def records(self, choice: ChoiceRecord, repairs: Repairs | None) -> Iterator[ComparisonRecord]:
        """As it is, and behind it a record of each repair; what adds matrices takes other times."""
        from ..running.footprint import footprint

        plan, chosen = choice.plan, {name: getattr(choice, name) for name in Answered.model_fields}
        record = ComparisonRecord(
            **chosen,
            quality=self.held.quality(scored_as(plan)),
            footprint=footprint(self.subject.model, plan),
            tasks=self.answers.get(plan, ()),
            times=self.times.get(plan),
            provenance=Provenance.of(self.about, fingerprint=self.subject.structure.fingerprint),
        )
        yield record
        for name in repairs.others if repairs else ():
            added = self.added[name, plan]
            changes: dict[str, Any] = {"repair": name, "added_bytes": added, "tasks": ()}
            changes |= {"times": None} if added else {}
            yield record.model_copy(update=changes | {"quality": self.held.quality(scored_as(plan, name))})


def _repaired(
    subject: Subject, plans: Sequence[Plan], repairs: Repairs, held: HeldScores, progress: Progress
) -> dict[tuple[str, Plan], int]:
    """By repair and plan the bytes that it adds at run time; its scores are held.

    One plan is repaired in all ways, and all are scored together, before the next one is: weights take memory.
    """
    from ..repairing.methods import kept_repair

    found: dict[tuple[str, Plan], int] = {}
    for done, plan in enumerate(plans):
        repaired: dict[str, RepairedPlan] = {}
        for name in repairs.others:
            progress(done, len(plans), f"{name} of {plan}")
            repaired[name] = kept_repair(subject.out / "repairs", name, subject.model, plan, repairs.batches)[0]
        held.measure({scored_as(plan, name): one for name, one in repaired.items()}, f"scoring repairs of {plan}")
        found |= {(name, plan): one.added_bytes for name, one in repaired.items()}
    return found


def _behind(records: Sequence[ComparisonRecord], held: HeldScores) -> list[ComparisonRecord]:
    """The same, each beside the one of as many of the same space, and repaired alike, that loses least."""
    from ..measuring.statistics import mean_and_error

    groups: dict[tuple[Any, ...], list[ComparisonRecord]] = {}
    for record in records:
        if is_number(record.quality.delta_nll) and held.has(scored_as(record.plan, record.repair)):
            groups.setdefault((record.space, record.count, record.repair), []).append(record)
    beside: dict[Key, tuple[float, float]] = {}
    for group in groups.values():
        best, *others = sorted(group, key=lambda one: one.quality.delta_nll)
        least = held.scores(scored_as(best.plan, best.repair)).nll
        for one in others:
            mine = held.scores(scored_as(one.plan, one.repair)).nll
            beside[one.key] = mean_and_error([a - b for a, b in zip(mine, least)])
    figures = (beside.get(record.key, (math.nan, math.nan)) for record in records)
    return [record.model_copy(update={"behind": a, "behind_se": b}) for record, (a, b) in zip(records, figures)]


def _without_place(record: ComparisonRecord) -> dict[str, Any]:
    """All that a record says, but for where it was measured."""
    return record.model_dump(mode="json", exclude={"provenance": {"where"}})


class _Choosing:
    """What each run is answered, taken from the folder where it is there; scores are shared between counts."""

    def __init__(self, subject: Subject, objectives: Mapping[str, CalibratedObjective], about: Provenance) -> None:
        self.subject, self.objectives, self.about = subject, objectives, about
        self.scored: dict[tuple[str, str, str], tuple[UnitScores, SearchCost]] = {}
        self.held = Ledger(subject.out, ChoiceRecord, lambda record: self._about(record.objective))

    def choices(self, asked: Sequence[tuple[Run, Progress]]) -> list[ChoiceRecord]:
        """One record a run, in their order."""
        for run, progress in asked:
            if run.key not in self.held:
                self.held.add(self._choose(run, progress))
            progress(1, 1, run.name)
        return [self.held[run.key] for run, _ in asked]

    def _about(self, objective: str) -> Provenance:
        """Where a choice by this objective comes from; nothing is held against one that is not asked for."""
        by = self.objectives.get(objective)
        return Provenance.of(self.about, by=f"{by.objective.name} {by.objective.digest()}") if by else self.about

    def _choose(self, run: Run, progress: Progress) -> ChoiceRecord:
        from ..choosing.criteria import Setting, criterion
        from ..choosing.space import plan_of

        by, one = self.objectives[run.objective], criterion(run.criterion)
        evaluator = self._evaluator(run, by.objective)
        telling = _naming(progress, run)
        setting = Setting(self.subject.model, run.space, by.batches, evaluator, self.subject.seed, progress=telling)
        chosen, spent = self._answer(run, setting)
        rise = math.nan
        if one.reads == "objective" and not one.score:  # known already, or one evaluation more
            rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
        return ChoiceRecord(
            plan=plan_of(chosen.skipped),
            criterion=run.criterion,
            objective=run.objective,
            space=str(run.space),
            count=run.count,
            order=tuple(tuple(unit) for unit in chosen.order),
            calibration_tokens=sum(tokens.numel() for tokens in by.batches),
            spent=spent,
            forwards=spent.executions / evaluator.forward,
            calibration_delta=rise,
            provenance=self._about(run.objective),
        )

    def _evaluator(self, run: Run, objective: Objective) -> Evaluator:
        """Runs that go by the same share what they evaluate."""
        from ..choosing.criteria import criterion
        from ..choosing.evaluator import Evaluator

        model = self.subject.model
        if criterion(run.criterion).reads != "objective":
            return Evaluator(model, objective, settings=self.about)
        folder = self.subject.out / Path(EvaluationRecord.file).stem
        name = f"{_file_name(f'{run.criterion}-{run.objective}', f'{run.criterion} {run.objective}')}.jsonl"
        return Evaluator(model, objective, folder=folder, name=name, settings=self.about)

    def _answer(self, run: Run, setting: Setting) -> tuple[Choice, SearchCost]:
        from ..choosing.budget import by_count
        from ..choosing.criteria import choose, criterion, take

        budget = by_count(run.space, run.count)
        one = criterion(run.criterion)
        if not one.score:
            chosen = choose(run.criterion, setting, budget)
            return chosen, setting.evaluator.spent
        key = run.criterion, run.objective, str(run.space)
        if key not in self.scored:
            self.scored[key] = one.scores(setting), setting.evaluator.spent
        scores, spent = self.scored[key]
        return take(setting, scores, budget), spent


def _file_name(words: str, told_apart_by: str) -> str:
    """A digest tells names apart that differ in what no file name may hold, or are too long."""
    short = re.sub(r"[^\w.+*-]", "-", words)[:80]
    return f"{short}-{hashlib.sha256(told_apart_by.encode()).hexdigest()[:8]}"


def _naming(progress: Progress, run: Run) -> Progress:
    return lambda done, total, doing: progress(done, total, f"{run.name}: {doing}")


# --- files ------------------------------------------------------------------------------------------------------------

PLANS = "plans"
SETS = {"mlp": "MLPs", "portable": "portable sublayers"}
TOLD = (
    "By: the objective that a criterion goes by, if by one. NLL and KL in nats a token; behind the best: NLL beyond "
    "that of the best row that is repaired alike, paired by window. Forward passes: over the text that is chosen by."
)
TIMED_ONCE = (
    "Plans that leave equal parameters, weights and KV cache take equal time, so one of them was timed, and the others "
    "show its times."
)


def write_comparison(records: Sequence[ComparisonRecord], out: Path, title: str, made: str) -> None:
    """The table as `out/table.md`, .tex and .csv, each plan in `out/plans`, and with the extra `report` a figure.

    `title` stands over the table, and `made` says how and on what it was measured. Raises `UsageError` where a file
    cannot be written.
    """
    note = f"\n{TIMED_ONCE}\n" if timed_once(records) else ""
    markdown = f"# {title}\n\n{made}\n\n{comparison_table(records)}{note}"
    (out / "table.md").write_text(markdown, encoding="utf-8")
    (out / "table.tex").write_text("\n".join(_latex(records, f"{title}. {made}")), encoding="utf-8")
    (out / "table.csv").write_text(as_csv(records), encoding="utf-8")
    (out / PLANS).mkdir(exist_ok=True)
    for record in records:
        shape = record.what.get("fingerprint")
        plan = Plan(record.plan.attention, record.plan.mlp, fingerprint=shape, note=record.chosen_by)
        plan.save(plan_file(out, record))
    if installed(*FIGURES):
        from ..charts.losses import losses_in_panels
        from ..charts.style import save

        save(losses_in_panels(points_of(records), title), out / "front")


def timed_once(records: Sequence[ComparisonRecord]) -> bool:
    """Whether plans of different sublayers show the same measurement of time."""
    timed = [record for record in records if record.times]
    return len({record.plan for record in timed}) > len({record.footprint for record in timed})


def comparison_table(records: Sequence[ComparisonRecord]) -> str:
    """The comparison in Markdown, a part for each space and count, what loses least first.

    "On the text it chose by" is the objective's rise there.
    """
    columns = [column for column in columns_of(records) if column not in ASKED]
    lines = table("", [*columns, words("skips", lambda one: layers_in(one.plan))], _best_first(records))
    parts = [f"{lines.legend}\n"]
    parts += [f"### {name}\n\n{part.markdown()}" for name, part in _parts(lines, records)]
    return "\n".join(parts)


def _parts(whole: Table, records: Sequence[ComparisonRecord]) -> Iterator[tuple[str, Table]]:
    """A table of all, which loses least first, by space and count."""
    places: dict[tuple[str, int], list[int]] = {}
    for place, record in enumerate(_best_first(records)):
        places.setdefault((record.space, record.count), []).append(place)
    for (space, count), rows in places.items():
        yield _counted(count, space), replace(whole, rows=tuple(whole.rows[place] for place in rows))


def _latex(records: Sequence[ComparisonRecord], caption: str) -> Iterator[str]:
    """A table for each space and count, of what a paper says; the other columns are in the CSV."""
    whole = table("", _pasted(records), _best_first(records))
    for name, part in _parts(whole, records):
        told = f"{caption} {name} skipped. {TOLD} {part.legend}"
        yield as_latex(part, caption=told, label=name.replace(" ", "-"))


def _pasted(records: Sequence[ComparisonRecord]) -> list[Column[ComparisonRecord]]:
    names = {"criterion", "repair", BY.heading, BEHIND.heading, FORWARDS.heading}
    names |= {column.heading for column in (DELTA_NLL, KL, TOP1, SPEEDUPS[0])}
    names |= {column.heading for column in _task_columns(records)}
    return [column for column in columns_of(records) if column.heading in names]


def _best_first(records: Sequence[ComparisonRecord]) -> list[ComparisonRecord]:
    return [records[place] for place in best_first(records)]


def best_first(records: Sequence[ComparisonRecord]) -> list[int]:
    """Places of records: by space and count, then by loss, what is repaired beside what is not."""
    lost: dict[Key, float] = {}
    for record in records:
        lost[_asked(record)] = min(record.quality.nats_lost, lost.get(_asked(record), math.inf))
    spaces = [*dict.fromkeys(record.space for record in records)]

    def rank(place: int) -> tuple[Any, ...]:
        record = records[place]
        asked = _asked(record)
        return spaces.index(record.space), record.count, lost[asked], asked, record.quality.nats_lost

    return sorted(range(len(records)), key=rank)


def _asked(record: ComparisonRecord) -> Key:
    return tuple(str(getattr(record, name)) for name in RUN)


def layers_in(plan: Plan) -> str:
    """Which layers a plan skips something of, such as `attention 6, 7; MLP 3`."""
    return "; ".join(f"{KIND_NAMES[kind]} {in_ranges(layers)}" for kind, layers in plan.indices.items() if layers)


def _counted(count: int, space: str) -> str:
    return f"{count} {SETS.get(space, f'{space}s' if count != 1 else space)}"


def plan_file(folder: Path, record: ComparisonRecord) -> Path:
    """Where the plan of a choice is, in the folder of a comparison."""
    named = "-".join(str(getattr(record, name)) for name in RUN)
    return folder / PLANS / f"{_file_name(named, named)}.json"


def points_of(records: Sequence[ComparisonRecord]) -> list[Point]:
    """A point for each record with a loss; `plan` counts the records from 0.

    A criterion goes by its name, and by its objective too where there are several.
    """
    from ..charts.losses import Point

    by: dict[str, set[str]] = {}
    for record in records:
        by.setdefault(record.criterion, set()).add(record.objective)
    return [
        Point(
            record.name,
            record.quality.delta_nll,
            record.quality.delta_nll_se,
            record.times.speedup_decode if record.times else None,
            record.count,
            f"{record.criterion}, {record.objective}" if len(by[record.criterion]) > 1 else record.criterion,
            record.repair,
            panel=record.space,
            plan=number,
        )
        for number, record in enumerate(records)
        if is_number(record.quality.delta_nll)
    ]


# --- on a page --------------------------------------------------------------------------------------------------------


def shown(folder: Folder) -> Shown:
    """What a page says of a comparison."""
    records = folder.of(ComparisonRecord)
    if not records:
        return Shown()
    return Shown(
        message=judged(folder, records, then=lambda one: _found_again(folder, one), way=lambda one: one.way),
        cards=tuple(_cards(records)),
        steps=tuple(
            Step(one.name, one.plan, one.quality, one.times, one.footprint, order=one.order) for one in records
        ),
        first=first_shown(records),
        sections=tuple(_sections(records)),
        costs=read_costs(folder.path),
    )


def _found_again(folder: Folder, record: ComparisonRecord) -> tuple[str, str]:
    """What makes the model of a choice: from its plan, or else by a search for the same."""
    unrepaired = record.repair == UNREPAIRED
    if (plan := plan_file(folder.path, record)).is_file() and unrepaired:
        command = next_command("export", folder.model, plan=plan, repair="refit", to="hf", out="smaller")
        return "repair it, and write that model", command
    if plan.is_file():
        kept = record.repair == "refit" or record.added_bytes  # what adds matrices cannot be served
        mend: dict[str, object] = {} if kept else {"repair": record.repair}
        mend |= on_the_text(folder.provenance, "sequences", "length")
        return "repair that plan", next_command("repair", folder.model, plan=plan, **mend, out="repaired")
    options: dict[str, object] = {"skip": f"{record.space}:{record.count}"}
    if record.criterion != "search":
        options["criterion"] = record.criterion
    if record.objective in GOALS:
        options["objective"] = record.objective
    repair = "" if unrepaired else ", then repair it"
    return f"make that plan{repair}", next_command("search", folder.model, **options, out="plan.json")


def _sections(records: Sequence[ComparisonRecord]) -> Iterator[Section]:
    from ..charts.losses import colours_of, losses_by_count, tradeoff
    from ..charts.style import on_page

    order, points = best_first(records), points_of(records)
    colours = colours_of(points)
    figures = [
        Figure(
            on_page(losses_by_count(panel, colours), 340),
            f"quality lost by how many {space} are skipped",
            title=space,
            csv=as_csv([one for one in records if one.space == space]),
        )
        for space in dict.fromkeys(point.panel for point in points)
        if (panel := [point for point in points if point.panel == space])
    ]
    if timed := [replace(point, shape=_among(point)) for point in points if point.speedup]:
        chart = tradeoff(timed, colours, colour="criterion", shape="among")
        figures.append(Figure(on_page(chart), "quality lost against decode speedup", title="against decode speedup"))
    ranked = [records[place] for place in order]
    columns = mark_usable(columns_of(records), lambda one: one.quality)
    note = TIMED_ONCE if timed_once(records) else ""
    yield Section("results", "Results", tuple(figures), table("results", columns, ranked), tuple(order), note)
    if repairs := _repairs_section(records, order):
        yield repairs


def _among(point: Point) -> str:
    return point.panel + (f", {point.shape}" if point.shape != UNREPAIRED else "")


Repaired = Mapping[str, ComparisonRecord]  # one choice, by what made up for it


def _repairs_section(records: Sequence[ComparisonRecord], order: Sequence[int]) -> Section | None:
    """What each choice costs, and beside it after each repair; None where nothing is repaired."""
    repairs = [*dict.fromkeys(record.repair for record in records)]
    if not set(repairs) - {UNREPAIRED}:
        return None
    rows: dict[Key, dict[str, ComparisonRecord]] = {}
    steps: dict[Key, int] = {}
    for place in order:
        record = records[place]
        rows.setdefault(_asked(record), {})[record.repair] = record
        steps.setdefault(_asked(record), place)
    named: tuple[Column[ComparisonRecord], ...] = (words("criterion", lambda one: one.criterion), BY, *ASKED)
    columns = [*within(named, lambda row: next(iter(row.values()))), *map(_after, repairs)]
    return Section(
        "repairs",
        "Before and after repairs",
        table=table("repairs", columns, [*rows.values()]),
        steps=tuple(steps.values()),
    )


def _after(repair: str) -> Column[Repaired]:
    """What is lost after a repair."""
    name = "unrepaired" if repair == UNREPAIRED else repair
    columns: tuple[Column[Repaired], ...] = within(
        (DELTA_NLL,), lambda row: row[repair].quality if repair in row else None
    )
    return replace(columns[0], heading=name)


def _cards(records: Sequence[ComparisonRecord]) -> Iterator[Card]:
    """What is fastest of the usable, and what loses least at the largest usable count of each space."""
    known = [one for one in records if one.plan and is_number(one.quality.delta_nll)]
    if not known:
        return
    yield fastest_card(known)
    for space in list(dict.fromkeys(record.space for record in known))[: MOST_CARDS - 1]:
        asked = [record for record in known if record.space == space]
        usable = [record for record in asked if is_usable(record.quality)]
        count = max(record.count for record in usable or asked)
        ranked = sorted((one for one in asked if one.count == count), key=lambda one: one.quality.delta_nll)
        yield _least(ranked, f"Loses least: {count} {space}")


def _least(ranked: Sequence[ComparisonRecord], title: str) -> Card:
    best, *rest = ranked
    text = f"{best.way}, {best.forwards:,.1f} forward passes to find"
    same = [one for one in rest if (one.plan, one.quality.delta_nll) == (best.plan, best.quality.delta_nll)]
    other = next((one for one in rest if one not in same), None)
    if same:
        text += f"; the same set by {joined([one.way for one in same])}"
    if other:
        text += f"; next, {nats_in_words(other.quality)}: {other.way}"
    if not is_usable(best.quality):
        text += "; no longer usable"
    error = f"± {best.quality.delta_nll_se:.2f} " if is_number(best.quality.delta_nll_se) else ""
    return Card(title, f"{best.quality.delta_nll:+.2f}", f"{error}nats a token", text)
