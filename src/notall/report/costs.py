"""What skipping each sublayer alone costs, as far as a folder's files say."""

from collections.abc import Iterator
from pathlib import Path

from ..experiments.sweep import LeaveOneOutRecord
from ..plan import several
from ..results.facts import DELTA_NLL, KL
from ..results.ledger import header_of, read_records
from ..results.record import is_number
from ..results.repairs import EvaluationRecord
from .parts import CellPlace, Costs

TITLES = {"nll": DELTA_NLL.titled, "kl": f"KL added, {KL.unit}"}  # by the objective


def read_costs(folder: Path) -> Costs | None:
    """Of all that a folder's files know, the costs of most sublayers. Raises
    `UsageError` on a malformed line.
    """
    found = []
    if rows := read_records(folder / LeaveOneOutRecord.file, LeaveOneOutRecord):
        windows = rows[0].sequences
        text = f"{several(windows, 'window')} of text" if windows else "some text"
        alone = {_place(row.sublayer): row.delta_nll for row in rows}
        found.append(Costs(alone, TITLES["nll"], text))
    log = folder / EvaluationRecord.file
    for file in (log, *sorted(log.with_suffix("").glob("*.jsonl"))):
        found += _evaluated(file)
    return max(found, key=lambda costs: len(costs.found), default=None)


def _evaluated(file: Path) -> Iterator[Costs]:
    """Of a search or a comparison, which may have evaluated sublayers alone on all of
    its text, and on parts of it.
    """
    header = header_of(file)
    objective = header.provenance.what.get("objective") if header else None
    by_share: dict[int | str, dict[tuple[str, ...], float]] = {}
    for row in read_records(file, EvaluationRecord):
        if is_number(row.cost):
            by_share.setdefault(row.batches, {})[row.skipped] = row.cost
    for share, costs in by_share.items():
        if () not in costs:
            continue
        found = {
            _place(names[0]): cost - costs[()]
            for names, cost in costs.items()
            if len(names) == 1
        }
        if found:
            title = TITLES.get(str(objective), f"rise of {objective}")
            text = "the text that was chosen by"
            if share != "all":
                text += f", on {share} of its batches"
            yield Costs(found, title, text)


def _place(name: str) -> CellPlace:
    kind, _, layer = name.partition(".")
    return "mlp" if kind == "mlp" else "attention", int(layer)
