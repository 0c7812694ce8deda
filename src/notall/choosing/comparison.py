"""Criteria side by side: what each skips at each budget, what that costs on held-out text, and what it took to find.

In stages, each of which goes on where it was stopped: every criterion chooses, all plans are scored together on the
held-out text, repaired ones plan by plan, answer tasks together, are timed, and become a line each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.paper.sweep import as_record, as_scores
from ..measuring.plan_times import Timed, time_plan
from ..measuring.quality import Scores as Losses
from ..measuring.quality import score, summarize
from ..measuring.statistics import mean_and_error
from ..progress import Progress, Stages, silent
from ..records.columns import Row
from ..records.comparison import (
    UNREPAIRED,
    ChoiceRecord,
    ComparisonRecord,
    HeldOutRecord,
    PlanTimesRecord,
    TaskFigure,
)
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.record import Key, TimeFields
from ..records.search import EvaluationRecord
from ..repairing.methods import method
from ..repairing.methods.keeping import kept_repair
from ..running.footprint import footprint
from ..structure.locating import locate
from .budget import by_count
from .criteria import CRITERIA, Setting, UnitScores, choose, criterion, suits
from .criteria.setting import Chosen, take
from .evaluator import Evaluator, Spent
from .objective import Objective
from .space import Space, plan_of

if TYPE_CHECKING:
    from ..evaluation.tasks import Job, TaskShelf

NO_FILE_NAME = str.maketrans(" /:", "---")  # criteria and aims may be called module:function and task:NAME
DEAR = ("greedy", "evolution", "quadratic")  # criteria that evaluate many times as often as the search


@dataclass(frozen=True)
class Aim:
    """What a criterion goes by: an objective, and the calibration text, (batch, tokens) token ids each."""

    objective: Objective
    batches: Sequence[Tensor]


@dataclass(frozen=True)
class Question:
    """What `criterion` skips, going by the aim of this name, to skip `count` of `space`."""

    criterion: str
    aim: str
    space: Space
    count: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """As in the records."""
        return self.criterion, self.aim, str(self.space), self.count

    @property
    def name(self) -> str:
        return " ".join(map(str, self.key))


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-evaluation-harness to run every plan on; `limit` is in documents a task."""

    names: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    limit: int | None = None
    num_fewshot: int | None = None
    folder: Path | TaskShelf | None = None

    def jobs(self) -> list[Job]:
        """Their requests, built. Raises `UsageError` as `TaskShelf.jobs` does."""
        from ..evaluation.tasks import Limits, TaskShelf

        return TaskShelf.of(self.folder).jobs(self.names, self.num_fewshot, Limits(self.limit))


@dataclass(frozen=True)
class Repairs:
    """Ways to make up for what a plan skips, by name, and the text to do it with: (batch, tokens) token ids each."""

    methods: tuple[str, ...] = ()
    batches: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        for name in self.methods:
            method(name)

    @property
    def others(self) -> tuple[str, ...]:
        """Each once, without the one that does nothing."""
        return tuple(name for name in dict.fromkeys(self.methods) if name != UNREPAIRED)


def questions_of(
    criteria: Sequence[str], aims: Sequence[str], spaces: Sequence[tuple[Space, Sequence[int]]]
) -> list[Question]:
    """Every criterion at every count of every space that it can choose from; by each aim where it goes by one."""
    return [
        Question(name, aim, space, count)
        for space, counts in spaces
        for name in criteria
        for aim in (aims if criterion(name).measured else aims[:1])
        for count in counts
        if suits(name, space)
    ]


