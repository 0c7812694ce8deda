"""Errors of means, and what so few items allow to say: tests of paired differences, and
intervals.

Items of one document are no independent witnesses: where `documents` names the document
of each item, errors, tests and intervals count documents.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

from scipy.special import bdtr, stdtr, stdtrit

from ..results.facts import SIGNIFICANT
from ..results.record import Quartiles

Item = TypeVar("Item")
# Of each item its document; None where each has its own.
Documents = Sequence[Hashable] | None
# Of intervals: each end misses as often as a one-sided test at half of `SIGNIFICANT`.
LEVEL = 1 - SIGNIFICANT
JACKKNIFED = 100  # parts, at most, of which one is left out at a time
MOST_FLIPPED = 16  # terms of a sum of which all signs are tried
# Terms, all above or all below zero, that an exact test tells from chance: 2 / 2^6 < 0.05.
FEWEST_SIGNS = math.ceil(math.log2(2 / SIGNIFICANT))
LEAST_DOCUMENTS = 30  # of each task: from fewer a standard error is a guess
LEAST_ROUNDS = 5  # of times
LEAST_WINDOWS = 8  # of text


def mean_and_error(
    values: Sequence[float], documents: Documents = None
) -> tuple[float, float]:
    """The mean, and its standard error (sample standard deviation / sqrt(n)): nan for
    one value, inf on overflow.

    Over C documents it is cluster-robust: sqrt(C / (C - 1) sum over documents of (sum
    of value - mean)^2) / n. Source: Cameron and Miller 2015, A Practitioner's Guide to
    Cluster-Robust Inference, II.A.
    """
    n = len(values)
    try:
        mean = math.fsum(values) / n
        apart = summed([value - mean for value in values], documents)
        count = len(apart)
        if count < 2:
            return mean, math.nan
        squares = math.fsum(one**2 for one in apart)
        variance_of_sum = count / (count - 1) * squares
        return mean, math.sqrt(variance_of_sum) / n
    except OverflowError:
        return math.inf, math.inf


def summed(values: Sequence[float], documents: Documents = None) -> list[float]:
    """The sum of the values of each document, in the order of their first items;
    without documents the values.
    """
    if documents is None:
        return list(values)
    sums = dict.fromkeys(documents, 0.0)
    for value, document in zip(values, documents, strict=True):
        sums[document] += value
    return [*sums.values()]


def jackknife_error(
    statistic: Callable[[Sequence[Item]], float],
    items: Sequence[Item],
    groups: int = JACKKNIFED,
) -> float:
    """The standard error of `statistic(items)`, by leaving out one of (at most)
    `groups` parts at a time.

    Of a mean, with a part for each item, it is the standard error of `mean_and_error`;
    of one item it is nan. Source: Tukey 1958; Efron and Tibshirani, An Introduction to
    the Bootstrap, chapter 11.
    """
    groups = min(groups, len(items))
    if groups < 2:
        return math.nan

    def without(part: int) -> float:
        others = [one for i, one in enumerate(items) if i % groups != part]
        return statistic(others)

    values = list(map(without, range(groups)))
    average = math.fsum(values) / groups
    squares = math.fsum((value - average) ** 2 for value in values)
    variance = squares * (groups - 1) / groups
    return math.sqrt(variance)


# --- tests
# --------------------------------------------------------------------------------------


def sign_flip_p_value(
    differences: Sequence[float], documents: Documents = None
) -> float:
    """How likely paired differences sum up as far from zero by chance, were each as
    likely positive as negative.

    Two-sided. Exact where all that are not 0 are of one size, as of right and wrong
    answers (McNemar 1947), and for up to 16 others; for more by the normal
    distribution, with the variance that flipping gives. Source: Fisher 1935, The Design
    of Experiments, section 21.
    """
    terms = [value for value in summed(differences, documents) if value]
    if not all(map(math.isfinite, terms)):
        return math.nan
    sizes = set(map(abs, terms))
    if len(sizes) == 1:
        above = sum(value > 0 for value in terms)
        return _sign_test(above, len(terms))
    observed = abs(math.fsum(terms))
    squares = math.fsum(value**2 for value in terms)
    spread = math.sqrt(squares)
    if len(terms) > MOST_FLIPPED:
        deviations = observed / spread
        return math.erfc(deviations / math.sqrt(2))
    sums = [0.0]  # of all signs of the terms so far
    for value in terms:
        higher = [total + value for total in sums]
        lower = [total - value for total in sums]
        sums = higher + lower
    least = observed - 1e-9 * spread  # up to rounding
    as_far = sum(abs(total) >= least for total in sums)
    return as_far / len(sums)


def _sign_test(above: int, of: int) -> float:
    """Two-sided: how likely so few, or so many, of them are above by chance."""
    fewer = min(above, of - above)
    one_sided = float(bdtr(fewer, of, 0.5))
    return min(1.0, 2 * one_sided)


def too_few(could_fall: int, items: int) -> int | None:
    """How many items it takes before a loss could be seen against chance; None where there
    are enough, or nothing to lose.

    `could_fall` of the `items` could do worse: of right and wrong answers those that
    the original model has right.
    """
    if not 0 < could_fall < FEWEST_SIGNS:
        return None
    return math.ceil(FEWEST_SIGNS * items / could_fall)


def student_p_value(difference: float, error: float, degrees: float) -> float:
    """How likely a difference is as large by chance: two-sided, Student's t of so many
    degrees of freedom.

    `error` is its standard error, estimated with those degrees; without any, or without
    an error, it is nan.
    """
    if not (degrees > 0 and error >= 0):
        return math.nan
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    t = abs(difference) / error
    one_sided = float(stdtr(degrees, -t))
    return 2 * one_sided


@cache
def student_quantile(degrees: float, level: float = LEVEL) -> float:
    """How many errors an interval at `level` reaches to either side of its middle; inf
    without a degree of freedom.
    """
    if not degrees > 0:
        return math.inf
    below = (1 + level) / 2
    return float(stdtrit(degrees, below))


# --- estimates with their errors
# --------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A value with its standard error, which was estimated with so many degrees of
    freedom.
    """

    value: float
    error: float
    degrees: float

    def ends(self, level: float = LEVEL) -> tuple[float, float]:
        """Of its interval, by Student's t; infinitely far where there are too few items
        for an error.
        """
        errors = student_quantile(self.degrees, level)
        reach = errors * self.error
        if math.isnan(reach):
            reach = math.inf
        return self.value - reach, self.value + reach

    def less(self, other: "Estimate") -> "Estimate":
        """The difference of two independent estimates (Welch 1947); the error is too
        large where both rise together.
        """
        return combined([(1.0, self), (-1.0, other)])


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The weighted sum of independent estimates, with the degrees of freedom of Welch
    and Satterthwaite (1946).

    Without an error, where one of them has none.
    """
    value = sum(weight * one.value for weight, one in parts)
    squares = [(weight * one.error) ** 2 for weight, one in parts]
    degrees_of = [one.degrees for _, one in parts]
    fewest = min(degrees_of)
    total = sum(squares)
    if not math.isfinite(total) or fewest <= 0:
        return Estimate(value, math.nan, 0)
    pairs = zip(squares, degrees_of)
    spread = sum(square**2 / of for square, of in pairs)
    degrees = total**2 / spread if spread else fewest
    return Estimate(value, math.sqrt(total), degrees)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], documents: Documents = None
) -> Estimate:
    """The mean of ours less theirs on the same items.

    Of right and wrong answers (1 and 0) the error counts half an item more in each of
    the four cells, so that where both agree on all it is not 0. Source: Agresti and Min
    2005, Statistics in Medicine 24, 729.
    """
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    mean, error = mean_and_error(differences, documents)
    count = len(summed(differences, documents))
    are_answers = documents is None and are_right_or_wrong(ours, theirs)
    if are_answers and count > 1:
        total = count + 2
        differ = sum(map(abs, differences)) + 1
        shift = math.fsum(differences) / total
        variance = max(0.0, differ / total - shift**2)
        error = math.sqrt(variance / total)
    return Estimate(mean, error, count - 1)


def of_rounds(found: Quartiles) -> Estimate:
    """A median of timed rounds. Its error is from the quartiles, which count for about
    half of the rounds.

    A simulation in the tests has the rates: at 5 rounds and more an interval's end
    misses in 2 to 3.5 % of cases.
    """
    degrees = (found.n - 1) / 2
    return Estimate(found.median, found.error, degrees)


def of_ranks(correlation: float, count: int) -> Estimate:
    """A rank correlation of so many pairs: its interval has 0 where a shuffle is as far
    from 0 in 5 % of cases.

    By Student's t, which holds from six pairs on. Source: Kendall and Gibbons 1990,
    Rank Correlation Methods, 4.
    """
    degrees = count - 2
    if degrees < 1:
        return Estimate(correlation, math.nan, 0)
    reach = student_quantile(degrees)
    length = math.sqrt(degrees + reach**2)
    farthest = reach / length
    return Estimate(correlation, farthest / reach, degrees)


def are_right_or_wrong(*columns: Sequence[float]) -> bool:
    """Whether all values are 1 or 0."""
    return all(value in (0, 1) for values in columns for value in values)
