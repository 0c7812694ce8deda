"""What is measured of a plan: one type a fact, with its units and its columns. Nothing
here runs a model.
"""

import math
from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from ..plan import KIND_NAMES
from .record import (
    Amount,
    Count,
    Fact,
    LayerIndex,
    Loss,
    Number,
    Positive,
    Quartiles,
    Share,
    Skips,
    Unsigned,
)
from .table import (
    Column,
    in_magnitude,
    inherited,
    number,
    size,
    with_error,
    with_interval,
    with_quartiles,
    words,
)

State = Literal[
    "skipped", "repaired", "healed"
]  # of a plan: what was made up for what it skips
Decoding = Literal[
    "greedy", "sampled"
]  # how a model writes: the likeliest token each time, or at temperature 1
GRID = (
    "variant",
    "fraction",
    "keep_last",
)  # what tells the configurations of the paper's grid apart


class Quality(Fact):
    """What a plan costs. `_se`: standard error over sequences; differences are paired
    with the original model's.
    """

    nll: Loss = Field(description="negative log-likelihood, nats per token")
    nll_se: Unsigned = Field(description="nats per token")
    delta_nll: Number = Field(
        description=(
            "nll less the original model's on the same sequences, nats per token"
        )
    )
    delta_nll_se: Unsigned = Field(
        description="of the paired differences, nats per token"
    )
    perplexity: Unsigned = Field(description="exp(nll)")
    kl: Number = Field(
        description="KL(dense || skipped) of the next token, nats per token"
    )
    kl_se: Unsigned = Field(description="nats per token")
    top1_agreement: Share = Field(
        description="share of tokens with the original model's first choice, 0 to 1"
    )
    top1_agreement_se: Unsigned = Field(description="0 to 1")
    sequences: Count = Field(
        description="how many sequences the quality was measured on"
    )

    @property
    def nats_lost(self) -> float:
        """`delta_nll`; infinite where the model overflows."""
        return self.delta_nll if math.isfinite(self.delta_nll) else math.inf


class Added(Fact):
    """Of which two make a third: each field and the other's behind it, or on top."""

    def __add__(self, other: Self) -> Self:
        return type(self)(
            **{
                name: getattr(self, name) + getattr(other, name)
                for name in type(self).model_fields
            }
        )


class Scores(Added):
    """Of one plan on a batch, a value a sequence: means over its predicted tokens."""

    nll: tuple[Loss, ...] = Field(description="nats per token")
    kl: tuple[Number, ...] = Field(description="KL(dense || skipped), nats per token")
    top1_agreement: tuple[Share, ...] = Field(description="0 to 1")

    @model_validator(mode="after")
    def _of_each_sequence(self) -> Self:
        if not len(self.nll) == len(self.kl) == len(self.top1_agreement):
            raise ValueError(
                "nll, kl and top1_agreement are of different numbers of sequences"
            )
        return self


NATS = "nats per token"
DELTA_NLL: Column[Quality] = with_error(
    "NLL added", lambda q: (q.delta_nll, q.delta_nll_se), unit=NATS
)
KL: Column[Quality] = with_error("KL", lambda q: (q.kl, q.kl_se), unit=NATS)
TOP1: Column[Quality] = with_error(
    "top-1 agreement", lambda q: (q.top1_agreement, q.top1_agreement_se)
)
PERPLEXITY: Column[Quality] = number("perplexity", lambda q: q.perplexity, in_magnitude)
NLL: Column[Quality] = with_error("NLL", lambda q: (q.nll, q.nll_se), unit=NATS)
QUALITY = (DELTA_NLL, KL, TOP1, PERPLEXITY, NLL)


class Times(Fact):
    """What a model takes beside the original model of the same rounds: milliseconds,
    and ratios paired by round.
    """

    prefill_ms: Quartiles = Field(
        description="milliseconds from the prompt to the first new token"
    )
    decode_ms_per_token: Quartiles = Field(
        description="milliseconds of a decode step, for the whole batch"
    )
    speedup_prefill: Quartiles = Field(
        description="dense prefill_ms / this one's, a ratio a round; > 1: faster"
    )
    speedup_decode: Quartiles = Field(
        description="dense decode_ms_per_token / this one's, likewise"
    )
    peak_bytes: Count | None = Field(
        None, description="most CUDA memory allocated while timing; None without CUDA"
    )


SPEEDUPS: tuple[Column[Times], Column[Times]] = (
    with_quartiles("decode speedup", lambda times: times.speedup_decode, ".2f"),
    with_quartiles("prefill speedup", lambda times: times.speedup_prefill, ".2f"),
)
DECODE_MS: Column[Times] = with_quartiles(
    "decode ms/token", lambda times: times.decode_ms_per_token
)
PREFILL_MS: Column[Times] = with_quartiles("prefill ms", lambda times: times.prefill_ms)
PEAK: Column[Times] = size("peak memory", lambda times: times.peak_bytes)
TIMES = (*SPEEDUPS, DECODE_MS, PREFILL_MS)


class Footprint(Fact):
    """What a plan leaves of a model. What is skipped and others read weighs what it
    did.
    """

    params: Count = Field(description="parameters that are left")
    weight_bytes: Count = Field(
        description="bytes of the weights that are left, as loaded, scales too"
    )
    kv_bytes_per_token: Count = Field(
        description="bytes of KV cache a token of one sequence takes"
    )
    state_bytes: Count | None = Field(
        None, description="bytes of states of fixed size of one sequence, of hybrids"
    )


