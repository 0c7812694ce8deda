"""What is kept of what the original model can do, by tasks: what is asked for,
measured and kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import option
from ..plan import Plan, several
from ..progress import Progress, silent
from ..results import lines
from ..results.facts import RECOVERY, PlanScore, Recovered, State
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.record import Record, Skips
from .benchmarks import run_choice
from .options.tasks import TaskChoice, TaskOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.tasks import Job


TASKS = "needles", "answers"  # by which recovery is measured, where none are named


@dataclass(frozen=True)
class RecoveryOptions(TaskOptions):
    """By which tasks what is kept is measured, and how much of it is asked for."""

    recovery: float | None = option(
        None,
        "the share of the original model's score that each task must keep, or exit code"
        " 3 (of needles and answers, if no --tasks are named)",
        metavar="SHARE",
    )

    def check(self, *, objectives: Sequence[str] = ()) -> TaskChoice:
        """As `TaskOptions.check`; raises `UsageError` for what is no share of a score,
        too.
        """
        if self.recovery is None:
            return super().check(objectives=objectives)
        if not 0 < self.recovery <= 1:
            raise UsageError(
                f"--recovery {self.recovery:g} is no share of a score: give one such as"
                " 0.95"
            )
        named = replace(self, tasks=self.tasks or TASKS, recovery=None)
        return replace(named.check(objectives=objectives), recovery=self.recovery)


class JudgedRecord(
    Record, Skips, PlanScore, kind="judged", key=("task", "metric", "model")
):
    """A plan, with its weights if it has any, on a task, compared with the original
    model on the same items.
    """


def judge_recovery(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Mapping[State, Plan],
    jobs: "Sequence[Job]",
    tasks: TaskChoice,
    out: Path | None = None,
    progress: Progress = silent,
) -> list[PlanScore]:
    """What the plans, by their states, score on `jobs`. Answers are kept in the folder
    `out`.
    """
    names = [*plans]
    found = run_choice(model, tokenizer, [*plans.values()], jobs, tasks, out, progress)
    return [
        PlanScore(model=names[result.number], **dict(result.score)) for result in found
    ]


def judged(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plans: Mapping[State, Plan],
    tasks: TaskChoice,
    folder: Path,
    settings: Provenance,
    progress: Progress = silent,
) -> list[PlanScore]:
    """What the plans score on the tasks that are asked for, kept in `folder`, with
    their answers in a folder of it.
    """
    scores = judge_recovery(
        model, tokenizer, plans, tasks.jobs(), tasks, folder / "answers", progress
    )
    keep_scores(folder, plans, scores, settings)
    return scores


def keep_scores(
    folder: Path,
    plans: Mapping[State, Plan],
    scores: Sequence[PlanScore],
    settings: Provenance,
) -> None:
    """Write down what plans score, unless it is there."""
    records = []
    for score in scores:
        plan = plans[score.model]
        about = Provenance.of(settings, weights=plan.digest)
        records.append(
            JudgedRecord(**dict(score), plan=plan.unrepaired, provenance=about)
        )
    with lines.lock(folder):
        Ledger(folder, JudgedRecord).renew(records)


def last_state(scores: Sequence[PlanScore]) -> list[PlanScore]:
    """Of the last of the states that scored, where more is better."""
    return [
        one for one in scores if one.model == scores[-1].model and one.higher_is_better
    ]


def verdict_on(score: PlanScore, least: float) -> Recovered:
    """Whether enough is kept; inconclusive where the original model scores nothing."""
    return score.recovery.is_kept(least) if score.recovery else "inconclusive"


def kept_in_words(scores: Sequence[PlanScore], least: float = RECOVERY) -> str | None:
    """How many scores of the last state keep enough; None without any."""
    verdicts = [verdict_on(one, least) for one in last_state(scores)]
    if not verdicts:
        return None
    kept = f"{verdicts.count('kept')} of {several(len(verdicts), 'score')}"
    counts = [f"Recovery: {kept} at {least:g} or more of the original model's"]
    for word in ("lost", "inconclusive"):
        if word in verdicts:
            counts.append(f"{verdicts.count(word)} {word}")
    return f"{', '.join(counts)}."


def short_of(scores: Sequence[PlanScore], least: float) -> str | None:
    """Which scores of the last state are not seen to keep `least` of the original
    model's; None: all are.

    Every metric counts of which more is better; where the original model scores
    nothing, it is inconclusive.
    """
    last = last_state(scores)
    if not last:
        return f"a recovery of {least:g}: no task has a score of which more is better"
    short = [one for one in last if verdict_on(one, least) != "kept"]
    if not short:
        return None
    count = f"{len(short)} of {several(len(last), 'score')}"
    details = "; ".join(_shortage(one, least) for one in short)
    return f"a recovery of {least:g} on {count}: {details}"


def _shortage(score: PlanScore, least: float) -> str:
    """What is known of a score that is not seen to keep enough."""
    verdict = verdict_on(score, least)
    name = f"{score.task} ({score.usual_metric}) {verdict}"
    if score.recovery is None:
        return f"{name}, as the original model scores {score.value - score.delta:.2f}"
    share, low, high = score.recovery.interval
    items = several(score.documents, "item")
    found = f"{name}, {share:.2f} [{low:.2f}, {high:.2f}] on {items}"
    more = score.recovery.items_to_tell(least)
    if verdict == "inconclusive" and more:
        return f"{found}; about {more:,} would tell"
    return found
