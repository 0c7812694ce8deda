"""What leaving out each sublayer alone costs, as far as a results folder knows it: from a sweep, or from a search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..plan import several
from ..results.evaluations import EvaluationRecord
from ..results.facts import DELTA_NLL, KL
from ..results.ledger import header_of, read
from ..results.record import Count, Number, Record, SublayerName, Unsigned, is_number
from .shown import Costs, Place

KINDS = {"attn": "attention", "mlp": "mlp"}
TITLES = {"nll": DELTA_NLL.titled, "kl": f"KL added, {KL.unit}"}  # by the objective


class LeaveOneOutRecord(Record):
    """One sublayer left out, on a few sequences."""

    file = "leave_one_out.jsonl"
    commands = ("sweep",)
    key_fields = ("sublayer",)

    record: Literal["leave_one_out"] = "leave_one_out"
    sublayer: SublayerName
    delta_nll: Number = Field(description="nll less the dense model's, nats per token")
    delta_nll_se: Unsigned = Field(math.nan, description="of the paired differences, nats per token")
    sequences: Count | None = Field(None, description="on how many")


def read_costs(folder: Path) -> Costs | None:
    """Of all that a folder's files tell, what tells of most sublayers. Raises `UsageError` on a malformed line."""
    log = folder / EvaluationRecord.file
    found = [*_left_out(folder / LeaveOneOutRecord.file)]
    for file in (log, *sorted(log.with_suffix("").glob("*.jsonl"))):
        found += _evaluated(file)
    return max(found, key=lambda costs: len(costs.found), default=None)


def _left_out(file: Path) -> Iterator[Costs]:
    """Of a sweep."""
    rows = read(file, LeaveOneOutRecord)
    if rows:
        windows = rows[0].sequences
        found: dict[Place, float] = {_place(row.sublayer): row.delta_nll for row in rows}
        yield Costs(found, TITLES["nll"], f"{several(windows, 'window')} of text" if windows else "some text")


def _evaluated(file: Path) -> Iterator[Costs]:
    """Of a search or a comparison, which may have evaluated sublayers alone on all of its text, and on parts of it."""
    header = header_of(file)
    objective = header.provenance.what.get("objective") if header else None
    by_share: dict[int | str, dict[tuple[str, ...], float]] = {}
    for row in read(file, EvaluationRecord):
        if is_number(row.cost):
            by_share.setdefault(row.batches, {})[row.skipped] = row.cost
    for share, costs in by_share.items():
        if () not in costs:
            continue
        found = {_place(names[0]): cost - costs[()] for names, cost in costs.items() if len(names) == 1}
        if found:
            part = "" if share == "all" else f", on {share} of its batches"
            title = TITLES.get(str(objective), f"rise of {objective}")
            yield Costs(found, title, f"the text that was chosen by{part}")


def _place(name: str) -> Place:
    kind, _, layer = name.partition(".")
    return KINDS[kind], int(layer)
