"""What leaving out each sublayer alone costs, as far as a results folder knows it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..records.leave_one_out import LeaveOneOutRecord
from ..records.ledger import header_of, read
from ..records.record import DELTA_NLL, KL
from ..records.search import EvaluationRecord
from .rows import SHORT, Number

Place = tuple[str, int]  # kind, layer

NAME = re.compile(rf"({'|'.join(SHORT.values())})\.(\d{{1,4}})")
KIND = {short: kind for kind, short in SHORT.items()}
TITLES = {"nll": DELTA_NLL.titled, "kl": f"KL added, {KL.unit}"}


@dataclass(frozen=True)
class Costs:
    """By kind and layer; `title` says what is counted, `measured_on` on how much text."""

    found: Mapping[Place, Number]
    title: str
    measured_on: str


def read_costs(path: Path) -> Costs | None:
    """Of all that a folder's files tell, what tells of most sublayers. Raises `UsageError` on a malformed line."""
    found = [*_left_out(path / LeaveOneOutRecord.file)]
    log = path / EvaluationRecord.file
    for file in (log, *sorted(log.with_suffix("").glob("*.jsonl"))):
        found += _evaluated(file)
    return max(found, key=lambda costs: len(costs.found), default=None)


def _left_out(file: Path) -> Iterator[Costs]:
    """Of a sweep."""
    rows = read(file, LeaveOneOutRecord)
    if rows:
        windows = rows[0].sequences
        found: dict[Place, Number] = {(row.kind, row.layer): row.delta_nll for row in rows}
        yield Costs(found, TITLES["nll"], f"{windows} windows of text" if windows else "some text")


def _evaluated(file: Path) -> Iterator[Costs]:
    """Of a search or a comparison, which may have evaluated sublayers alone on all of its text, and on parts of it."""
    header = header_of(file)
    objective = header.provenance.what.get("objective") if header else None
    by_share: dict[int | str, dict[tuple[str, ...], float]] = {}
    for row in read(file, EvaluationRecord):
        if row.cost is not None:
            by_share.setdefault(row.batches, {})[row.skipped] = row.cost
    for share, costs in by_share.items():
        alone = {place: cost for names, cost in costs.items() if (place := _place(names))}
        if alone and () in costs:
            found: dict[Place, Number] = {place: cost - costs[()] for place, cost in alone.items()}
            title = TITLES.get(str(objective), f"rise of {objective}")
            part = "" if share == "all" else f", on {share} of its batches"
            yield Costs(found, title, f"the text that was chosen by{part}")


def _place(names: tuple[str, ...]) -> Place | None:
    """Of the one sublayer that is named."""
    match = NAME.fullmatch(names[0]) if len(names) == 1 else None
    return (KIND[match[1]], int(match[2])) if match else None
