"""What one plan costs, before a repair and after it: on a text, on benchmarks, and in
what accuracy hides.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..measuring.statistics import Estimate
from ..plan import Plan, several
from ..progress import Progress, Stages, reading, silent, tracked
from ..results.facts import PLAN_SCORES, QUALITY, PlanCheck, PlanScore, Quality, State
from ..results.ledger import Ledger, read, working_in
from ..results.provenance import Provenance
from ..results.record import Fact, is_number
from ..results.repairs import (
    HEALING,
    MEASURED,
    REFITS,
    HealRecord,
    MeasuredRecord,
    RefitRecord,
)
from ..results.table import Column, number, table, within, words
from ..strict_json import Settings
from .bench import BenchRecord
from .folder import Card, Figure, Folder, Section, Shown, Step, in_nats
from .options import PlanOptions, TaskChoice
from .recovery import judge, keep_scores, scores_of
from .verdict import Verdict, asking_for_less, mending, next_command

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


STATES: tuple[State, ...] = get_args(State)
REFIT_OF_KEPT = (
    (
        "Squared distance of the stream behind each sublayer from where it should be,"
        " over what it would be without a refit there"
    ),
    "What became of each kept sublayer",
)
REFIT_OF_PROMPT = (
    (
        "Squared distance of the prompt's keys and values from the original model's,"
        " over what it would be without a refit"
    ),
    "What became of the keys and values of each attention that the prompt skips",
)


class ModelQuality(Fact):
    """The quality of the dense, the skipped or the repaired model."""

    model: str
    quality: Quality


QUALITIES: tuple[Column[ModelQuality], ...] = (
    words("model", lambda one: one.model),
    *within(QUALITY, lambda one: one.quality),
    number("sequences", lambda one: one.quality.sequences, "d"),
)


@dataclass(frozen=True)
class Evaluated:
    """Of the original model and of each state of the plan the quality on a text, and of
    those its scores and checks.
    """

    quality: list[ModelQuality]
    scores: list[PlanScore]
    checks: list[PlanCheck]


@dataclass(frozen=True)
class Evaluation:
    """A plan to evaluate; a repaired one beside what it skips without its weights.

    `diagnostics` are windows, None to leave them out. Answers to tasks are kept in the
    folder `out`. Of each window of the text the first `prompt_tokens` are its prompt,
    and only what follows is scored; None: all of it is.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    plan: Plan
    tasks: TaskChoice
    diagnostics: "Sequence[Tensor] | None" = None
    out: Path | None = None
    seed: int = 0  # of what the diagnostics draw
    progress: Progress = silent
    prompt_tokens: int | None = None

    @property
    def states(self) -> dict[State, Plan]:
        """What is measured of the plan: without what it skips, and repaired where it
        is.
        """
        states: dict[State, Plan] = {"skipped": self.plan.unrepaired}
        return states | (
            {"repaired": self.plan} if self.plan.state == "repaired" else {}
        )

    def run(self, batches: "Sequence[Tensor]") -> Evaluated:
        """On `batches` of token ids, (batch, tokens) each, then on the tasks, whose
        data is loaded first.
        """
        from ..evaluation.diagnostics import run_diagnostics
        from ..measuring.quality import evaluate

        self.progress(0, 1, "reading the tasks")
        jobs = self.tasks.jobs()
        plans = [*self.states.values()]
        words = reading(sum(batch.numel() for batch in batches), len(plans) + 1)
        asked = sum(job.steps(len(plans) + 1) for job in jobs)
        stages = Stages(self.progress, words + asked)
        read = tracked(batches, "quality on the text", stages.stage(words))
        qualities = zip(
            ("dense", *self.states),
            evaluate(self.model, [Plan(), *plans], read, self.prompt_tokens),
        )
        quality = [ModelQuality(model=name, quality=found) for name, found in qualities]
        stage = stages.stage(asked)
        scores = judge(
            self.model, self.tokenizer, self.states, jobs, self.tasks, self.out, stage
        )
        if self.diagnostics is None:
            return Evaluated(quality, scores, [])
        how: Settings = {"seed": self.seed, "progress": self.progress}
        found = run_diagnostics(
            self.model, self.tokenizer, plans, self.diagnostics, **how
        )
        checks = [
            PlanCheck(model=name, **dict(one))
            for some in zip(*found)
            for name, one in zip(self.states, some)
        ]
        return Evaluated(quality, scores, checks)

    def records(
        self, found: Evaluated, batches: "Sequence[Tensor]", settings: Provenance
    ) -> list[MeasuredRecord]:
        """The quality that was found, a record for each state, with what decides its
        figures; in `out` too.
        """
        from ..repairing.texts import about_measured

        records, text = list[MeasuredRecord](), str(settings.what["text"])
        for (state, plan), one in zip(self.states.items(), found.quality[1:]):
            about = about_measured(self.model, settings, plan, batches)
            records.append(
                MeasuredRecord(
                    text=text,
                    model=state,
                    plan=plan,
                    quality=one.quality,
                    provenance=about,
                )
            )
        if self.out:
            with working_in(self.out, "eval"):
                kept = Ledger(self.out, MeasuredRecord)
                kept.add(*(record for record in records if record.key not in kept))
            keep_scores(self.out, self.states, found.scores, settings)
        return records


