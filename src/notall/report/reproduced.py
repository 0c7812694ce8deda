"""A folder whose records were made again: its table and its sentence."""

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import get_args

from ..experiments.reproduce import Agreement, Remade
from ..plan import several
from ..results.table import Column, words

COLUMNS: tuple[Column[Remade], ...] = tuple(
    words(name.replace("_", " "), attrgetter(name)) for name in Remade.model_fields
)
HOW_JUDGED = (
    "Equal: to the last digit. Tolerance: half of a figure's standard error, or 5 % of a"
    " figure without one."
)


def conclusion(found: Sequence[Remade], folder: Path) -> str:
    """How many records agree, and by which rule, in a sentence."""
    counts = Counter(one.agreement for one in found)
    agreements = ", ".join(
        f"{counts[name]} {name}" for name in get_args(Agreement) if counts[name]
    )
    records = f"{several(len(found), 'record')} of {folder}, made again"
    timed = any(one.speedup_recorded for one in found)
    times = " Times are shown, and not judged." if timed else ""
    return f"{records}: {agreements}. {HOW_JUDGED}{times}"
