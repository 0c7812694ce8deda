"""Choose a plan to meet a budget, keep what was evaluated, measure what was chosen, and
say what it comes to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field

from ..errors import UsageError, shortened
from ..extras import need
from ..files import refuse_others
from ..models.names import USE
from ..options import Workload, option
from ..plan import Phase, Plan
from ..progress import Progress, Stages, silent
from ..results.facts import (
    QUALITY,
    SPEED_CHECK,
    Footprint,
    PlanScore,
    Quality,
    SearchCost,
    SpeedCheck,
)
from ..results.ledger import Ledger, read, working_in
from ..results.lines import refuse_unwritable
from ..results.provenance import Provenance, behind
from ..results.record import Amount, Key, Number, Record, Skips, SublayerName
from ..results.repairs import MeasuredRecord, RepairStep, State
from ..results.table import Column, number, table, within, words
from ..strict_json import Settings
from .evaluate import last_measured, tasks_section
from .folder import Folder, Section, Shown, Step, check_folder
from .options import (
    LAST_TOKENS,
    PHASE,
    HeldOutOptions,
    KeepFirst,
    KeepLast,
    ModelOptions,
    SkipAmount,
    TaskChoice,
    refuse_judging,
    space_of,
)
from .pages import read_costs
from .recovery import TASKS, RecoveryOptions, judge, keep_scores, last_state, scores_of
from .repair import REFIT, RepairOptions
from .used import Use
from .verdict import LITTLE, Verdict, next_command, what_next

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.budget import Budget, Resource
    from ..choosing.choice import ChosenPlan, Recovering
    from ..choosing.space import Space
    from ..repairing.texts import RepairTexts
    from ..structure.model_structure import ModelStructure

FARTHEST = 0.3  # nats up to which a plan is looked for that keeps a recovery
WITH_RETRIEVAL = (  # an episode has few tokens to judge, each of which is lost at once
    "kl + 0.3*retrieval"
)
RESOURCES: Mapping[str, Resource] = {
    "params": "params",
    "weights": "weight_bytes",
    "kv": "kv_bytes_per_token",
}
READS = "reads the prompt"  # of a speedup, before how many times as fast
NOTE = (
    "The objective is of the text that was chosen by; NLL and KL, where they are given,"
    " are of held-out text."
)


class SearchRecord(
    Record, Skips, kind="search", key=("chosen", "plan", "in_time")
):  # times are never the same twice
    """A plan that was chosen, and what was measured of it, if anything."""

    chosen: str = Field(description="how, by what, and how much")
    order: tuple[tuple[SublayerName, ...], ...] = Field(
        description="what was skipped together, in order of choosing"
    )
    dense_cost: Number = Field(description="the objective of the original model")
    cost: Number = Field(description="the objective of the plan")
    spent: SearchCost
    forwards: Amount = Field(
        description="executions in dense forward passes over the calibration text"
    )
    in_time: bool = Field(description="found before the time was up")
    missed: str | None = Field(
        None, description="what was reached of a budget that was not; None where it was"
    )
    quality: Quality | None = Field(None, description="on held-out text")
    check: SpeedCheck | None = Field(None, description="where a speedup was asked for")
    footprint: Footprint | None = Field(None, description="what the plan leaves")
    dense: Footprint | None = Field(None, description="of the original model")

    @property
    def key(self) -> Key:  # chosen again from the same text, it is the same choice
        return (
            *super().key,
            self.spent.evaluations,
            self.provenance and self.provenance.key,
        )


COLUMNS: tuple[Column[SearchRecord], ...] = (
    words("chosen", lambda one: one.chosen),
    *within(QUALITY, lambda one: one.quality),
    *within(SPEED_CHECK, lambda one: one.check),
    number("objective on its text", lambda one: one.cost, ".4f"),
    number("original model's objective", lambda one: one.dense_cost, ".4f"),
    words("search finished", lambda one: "yes" if one.in_time else "no"),
    number("forward passes", lambda one: one.forwards, ",.1f"),
    number("evaluations", lambda one: one.spent.evaluations, ",d"),
    number("CPU s", lambda one: one.spent.seconds, ",.1f"),
    number("wall s", lambda one: one.spent.wall_seconds or None, ",.1f"),
    words("missed", lambda one: one.missed),
)


def keep_choice(out: Path, found: ChosenPlan, provenance: Provenance) -> SearchRecord:
    """A choice, what it took, and its measurements, written into `out` unless they are
    there.
    """
    dense, left = found.weighed or (None, None)
    record = SearchRecord(
        **{
            name: value
            for name, value in vars(found).items()
            if name in SearchRecord.model_fields
        },
        chosen=found.plan.note or "",
        quality=found.held_out[1] if found.held_out else None,
        check=found.times,
        footprint=left,
        dense=dense,
        provenance=provenance,
    )
    with working_in(out, "search"):
        choices = Ledger(out, SearchRecord)
        if record.key not in choices:
            choices.add(record)
    return record


@dataclass(frozen=True)
class SpaceOptions:
    skip: str = option(
        "sublayer",
        "what to choose among, and how many of it, or below 1 what share: attention,"
        " mlp, block, sublayer (attentions and MLPs), or a kind of mixer, as inspect"
        " names it; portable: sublayers whose absence leaves an ordinary checkpoint;"
        " period: blocks until the kinds of mixers come again",
        metavar="KIND[:HOW MANY]",
    )
    keep_first: KeepFirst = False
    keep_last: KeepLast = False
    phase: Phase | None = option(
        None, f"{PHASE} (default: all; of a search by --recovery alone both)"
    )
    last_tokens: int | None = option(
        None, f"{LAST_TOKENS} (default: 1, or of a search what lowers the KL)", least=1
    )

    @property
    def amount(self) -> SkipAmount:
        return SkipAmount.parse(self.skip)

    def of(self, model: PreTrainedModel) -> Space:
        phase, last_tokens = self.phase or "all", self.last_tokens or 1
        return space_of(
            model, self.amount.kind, self.keep_first, self.keep_last, phase, last_tokens
        )


@dataclass(frozen=True)
class BudgetOptions:
    """How much is to be saved, or at most how many nats to lose."""

    PANEL: ClassVar = (
        "Budget: HOW MANY of --skip, one of these or --recovery, or one with a limit of"
        " nats"
    )

    params: float | None = option(
        None, "save this many parameters, or this share of them if below 1"
    )
    weights: float | None = option(
        None, "save this many bytes of weights, or this share"
    )
    kv: float | None = option(
        None, "save this many bytes of KV cache per token, or this share"
    )
    speedup: float | None = option(
        None,
        "run prompt and generated tokens this many times as fast here, or with --phase"
        " prefill the prompt",
    )
    max_nll: float | None = option(
        None, "most NLL to add, in nats per token, alone or as a limit"
    )
    max_kl: float | None = option(None, "the same for KL")

    def check(self, amount: SkipAmount, recovery: float | None = None) -> BudgetChoice:
        """Raises `UsageError` unless these and the number of --skip are one budget, or
        none with a `recovery`.
        """
        from ..choosing.budget import check_nats
        from ..choosing.latency import check_faster

        if len(amount.amounts) > 1:
            raise UsageError(
                f"--skip {amount} asks for several budgets: give one number"
            )
        given: dict[str, float] = {
            name: value for name, value in vars(self).items() if value is not None
        }
        given |= {"count": amount.amounts[0]} if amount.amounts else {}
        limits = [
            (name, value) for name, value in given.items() if name.startswith("max_")
        ]
        savings = [one for one in given.items() if one not in limits]
        if recovery and not given:
            return BudgetChoice(None, ("farthest", FARTHEST))
        if not given or len(limits) > 1 or len(savings) > 1:
            wrong = [*dict(savings if len(savings) > 1 else limits)] or [
                "count",
                *vars(self),
            ]
            names = [
                (
                    f"--skip {amount.kind}:N"
                    if name == "count"
                    else f"--{name.replace('_', '-')}"
                )
                for name in wrong
            ]
            raise UsageError(
                "give one budget:"
                f" {' or '.join([*names, *([] if given else ['--recovery'])])}"
            )
        for _, value in limits:
            check_nats(value)
        if self.speedup is not None:
            check_faster(self.speedup)
        return BudgetChoice(next(iter(savings), None), next(iter(limits), None))


@dataclass(frozen=True)
class BudgetChoice:
    """What to save, or at most how many nats to lose, by the names of options."""

    saving: tuple[str, float] | None
    limit: tuple[str, float] | None = None

    def objective(self, text: str) -> str:
        """The one that is limited, else KL, which tells more of as much text; on the
        mix retrieval counts, too.
        """
        if self.limit and self.limit[0] in ("max_nll", "max_kl"):
            return self.limit[0].removeprefix("max_")
        return WITH_RETRIEVAL if text == USE else "kl"

    def check(self, model: PreTrainedModel, space: Space, workload: Workload) -> None:
        """Raise `UsageError` for what cannot be saved, as far as that is known without
        timing the model.
        """
        if self.saving and self.saving[0] == "speedup":
            workload.check(model)
        else:
            self.of(model, space, workload)

    def of(
        self,
        model: PreTrainedModel,
        space: Space,
        workload: Workload,
        progress: Progress = silent,
    ) -> Budget:
        """The budget; where it is a speedup, the model is timed."""
        from ..choosing.budget import by_count, by_footprint, by_limit, within_limit
        from ..choosing.latency import by_speedup, measure_times

        nats = self.limit and {"max_nll": "NLL", "max_kl": "KL"}.get(
            self.limit[0], "of the objective"
        )
        limit = by_limit(space, self.limit[1], nats) if self.limit and nats else None
        if self.saving is None:
            assert limit
            return limit
        name, amount = self.saving
        if name == "count":
            saving = by_count(space, amount)
        elif name == "speedup":
            how: Settings = {
                "phase": space.phase,
                "wanted": (space, amount),
                "progress": progress,
            }
            times = measure_times(model, workload, **how)
            saving = by_speedup(space, times, amount)
        else:
            saving = by_footprint(model, space, RESOURCES[name], amount)
        return within_limit(saving, limit) if limit else saving


@dataclass(frozen=True)
class ObjectiveOptions:
    """By which importance criterion sets are chosen, what they are judged by, and when
    to stop.
    """

    PANEL: ClassVar = "What a set is judged by, and when to stop"

    criterion: str = option(
        "search", "a name of `notall criteria`, or your own module:function"
    )
    objective: str | None = option(
        None,
        "nll, kl, retrieval, answers, task:NAME, or a sum such as 'kl + 0.5*task:NAME'"
        " (default: kl, on the mix kl + 0.3*retrieval; what --max-nll or --max-kl"
        " limits)",
    )
    prompts: Path | None = option(
        None, "for `answers`: prompts, one per line, or a .jsonl with a `prompt` column"
    )
    max_minutes: float | None = option(
        None,
        "minutes by the clock to look for at most; loading, writing the mix, timing and"
        " measuring take more",
    )
    patience: int = option(
        12, "stop after this many evaluations that bring nothing", least=0
    )

    def check(self) -> None:
        """Raise `UsageError` for what is no criterion, or needs an extra that is not
        installed.
        """
        from ..choosing.criteria import criterion as criterion_of

        need(*criterion_of(self.criterion).needs)


def tasks_of(objectives: Sequence[str], prompts: Path | None) -> list[str]:
    """The tasks that objectives are made of. Raises `UsageError` for what is none, and
    for prompts that are none.
    """
    from ..choosing.objective import terms_of
    from ..models.texts import read_prompts

    parts = [name for one in objectives for _, name in terms_of(one, prompts)]
    if "answers" in parts and prompts:
        read_prompts(prompts)
    return [name.removeprefix("task:") for name in parts if name.startswith("task:")]


class Searched(NamedTuple):
    """What a search found, for which budget, what that costs before a repair and after
    it, and the plan's file.
    """

    record: SearchRecord
    budget: str
    measured: Sequence[MeasuredRecord]
    scores: Sequence[PlanScore]
    verdict: Verdict
    out: Path


@dataclass(frozen=True)
class Search:
    """All that a search is asked for; `out` is the plan's file, with a folder of
    evaluations next to it.
    """

    model: ModelOptions
    space: SpaceOptions
    text: HeldOutOptions
    budget: BudgetOptions
    workload: Workload
    by: ObjectiveOptions
    repair: RepairOptions
    tasks: RecoveryOptions
    out: Path
    seed: int = 0
    shared: Path | None = (
        # the folder of answers to tasks of another search, which asked the original
        # model
        None
    )

    @property
    def folder(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.search")

    @property
    def answers(self) -> Path:
        return self.shared or self.folder / "answers"

    @property
    def repaired(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.repaired")

    def check(self) -> BudgetChoice:
        """The budget. Raises `UsageError` for whatever is wrong that can be known
        without a model.
        """
        from ..choosing.choice import check_minutes

        check_folder(self.folder, "search")
        refuse_others(self.out, Plan.load, "plan")
        refuse_unwritable(self.out.parent)
        if self.repair and (self.by.objective or self.budget.max_nll is not None):
            raise UsageError(
                "--repair judges sets by the KL that it leaves: leave --objective out,"
                " and --max-nll"
            )
        if (
            self.repair
            and self.space.phase == "prefill"
            and self.repair.repair != REFIT
        ):
            raise UsageError(
                f"keys and values of a prompt are refit: give --repair {REFIT}"
            )
        if self.space.last_tokens and self.space.phase != "prefill":
            raise UsageError(
                "--last-tokens says how much of a prompt runs whole: add --phase"
                " prefill"
            )
        self.by.check()
        check_minutes(self.by.max_minutes)
        wanted = self.budget.check(self.space.amount, self.tasks.recovery)
        self.text.check()
        self.repair.check(self.repaired)
        return wanted

    def asks_for_both(self, wanted: BudgetChoice) -> bool:
        """Whether the answer is one for every token and one for the prompt alone: a
        recovery, and nothing else.
        """
        from ..choosing.objective import OF_TEXT, terms_of

        if self.space.phase or not self.tasks.recovery or wanted.saving:
            return False
        terms = (
            terms_of(self.by.objective, self.by.prompts) if self.by.objective else []
        )
        by_text = all(name in OF_TEXT for _, name in terms)
        refits = not self.repair or self.repair.repair == REFIT
        return (
            by_text and refits and self.space.amount.kind not in ("portable", "period")
        )

    @property
    def in_the_prompt(self) -> Search:
        """The same for the prompt's tokens alone, in files of its own."""
        out = self.out.with_name(f"{self.out.stem}-prefill{self.out.suffix}")
        return replace(
            self,
            space=replace(self.space, phase="prefill"),
            out=out,
            shared=self.answers,
        )

    def run(self, progress: Progress) -> list[Searched]:
        """Load the model, choose, repair where that is wanted, and measure. Raises as
        `choose_plan` does.

        A recovery without a phase is answered twice: for every token, and then for the
        prompt's alone.
        """
        wanted, asked = self.check(), [self]
        if self.asks_for_both(wanted):
            each = self._with_minutes(0.5)
            asked = [each, each.in_the_prompt]
            each.in_the_prompt.check()
        tasks = self._tasks(
            wanted
        )  # once: to read those of the harness takes ten seconds
        net, tokenizer = self.model.load()
        if len(asked) > 1 and (why := _not_in_the_prompt(asked[1].space, net)):
            print(f"note: for every token alone: {why}", file=sys.stderr)
            asked = [self]
        stages = Stages(progress, len(asked))
        return [one.found(net, tokenizer, tasks, stages.stage(1)) for one in asked]

    def _with_minutes(self, share: float) -> Search:
        """The same in a share of the minutes, where they are limited."""
        most = self.by.max_minutes
        return (
            self
            if most is None
            else replace(self, by=replace(self.by, max_minutes=share * most))
        )

    def _judged_by(self, wanted: BudgetChoice) -> str:
        """The objective; the mix's retrieval has no prompt."""
        return self.by.objective or wanted.objective(
            "" if self.space.phase == "prefill" else self.text.text
        )

    def _tasks(self, wanted: BudgetChoice) -> TaskChoice:
        """Those that judge, none of which asks for what is chosen by or fitted to."""
        judged_by = self._judged_by(wanted)
        tasks = self.tasks.check(objectives=tasks_of([judged_by], self.by.prompts))
        own_text = [self.text.text, *(self.repair.sources if self.repair else ())]
        refuse_judging(
            tasks, own_text, self.by.prompts if "answers" in judged_by else None
        )
        return tasks

    def found(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: TaskChoice,
        progress: Progress,
    ) -> Searched:
        """As `run`, of one phase, judged by `tasks`."""
        from ..choosing.choice import choose_plan
        from ..choosing.in_prompts import LAST_TOKENS as TRIED
        from ..choosing.objective import build_objective
        from ..repairing.texts import measure

        wanted = self.check()
        of_prompt = self.space.phase == "prefill"
        judged_by = self._judged_by(wanted)
        among = self.space.of(net)
        wanted.check(net, among, self.workload)
        twice = 2 if self.repair else 1  # half of them to fit to
        wide = replace(self.text, sequences=twice * self.text.sequences)
        split = wide.split(net, tokenizer, seed=self.seed, fewer=True)
        batches, about = split.calibration, split.described
        other: Settings = {
            name: about.pop(name)
            for name in ("held_out", "held_out_sha256")
            if name in about
        }
        other |= (
            {"seed": self.seed} if self.seed else {}
        )  # a record without one is of seed 0
        texts = (
            self.repair.texts(
                net, tokenizer, progress, seed=self.seed, used=[split.own]
            )
            if self.repair
            else None
        )
        split = (
            split.apart_from(texts.fitted) if texts and self.text.held_out else split
        )
        of: Settings = {
            "prompts": self.by.prompts,
            "task_path": tasks.shelf,
            "task_limit": tasks.questions,
        }
        prompt = self.text.length // 2 if of_prompt else None
        of |= {"prompt_tokens": prompt}
        about |= {"prompt_tokens": prompt} if prompt else {}
        goal = build_objective(judged_by, net, tokenizer, batches, **of)
        budget = wanted.of(net, among, self.workload, progress)
        settings = self.model.provenance(net, **about)
        found = choose_plan(
            net,
            self.by.criterion,
            among,
            budget,
            batches,
            goal,
            out=self.folder,
            provenance=settings,
            max_minutes=self.by.max_minutes,
            patience=self.by.patience,
            seed=self.seed,
            held_out=split.evaluation,
            after_repair=bool(self.repair),
            recovering=(
                self._recovering(net, tokenizer, tasks, texts, settings, progress)
                if tasks.recovery
                else None
            ),
            last_tokens=TRIED if of_prompt and self.space.last_tokens is None else (),
            progress=progress,
        )
        self._save(found.plan)
        record = keep_choice(
            self.folder,
            found,
            Provenance.of(settings, **other, fingerprint=found.plan.fingerprint),
        )
        text = f"{split.measured_on}{behind(prompt)}"
        spec, measured = self.model.model, list[MeasuredRecord]()
        verdict = Verdict.on(net, found.plan, record.quality, text, spec=spec)
        plans: dict[State, Plan] = {"skipped": found.plan}
        if texts:
            plans["repaired"] = self.repair.apply(
                net, found.plan, texts, self.repaired, settings, progress
            )
            windows = (
                {split.measured_on: split.evaluation}
                if self.text.held_out
                else texts.other
            )
            measured = measure(net, plans, windows, self.folder, settings, progress)
            last = measured[-1]
            verdict = Verdict.on(
                net, plans["repaired"], last.quality, last.text, spec=spec
            )
        asked = tasks or self._retrieval(net, found.plan)
        scores = judge(
            net, tokenizer, plans, asked.jobs(), asked, self.answers, progress
        )
        keep_scores(self.folder, plans, scores, settings)
        missed = found.missed and f"{budget.description}: {found.missed}"
        speedup = found.times.measured_speedup if found.times else None
        verb = READS if of_prompt else "runs"
        verdict = replace(
            verdict, speedup=speedup, verb=verb, missed=missed, late=not found.in_time
        )
        verdict = verdict.judged(scores, tasks.recovery)
        verdict = replace(verdict, next=self._next(net, verdict))
        return Searched(record, budget.description, measured, scores, verdict, self.out)

    def _recovering(
        self,
        net: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: TaskChoice,
        texts: RepairTexts | None,
        settings: Provenance,
        progress: Progress,
    ) -> Recovering:
        """What a plan, after the repair if there is one, keeps of the task of which it
        keeps least.

        The items are few, and none of those that judge it, so that it is to keep half
        of what it may lose.
        """
        from ..choosing.choice import Recovering
        from ..evaluation.checks import is_check

        assert tasks.shelf
        assert tasks.recovery
        names = tuple(filter(is_check, tasks.names)) or tuple(
            tasks.shelf.names(TASKS)
        )  # these have items to choose by
        checks = replace(tasks, names=names)
        jobs = checks.choosing()

        def kept(plan: Plan) -> float:
            with TemporaryDirectory() as folder:
                out = Path(folder) / "repaired"
                if texts:
                    plan = self.repair.apply(net, plan, texts, out, settings, progress)
                found = judge(
                    net,
                    tokenizer,
                    {plan.state: plan},
                    jobs,
                    checks,
                    self.answers,
                    progress,
                )
            return min(
                (
                    one.recovery.share if one.recovery else 0.0
                    for one in last_state(found)
                ),
                default=0.0,
            )

        return Recovering(kept, (1 + tasks.recovery) / 2)

    def _save(self, plan: Plan) -> None:
        with suppress(UsageError):
            before = Plan.load(self.out)
            if before.identity != plan.identity:
                print(
                    f"note: {self.out} skipped {before} before, and is replaced",
                    file=sys.stderr,
                )
        plan.save(self.out)

    def _retrieval(self, net: PreTrainedModel, plan: Plan) -> TaskChoice:
        """Passkeys, where what the plan skips may be what finds things again:
        perplexity does not see it.
        """
        from ..structure.locating import locate

        asked = (
            ("passkey",)
            if may_lose_retrieval(locate(net), plan) and find_spec("lm_eval")
            else ()
        )
        return replace(self.tasks, tasks=asked, limit=("16",), truncate=True).check()

    def _next(self, net: PreTrainedModel, verdict: Verdict) -> str:
        from ..structure.locating import locate

        spec, made = self.model.model, self.repaired if self.repair else self.out
        if not verdict.plan:
            return next_command("search", spec, max_nll=LITTLE, out=self.out)
        if locate(
            net
        ).stubbed:  # its layers are neither cut out of a checkpoint nor repaired
            return next_command("bench", spec, plan=made)
        return what_next(
            verdict, spec, made, None if self.text.text == USE else self.text.text
        )[1]


