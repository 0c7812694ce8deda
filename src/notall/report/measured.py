"""The page of eval, repair and heal: a plan before a repair and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..experiments.bench import BenchRecord
from ..experiments.evaluate import Evaluated, ModelQuality
from ..experiments.next_commands import asking_for_less, next_command, what_next
from ..experiments.verdict import Verdict, in_nats
from ..measuring.statistics import Estimate
from ..plan import Plan, several
from ..results.facts import PLAN_CHECKS, PLAN_SCORES, QUALITY, Quality, State
from ..results.ledger import read_records
from ..results.record import is_number
from ..results.repairs import (
    HEALING,
    LEAST_REFIT_GAIN,
    MEASURED,
    REFITS,
    HealRecord,
    MeasuredRecord,
    RefitRecord,
)
from ..results.table import Column, Table, number, table, within, words
from .folder import Folder
from .parts import Card, Figure, Message, PageParts, PageStep, Section
from .plans import judged_scores, scores_table, step_verdict

if TYPE_CHECKING:
    from ..running.repaired import RepairedPlan


STATES: tuple[State, ...] = get_args(State)
# Titles and notes of the section of refits.
REFITS_OF_KEPT = "What became of each kept sublayer"
DISTANCE_OF_KEPT = (
    "Squared distance of the stream behind each sublayer from where it should be, over"
    " what it would be without a refit there"
)
REFITS_OF_PROMPT = (
    "What became of the prompt's keys and values, and of what stands in for its MLPs"
)
DISTANCE_OF_PROMPT = (
    "Squared distance of the prompt's keys and values from the original model's, or of"
    " the stream behind an MLP, over what it would be without a refit"
)
MEASURED_NOTE = (
    "The same windows of text, which nothing was fitted or trained to, read by the"
    " original model, by the plan before and by the plan after. Lower is better."
    " Differences are paired with the original model."
)
HEALING_NOTE = (
    "KL to the original model, on text that is not trained on. The weights that were"
    " best there are kept."
)
TASKS_NOTE = (
    "Recovery: the share of the original model's score that is kept, [95 % interval]."
    " Worse: p < 0.05."
)
QUALITIES: tuple[Column[ModelQuality], ...] = (
    words("model", lambda one: one.model),
    *within(QUALITY, lambda one: one.quality),
    number("sequences", lambda one: one.quality.sequences, "d"),
)


def tables_of(found: Evaluated, title: str) -> dict[str, Table]:
    """The quality on a text; scores on tasks and diagnostics where there are some."""
    tables = {"quality": table(title, QUALITIES, found.quality)}
    if found.scores:
        tables["tasks"] = scores_table(found.scores)
    if found.checks:
        worse = "what accuracy hides; worse: p < 0.05"
        tables["diagnostics"] = table(worse, PLAN_CHECKS, found.checks)
    return tables


def last_measured(folder: Folder) -> MeasuredRecord | None:
    """What was measured of a plan in its last state, on the first text that it was
    measured on.
    """
    known = [one for one in folder.of(MeasuredRecord) if one.plan]
    first = [one for one in known if one.text == known[0].text]
    return max(first, key=lambda one: STATES.index(one.model), default=None)


def page_parts_of_repair(folder: Folder) -> PageParts:
    """Of `repair` and `heal`; next comes what one does with the weights."""
    return measured_page(
        folder, lambda verdict: what_next(verdict, folder.model, folder.path)
    )


def page_parts(folder: Folder) -> PageParts:
    """Of `eval`; next comes what the plan saves, or a search for a milder one."""

    def then(verdict: Verdict) -> tuple[str, str]:
        if not verdict.usable:
            return asking_for_less(folder.model, verdict.plan)
        bench = next_command("bench", folder.model, *folder.plan_options)
        return "see what that saves", bench

    return measured_page(folder, then)


def measured_page(
    folder: Folder, then: Callable[[Verdict], tuple[str, str]]
) -> PageParts:
    """The last state of a plan that was repaired, healed or evaluated; `then` says what
    comes next.

    With the times of `notall bench` in the folder next to it, such as `repaired.bench`,
    where they are of that plan.
    """
    measured, last = folder.of(MeasuredRecord), last_measured(folder)
    if not last:
        steps = tuple(PageStep(one.plan.in_words(), one.plan) for one in measured[:1])
        return PageParts(
            cards=tuple(_cards(measured)),
            steps=steps,
            sections=tuple(_sections(folder)),
        )
    timed = last_timed(folder.path, last.plan)
    step = PageStep(last.plan.in_words(), last.plan, last.quality if timed else None)
    if timed and timed.skipped:
        step = replace(
            step,
            times=timed.skipped.times,
            footprint=timed.skipped.footprint,
            dense=timed.dense.footprint,
        )
    verdict = replace(
        step_verdict(step, folder),
        quality=last.quality,
        text=last.text if last.plan.prefill else "",  # where its prompt ends
        state=last.model,
    ).judged(judged_scores(folder, last.plan))
    speed = _speed_cards(timed) if timed else ()
    return PageParts(
        message=Message.of(verdict, *then(verdict)),
        cards=(*speed, *_cards(measured)),
        steps=(step,),
        sections=tuple(_sections(folder)),
    )


def last_timed(folder: Path, plan: Plan) -> BenchRecord | None:
    """The last times of a plan in the folder of the same name but for its ending:
    `.bench`.
    """
    path = folder.resolve().with_suffix(".bench") / BenchRecord.file  # of "." too
    found = read_records(path, BenchRecord) if path.is_file() else []
    own = [one for one in found if one.plan.indices == plan.indices]
    return own[-1] if own else None


def _speed_cards(timed: BenchRecord) -> Iterator[Card]:
    """What a plan makes faster, first what it is for."""
    if not timed.skipped:
        return
    times, plan = timed.skipped.times, timed.plan
    prompt = several(timed.prompt_tokens, "prompt token")
    if plan.prefill and not len(plan):
        title, other_title = f"The first token, {prompt}", "each further token"
        first, other = times.speedup_prefill, times.speedup_decode
    else:
        title, other_title = "Each token", f"the first of {prompt}"
        first, other = times.speedup_decode, times.speedup_prefill
    quartiles = f"quartiles {first.low:.2f} to {first.high:.2f}"
    text = f"{quartiles}; {other_title}: {other.median:.2f}×"
    yield Card(title, f"{first.median:.2f}×", "as fast", text)


def _sections(folder: Folder) -> Iterator[Section]:
    from ..charts.layers import by_depth, training
    from ..charts.style import on_page

    if measured := folder.of(MeasuredRecord):
        rows = table("measured", MEASURED, measured)
        yield Section("measured", "Before and after", table=rows, note=MEASURED_NOTE)
    yield from tasks_section(folder, measured[-1].plan if measured else None)
    if looks := folder.of(HealRecord):
        label = "KL on held-out text over the CPU time"
        figure = Figure(on_page(training(looks), 300), label, note=HEALING_NOTE)
        rows = table("healing", HEALING, looks)
        yield Section("healing", "How the healing went", (figure,), rows)
    if refits := folder.of(RefitRecord):
        title, distance = REFITS_OF_KEPT, DISTANCE_OF_KEPT
        last = last_measured(folder)
        if last and last.plan.prefill:
            title, distance = REFITS_OF_PROMPT, DISTANCE_OF_PROMPT
        note = (
            f"{distance}, on windows that were not fitted to. 100%: it was left alone."
        )
        label = "Error that each refit left, by depth"
        figure = Figure(on_page(by_depth(refits), 300), label, note=note)
        yield Section("refits", title, (figure,), table("refits", REFITS, refits))


def tasks_section(folder: Folder, plan: Plan | None) -> Iterator[Section]:
    """What a plan scores on tasks, where that was measured."""
    if scores := judged_scores(folder, plan):
        title = "What is kept of what the original model can do"
        rows = table("tasks", PLAN_SCORES, scores)
        yield Section("tasks", title, table=rows, note=TASKS_NOTE, opens=True)


def _cards(measured: Sequence[MeasuredRecord]) -> Iterator[Card]:
    """For each of the first texts what is lost in the end, and what was before."""
    of_prompt = any(one.plan.prefill for one in measured)
    texts: dict[str, dict[State, Quality]] = {}
    for one in measured:
        if one.plan:
            texts.setdefault(one.text, {})[one.model] = one.quality
    for text, states in list(texts.items())[:5]:
        *before, last = sorted(states, key=STATES.index)
        quality = states[last]
        interval = _interval(quality) if of_prompt else ""
        parts = [f"{last}{_in_brackets(quality)}{interval}"]
        for state in before:
            loss = in_nats(states[state])
            parts.append(f"{loss} {state}{_in_brackets(states[state])}")
        yield Card.of_loss(text, quality, "; ".join(parts))


def _interval(quality: Quality) -> str:
    """Of what is lost, by Student's t over windows; "" of a single one."""
    loss = Estimate(quality.nats_lost, quality.delta_nll_se, quality.sequences - 1)
    low, high = loss.ends()
    if not (is_number(low) and is_number(high)):
        return ""
    return f", 95 % interval {low:+.3f} to {high:+.3f}"


