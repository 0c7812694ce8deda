"""Means with their standard errors, and whether two sets of figures on the same documents differ."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TypeVar

Item = TypeVar("Item")
LEVEL = 0.95  # of intervals
MOST_FLIPPED = 16  # terms of a sum of which all signs are tried


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error (sample standard deviation / sqrt(n)): nan for one value, inf on overflow."""
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
    from scipy.stats import binomtest

    apart = [a > b for a, b in zip(ours, theirs) if a != b]
    return float(binomtest(sum(apart), len(apart)).pvalue) if apart else 1.0


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


def recovery_interval(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """The mean of `ours` over that of `theirs`, on the same items, and the ends of its interval at the level 0.95.

    Of right and wrong answers (1 and 0) by Bonett and Price 2006 (Statistics in Medicine 25, 3039), which holds for few
    items and where both agree on all; of other values by Fieller's theorem (1954), with Student's t. The interval ends
    at infinity where `theirs` may have no mean above zero; then the ratio may be nan.
    """
    from scipy.special import stdtrit

    both, total, base = len(ours), math.fsum(ours), math.fsum(theirs)
    ratio = total / base if base > 0 else math.nan
    if base <= 0 or both < 2:
        return ratio, 0.0, math.inf
    if all(value in (0, 1) for value in (*ours, *theirs)):
        return (ratio, *_of_proportions(ours, theirs))
    mean, dense = total / both, base / both
    pairs = [(one - mean, other - dense) for one, other in zip(ours, theirs)]
    t = stdtrit(both - 1, (1 + LEVEL) / 2)
    own, shared, their = (
        t * t * math.fsum(products) / (both - 1) / both for products in zip(*((a * a, a * b, b * b) for a, b in pairs))
    )
    a, b, c = dense**2 - their, mean * dense - shared, mean**2 - own
    if a <= 0:
        return ratio, 0.0, math.inf
    spread = math.sqrt(max(0.0, b * b - a * c))
    return ratio, max(0.0, (b - spread) / a), (b + spread) / a


def _of_proportions(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Bonett and Price's ends: Wilson's of each share among the items that one gets right, made as narrow as pairs."""
    right, base = sum(ours), sum(theirs)
    lost, gained = sum(a < b for a, b in zip(ours, theirs)), sum(a > b for a, b in zip(ours, theirs))
    items = base + gained
    paired = math.sqrt((lost + gained + 2) / ((right + 1) * (base + 1)))
    apart = sum(math.sqrt((1 - (count + 1) / (items + 2)) / (count + 1)) for count in (right, base))
    z = NormalDist().inv_cdf((1 + LEVEL) / 2) * paired / apart

    def wilson(count: float) -> tuple[float, float]:
        middle, spread = 2 * count + z * z, z * math.sqrt(z * z + 4 * count * (1 - count / items))
        return (middle - spread) / (2 * (items + z * z)), (middle + spread) / (2 * (items + z * z))

    (low, high), (base_low, base_high) = wilson(right), wilson(base)
    return low / base_high, high / base_low if base_low > 0 else math.inf
