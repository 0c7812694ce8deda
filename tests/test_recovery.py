"""Recovery: the share of the original model's score that is kept, and whether its
interval says so.
"""

import math
import random

import pytest

from api import Recovery, checks, recovery_interval


def of(ours, theirs):
    return Recovery.of(recovery_interval(ours, theirs), len(ours))


def pairs(draw, items, dense, share):
    """Right and wrong answers to items: the original model's, and those of a plan that
    keeps `share` of its score.
    """
    gained = 0.1
    kept = share - (1 - dense) * gained / dense
    theirs = [float(draw.random() < dense) for _ in range(items)]
    return [
        float(draw.random() < (kept if right else gained)) for right in theirs
    ], theirs


def score(both, lost, gained, ratio):
    """Tang, Tang and Chan's score, with the likeliest share that is lost by search and
    not by a formula.
    """
    count = both + lost + gained

    def likelihood(share):
        shares = (
            (1 - share * (1 + ratio)) / ratio,
            share,
            (share - (1 - ratio)) / ratio,
        )
        if any(
            one < 0 or (not one and seen)
            for one, seen in zip(shares, (both, lost, gained))
        ):
            return -math.inf
        return sum(
            seen * math.log(one)
            for one, seen in zip(shares, (both, lost, gained))
            if seen
        )

    steps = 100_000
    share = max((likelihood(step / steps), step / steps) for step in range(steps + 1))[
        1
    ]
    more = both + gained - ratio * (both + lost)
    return more / math.sqrt(count * ((1 + ratio) * share + ratio - 1))


@pytest.mark.parametrize(
    ("both", "lost", "gained"), [(50, 10, 3), (37, 3, 0), (12, 4, 4)]
)
def test_an_interval_of_answers_ends_where_the_score_test_does(both, lost, gained):
    theirs = [1.0] * (both + lost) + [0.0] * (gained + 5)
    ours = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * 5
    share, low, high = recovery_interval(ours, theirs)
    assert share == pytest.approx((both + gained) / (both + lost))
    assert score(both, lost, gained, low) == pytest.approx(1.959964, abs=2e-3)
    if high <= 1:  # with half an answer as correction
        assert score(both, lost, gained, high) < -1.959964


def test_an_interval_of_equal_answers_is_that_of_a_share():
    """All that the original model has right and nothing else: Wilson's lower end."""
    _, low, _ = recovery_interval([1.0] * 50, [1.0] * 50)
    assert low == pytest.approx(50 / (50 + 1.959964**2), rel=1e-5)


def test_an_interval_of_scores_ends_where_hall_s_test_does():
    from scipy.stats import skew, t

    draw = random.Random(0)
    theirs = [draw.uniform(0.5, 1) for _ in range(30)]
    ours = [one * draw.betavariate(9, 1) for one in theirs]
    _, *ends = recovery_interval(ours, theirs)
    for end, side in zip(ends, (1, -1)):
        apart = [one - end * other for one, other in zip(ours, theirs)]
        n, mean = 30, sum(apart) / 30
        spread = math.sqrt(sum((one - mean) ** 2 for one in apart) / (n - 1))
        w, g = mean / spread, skew(apart, bias=False)
        corrected = math.sqrt(n) * (w + g * w**2 / 3 + g**2 * w**3 / 27 + g / (6 * n))
        assert corrected == pytest.approx(side * t.ppf(0.975, 14.5), rel=1e-5)


def test_items_of_one_document_count_as_one():
    draw = random.Random(0)
    theirs = [float(draw.random() < 0.7) for _ in range(40)]
    ours = [one * (draw.random() < 0.8) for one in theirs]
    alone = recovery_interval(ours, theirs)
    copied = recovery_interval(ours * 4, theirs * 4, [*range(40)] * 4)
    assert copied[0] == pytest.approx(alone[0])
    assert copied[2] - copied[1] > 0.9 * (alone[2] - alone[1])
    assert recovery_interval(ours * 4, theirs * 4)[1] > copied[1]


def test_an_interval_that_reaches_below_is_never_kept():
    draw = random.Random(1)
    for _ in range(500):
        found = of(
            *pairs(
                draw, draw.randint(2, 80), draw.uniform(0.3, 1), draw.uniform(0.7, 1)
            )
        )
        for least in (0.8, 0.95, 1.0):
            assert (found.is_kept(least) == "kept") == (found.low >= least)
            assert (found.is_kept(least) == "lost") == (found.high < least)


def test_agreement_on_few_items_tells_nothing_and_on_many_it_does():
    assert of([1.0] * 15, [1.0] * 15).is_kept() == "inconclusive"
    assert of([1.0] * 15, [1.0] * 15).items_to_tell() == 73
    assert (
        of([1.0] * 72, [1.0] * 72).is_kept() == "inconclusive"
    )  # as docs/evaluating.md has it
    assert of([1.0] * 73, [1.0] * 73).is_kept() == "kept"


def test_the_checks_of_a_plan_have_items_enough_to_be_kept():
    assert of([1.0] * checks.ITEMS, [1.0] * checks.ITEMS).is_kept() == "kept"


def test_the_items_that_would_tell_do():
    ours, theirs = [1.0] * 17 + [0.0] * 3, [1.0] * 20
    few = of(ours, theirs)
    assert few.is_kept() == "inconclusive"
    times = math.ceil(few.items_to_tell() / 20 * 1.1)
    assert of(ours * times, theirs * times).is_kept() == "lost"
    fewer = max(1, few.items_to_tell() // 40)
    assert of(ours * fewer, theirs * fewer).is_kept() == "inconclusive"


def test_a_dense_model_that_finds_nothing_tells_nothing():
    assert of([1.0, 0.0, 0.0], [0.0, 0.0, 0.0]) is None
    assert of([1.0], [1.0]) is None
    few = of([0.5, 0.9], [0.1, 0.9])
    assert few.low < 0.5 < 2 < few.high
    apart = [0.001, 0.9, 0.002, 0.001] * 4
    assert (
        of(apart[::-1], [value - 0.2 for value in apart]) is None
    )  # the original may be at zero