def compare_criteria(
    model: PreTrainedModel,
    questions: Sequence[Question],
    aims: Mapping[str, Aim],
    held_out: Sequence[Tensor],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    tasks: Tasks | None = None,
    timed: Timed | None = None,
    repairs: Repairs | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> list[ComparisonRecord]:
    """Choose, score, ask and time as `questions` say; one record a question, in the folder `out` too.

    With `repairs`, one more for each of them, behind the question's own: its plan, repaired, on the held-out text.
    Called again on the same folder it goes on where it stopped, and what was done of other questions stays. Raises
    `UsageError` when the folder holds work of other settings or of another command, is in use or cannot be written,
    and as `choose` does.
    """
    if timed:
        timed.check(model)
    for question in questions:
        by_count(question.space, question.count)
    jobs = tasks.jobs() if tasks else []
    about = Provenance.of(provenance, seed=seed)
    guesses = {question: _guess(question) for question in questions}
    chosen_in = sum(guesses.values())
    repaired_in = 0.3 * chosen_in * len(repairs.others) if repairs else 0.0
    stages = Stages(progress, 1.5 * chosen_in + repaired_in)  # what is measured takes half as much again
    with working_in(out, "compare"):
        kept = Ledger(out, ComparisonRecord)
        choices = _Choosing(model, aims, out, about, seed).choices(
            [(question, stages.stage(steps)) for question, steps in guesses.items()]
        )
        plans = {choice.skipped: plan_of(choice.skipped.split()) for choice in choices}
        losses = _losses(model, plans, held_out, out, about, stages.stage(0.3 * chosen_in))
        repaired = _repaired(model, plans, repairs, held_out, out, about, stages.stage(repaired_in)) if repairs else {}
        answers = (
            _answers(model, tasks.tokenizer, plans, jobs, out, stages.stage(0.1 * chosen_in)) if tasks and jobs else {}
        )
        times = _times(model, plans, timed, out, about, seed, stages.stage(0.1 * chosen_in)) if timed else {}
        records: list[ComparisonRecord] = []
        for choice in choices:
            plan = plans[choice.skipped]
            record = ComparisonRecord(
                **choice.model_dump(exclude={"record", "provenance"}),
                plan=plan,
                **asdict(summarize(losses[choice.skipped], losses[""])),
                **asdict(footprint(model, plan)),
                tasks=answers.get(choice.skipped, {}),
                times=times.get(choice.skipped),
                provenance=Provenance.of(about, fingerprint=locate(model).fingerprint),
            )
            scores = {name: repaired[name, choice.skipped] for name in (repairs.others if repairs else ())}
            records += _each_repair(record, scores, losses[""]) if repairs else [record]
        held = _HeldOut(out, about, held_out)
        asked = {record.key for record in records}
        every = _behind([*records, *(record for record in kept if record.key not in asked)], held)
        _keep(kept, every)
        records = every[: len(records)]
        progress(stages.steps, stages.steps, f"compared {len(records)} choices")
        return records


def _behind(records: Sequence[ComparisonRecord], held: _HeldOut) -> list[ComparisonRecord]:
    """The same, each beside the one of as many of the same space, and repaired alike, that loses least."""
    groups: dict[tuple[Any, ...], list[ComparisonRecord]] = {}
    for record in records:
        if record.delta_nll is not None and held.has(record.repair, record.skipped):
            groups.setdefault((record.space, record.count, record.repair), []).append(record)
    beside: dict[Key, tuple[float | None, float | None]] = {}
    for group in groups.values():
        best, *others = sorted(group, key=lambda one: one.delta_nll or 0.0)
        least = held.scores(best.repair, best.skipped).nll
        for one in others:
            mine = held.scores(one.repair, one.skipped).nll
            behind, error = mean_and_error([a - b for a, b in zip(mine, least)])
            beside[one.key] = behind, None if math.isnan(error) else error
    figures = (beside.get(record.key, (None, None)) for record in records)
    return [record.model_copy(update={"behind": a, "behind_se": b}) for record, (a, b) in zip(records, figures)]


def _keep(kept: Ledger[ComparisonRecord], records: Sequence[ComparisonRecord]) -> None:
    for record in records:
        if record.key not in kept or _figures(kept[record.key]) != _figures(record):
            kept.add(record)


def _each_repair(
    record: ComparisonRecord, repaired: Mapping[str, tuple[Losses, int]], dense: Losses
) -> list[ComparisonRecord]:
    """A record unrepaired, and one of each repair, from its scores and the bytes that it adds."""
    records = [record.model_copy(update={"repair": UNREPAIRED})]
    for name, (scores, added) in repaired.items():
        changes = {"repair": name, "added_bytes": added, "tasks": {}}
        changes |= {"times": None} if added else {}
        records.append(record.model_copy(update=changes | asdict(summarize(scores, dense))))
    return records


def _figures(record: ComparisonRecord) -> Row:
    """All that a record says, but for where it was measured."""
    return record.model_dump(exclude={"provenance": {"where"}})


# --- choosing ---------------------------------------------------------------------------------------------------------


class _Choosing:
    """What each question is answered, taken from the folder where it is there; scores are shared between counts."""

    def __init__(
        self, model: PreTrainedModel, aims: Mapping[str, Aim], out: Path, about: Provenance, seed: int
    ) -> None:
        self.model, self.aims, self.out, self.about, self.seed = model, aims, out, about, seed
        self.scored: dict[tuple[str, str, str], tuple[UnitScores, Spent]] = {}
        self.held = Ledger(out, ChoiceRecord, lambda record: self._about(record.aim))

    def choices(self, asked: Sequence[tuple[Question, Progress]]) -> list[ChoiceRecord]:
        """One record a question, in their order."""
        for question, progress in asked:
            if question.key not in self.held:
                self.held.add(self._choose(question, progress))
            progress(1, 1, question.name)
        return [self.held[question.key] for question, _ in asked]

    def _about(self, aim: str) -> Provenance:
        """Where a choice by this aim comes from; of an aim that is not asked for, nothing is held against it."""
        by = self.aims.get(aim)
        return Provenance.of(self.about, by=f"{by.objective.name} {by.objective.digest()}") if by else self.about

    def _choose(self, question: Question, progress: Progress) -> ChoiceRecord:
        aim, one = self.aims[question.aim], criterion(question.criterion)
        evaluator = self._evaluator(question, aim)
        setting = Setting(
            self.model, question.space, aim.batches, evaluator, self.seed, progress=_naming(progress, question)
        )
        chosen, spent = self._answer(question, setting)
        rise = None
        if one.measured and not one.score:  # known already, or one evaluation more
            rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
        return ChoiceRecord(
            criterion=question.criterion,
            aim=question.aim,
            space=str(question.space),
            count=question.count,
            skipped=" ".join(question.space.sorted(chosen.skipped)),
            order=tuple(tuple(unit) for unit in chosen.order),
            calibration_tokens=sum(tokens.numel() for tokens in aim.batches),
            **vars(spent),
            forwards=spent.executions / evaluator.forward,
            forwards_in_full=spent.one_by_one / evaluator.forward,
            calibration_delta=rise,
            provenance=self._about(question.aim),
        )

    def _evaluator(self, question: Question, aim: Aim) -> Evaluator:
        """Questions that go by the same share what they evaluate."""
        if not criterion(question.criterion).measured:
            return Evaluator(self.model, aim.objective, settings=self.about)
        name = f"{question.criterion}-{question.aim}".translate(NO_FILE_NAME)
        folder = self.out / Path(EvaluationRecord.file).stem
        return Evaluator(self.model, aim.objective, folder=folder, name=f"{name}.jsonl", settings=self.about)

    def _answer(self, question: Question, setting: Setting) -> tuple[Chosen, Spent]:
        budget = by_count(question.space, question.count)
        one = criterion(question.criterion)
        if not one.score:
            chosen = choose(question.criterion, setting, budget)
            return chosen, replace(setting.evaluator.spent)
        key = question.criterion, question.aim, str(question.space)
        if key not in self.scored:
            self.scored[key] = one.scores(setting), setting.evaluator.spent
        scores, spent = self.scored[key]
        return take(setting, scores, budget), spent


def _naming(progress: Progress, question: Question) -> Progress:
    return lambda done, total, doing: progress(done, total, f"{question.name}: {doing}")


def _guess(question: Question) -> float:
    """Forward passes, about."""
    units = len(question.space.units)
    guesses = {
        "leave-one-out": units / 2,
        "greedy": units * question.count / 2,
        "evolution": 150,
        "quadratic": units**2 / 24,
        "search": 2 * question.count + 20,
    }
    return guesses.get(question.criterion, 1.0)


# --- measuring --------------------------------------------------------------------------------------------------------


def _losses(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    held_out: Sequence[Tensor],
    out: Path,
    about: Provenance,
    progress: Progress,
) -> dict[str, Losses]:
    """The scores of the dense model ("") and of each plan on the held-out text; what lacks is computed together."""
    held = _HeldOut(out, about, held_out)
    for number, tokens in enumerate(held_out):
        lacking = held.lacking(number, UNREPAIRED, ["", *plans])
        if lacking:
            progress(number, len(held_out), f"scoring {len(lacking)} plans on held-out text")
            asked = [skipped for skipped in lacking if skipped]
            held.add(number, UNREPAIRED, dict(zip(["", *asked], score(model, [plans[one] for one in asked], tokens))))
    return {skipped: held.scores(UNREPAIRED, skipped) for skipped in ("", *plans)}


def _repaired(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    repairs: Repairs,
    held_out: Sequence[Tensor],
    out: Path,
    about: Provenance,
    progress: Progress,
) -> dict[tuple[str, str], tuple[Losses, int]]:
    """By repair and plan: its scores on the held-out text, and the bytes that it adds at run time.

    One plan is repaired in all ways, and all are scored together, before the next one is: weights take memory.
    """
    held = _HeldOut(out, about, held_out)
    found: dict[tuple[str, str], tuple[Losses, int]] = {}
    for number, (skipped, plan) in enumerate(plans.items()):
        repaired = {}
        for name in repairs.others:
            progress(number, len(plans), f"{name} of {skipped}")
            repaired[name] = kept_repair(out / "repairs", name, model, plan, repairs.batches)[0]
        for batch, tokens in enumerate(held_out):
            lacking = [name for name in repaired if held.lacking(batch, name, [skipped])]
            if lacking:
                _, *scores = score(model, [repaired[name] for name in lacking], tokens)
                for name, one in zip(lacking, scores):
                    held.add(batch, name, {skipped: one})
        found |= {(name, skipped): (held.scores(name, skipped), one.added_bytes) for name, one in repaired.items()}
    return found


class _HeldOut:
    """What was scored of the held-out text already, by batch, repair and plan; "" is the dense model."""

    def __init__(self, out: Path, about: Provenance, batches: Sequence[Tensor]) -> None:
        self.batches = batches
        self.about = Provenance.of(about, held_out_tokens=sum(tokens.numel() for tokens in batches))
        self.kept = Ledger(out, HeldOutRecord, self.about)
        self.held = {
            (one.batch, one.repair, skipped): one.scores[skipped] for one in self.kept for skipped in one.scores
        }

    def lacking(self, batch: int, repair: str, plans: Sequence[str]) -> list[str]:
        return [skipped for skipped in plans if (batch, repair, skipped) not in self.held]

    def has(self, repair: str, skipped: str) -> bool:
        """Of all batches."""
        return all((number, repair, skipped) in self.held for number in range(len(self.batches)))

    def add(self, batch: int, repair: str, scores: Mapping[str, Losses]) -> None:
        new = {skipped: as_record(one) for skipped, one in scores.items()}
        record = HeldOutRecord(batch=batch, scores=new, provenance=self.about)
        self.kept.add(record if repair == UNREPAIRED else record.model_copy(update={"repair": repair}))
        self.held |= {(batch, repair, skipped): one for skipped, one in new.items()}

    def scores(self, repair: str, skipped: str) -> Losses:
        """Of all batches."""
        total = Losses()
        for number, tokens in enumerate(self.batches):
            total.extend(as_scores(self.held[number, repair, skipped], len(tokens), self.kept.path))
        return total


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: Mapping[str, Plan],
    jobs: Sequence[Job],
    out: Path,
    progress: Progress,
) -> dict[str, dict[str, TaskFigure]]:
    """Each plan's metric of each task, with its difference to the dense model, paired by document."""
    from ..evaluation.harness import run_jobs

    names = ["", *(skipped for skipped in plans if skipped)]
    every = [plans.get(skipped, Plan()) for skipped in names]
    found = run_jobs(model, tokenizer, every, jobs, folder=out / "answers", progress=progress)
    by_plan: dict[str, dict[str, TaskFigure]] = {skipped: {} for skipped in names}
    for result in found:
        by_plan[names[result.number]][f"{result.task} {result.metric.partition(',')[0]}"] = TaskFigure(
            value=result.value,
            stderr=result.stderr,
            delta=result.delta,
            delta_stderr=result.delta_stderr,
            p_value=result.p_value,
            num_fewshot=result.num_fewshot,
            documents=len(result.documents),
        )
    return by_plan


