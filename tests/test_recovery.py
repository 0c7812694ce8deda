"""Recovery: the share of the original model's score that is kept, and whether its interval says so."""

import math
import random

import pytest

from api import Recovery, recovery_interval


def of(ours, theirs):
    return Recovery.of(recovery_interval(ours, theirs), len(ours))


def pairs(draw, items, dense, share):
    """Right and wrong answers to items: the original model's, and those of a plan that keeps `share` of its score."""
    gained = 0.1
    kept = share - (1 - dense) * gained / dense
    theirs = [float(draw.random() < dense) for _ in range(items)]
    return [float(draw.random() < (kept if right else gained)) for right in theirs], theirs


@pytest.mark.parametrize(("items", "dense"), [(30, 0.6), (60, 0.3), (100, 0.9), (300, 0.6)])
@pytest.mark.parametrize("share", [0.95, 0.8])
def test_the_interval_holds_the_share_at_its_level(items, dense, share):
    draw, tries = random.Random(0), 1000
    found = [of(*pairs(draw, items, dense, share)) for _ in range(tries)]
    held = sum(one.low <= share <= one.high for one in found) / tries
    assert held > 0.95 - 3 * math.sqrt(0.05 * 0.95 / tries)
    # At the very share that is asked for, it is by chance alone that a plan is called kept, or lost.
    for verdict in ("kept", "lost"):
        assert sum(one.is_kept(share) == verdict for one in found) / tries < 0.065


def test_other_values_have_an_interval_that_holds():
    draw, tries, held = random.Random(0), 1000, 0
    for _ in range(tries):
        theirs = [0.5 + draw.random() / 2 for _ in range(12)]
        one = of([value * (0.9 + draw.gauss(0, 0.1)) for value in theirs], theirs)
        held += one.low <= 0.9 <= one.high
    assert abs(held / tries - 0.95) < 3 * math.sqrt(0.05 * 0.95 / tries) + 0.005


def test_bonett_and_price_by_hand():
    """13 of 15 found where the original model finds all: their formula, written out."""
    n11, n10, n01 = 13, 2, 0
    n = n11 + n10 + n01
    a = math.sqrt((n10 + n01 + 2) / ((n11 + n01 + 1) * (n11 + n10 + 1)))
    b = math.sqrt((1 - (n11 + n01 + 1) / (n + 2)) / (n11 + n01 + 1))
    c = math.sqrt((1 - (n11 + n10 + 1) / (n + 2)) / (n11 + n10 + 1))
    k = 1.959964 * a / (b + c)

    def wilson(x):
        root = k * math.sqrt(k**2 + 4 * x * (1 - x / n))
        return (2 * x + k**2 - root) / (2 * (n + k**2)), (2 * x + k**2 + root) / (2 * (n + k**2))

    (low, high), (base_low, base_high) = wilson(13), wilson(15)
    found = of([1.0] * 13 + [0.0] * 2, [1.0] * 15)
    assert (found.share, found.low, found.high) == pytest.approx((13 / 15, low / base_high, high / base_low), rel=1e-5)


def test_an_interval_that_reaches_below_is_never_kept():
    draw = random.Random(1)
    for _ in range(500):
        found = of(*pairs(draw, draw.randint(2, 80), draw.uniform(0.3, 1), draw.uniform(0.7, 1)))
        for least in (0.8, 0.95, 1.0):
            assert (found.is_kept(least) == "kept") == (found.low >= least)
            assert (found.is_kept(least) == "lost") == (found.high < least)


def test_agreement_on_few_items_tells_nothing_and_on_many_it_does():
    assert of([1.0] * 15, [1.0] * 15).is_kept() == "inconclusive"
    assert of([1.0] * 15, [1.0] * 15).items_to_tell() > 15
    assert of([1.0] * 37, [1.0] * 37).is_kept() == "inconclusive"  # as docs/evaluating.md has it
    assert of([1.0] * 38, [1.0] * 38).is_kept() == "kept"


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
    assert of([0.5, 0.9], [0.1, 0.9]) is None  # Fieller's interval has no end