def mend_of(spec: str, asked: PlanOptions, plan: Plan) -> str:
    """The command that may find something better than what was asked for."""
    if asked.skip:
        words = {
            name: value for name, value in asked.words.items() if name != "keep_last"
        }
        return next_command("search", spec, **words, out="better.json")
    return mending(spec, asked.plan, plan.state == "repaired")


def last_measured(folder: Folder) -> MeasuredRecord | None:
    """What was measured of a plan in its last state, on the first text that it was
    measured on.
    """
    known = [one for one in folder.of(MeasuredRecord) if one.plan]
    first = [one for one in known if one.text == known[0].text]
    return max(first, key=lambda one: STATES.index(one.model), default=None)


def warn_if_worse(measured: Sequence[MeasuredRecord]) -> None:
    """Warn where a text loses more after a repair than before it: Student's t,
    one-sided at 0.025.

    As if the errors of both were independent; windows that are hard for both make the
    test a cautious one.
    """
    before = {one.text: one.quality for one in measured if one.model == "skipped"}
    for one in measured:
        if one.model != "repaired" or one.text not in before:
            continue
        lost, was = one.quality, before[one.text]
        after, earlier = (
            Estimate(one.nats_lost, one.delta_nll_se, one.sequences - 1)
            for one in (lost, was)
        )
        overflows = math.isinf(lost.nats_lost) and math.isfinite(was.nats_lost)
        if overflows or after.less(earlier).ends()[0] > 0:
            on = f" on {one.text}" if one.text else ""
            told = (
                f"the repair makes it worse{on}: {lost.nats_lost:.3f} nats where it was"
                f" {was.nats_lost:.3f}"
            )
            print(
                f"warning: {told}; repair with more text, in another way, or not"
                " at all",
                file=sys.stderr,
            )


def shown(folder: Folder) -> Shown:
    timed = (
        "see what that saves",
        next_command("bench", folder.model, *folder.plan_options),
    )

    def then(verdict: Verdict) -> tuple[str, str]:
        return timed if verdict.usable else asking_for_less(folder.model, verdict.plan)

    return shown_measured(folder, then)


def shown_measured(folder: Folder, then: Callable[[Verdict], tuple[str, str]]) -> Shown:
    """What a page says of a folder of `repair`, `heal` or `eval`: its last state, and
    what comes `then`.

    With the times of `notall bench` in the folder beside it, such as `repaired.bench`,
    where they are of that plan.
    """
    measured, last = folder.of(MeasuredRecord), last_measured(folder)
    timed, message = (timed_beside(folder.path, last.plan) if last else None), None
    steps = tuple(Step(one.plan.in_words(), one.plan) for one in measured[:1])
    if last:
        step = Step(last.plan.in_words(), last.plan, last.quality if timed else None)
        if timed and timed.skipped:
            left, dense = timed.skipped.footprint, timed.dense.footprint
            step = replace(step, times=timed.skipped.times, footprint=left, dense=dense)
        steps = (step,)
        on = last.text if last.plan.prefill else ""  # where its prompt ends
        verdict = replace(
            Verdict.of(step, folder), quality=last.quality, text=on, state=last.model
        )
        verdict = verdict.judged(scores_of(folder, last.plan))
        message = verdict.message(*then(verdict))
    return Shown(
        message=message,
        cards=(*(_speed_cards(timed) if timed else ()), *_cards(measured)),
        steps=steps,
        sections=tuple(_sections(folder)),
    )