def _in_brackets(quality: Quality) -> str:
    """KL and top-1 agreement in brackets, as far as they are known."""
    parts = []
    if is_number(quality.kl):
        parts.append(f"KL {quality.kl:.2f}")
    if is_number(quality.top1_agreement):
        parts.append(f"top-1 agreement {quality.top1_agreement:.0%}")
    return f" ({', '.join(parts)})" if parts else ""


def refits_table(repaired: RepairedPlan, out: Path) -> Table:
    """What became of each sublayer, shown where much did; its facts are all of it."""
    refits = repaired.refits
    shown = [one for one in refits if one.left <= 1 - LEAST_REFIT_GAIN or one.why]
    refit = sum(len(one.sublayers) for one in refits if one.ridge is not None)
    total = sum(len(one.sublayers) for one in refits)
    kept = f"{refit} of {several(total, 'kept sublayer')}"
    if repaired.prefill:
        kept = f"{refit} of {several(total, 'sublayer')} of the prompt"
    title = f"{out}: {kept} refit"
    if any(one.ridge is None and not one.why for one in refits):
        title += "; refitting others did not help on held-out text (more text may)"
    title += f"; shown are those that mend over {LEAST_REFIT_GAIN:.0%}"
    return replace(table(title, REFITS, shown), facts=refits)
