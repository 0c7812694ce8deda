"""What is written down: frozen facts, and records of them that know their file, their key and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from typing_extensions import Self

from ..inputs import Settings
from ..plan import Plan
from .provenance import Provenance

MOST_LAYERS = 10_000  # more than any model has; a damaged index does not become a page of gigabytes

Key = tuple[Any, ...]
Command = Literal["sweep", "compare", "search", "paper", "bench", "draft", "eval", "repair", "heal", "pareto"]
Scalar = float | int | str | bool | None


def is_number(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)


def _none_if_no_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


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
    PlainSerializer(_none_if_no_number, return_type=float | None, when_used="json"),
]
Unsigned = Annotated[Number, _between(0)]  # such as a standard error
Loss = Annotated[Number, _between(-0.01)]  # rounding may bring it just below 0
Share = Annotated[Number, _between(0, 1)]  # of tokens, or a probability
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, lt=1e18)]  # of work
Positive = Annotated[float, Field(gt=1e-9, lt=1e18)]  # a time, a ratio of times: it is divided by
SublayerName = Annotated[str, Field(pattern=r"^(attn|mlp)\.\d{1,4}$")]
SublayerNames = Annotated[str, Field(pattern=r"^((attn|mlp)\.\d{1,4}( |$))*$")]
LayerIndex = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]


def _plausible(value: object) -> object:
    indices = value.indices if isinstance(value, Plan) else value
    if not isinstance(indices, dict) or indices.keys() != {"attention", "mlp"}:
        raise ValueError('expected {"attention": [...], "mlp": [...]}')
    for layers in indices.values():
        if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < MOST_LAYERS for layer in layers):
            raise ValueError(f"layers are whole numbers from 0 to {MOST_LAYERS - 1}")
    return value


# In a record the fingerprint is the provenance's.
Skipped = Annotated[
    Plan,
    BeforeValidator(_plausible),
    AfterValidator(lambda plan: Plan(plan.attention, plan.mlp)),
    PlainSerializer(lambda plan: plan.indices, return_type=dict[str, list[int]]),
]


class Fact(BaseModel):
    """What was measured, as it is stored, shown and drawn: frozen, and checked where it is read."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="forbid", strict=True, allow_inf_nan=False)

    def figures(self) -> dict[str, Scalar]:
        """Every number and text in it, also in the facts that it holds, by the names of fields: a line of a CSV."""
        found: dict[str, Scalar] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Quartiles):
                found |= {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
            elif isinstance(value, Fact):
                found |= value.figures()
            elif isinstance(value, Plan):
                found["skipped"] = " ".join(value.names)
            elif isinstance(value, float):
                found[name] = _none_if_no_number(value)
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
    def of(cls, samples: Sequence[float]) -> Quartiles:
        """Summarise at least one sample; quartiles interpolate linearly."""
        import numpy  # not for a page or a help

        low, median, high = numpy.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(median=median, low=low, high=high, n=len(samples))

    @property
    def error(self) -> float:
        """The standard error of the median, from the quartiles, as if the samples were normal."""
        return 0.93 * (self.high - self.low) / self.n**0.5


KINDS: dict[str, type[Record]] = {}  # those whose modules are imported


class Record(Fact):
    """One line of a file. A kind says which file, which commands write it, and what tells its lines apart."""

    file: ClassVar[str]
    commands: ClassVar[tuple[Command, ...]]
    key_fields: ClassVar[tuple[str, ...]]
    headed: ClassVar[bool] = False  # whether the first line of the file holds the provenance of all

    record: str = Field(description="the kind of this line")
    provenance: Provenance | None = Field(None, description="where the figures come from")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: object) -> None:
        KINDS[cls.kind_name()] = cls

    @classmethod
    def kind_name(cls) -> str:
        """Its name in files."""
        return str(cls.model_fields["record"].default)

    @property
    def key(self) -> Key:
        """What tells it from others of its file; measured again, it is written again."""
        return tuple(getattr(self, name) for name in self.key_fields)

    @property
    def what(self) -> Settings:
        """What decided its figures, as far as that was written down."""
        return self.provenance.what if self.provenance else {}

    def line(self) -> Settings:
        """As it is written."""
        return {"record": self.record, **self.model_dump(mode="json", exclude_unset=True)}

    @classmethod
    def from_fact(cls, *facts: Fact, **more: object) -> Self:
        """A record of what `facts` have of its fields, and of what is new."""
        own = cls.model_fields.keys() - {"record"}
        found = {name: getattr(fact, name) for fact in facts for name in type(fact).model_fields if name in own}
        return cls(**found | more)


class HeaderRecord(Record):
    """The first line of a file whose lines all come from the same run."""

    record: Literal["header"] = "header"
    of: str = Field(description="the kind of the lines that follow")
    provenance: Provenance


class Skips(Fact):
    """A plan."""

    plan: Skipped = Field(description="indices of the skipped layers, from 0")

    @property
    def name(self) -> str:
        return self.plan.in_words()
