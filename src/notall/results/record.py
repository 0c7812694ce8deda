"""What is written down: frozen facts, and records of them that know their file, their
key and where they come from.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    field_validator,
)
from typing_extensions import Self

from ..plan import Plan
from ..strict_json import Settings
from .lines import finite
from .provenance import Provenance

# more than any model has; a damaged index does not become a page of gigabytes
MOST_SHOWN_LAYERS = 10_000

RecordKey = tuple[Any, ...]
Command = Literal[
    "sweep",
    "compare",
    "search",
    "paper",
    "bench",
    "draft",
    "eval",
    "repair",
    "heal",
    "pareto",
    "slim",
]
Scalar = float | int | str | bool | None


def is_number(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def _between(low: float, high: float = math.inf) -> AfterValidator:
    def check(value: float) -> float:
        if value < low or value > high:
            raise ValueError(f"should be from {low:g} to {high:g}")
        return value

    return AfterValidator(check)


# In JSON null where it is no finite number, which is read as nan.
Number = Annotated[
    float,
    Field(allow_inf_nan=True),
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(finite, return_type=float | None, when_used="json"),
]
Unsigned = Annotated[Number, _between(0)]  # such as a standard error
Loss = Annotated[Number, _between(-0.01)]  # rounding may bring it just below 0
Share = Annotated[Number, _between(0, 1)]  # of tokens, or a probability
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, lt=1e18)]  # of work
Positive = Annotated[
    float, Field(gt=1e-9, lt=1e18)
]  # a time, a ratio of times: it is divided by
SublayerName = Annotated[str, Field(pattern=r"^(attn|mlp)\.\d{1,4}$")]
# Of a plan what it skips, as `Plan.skipped` says it.
SublayerNames = Annotated[
    str, Field(pattern=r"^(((prompt:)?(attn|mlp)\.\d{1,4}|last:\d{1,10})( |$))*$")
]
LayerIndex = Annotated[int, Field(ge=0, lt=MOST_SHOWN_LAYERS)]


def _plausible(value: object) -> Plan:
    """In a record the fingerprint is the provenance's."""
    indices = value.indices if isinstance(value, Plan) else value
    if not isinstance(indices, dict) or indices.keys() - {"prefill"} != {
        "attention",
        "mlp",
    }:
        raise ValueError('expected {"attention": [...], "mlp": [...]}')
    plan = Plan(**indices)
    named = (*plan.attention, *plan.mlp, *plan.prefill.attention, *plan.prefill.mlp)
    if max(named, default=0) >= MOST_SHOWN_LAYERS:
        raise ValueError(f"layers are whole numbers from 0 to {MOST_SHOWN_LAYERS - 1}")
    return plan


SkippedNames = Annotated[
    Plan,
    BeforeValidator(_plausible),
    PlainSerializer(lambda plan: plan.indices, return_type=Settings),
]


class Fact(
    BaseModel,
    frozen=True,
    defer_build=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
):
    """What was measured, as it is stored, shown and drawn: frozen, and checked where it
    is read.
    """

    def figures(self) -> dict[str, Scalar]:
        """Every number and text in it, also in the facts that it holds, by the names of
        fields: a line of a CSV.
        """
        found: dict[str, Scalar] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Quartiles):
                found |= {
                    name: value.median,
                    f"{name}_low": value.low,
                    f"{name}_high": value.high,
                }
            elif isinstance(value, Fact):
                found |= value.figures()
            elif isinstance(value, Plan):
                found["skipped"] = " ".join(value.names)
                if value.prefill:
                    found["skipped_in_the_prompt"] = " ".join(value.prefill.names)
                    found["last_tokens_whole"] = value.prefill.last_tokens
            elif isinstance(value, float):
                found[name] = finite(value)
            elif isinstance(value, int | str) and name != "record":
                found[name] = value
        return found


class Quartiles(Fact):
    """The median of `n` samples and their quartiles, in the unit of the samples."""

    median: Positive
    low: Positive
    high: Positive
    n: Count = Field(description="how many samples: mostly one a round")

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quartiles":
        """Summarise at least one sample; quartiles interpolate linearly."""
        import numpy  # not for a page or a help

        low, median, high = numpy.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(median=median, low=low, high=high, n=len(samples))

    @property
    def error(self) -> float:
        """The standard error of the median, from the quartiles, as if the samples were
        normal.
        """
        return 0.93 * (self.high - self.low) / self.n**0.5


