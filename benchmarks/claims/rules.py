"""Verdicts by rule: a 95 % interval, a threshold that is written down beforehand, and
the side that a claim is on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit
from scipy.stats import rankdata

from notall.measuring.statistics import LEVEL, mean_and_error
from notall.results.record import Fact, Number

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
Side = Literal["above", "below"]
Verdict = Literal["holds", "fails", "inconclusive", "not run"]
DRAWS = 2000  # of a bootstrap
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


class Interval(Fact):
    """A statistic with its 95 % interval."""

    value: Number
    low: Number
    high: Number


def verdict(found: Interval, threshold: float, side: Side) -> Verdict:
    """`holds` where the whole interval is on the claim's side of the threshold, `fails`
    where it is on the other.
    """
    if not all(map(math.isfinite, (found.low, found.high))):
        return "inconclusive"
    is_above, is_below = found.low > threshold, found.high < threshold
    holds, fails = (is_above, is_below) if side == "above" else (is_below, is_above)
    return "holds" if holds else "fails" if fails else "inconclusive"


def paired(differences: Sequence[float]) -> Interval:
    """The mean of differences that are paired by window, by Student's t."""
    mean, error = mean_and_error(differences)
    reach = float(stdtrit(max(1, len(differences) - 1), TAILS[1])) * error
    return Interval(value=mean, low=mean - reach, high=mean + reach)


def bootstrap(
    statistic: Callable[[Places], float], items: int, draws: int = DRAWS
) -> Interval:
    """Percentiles of a statistic of `items` places over places drawn with replacement;
    draws without one are no use.
    """
    places = np.random.default_rng(0).integers(0, items, (draws, items))
    return percentiles(
        statistic(np.arange(items)), [statistic(some) for some in places]
    )


def percentiles(value: float, drawn: Sequence[float]) -> Interval:
    finite = [one for one in drawn if math.isfinite(one)]
    low, high = np.quantile(finite, TAILS).tolist() if finite else (math.nan, math.nan)
    return Interval(value=value, low=low, high=high)


def spearman(one: Floats, other: Floats) -> float:
    """The rank correlation, ties at their mean rank; nan where a side is constant."""
    first, second = (ranks - ranks.mean() for ranks in (rankdata(one), rankdata(other)))
    spread = math.sqrt(first @ first * (second @ second))
    return float(first @ second / spread) if spread else math.nan


def correlated(one: Floats, other: Floats) -> Interval:
    """Spearman's, with a bootstrap over what both are values of."""
    return bootstrap(lambda places: spearman(one[places], other[places]), len(one))


def eta_squared(values: Floats) -> Floats:
    """Shares of the variance of (rows, columns, repeats): rows, columns, their
    interaction, repeats; they sum to 1.
    """
    rows, columns, repeats = values.shape
    mean, cells = values.mean(), values.mean(2)
    by_row, by_column = cells.mean(1) - mean, cells.mean(0) - mean
    together = cells - mean - by_row[:, None] - by_column
    parts = (
        columns * repeats * (by_row**2).sum(),
        rows * repeats * (by_column**2).sum(),
        repeats * (together**2).sum(),
        ((values - cells[:, :, None]) ** 2).sum(),
    )
    total = math.fsum(parts)
    return np.array(parts) / total if total else np.full(4, math.nan)


def share_of_rows_less_columns(values: Floats) -> Interval:
    """Eta squared of rows less that of columns, of (rows, columns, repeats, windows).

    A bootstrap over the repeats of each cell and over windows, which all cells share.
    """
    rows, columns, repeats, windows = values.shape
    rng = np.random.default_rng(0)

    def statistic(some: Floats) -> float:
        shares = eta_squared(some.mean(3))
        return float(shares[0] - shares[1])

    drawn = []
    for _ in range(DRAWS):
        places = rng.integers(0, repeats, (rows, columns, repeats, 1))
        again = np.take_along_axis(values, places, axis=2)
        drawn.append(statistic(again[..., rng.integers(0, windows, windows)]))
    return percentiles(statistic(values), drawn)


def agreement(losses: Floats) -> Floats:
    """Of each set, from (sets, methods): Spearman of its losses with the mean rank of
    each method on the other sets.
    """
    ranks = np.stack([rankdata(row) for row in losses])
    others = (ranks.sum(0) - ranks) / (len(ranks) - 1)
    return np.array([spearman(own, other) for own, other in zip(ranks, others)])
