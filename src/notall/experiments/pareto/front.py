"""Which models are faster than all that lose less."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...measuring.statistics import Estimate, mean_and_error, of_rounds
from ...results.record import is_number
from .records import ParetoRecord


def is_faster(one: ParetoRecord, other: ParetoRecord) -> bool:
    """Whether it decodes faster: Student's t of the rounds' own ratios, one-sided at
    0.025.

    Records without the rounds are compared by their quartiles.
    """
    if one.round_ms and len(one.round_ms) == len(other.round_ms):
        pairs = zip(one.round_ms, other.round_ms)
        ratios = [math.log(theirs / ours) for ours, theirs in pairs]
        more = Estimate(*mean_and_error(ratios), len(ratios) - 1)
    elif one.times and other.times:
        ours, theirs = one.times.speedup_decode, other.times.speedup_decode
        more = of_rounds(ours).less(of_rounds(theirs))
    else:
        return False
    return more.ends()[0] > 0


def loses_less(one: ParetoRecord, other: ParetoRecord, *, by_bits: bool) -> bool:
    """Whether its loss is lower, one-sided at 0.025, as if the errors over windows were
    independent.
    """

    def loss(record: ParetoRecord) -> Estimate:
        return Estimate(*record.loss(by_bits=by_bits), (record.windows or 0) - 1)

    return loss(other).less(loss(one)).ends()[0] > 0


def compares_bits(records: Iterable[ParetoRecord]) -> bool:
    """Whether some model has other tokens, so that all are compared by bits per
    byte.
    """
    return any(
        is_number(one.bits_per_byte) and not is_number(one.delta_nll) for one in records
    )


def pareto_front(records: Sequence[ParetoRecord]) -> list[ParetoRecord]:
    """By their loss, the records that are faster than all before them, as far as
    `is_faster` can tell.
    """
    by_bits = compares_bits(records)

    def loss(record: ParetoRecord) -> float:
        return record.loss(by_bits=by_bits)[0]

    measured = [one for one in records if one.times and is_number(loss(one))]
    found: list[ParetoRecord] = []
    for one in sorted(measured, key=lambda each: (loss(each), -each.faster)):
        if all(is_faster(one, other) for other in found):
            found.append(one)
    return found
