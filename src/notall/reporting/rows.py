"""What a page calls records and plans: rows of plain values, whichever command wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..records.columns import Row
from ..records.comparison import UNREPAIRED
from ..records.record import VARIANTS, counted

Number = float | None  # None: what came out as no finite number

SHORT = {"attention": "attn", "mlp": "mlp"}
SHORT_NAME = 120  # letters of a name in a heading or a figure; the tables' CSV and the provenance have all of them


def kind_of(record: Row) -> str:
    """The command that wrote it."""
    marks = {"variant": "sweep", "criterion": "compare", "chosen": "search", "prompt_tokens": "bench"}
    return next((kind for mark, kind in marks.items() if mark in record), "repair")


def name_of(record: Row) -> str:
    """A configuration in words, such as `attention 10%, last layer kept` or `search by kl: 4 attention`."""
    kind = kind_of(record)
    if kind == "compare":
        return f"{way_of(record)}: {record['count']} {record['space']}"
    if kind == "search":
        return str(record["chosen"])
    if kind == "bench":
        tokens = f"{record['prompt_tokens']} + {record['new_tokens']} tokens"
        return f"{counted(record['plan'])}, {tokens}, batch {record['batch_size']}"
    if kind == "repair":
        return counted(record["plan"])
    if record["variant"] == "dense":
        return "dense"
    kept = ", last layer kept" if record["keep_last"] else ""
    return f"{VARIANTS[record['variant']]} {record['fraction']:.0%}{kept}"


def way_of(record: Row) -> str:
    """How the plan of a comparison was chosen, and repaired, such as `search by kl, refit`.

    What evaluates nothing but the dense model goes by no objective.
    """
    repair = record.get("repair", UNREPAIRED)
    aim = f" by {record['aim']}" if record["evaluations"] > 1 else ""
    return f"{record['criterion']}{aim}" + (f", {repair}" if repair != UNREPAIRED else "")


def in_words(plan: Mapping[str, Sequence[int]]) -> str:
    """What a plan skips, such as `3 blocks` or `1 attention and 4 MLPs`."""
    attention, mlp = plan.get("attention", ()), plan.get("mlp", ())
    if attention and list(attention) == list(mlp):
        return several(len(mlp), "block")
    parts = [several(len(skipped), name) for skipped, name in ((attention, "attention"), (mlp, "MLP")) if skipped]
    return " and ".join(parts) or "nothing"


def several(count: int, name: str) -> str:
    return f"{count} {name}" + ("s" if count != 1 else "")


def shorten(text: str, length: int = SHORT_NAME) -> str:
    return text if len(text) <= length else text[:length] + "…"


def sublayers(record: Row) -> list[str]:
    """What a record's plan skips, as `attn.3`, `mlp.3`."""
    return [f"{short}.{index}" for kind, short in SHORT.items() for index in record["plan"].get(kind, ())]
