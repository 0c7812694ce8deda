"""What every kind of record has: its file, the commands that write it, its key, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from .columns import Column, Row, magnitude, number, plain, size, with_error, with_spread
from .plan import Plan
from .provenance import Provenance

MOST_LAYERS = 10_000  # more than any model has; a damaged index does not become a page of gigabytes

Key = tuple[Any, ...]
Command = Literal["sweep", "compare", "search", "paper", "bench", "draft", "eval", "repair", "heal", "front"]


def _none_if_infinite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_OrNone = BeforeValidator(_none_if_infinite)
Number = Annotated[float | None, _OrNone]  # None: what came out as no finite number
Unsigned = Annotated[Annotated[float, Field(ge=0)] | None, _OrNone]  # likewise: a standard error
Loss = Annotated[Annotated[float, Field(gt=-0.01)] | None, _OrNone]  # likewise: rounding may bring it just below 0
Share = Annotated[Annotated[float, Field(ge=0, le=1)] | None, _OrNone]  # likewise: of tokens, or a probability
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Amount = Annotated[float, Field(ge=0, lt=1e18)]  # of work
Positive = Annotated[float, Field(gt=1e-9, lt=1e18)]  # a time, a ratio of times: it is divided by
SublayerName = Annotated[str, Field(pattern=r"^(attn|mlp)\.\d{1,4}$")]
SublayerNames = Annotated[str, Field(pattern=r"^((attn|mlp)\.\d{1,4}( |$))*$")]
LayerIndex = Annotated[int, Field(ge=0, lt=MOST_LAYERS)]


def _within(plan: Plan) -> dict[str, list[int]]:
    return plan.indices


def _bare(plan: Plan) -> Plan:
    """Of a plan what is skipped: in a record the fingerprint is the provenance's."""
    return Plan(plan.attention, plan.mlp)


def _plausible(value: Any) -> Any:
    """Refuse a plan of more layers than a model has, before a page is made of it."""
    indices = value.indices if isinstance(value, Plan) else value
    if not isinstance(indices, dict) or indices.keys() != {"attention", "mlp"}:
        raise ValueError('expected {"attention": [...], "mlp": [...]}')
    for layers in indices.values():
        if not isinstance(layers, list) or not all(type(layer) is int and 0 <= layer < MOST_LAYERS for layer in layers):
            raise ValueError(f"layers are whole numbers from 0 to {MOST_LAYERS - 1}")
    return value


Skipped = Annotated[Plan, BeforeValidator(_plausible), AfterValidator(_bare), PlainSerializer(_within)]


class Fields(BaseModel):
    """Fields that several kinds share, and what records are made of."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Record(Fields):
    """One line of a file. A kind says which file, which commands write it, and what tells its lines apart."""

    file: ClassVar[str]
    commands: ClassVar[tuple[Command, ...]]
    key_fields: ClassVar[tuple[str, ...]]
    headed: ClassVar[bool] = False  # whether the first line of the file holds the provenance of all
    groups: ClassVar[tuple[str, ...]] = ()  # fields that are groups of fields, None where they were not measured
    columns: ClassVar[tuple[Column, ...]] = ()  # of tables: which row it is, the answer, then the rest by importance

    record: str = Field(description="the kind of this line")
    provenance: Provenance | None = Field(None, description="where the figures come from")

    @property
    def key(self) -> Key:
        """What tells it from others of its file; measured again, it is written again."""
        return tuple(getattr(self, name) for name in self.key_fields)

    def line(self) -> Row:
        """As it is written."""
        return {"record": self.record, **self.model_dump(mode="json", exclude_unset=True)}

    def row(self) -> Row:
        """As tables and figures take it: plain values by name, groups unpacked, what was not measured left out."""
        row: Row = {}
        for name, value in self.line().items():
            if isinstance(getattr(self, name), Fields):
                row |= value
            elif name != "record" and not (name in self.groups and value is None):
                row[name] = value
        return row | ({"provenance": self.provenance.flat} if self.provenance else {})


class HeaderRecord(Record):
    """The first line of a file whose lines all come from the same run."""

    record: Literal["header"] = "header"
    provenance: Provenance


class Skips(Fields):
    """A plan."""

    plan: Skipped = Field(description="indices of the skipped layers, from 0")


VARIANTS = {"dense": "dense", "attention": "attention", "mlp": "MLP", "block": "block", "plan": "plan"}


def counted(plan: Mapping[str, Sequence[int]]) -> str:
    """How many of each kind a plan skips."""
    counts = {kind: len(plan.get(kind, ())) for kind in ("attention", "mlp")}
    return ", ".join(f"{count} {VARIANTS[kind]}" for kind, count in counts.items() if count) or "dense"


PLAN = plain("plan", "skipped", counted)


class Configured(Skips):
    """A row of the paper's grid."""

    variant: Literal["dense", "attention", "mlp", "block", "plan"] = Field(description="what is skipped")
    fraction: float = Field(ge=0, le=1, description="share of the layers that was asked for, 0 to 1")
    keep_last: bool = Field(description="whether the last layer is preserved")


