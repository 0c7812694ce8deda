"""notall slim: from a model to checkpoints that keep a recovery, in one command."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..experiments.next_commands import as_step
from ..experiments.options.model import ModelOptions
from ..experiments.options.text import HeldOutOptions
from ..experiments.recovery import RecoveryOptions, last_state, verdict_on
from ..experiments.repair import REFIT, RepairOptions
from ..experiments.search.options import SpaceOptions
from ..experiments.slim.run import USUAL_TEXT, Slim, Slimmed, SlimOptions
from ..experiments.verdict import Verdict
from ..options import OutFolder, RunOptions, Workload
from ..plan import several
from ..report.card import write_card
from ..results.facts import (
    DENSE_VALUE,
    FOOTPRINT,
    RECOVERED,
    RECOVERY,
    SPEEDUPS,
    VALUE,
    Footprint,
    PlanScore,
    Times,
)
from ..results.record import Fact, Share
from ..results.table import Column, number, table, within, words
from ..results.terminal import next_report, progress_bar, show
from .app import command, conclude
from .export import conclusion_of

USUAL_TASKS = RecoveryOptions(recovery=RECOVERY)
USUAL_REPAIR = RepairOptions(repair=REFIT)
EVERY, PROMPT = "every token", "the prompt"


class Gain(Fact):
    """What a set gains: times that were measured, work and size."""

    skipped_for: str
    skipped: str
    share: Share
    times: Times | None
    footprint: Footprint | None


class KeptScore(Fact):
    """A score of a set on a task."""

    skipped_for: str
    score: PlanScore
    verdict: str


GAINED: tuple[Column[Gain], ...] = (
    words("skipped for", lambda one: one.skipped_for),
    words("skipped", lambda one: one.skipped),
    number("of the layers' parameters", lambda one: one.share, ".0%"),
    *within(SPEEDUPS, lambda one: one.times),
    *within(FOOTPRINT, lambda one: one.footprint),
)
KEPT: tuple[Column[KeptScore], ...] = (
    words("skipped for", lambda one: one.skipped_for),
    words("task", lambda one: one.score.task),
    *within((RECOVERED, VALUE, DENSE_VALUE), lambda one: one.score),
    words("verdict", lambda one: one.verdict),
)


@command(example="notall slim smollm2 --out slim")
def slim(
    model: ModelOptions,
    how: SlimOptions,
    space: SpaceOptions,
    run: RunOptions,
    tasks: RecoveryOptions = USUAL_TASKS,
    repair: RepairOptions = USUAL_REPAIR,
    text: HeldOutOptions = USUAL_TEXT,
    workload: Workload = Workload(prompt_tokens=512, generation_tokens=32),
    out: OutFolder = Path("slim"),
) -> None:
    """Run search, repair, bench, export and card in one command.

    It looks for what a prompt can skip, and for what every token can, such that tasks
    keep their scores. It repairs each set, times it, exports it, compares the
    export with the plan and writes its card. Each step is a command of its own, which
    is named. It says first about how long that takes. If you interrupt it, the same
    command continues where it stopped.
    """
    asked = Slim.of(model, space, text, tasks, repair, workload, how, out, run.seed)
    with progress_bar() as progress:
        found = asked.run(progress)
    for one in found:
        if one.folder:
            records = [out / f"{one.name}.search", out / f"{one.name}.bench"]
            with as_step("card", one.folder, *records):
                write_card(one.folder, records)
    least = tasks.recovery or RECOVERY
    rounds = several(workload.rounds, "round")
    title = f"{out}: what is gained, median [quartiles] of {rounds}"
    kept = f"{out}: the share of the original's score that is kept"
    tables = {
        "gained": table(title, GAINED, [_gain_of(one) for one in found]),
        "kept": table(kept, KEPT, [*_kept_by(found, least)]),
    }
    exports = {
        one.name: {"folder": str(one.folder), **conclusion_of(one.folder, asked.to)}
        for one in found
        if one.folder
    }
    verdicts = {one.name: _with_next(one, exports.get(one.name)) for one in found}
    numbers = {f"verdict_{name}": one.in_numbers() for name, one in verdicts.items()}
    lines = [line for one in found for line in _lines(one, exports.get(one.name))]
    also = {"exports": exports, **numbers}
    show(tables, as_json=run.as_json, also=also, then=[*lines, _report_of(out)])
    first, *_ = names = [*verdicts]
    others = {name: verdicts[name] for name in names[1:]}
    conclude(verdicts[first], also=others, as_json=run.as_json)


def _report_of(out: Path) -> str:
    """The command that makes a page of all that was found."""
    return next_report(out).replace("Next: ", "Report:  ", 1)


def _tokens_of(found: Slimmed) -> str:
    return PROMPT if found.of_prompt else EVERY


def _gain_of(found: Slimmed) -> Gain:
    timed = found.timed.skipped if found.timed else None
    return Gain(
        skipped_for=_tokens_of(found),
        skipped=found.plan.in_words(),
        share=found.share,
        times=timed.times if timed else None,
        footprint=timed.footprint if timed else None,
    )


def _kept_by(found: Sequence[Slimmed], least: float) -> Iterator[KeptScore]:
    for one in found:
        for score in last_state(one.scores):
            verdict = verdict_on(score, least)
            yield KeptScore(skipped_for=_tokens_of(one), score=score, verdict=verdict)


def _with_next(found: Slimmed, written: Mapping[str, str] | None) -> Verdict:
    """Its verdict, with what runs its checkpoint as the next command; where the prompt
    alone skips, that has one by its plan.
    """
    if written is None or found.of_prompt:
        return found.verdict
    return replace(found.verdict, next=written.get("Next", ""))


def _lines(found: Slimmed, written: Mapping[str, str] | None) -> Iterator[str]:
    """Where the checkpoint of a set is, that it was compared, and how it is served."""
    tokens = _tokens_of(found)
    if written is None:
        why = " and ".join(found.verdict.faults) or "nothing is skipped"
        yield f"For {tokens}: not exported, as {why}."
        return
    yield f"For {tokens}: {written['folder']}. Check: {written['Check']}."
    if found.of_prompt and "Next" in written:
        yield f"Load:    {written['Next']}"
    if "Serve" in written:
        yield f"Serve:   {written['Serve']}"