def _not_in_the_prompt(space: SpaceOptions, net: PreTrainedModel) -> str:
    """Why nothing can be chosen that the prompt alone skips; "" where it can."""
    try:
        space.of(net)
    except UsageError as error:
        return str(error)
    return ""


def may_lose_retrieval(structure: ModelStructure, plan: Plan) -> bool:
    """Whether `plan` takes an attention with keys and values from a model whose other
    mixers keep states alone.
    """
    has_states = any(
        part.state_bytes and not part.kv_bytes_per_token for part in structure.sublayers
    )
    return has_states and any(
        part.kv_bytes_per_token and part.index in plan.attention
        for part in structure.sublayers
    )


def uses_of(plan: Plan, path: Path | None = None) -> list[Use]:
    """What a plan, maybe read from `path`, was chosen by, and what its weights were
    fitted to.
    """
    found = [use for step in getattr(plan, "history", ()) for use in _uses_in(step)]
    chosen = path.with_suffix(".search") / SearchRecord.file if path else None
    if chosen and chosen.is_file():
        with suppress(UsageError):  # a damaged file is nothing to stop for
            records = [
                record
                for record in read(chosen, SearchRecord)
                if record.plan.indices == plan.indices
            ]
            found += [_use("chosen by", record.what, record.what) for record in records]
    return found


