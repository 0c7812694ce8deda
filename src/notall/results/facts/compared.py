"""Figures of a plan compared with the original model's, item by item: tasks, checks and
the share that is kept.
"""

import math
from typing import Literal

from pydantic import Field
from typing_extensions import Self

from ..record import Count, Fact, Number, Share, Unsigned
from ..table import Column, inherited, number, with_error, with_interval, words

# the state of a plan: as it is, with a repair, or trained after that
State = Literal["skipped", "repaired", "healed"]
# how a model writes: the likeliest token each time, or at temperature 1
Decoding = Literal["greedy", "sampled"]

SIGNIFICANT = 0.05
RECOVERY = 0.95  # of the original model's score, that serving asks for

Recovered = Literal["kept", "lost", "inconclusive"]


class Recovery(Fact):
    """The share of the original's score that a plan keeps, paired by item, with its
    interval at the level 0.95.
    """

    share: Number = Field(
        description="the plan's score over the original model's on the same items"
    )
    low: Number = Field(description="the interval's lower end")
    high: Number = Field(description="its upper end")
    items: Count

    @classmethod
    def of(cls, interval: tuple[float, float, float], items: int) -> Self | None:
        """From (share, low, high); None where the interval has no end: the original
        model may be at zero.
        """
        share, low, high = interval
        if not (math.isfinite(share) and high < math.inf):
            return None
        return cls(share=share, low=low, high=high, items=items)

    @property
    def interval(self) -> tuple[float, float, float]:
        """(share, low, high)."""
        return self.share, self.low, self.high

    def is_kept(self, least: float = RECOVERY) -> Recovered:
        """`kept` where the whole interval is at `least` or above, `lost` where it is
        below.
        """
        if self.low >= least:
            return "kept"
        return "lost" if self.high < least else "inconclusive"

    def items_to_tell(self, least: float = RECOVERY) -> int | None:
        """About how many items would tell, at this share and spread; None where the
        share is too near to `least`.
        """
        apart = abs(self.share - least)
        if apart <= 1e-3:
            return None
        is_above = self.share > least
        side = self.share - self.low if is_above else self.high - self.share
        if self.share == 1 > least and self.low > 0:
            # of n that are all alike the lower end is n / (n + a constant)
            return math.ceil(self.items * max(1.0, (side / self.low) / (apart / least)))
        return math.ceil(self.items * max(1.0, side / apart) ** 2)


class Compared(Fact):
    """One figure of a plan, compared with the original model's over the same
    documents, windows or prompts.
    """

    value: Number
    value_se: Unsigned = Field(math.nan, description="standard error of value")
    delta: Number = Field(description="value less the original model's")
    delta_se: Unsigned = Field(description="standard error of delta, paired")
    p_value: Share = Field(math.nan, description="of no difference, two-sided")
    too_few: Count | None = Field(
        None,
        description="how many items would do, where no loss could be told from chance",
    )
    higher_is_better: bool | None = Field(
        None, description="None where neither way is good"
    )
    recovery: Recovery | None = Field(
        None, description="where higher is better and items have values"
    )

    @property
    def worse(self) -> bool:
        """Whether it got worse beyond chance: p < 0.05, not corrected for the number of
        comparisons.
        """
        lost = self.delta < 0 if self.higher_is_better else self.delta > 0
        return self.higher_is_better is not None and lost and self.p_value < SIGNIFICANT

    @property
    def verdict(self) -> str:
        """`worse`; nothing where that cannot be told from chance; or how many items it
        would take to tell.
        """
        if self.higher_is_better is None:
            return ""
        if self.too_few:
            return f"too few: {self.too_few:,} would do"
        return "worse" if self.worse else ""


VALUE: Column[Compared] = with_error("value", lambda one: (one.value, one.value_se))
DIFFERENCE: Column[Compared] = with_error(
    "difference", lambda one: (one.delta, one.delta_se)
)
WORSE: Column[Compared] = words("worse", lambda one: one.verdict)
P_VALUE: Column[Compared] = number(
    "p", lambda one: one.p_value, lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}"
)
DENSE_VALUE: Column[Compared] = number("dense", lambda one: one.value - one.delta)
RECOVERED: Column[Compared] = with_interval(
    "recovery", lambda one: one.recovery.interval if one.recovery else None
)
COMPARED = (RECOVERED, DIFFERENCE, WORSE, P_VALUE, VALUE, DENSE_VALUE)


class TaskScore(Compared):
    """A plan on a task of lm-evaluation-harness by one metric; value and its error are
    the harness's own.
    """

    task: str = Field(description="as the harness names it")
    metric: str = Field(description="metric,filter of the harness")
    num_fewshot: Count = Field(description="examples shown before a question")
    documents: Count = Field(description="how many were evaluated")
    values: tuple[Number, ...] | None = Field(
        None, description="the metric of each document, where it is a number"
    )
    sources: tuple[Count, ...] | None = Field(
        None,
        description=(
            "of each of them the number of the passage that it is about, where some"
            " share one"
        ),
    )

    @property
    def usual_metric(self) -> str:
        """The harness's `metric,filter` by its usual name: acc_norm,none is normalized
        accuracy.
        """
        name, _, kind = self.metric.partition(",")
        usual = METRICS.get(name, name.replace("_", " "))
        return usual if kind in ("", "none") else f"{usual} ({kind.replace('-', ' ')})"


METRICS = {
    "acc": "accuracy",
    "acc_norm": "normalized accuracy",
    "f1": "F1",
    "bleu": "BLEU",
}  # others by their name


class NamedTasks(Fact):
    """A name that `--tasks` takes."""

    task: str
    kind: str = Field(description="task, group or tag")
    num_fewshot: Count | None = Field(
        description="examples, where the leaderboard says how many"
    )


NAMED_TASKS: tuple[Column[NamedTasks], ...] = (
    words("task", lambda one: one.task),
    words("kind", lambda one: one.kind),
    number("shots", lambda one: one.num_fewshot, "d"),
)


class Check(Compared):
    """One figure of the diagnostics; errors are over sequences, prompts or
    questions.
    """

    check: str


class PlanCheck(Check):
    """A check of one of several plans."""

    model: str = Field(description="which: skipped or repaired")


class PlanScore(TaskScore):
    """A score of one state of a plan."""

    model: State


PLAN_CHECKS: tuple[Column[PlanCheck], ...] = (
    words("check", lambda one: one.check),
    words("model", lambda one: one.model),
    *inherited(PlanCheck, COMPARED),
)
PLAN_SCORES: tuple[Column[PlanScore], ...] = (
    words("task", lambda one: one.task),
    words("metric", lambda one: one.usual_metric),
    words("model", lambda one: one.model),
    *inherited(PlanScore, COMPARED),
    number("shots", lambda one: one.num_fewshot, "d"),
    number("documents", lambda one: one.documents, "d"),
)
