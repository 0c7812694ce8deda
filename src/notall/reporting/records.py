"""The records that a page steps through: what each command's hold, as far as the page takes it for granted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ..records import ledger

Row = dict[str, Any]
Number = float | None  # None: what came out as no finite number

KINDS = {"dense": "dense", "attention": "attention", "mlp": "MLP", "block": "block", "plan": "plan"}
SHORT = {"attention": "attn", "mlp": "mlp"}
SHORT_NAME = 120  # letters of a name in a heading or a figure; the tables' CSV and the provenance have all of them


class Line(BaseModel):
    model_config = ConfigDict(strict=True)


class Planned(Line):
    """What all of them have; the speedups only where they were timed."""

    plan: dict[Literal["attention", "mlp"], list[int]]
    provenance: dict[str, Any]
    speedup_prefill: float = 1.0
    speedup_prefill_low: float = 1.0
    speedup_prefill_high: float = 1.0
    speedup_decode: float = 1.0
    speedup_decode_low: float = 1.0
    speedup_decode_high: float = 1.0


class Task(Line):
    """A metric of a task, paired with the dense model by document."""

    value: Number
    delta: Number
    delta_stderr: Number


class Compared(Planned):
    """A line of `notall compare`: what a criterion chose, and what that costs on held-out text."""

    criterion: str
    aim: str
    space: str
    count: int
    order: list[list[str]]
    delta_nll: Number
    delta_nll_se: Number
    kl: Number
    kl_se: Number
    top1_agreement: Number
    tasks: dict[str, Task]
    evaluations: int
    forwards: float
    seconds: float


class Chosen(Planned):
    """A line of `notall search`: the plan that it chose, what that took, and what was measured of it, if anything."""

    chosen: str
    order: list[list[str]]
    dense_cost: Number
    cost: Number
    evaluations: int
    forwards: float
    seconds: float
    in_time: bool
    delta_nll: Number = None
    delta_nll_se: Number = None
    predicted_speedup: float = 1.0
    speedup: float = 1.0
    speedup_low: float = 1.0
    speedup_high: float = 1.0


class Benched(Planned):
    """A line of `notall bench`: the times of the dense model, or of the plan beside it."""

    model: Literal["dense", "skipped"]
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    prefill_ms: float
    prefill_ms_low: float
    prefill_ms_high: float
    decode_ms_per_token: float
    decode_ms_per_token_low: float
    decode_ms_per_token_high: float
    params: int
    weight_bytes: int
    kv_bytes_per_token: int


class LeftOut(Line):
    """A line of leave_one_out.jsonl."""

    kind: Literal["attention", "mlp"]
    layer: int
    delta_nll: Number
    sequences: int | None = None


class Evaluated(Line):
    """A line of what a search or a comparison evaluated, or its first, which says by what."""

    settings: dict[str, Any] = {}
    skipped: list[str] | None = None
    batches: int | Literal["all"] = "all"
    cost: Number = None


MODELS: dict[str, type[BaseModel]] = {
    "sweep": ledger.Record,
    "compare": Compared,
    "search": Chosen,
    "bench": Benched,
}


def kind_of(record: Mapping[str, Any]) -> str:
    """The command that wrote it."""
    marks = {"variant": "sweep", "criterion": "compare", "chosen": "search"}
    return next((kind for mark, kind in marks.items() if mark in record), "bench")


def name_of(record: Mapping[str, Any]) -> str:
    """A configuration in words, such as `attention 10%, last layer kept` or `search by kl: 4 attention`."""
    kind = kind_of(record)
    if kind == "compare":
        return f"{record['criterion']} by {record['aim']}: {record['count']} {record['space']}"
    if kind == "search":
        return str(record["chosen"])
    if kind == "bench":
        tokens = f"{record['prompt_tokens']} + {record['new_tokens']} tokens"
        return f"{counted(record)}, {tokens}, batch {record['batch_size']}"
    if record["variant"] == "dense":
        return "dense"
    kept = ", last layer kept" if record["keep_last"] else ""
    return f"{KINDS[record['variant']]} {record['fraction']:.0%}{kept}"


def shorten(text: str, length: int = SHORT_NAME) -> str:
    return text if len(text) <= length else text[:length] + "…"


def sublayers(record: Mapping[str, Any]) -> list[str]:
    """What a record's plan skips, as `attn.3`, `mlp.3`."""
    return [f"{short}.{index}" for kind, short in SHORT.items() for index in record["plan"].get(kind, ())]


def counted(record: Mapping[str, Any]) -> str:
    """How many of each kind a record's plan skips."""
    counts = {KINDS[kind]: len(record["plan"].get(kind, ())) for kind in SHORT}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "dense"
