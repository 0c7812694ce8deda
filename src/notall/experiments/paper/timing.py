"""The paper's grid, timed at several prompt lengths and numbers of sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import ClassVar

from ...errors import UsageError
from ...options import Workload, option
from ...plan import several
from ...progress import Progress, Stages, silent
from ...results.facts import Configured, Times
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ..subject import Subject
from .records import TimesRecord


@dataclass(frozen=True)
class TimingGrid:
    """At which prompt lengths, for how many sequences at once the grid is timed, and
    how often.
    """

    PANEL: ClassVar[str] = "Timing"

    prompt_tokens: tuple[int, ...] = option(
        (128, 512), "tokens of the prompt; repeat it for more"
    )
    generation_tokens: int = option(16, "tokens generated behind it")
    concurrency: tuple[int, ...] = option((1,), "sequences at once; repeat it for more")
    rounds: int = option(5, "timed rounds; each times all configurations in turn")

    @property
    def workloads(self) -> list[Workload]:
        """One for each prompt length and number of sequences at once."""
        sizes = product(
            dict.fromkeys(self.prompt_tokens), dict.fromkeys(self.concurrency)
        )
        return [
            Workload(prompt, self.generation_tokens, at_once, self.rounds)
            for prompt, at_once in sizes
        ]


def time_in_turn(
    subject: Subject, rows: Sequence[Configured], progress: Progress, workload: Workload
) -> dict[str, Times]:
    """What each of `rows` takes, by its name; the dense one is among them."""
    from ...measuring.speed import time_plans

    plans = {row.name: row.plan for row in rows if row.variant != "dense"}
    return time_plans(
        subject.model, plans, workload, seed=subject.seed, progress=progress
    )


def time_grid(
    subject: Subject,
    rows: Sequence[Configured],
    timing: TimingGrid = TimingGrid(),
    *,
    measure: Callable[
        [Subject, Sequence[Configured], Progress, Workload], dict[str, Times]
    ] = time_in_turn,
    progress: Progress = silent,
) -> list[TimesRecord]:
    """Time all `rows` (the dense one first) for each workload of the grid, or take what
    the folder holds.

    Where memory does not hold so many sequences half of them are timed, and
    `concurrency` says so. Raises `UsageError` when not even one fits, and when another
    process works there.
    """
    from ...running.skipping import footprint

    about = Provenance.of(
        subject.provenance,
        generation_tokens=timing.generation_tokens,
        rounds=timing.rounds,
        seed=subject.seed,
    )
    with working_in(subject.out, "paper"):
        held = Ledger(subject.out, TimesRecord, about)
        stages = Stages(progress, sum(workload.steps for workload in timing.workloads))
        for workload in timing.workloads:
            report = stages.stage(workload.steps)
            prompt = several(workload.prompt_tokens, "prompt token")
            at = f"{prompt}, {workload.concurrency} at once"
            report(0, 1, f"timing {len(rows)} configurations at {at}")
            if _known(held, rows, workload):
                continue
            fitted, times = _fitting(partial(measure, subject, rows, report), workload)
            records = [
                TimesRecord.from_fact(
                    row,
                    prompt_tokens=workload.prompt_tokens,
                    asked_concurrency=workload.concurrency,
                    concurrency=fitted,
                    provenance=about,
                    times=times[row.name],
                    footprint=footprint(subject.model, row.plan),
                )
                for row in rows
            ]
            held.add(*records)
        progress(stages.steps, stages.steps, "timed all configurations")
        return [one for each in timing.workloads for one in _known(held, rows, each)]


def _known(
    held: Ledger[TimesRecord], rows: Sequence[Configured], workload: Workload
) -> list[TimesRecord]:
    """Of all rows, at one number of sequences; [] where one is missing."""
    size = (workload.prompt_tokens, workload.concurrency)
    found = []
    for row in rows:
        key = (*size, *row.configuration)
        if key in held and row.describes(held[key]):
            found.append(held[key])
    fitted = {one.concurrency for one in found}
    return found if len(found) == len(rows) and len(fitted) == 1 else []


def _fitting(
    run: Callable[[Workload], dict[str, Times]], workload: Workload
) -> tuple[int, dict[str, Times]]:
    """The largest halving of the sequences at once that memory holds, and its times."""
    from accelerate.utils.memory import clear_device_cache

    from ...evaluation.scoring import unless_out_of_memory

    at_once = workload.concurrency
    while at_once:
        smaller = replace(workload, concurrency=at_once)
        if times := unless_out_of_memory(partial(run, smaller)):
            return at_once, times
        clear_device_cache(garbage_collection=True)
        at_once //= 2
    raise UsageError(
        "one sequence takes more memory than there is; give a smaller dtype or shorter"
        " prompts"
    )