def _uses_in(step: RepairStep) -> Iterator[Use]:
    """The texts of a repair, or of a training, each of which has as many windows."""
    about = step.model_dump()
    texts = about["texts"] or [about]
    size = {"sequences": -(-step.sequences // len(texts))} if step.sequences else {}
    return (
        _use("repaired with", text, about | size)
        for text in texts
        if "text_sha256" in text
    )


def _use(how: str, text: Mapping[str, Any], about: Mapping[str, Any]) -> Use:
    numbers = {
        name: about[name] for name in ("sequences", "length", "seed") if name in about
    }
    return Use(how, text["text"], text["text_sha256"], **numbers)


def shown(folder: Folder) -> Shown:
    """What a page says of a search: of what was chosen last, repaired if it was."""
    records, repaired = folder.of(SearchRecord), last_measured(folder)
    last = records[-1]
    steps = tuple(
        Step(
            shortened(one.chosen, 120),
            one.plan,
            one.quality,
            None,
            one.footprint,
            one.dense,
            one.order,
        )
        for one in records
    )
    verdict = replace(
        Verdict.of(steps[-1], folder),
        quality=repaired.quality if repaired else last.quality,
        speedup=last.check.measured_speedup if last.check else None,
        verb=READS if last.plan.prefill else "runs",
        state=repaired.model if repaired else "skipped",
        missed=last.missed and f"what was asked: {shortened(last.missed, 120)}",
    )
    verdict = verdict.judged(scores_of(folder, last.plan))
    made = folder.path.with_suffix(".repaired" if repaired else ".json")
    return Shown(
        message=verdict.message(*what_next(verdict, folder.model, made)),
        steps=steps,
        first=len(records) - 1,
        sections=(
            Section(
                "results",
                "The choice",
                (),
                table("results", COLUMNS, records),
                (*range(len(records)),),
                NOTE,
            ),
            *tasks_section(folder, last.plan),
        ),
        costs=read_costs(folder.path),
    )