WEIGHTS: Column[Footprint] = size("weights", lambda left: left.weight_bytes)
KV: Column[Footprint] = size("KV/token", lambda left: left.kv_bytes_per_token)
STATE: Column[Footprint] = size("states", lambda left: left.state_bytes)
PARAMETERS: Column[Footprint] = number("parameters", lambda left: left.params, ",")
FOOTPRINT = (WEIGHTS, KV, PARAMETERS, STATE)


class Similarity(Fact):
    """Cosine of the residual stream before and after one block or sublayer: mean over
    tokens, error over sequences.
    """

    layer: LayerIndex
    kind: Literal["block", "attention", "mlp"]
    cosine: Number = Field(description="-1 to 1")
    cosine_se: Unsigned = Field(description="standard error over sequences")
    mixer: str | None = Field(
        None,
        description="the kind of an attention, where the model has several",
        max_length=80,
    )


COSINE: Column[Similarity] = with_error(
    "cosine", lambda row: (row.cosine, row.cosine_se), ".4f"
)
SIMILARITY: tuple[Column[Similarity], ...] = (
    number("layer", lambda row: row.layer, "d"),
    words("kind", lambda row: row.kind),
    COSINE,
    words("mixer", lambda row: row.mixer),
)


class SearchCost(Added):
    """What choosing took."""

    evaluations: Count = Field(0, description="sets of sublayers that were evaluated")
    executions: Amount = Field(
        0.0, description="sublayers run, in passes over the whole calibration text"
    )
    seconds: Amount = Field(0.0, description="CPU seconds of all threads")
    wall_seconds: Amount = Field(
        0.0,
        description="of the clock: on a GPU it is the measure; 0 where none was kept",
    )


class Configured(Skips):
    """A row of the paper's grid."""

    variant: Literal["dense", "attention", "mlp", "block"] = Field(
        description="what is skipped"
    )
    fraction: float = Field(
        ge=0, le=1, description="share of the layers that was asked for, 0 to 1"
    )
    keep_last: bool = Field(description="whether the last layer is preserved")

    @property
    def configuration(self) -> tuple[str, float, bool]:
        return self.variant, self.fraction, self.keep_last

    def describes(self, other: "Configured") -> bool:
        """Whether the other is of this row, and of the plan that the row stands for in
        this model.
        """
        return (
            self.configuration == other.configuration
            and self.plan.indices == other.plan.indices
        )

    @property
    def name(self) -> str:
        """Such as `attention 10%, last layer kept`."""
        if self.variant == "dense":
            return "dense"
        return (
            f"{KIND_NAMES[self.variant]}"
            f" {self.fraction:.0%}{', last layer kept' if self.keep_last else ''}"
        )


CONFIGURED: tuple[Column[Configured], ...] = (
    words("skipped", lambda row: KIND_NAMES[row.variant]),
    number("fraction", lambda row: row.fraction, ".0%", right=False),
    words("last layer", lambda row: "kept" if row.keep_last else ""),
)


class SpeedCheck(Fact):
    """A plan's speedup of a workload as it was predicted, and as it was measured,
    interleaved with the original.
    """

    predicted_ms: Positive
    measured_ms: Positive
    predicted_speedup: Positive = Field(description="ratio to the original model")
    measured_speedup: Quartiles = Field(description="the rounds' own ratios")

    @property
    def off(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_speedup / self.measured_speedup.median - 1


SPEED_CHECK: tuple[Column[SpeedCheck], ...] = (
    with_quartiles("measured speedup", lambda check: check.measured_speedup, ".3f"),
    number("predicted speedup", lambda check: check.predicted_speedup, ".3f"),
    number("off by", lambda check: check.off, "+.1%"),
    number("measured ms", lambda check: check.measured_ms, ".0f"),
    number("predicted ms", lambda check: check.predicted_ms, ".0f"),
)

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
        """None where the interval has no end: the original model may be at zero."""
        share, low, high = interval
        return (
            cls(share=share, low=low, high=high, items=items)
            if math.isfinite(share) and high < math.inf
            else None
        )

    @property
    def interval(self) -> tuple[float, float, float]:
        return self.share, self.low, self.high

    def is_kept(self, least: float = RECOVERY) -> Recovered:
        """`kept` where the whole interval is at `least` or above, `lost` where it is
        below.
        """
        return (
            "kept"
            if self.low >= least
            else "lost"
            if self.high < least
            else "inconclusive"
        )

    def items_to_tell(self, least: float = RECOVERY) -> int | None:
        """About how many items would tell, at this share and spread; None where the
        share is too near to `least`.
        """
        side = self.share - self.low if self.share > least else self.high - self.share
        apart = abs(self.share - least)
        if apart <= 1e-3:
            return None
        if (
            self.share == 1 > least and self.low > 0
        ):  # of n that are all alike the lower end is n / (n + a constant)
            return math.ceil(self.items * max(1.0, (side / self.low) / (apart / least)))
        return math.ceil(self.items * max(1.0, side / apart) ** 2)


class Compared(Fact):
    """One figure of a plan beside the original model's, over the same documents,
    windows or prompts.
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
P: Column[Compared] = number(
    "p", lambda one: one.p_value, lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}"
)
DENSE_VALUE: Column[Compared] = number("dense", lambda one: one.value - one.delta)
RECOVERED: Column[Compared] = with_interval(
    "recovery", lambda one: one.recovery.interval if one.recovery else None
)
COMPARED = (RECOVERED, DIFFERENCE, WORSE, P, VALUE, DENSE_VALUE)


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
        said = METRICS.get(name, name.replace("_", " "))
        return said if kind in ("", "none") else f"{said} ({kind.replace('-', ' ')})"


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
