"""Which plans of a folder leave the model usable, and which of those is best."""

from __future__ import annotations

from collections.abc import Iterable

from ..records.columns import Row
from .rows import sublayers
from .verdict import faults_of, nats_lost


def is_known(record: Row) -> bool:
    """Whether something is skipped, and it is known what that costs in NLL."""
    return record.get("delta_nll") is not None and "plan" in record and bool(sublayers(record))


def is_usable(record: Row) -> bool:
    """Whether it is known that the model is of use without what is skipped."""
    return is_known(record) and not faults_of(record)


def fastest(records: Iterable[Row]) -> Row | None:
    """Of the usable ones the fastest: of those that may be as fast, by its quartiles, what loses least.

    Where nothing was timed, the smallest, then the best.
    """
    usable = [*filter(is_usable, records)]
    first = max(
        usable,
        key=lambda record: (record.get("speedup_decode", 0), -record.get("weight_bytes", 0), -nats_lost(record)),
        default=None,
    )
    if first is None or "speedup_decode" not in first:
        return first
    at_least = first.get("speedup_decode_low", first["speedup_decode"])
    return min((record for record in usable if record.get("speedup_decode", 0) >= at_least), key=nats_lost)


def mildest(records: Iterable[Row]) -> Row | None:
    """What loses least, usable or not."""
    return min(filter(is_known, records), key=nats_lost, default=None)