# Of each kind of records its file, and the commands that write it; the first of them is
# the one that a message names.
HOMES: dict[str, tuple[str, tuple[Command, ...]]] = {
    "sweep": ("results.jsonl", ("sweep",)),
    "scores": ("scores.jsonl", ("sweep", "compare")),
    "similarity": ("similarity.jsonl", ("sweep", "paper")),
    "leave_one_out": ("leave_one_out.jsonl", ("sweep",)),
    "samples": ("samples.jsonl", ("sweep",)),
    "choice": ("choices.jsonl", ("compare",)),
    "plan_times": ("plan_times.jsonl", ("compare",)),
    "comparison": ("comparison.jsonl", ("compare",)),
    "search": ("chosen.jsonl", ("search",)),
    "evaluation": ("evaluations.jsonl", ("search", "compare")),
    "refit": ("refits.jsonl", ("repair",)),
    "healing": ("healing.jsonl", ("heal",)),
    "measured": ("measured.jsonl", ("repair", "heal", "search", "eval")),
    "judged": ("judged.jsonl", ("repair", "heal", "search", "eval")),
    "bench": ("bench.jsonl", ("bench",)),
    "draft": ("drafts.jsonl", ("draft",)),
    "answers": ("answers.jsonl", ("eval", "paper")),
    "benchmark": ("benchmarks.jsonl", ("paper",)),
    "diagnostics": ("diagnostics.jsonl", ("paper",)),
    "times": ("times.jsonl", ("paper",)),
    "claim": ("claims.jsonl", ("paper",)),
    "engine_scores": ("engine_scores.jsonl", ("pareto",)),
    "engine_times": ("engine_times.jsonl", ("pareto",)),
    "pareto": ("pareto.jsonl", ("pareto",)),
    "slim": ("slim.jsonl", ("slim",)),
}
# What commands write next to their records, and over again.
BESIDE: dict[Command, tuple[str, ...]] = {
    "sweep": ("table.*", "tradeoff.*", "similarity.*"),
    "compare": ("table.*", "front.*"),
    "paper": ("*.tex", "*.csv", "paper.md", "similarity.*"),
    "pareto": ("table.md", "pareto.*"),
}
RECORD_KINDS: "dict[str, type[Record]]" = {}  # those whose modules are imported


class Record(Fact):
    """One line of a file. `key` names the fields that tell it from others; the first of
    a `headed` file is of all.
    """

    kind_name: ClassVar[str]
    file: ClassVar[str]
    commands: ClassVar[tuple[Command, ...]]
    key_fields: ClassVar[tuple[str, ...]]
    headed: ClassVar[bool]

    record: str = Field("", validate_default=True, description="the kind of this line")
    provenance: Provenance | None = Field(
        None, description="where the figures come from"
    )

    def __init_subclass__(
        cls, kind: str, key: tuple[str, ...] = (), headed: bool = False
    ) -> None:
        cls.kind_name, cls.key_fields, cls.headed = kind, key, headed
        RECORD_KINDS[kind] = cls
        if kind in HOMES:
            cls.file, cls.commands = HOMES[kind]

    @field_validator("record")
    @classmethod
    def _own_kind(cls, kind: str) -> str:
        if kind not in ("", cls.kind_name):
            raise ValueError(f"should be {cls.kind_name}")
        return cls.kind_name

    @property
    def key(self) -> RecordKey:
        """What tells it from others of its file; measured again, it is written
        again.
        """
        return tuple(getattr(self, name) for name in self.key_fields)

    @property
    def what(self) -> Settings:
        """What decided its figures, as far as that was written down."""
        return self.provenance.what if self.provenance else {}

    def line(self) -> Settings:
        """The record as JSON: its kind and the fields that were set."""
        return {
            "record": self.kind_name,
            **self.model_dump(mode="json", exclude_unset=True),
        }

    @classmethod
    def from_fact(cls, *facts: Fact, **more: object) -> Self:
        """A record of what `facts` have of its fields, and of what is new."""
        own = cls.model_fields.keys() - {"record"}
        found = {
            name: getattr(fact, name)
            for fact in facts
            for name in type(fact).model_fields
            if name in own
        }
        return cls(**found | more)


class HeaderRecord(Record, kind="header"):
    """The first line of a file whose lines all come from the same run."""

    of: str = Field(description="the kind of the lines that follow")
    provenance: Provenance


class Skips(Fact):
    """A plan."""

    plan: SkippedNames = Field(description="indices of the skipped layers, from 0")

    @property
    def name(self) -> str:
        """The plan in words."""
        return self.plan.in_words()