CONFIGURED = (
    plain("variant", "skipped", VARIANTS.__getitem__),
    plain("fraction", write="{:.0%}".format),
    plain("keep_last", "last layer", lambda kept: "kept" if kept else ""),
)


class QualityFields(Fields):
    """What a plan costs. `_se`: standard error over sequences."""

    nll: Loss = Field(description="negative log-likelihood, nats per token")
    nll_se: Unsigned = Field(description="nats per token")
    delta_nll: Number = Field(description="nll less the dense model's on the same sequences, nats per token")
    delta_nll_se: Unsigned = Field(description="of the paired differences, nats per token")
    perplexity: Unsigned = Field(description="exp(nll)")
    kl: Number = Field(description="KL(dense || skipped) of the next token, nats per token")
    kl_se: Unsigned = Field(description="nats per token")
    top1_agreement: Share = Field(description="share of tokens with the dense model's first choice, 0 to 1")
    top1_agreement_se: Unsigned = Field(description="0 to 1")
    sequences: Count = Field(description="how many sequences the quality was measured on")


NATS = "nats per token"
DELTA_NLL = with_error("delta_nll", "NLL added", unit=NATS)
KL = with_error("kl", "KL", unit=NATS)
TOP1 = with_error("top1_agreement", "top-1 agreement")
PERPLEXITY = magnitude("perplexity", "perplexity")
QUALITY = (DELTA_NLL, KL, TOP1, PERPLEXITY, with_error("nll", "NLL", unit=NATS))


class TimeFields(Fields):
    """What a plan takes. `_low` and `_high`: quartiles over rounds."""

    prefill_ms: Positive = Field(description="milliseconds from the prompt to the first new token, median")
    prefill_ms_low: Positive = Field(description="milliseconds")
    prefill_ms_high: Positive = Field(description="milliseconds")
    decode_ms_per_token: Positive = Field(description="milliseconds a decode step, for the whole batch, median")
    decode_ms_per_token_low: Positive = Field(description="milliseconds")
    decode_ms_per_token_high: Positive = Field(description="milliseconds")
    speedup_prefill: Positive = Field(description="dense prefill_ms / this one's, paired by round, median; > 1: faster")
    speedup_prefill_low: Positive = Field(description="ratio")
    speedup_prefill_high: Positive = Field(description="ratio")
    speedup_decode: Positive = Field(description="dense decode_ms_per_token / this one's, likewise")
    speedup_decode_low: Positive = Field(description="ratio")
    speedup_decode_high: Positive = Field(description="ratio")


SPEEDUPS = (
    with_spread("speedup_decode", "decode speedup", ".2f"),
    with_spread("speedup_prefill", "prefill speedup", ".2f"),
)
TIMES = (
    *SPEEDUPS,
    with_spread("decode_ms_per_token", "decode ms/token"),
    with_spread("prefill_ms", "prefill ms"),
)


class SizeFields(Fields):
    """What a plan leaves of a model."""

    params: Count = Field(description="parameters that are left")
    weight_bytes: Count = Field(description="bytes of the weights that are left, as loaded")
    kv_bytes_per_token: Count = Field(description="bytes of KV cache a token of one sequence takes")
    state_bytes: Count | None = Field(None, description="bytes of states of fixed size of one sequence, of hybrids")


WEIGHTS, KV, STATE = (
    size("weight_bytes", "weights"),
    size("kv_bytes_per_token", "KV/token"),
    size("state_bytes", "states"),
)
SIZE = (WEIGHTS, KV, number("params", "parameters", ","), STATE)
PEAK = size("peak_bytes", "peak memory")


class SpentFields(Fields):
    """What choosing took."""

    evaluations: Count = Field(description="sets of sublayers that were evaluated")
    executions: Amount = Field(description="sublayers run, in passes over the whole calibration text")
    one_by_one: Amount = Field(description="what they would be without shared states")
    seconds: Amount = Field(description="CPU seconds of all threads")


SPENT = (
    number("evaluations", "evaluations", ",d"),
    number("forwards", "forward passes", ",.1f"),
    number("seconds", "CPU s", ",.1f"),
)