def timed_beside(folder: Path, plan: Plan) -> BenchRecord | None:
    """The last times of a plan in the folder that is called as this one, but for its
    ending: `.bench`.
    """
    path = folder.resolve().with_suffix(".bench") / BenchRecord.file  # of "." too
    found = read(path, BenchRecord) if path.is_file() else []
    return next(
        (one for one in reversed(found) if one.plan.indices == plan.indices), None
    )


def _speed_cards(timed: BenchRecord) -> Iterator[Card]:
    """What a plan makes faster, first what it is for."""
    if not timed.skipped:
        return
    times, of_prompt = timed.skipped.times, timed.plan.prefill and not len(timed.plan)
    first, other = times.speedup_prefill, times.speedup_decode
    titles = (
        f"The first token, {several(timed.prompt_tokens, 'prompt token')}",
        "each further token",
    )
    if not of_prompt:
        first, other = other, first
        titles = (
            "Each token",
            f"the first of {several(timed.prompt_tokens, 'prompt token')}",
        )
    told = (
        f"quartiles {first.low:.2f} to {first.high:.2f}; {titles[1]}:"
        f" {other.median:.2f}×"
    )
    yield Card(titles[0], f"{first.median:.2f}×", "as fast", told)


def _sections(folder: Folder) -> Iterator[Section]:
    from ..charts.layers import by_depth, training
    from ..charts.style import on_page

    if measured := folder.of(MeasuredRecord):
        note = (
            "The same windows of text, which nothing was fitted or trained to, read by"
            " the original model, by the plan before and by the plan after. Lower is"
            " better. Differences are paired with the original model."
        )
        yield Section(
            "measured",
            "Before and after",
            (),
            table("measured", MEASURED, measured),
            note=note,
        )
    yield from tasks_section(folder, measured[-1].plan if measured else None)
    if looks := folder.of(HealRecord):
        note = (
            "KL to the original model, on text that is not trained on. The weights that"
            " were best there are kept."
        )
        drawn = Figure(
            on_page(training(looks), 300),
            "KL on held-out text over the CPU time",
            note=note,
        )
        yield Section(
            "healing",
            "How the healing went",
            (drawn,),
            table("healing", HEALING, looks),
        )
    if refits := folder.of(RefitRecord):
        last = last_measured(folder)
        what, title = REFIT_OF_PROMPT if last and last.plan.prefill else REFIT_OF_KEPT
        note = f"{what}, on windows that were not fitted to. 100%: it was left alone."
        drawn = Figure(
            on_page(by_depth(refits), 300),
            "Error that each refit left, by depth",
            note=note,
        )
        yield Section("refits", title, (drawn,), table("refits", REFITS, refits))


def tasks_section(folder: Folder, plan: Plan | None) -> Iterator[Section]:
    """What a plan scores on tasks, where that was measured."""
    if scores := scores_of(folder, plan):
        note = (
            "Recovery: the share of the original model's score that is kept, [95 %"
            " interval]. Worse: p < 0.05."
        )
        title, scored = (
            "What is kept of what the original model can do",
            table("tasks", PLAN_SCORES, scores),
        )
        yield Section("tasks", title, table=scored, note=note, opens=True)


def _cards(measured: Sequence[MeasuredRecord]) -> Iterator[Card]:
    """For each of the first texts what is lost in the end, and what was before."""
    texts, of_prompt = (
        dict[str, dict[State, Quality]](),
        any(one.plan.prefill for one in measured),
    )
    for one in measured:
        if one.plan:
            texts.setdefault(one.text, {})[one.model] = one.quality
    for text, states in list(texts.items())[:5]:
        *before, last = sorted(states, key=STATES.index)
        told = [
            f"{last}{_beside(states[last])}{_interval(states[last]) if of_prompt else ''}"
        ]
        told += [
            f"{in_nats(states[state])} {state}{_beside(states[state])}"
            for state in before
        ]
        yield Card.of_loss(text, states[last], "; ".join(told))


def _interval(quality: Quality) -> str:
    """Of what is lost, by Student's t over windows; "" of a single one."""
    low, high = Estimate(
        quality.nats_lost, quality.delta_nll_se, quality.sequences - 1
    ).ends()
    return (
        f", 95 % interval {low:+.3f} to {high:+.3f}"
        if is_number(low) and is_number(high)
        else ""
    )


def _beside(quality: Quality) -> str:
    told = [f"KL {quality.kl:.2f}"] if is_number(quality.kl) else []
    told += (
        [f"{quality.top1_agreement:.0%} of first choices stay"]
        if is_number(quality.top1_agreement)
        else []
    )
    return f" ({', '.join(told)})" if told else ""
