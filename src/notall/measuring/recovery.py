"""How much of the original model's score a plan keeps: a ratio, and its interval."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from .statistics import (
    FEWEST_SIGNS,
    LEVEL,
    Documents,
    are_right_or_wrong,
    student_quantile,
    summed,
)

Floats = NDArray[np.float64]
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)
FEW_SCORES = 12  # scores from which a skew can be estimated


def recovery_interval(
    ours: Sequence[float], theirs: Sequence[float], documents: Documents = None
) -> tuple[float, float, float]:
    """The mean of `ours` over that of `theirs`, on the same items, and the ends of its
    interval at the level 0.95.

    The interval has every ratio that a test does not reject. Right and wrong answers (1
    and 0) have the score test of Tang, Tang and Chan 2003 (Statistics in Medicine 22,
    1217), other scores Student's t, corrected for their skew. Of few scores, or few
    that differ, the skew is unknown: they are tested as if each was all or nothing,
    which is wider. An interval ends at infinity where `theirs` may have no mean above
    zero; then the ratio may be nan.
    """
    mine = np.array(summed(ours, documents), dtype=np.float64)  # (documents,)
    base = np.array(summed(theirs, documents), dtype=np.float64)
    count = len(base)
    if not base.sum() > 0:
        return math.nan, 0.0, math.inf
    ratio = float(mine.sum() / base.sum())
    if count < 2:
        return ratio, 0.0, math.inf
    are_answers = documents is None and are_right_or_wrong(ours, theirs)
    least_score = min(mine.min(), base.min())
    differ = int((mine != base).sum())
    has_no_skew = count < FEW_SCORES or differ < FEWEST_SIGNS
    is_whole = are_answers or (least_score >= 0 and has_no_skew)

    def evidence(least: float) -> float:
        """For a ratio above `least`: how far the test is beyond its threshold, on
        either side.
        """
        if is_whole:
            return _score(mine, base, least) / NORMAL
        beyond = mine - least * base  # (documents,)
        threshold = student_quantile((count - 1) / 2)
        return _skewed_t(beyond) / threshold

    def above_low(least: float) -> float:
        return evidence(least) - 1

    def above_high(least: float) -> float:
        return evidence(least) + 1

    low = _crossing(above_low, 0.0, ratio or 1.0)
    high = _crossing(above_high, ratio, 2 * ratio or 1.0)
    return ratio, low, high


def _score(ours: Floats, theirs: Floats, ratio: float) -> float:
    """The standardised score for a larger ratio than this, from how much both have, was
    lost and was gained.

    Below zero with a continuity correction, as the few losses have the long tail there.
    Values are shares of the most.
    """
    most = max(ours.max(), theirs.max())
    change = (ours - theirs) / most
    shared = np.minimum(ours, theirs)
    both = shared.sum() / most
    lost = -change[change < 0].sum()
    gained = change[change > 0].sum()
    ours_in_all = both + gained
    theirs_in_all = both + lost
    count = theirs_in_all + gained

    # The likeliest share that is lost at this ratio is the larger root.
    a = count * (1 + ratio)
    b = theirs_in_all * ratio**2 - (ours_in_all + 2 * lost)
    c = lost * (1 - ratio)
    discriminant = max(0.0, b * b - 4 * a * c)
    likeliest_lost = (math.sqrt(discriminant) - b) / (2 * a)

    variance = count * ((1 + ratio) * likeliest_lost + ratio - 1)
    more = ours_in_all - ratio * theirs_in_all
    if more < 0:
        more = min(0.0, more + 0.5)
    if variance > 1e-12 * count:
        return float(more / math.sqrt(variance))
    is_none = abs(more) <= 1e-9 * count
    return 0.0 if is_none else math.copysign(math.inf, more)


def _skewed_t(values: Floats) -> float:
    """Student's t of the mean, corrected for the values' skew. Source: Hall 1992, J. R.
    Statist. Soc. B 54, 221.
    """
    n = len(values)
    mean = float(values.mean())
    apart = values - mean
    variance = (apart**2).mean()
    spread = float(np.sqrt(variance))
    if spread <= 1e-12 * abs(mean):
        return math.copysign(math.inf, mean) if mean else 0.0
    third_moment = float((apart**3).mean())
    biased_skew = third_moment / spread**3
    unbiasing = math.sqrt(n * (n - 1))
    skew = biased_skew * unbiasing / (n - 2)
    deviation = spread * math.sqrt(n / (n - 1))
    t = mean / deviation
    quadratic = skew * t**2 / 3
    cubic = skew**2 * t**3 / 27
    corrected = t + quadratic + cubic + skew / (6 * n)
    return math.sqrt(n) * corrected


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses zero, from `low` on; looked for beyond `high`
    too, and inf where it does not.
    """
    while falling(high) > 0:
        low = high
        high = 2 * high
        if high > 1e9:
            return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
