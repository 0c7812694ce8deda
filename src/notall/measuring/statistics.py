"""Means with their standard errors, and whether two sets of figures on the same documents differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
MOST_FLIPPED = 16  # terms of a sum of which all signs are tried


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (sample standard deviation / sqrt(n)); the error of one value is nan.

    Where sums overflow both are infinite.
    """
    n = len(values)
    try:
        mean = math.fsum(values) / n
        if n < 2:
            return mean, math.nan
        variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    except OverflowError:
        return math.inf, math.inf
    return mean, math.sqrt(variance / n)


def jackknife_error(statistic: Callable[[Sequence[Item]], float], items: Sequence[Item], groups: int = 100) -> float:
    """The standard error of `statistic(items)`, by leaving out one of (at most) `groups` parts at a time.

    Of a mean, with a part for each item, it is the standard error of `mean_and_error`; of one item it is nan.
    Source: Tukey 1958; Efron and Tibshirani, An Introduction to the Bootstrap, chapter 11.
    """
    groups = min(groups, len(items))
    if groups < 2:
        return math.nan
    left = [statistic([item for i, item in enumerate(items) if i % groups != part]) for part in range(groups)]
    average = math.fsum(left) / groups
    return math.sqrt(math.fsum((value - average) ** 2 for value in left) * (groups - 1) / groups)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How likely right and wrong answers (1 and 0) to the same documents differ as much by chance: exact, two-sided.

    Source: McNemar 1947; of the documents that only one of the two gets right, each has half of them by chance.
    """
    gained = sum(a > b for a, b in zip(ours, theirs))
    lost = sum(a < b for a, b in zip(ours, theirs))
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def sign_flip_p_value(differences: Sequence[float]) -> float:
    """How likely a sum is as far from zero by chance, were each of its terms as likely of the other sign: two-sided.

    Exact for up to 16 terms that are not 0; for more by the normal distribution, with the variance that flipping gives.
    Source: Fisher 1935, The Design of Experiments, section 21.
    """
    terms = [value for value in differences if value]
    observed, spread = abs(math.fsum(terms)), math.sqrt(math.fsum(value**2 for value in terms))
    if len(terms) > MOST_FLIPPED:
        return normal_p_value(observed, spread)
    sums = [0.0]
    for value in terms:
        sums = [total + value for total in sums] + [total - value for total in sums]
    return sum(abs(total) >= observed - 1e-9 * spread for total in sums) / len(sums)


def normal_p_value(difference: float, error: float) -> float:
    """How likely a difference is as large by chance, given its standard error: two-sided, normal distribution."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference / error) / math.sqrt(2))
