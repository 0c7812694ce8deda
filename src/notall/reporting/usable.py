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
    """Of the usable ones the fastest; among equals, and where nothing was timed, the smallest, then the best."""
    return max(
        filter(is_usable, records),
        key=lambda record: (record.get("speedup_decode", 0), -record.get("weight_bytes", 0), -nats_lost(record)),
        default=None,
    )


def mildest(records: Iterable[Row]) -> Row | None:
    """What loses least, usable or not."""
    return min(filter(is_known, records), key=nats_lost, default=None)