def _times(
    model: PreTrainedModel,
    plans: Mapping[str, Plan],
    timed: Timed,
    out: Path,
    about: Provenance,
    seed: int,
    progress: Progress,
) -> dict[str, TimeFields]:
    """Each plan's times in turn with the dense model; plans that leave as much of each kind are timed once."""
    about = Provenance.of(about, timed=asdict(timed))
    held = Ledger(out, PlanTimesRecord, about)
    found = {}
    for number, (skipped, plan) in enumerate(plans.items()):
        left = footprint(model, plan)
        key = (left.params, left.weight_bytes, left.kv_bytes_per_token)
        if key not in held:
            progress(number, len(plans), f"timing {plan}")
            figures = list(time_plan(model, plan, timed, seed=seed).values())[-1]
            times = TimeFields(**{name: value for name, value in figures.items() if name in TimeFields.model_fields})
            held.add(PlanTimesRecord(**asdict(left), times=times, provenance=about))
        found[skipped] = held[key].times
    return found


def compare_front(
    model: PreTrainedModel,
    space: Space,
    most: int,
    aim: Aim,
    held_out: Sequence[Tensor],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[ComparisonRecord]:
    """The trade-off up to `most` of `space`, at four sizes, by all criteria but those that cost more than the search.

    Writes what `compare_criteria` does to `out`, and raises as it does.
    """
    step = 2 if str(space) == "portable" else 1
    counts = sorted({max(step, step * round(most * part / 4 / step)) for part in (1, 2, 3, 4)})
    name = aim.objective.name
    questions = questions_of([c for c in CRITERIA if c not in DEAR], [name], [(space, counts)])
    return compare_criteria(model, questions, {name: aim}, held_out, out, provenance, seed=seed, progress=progress)
