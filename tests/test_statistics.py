"""Errors, tests and intervals against scipy, and by hand where it has none."""

import math
import random

import pytest
from scipy import stats

from api import (
    Estimate,
    Quartiles,
    combined,
    mean_and_error,
    of_ranks,
    of_rounds,
    paired_difference,
    sign_flip_p_value,
    student_p_value,
    student_quantile,
    summed,
    too_few,
)

pytestmark = pytest.mark.any_transformers  # numbers alone
DEGREES = (0.5, 1, 1.5, 2, 3, 7, 15.5, 99, 1000, 14041)


@pytest.mark.parametrize("degrees", DEGREES)
def test_students_t_is_scipys(degrees):
    for t in (0, 1e-3, 0.5, 1, 1.96, 3, 8, 40):
        assert student_p_value(t, 1, degrees) == pytest.approx(
            2 * stats.t.sf(t, degrees), rel=1e-8
        )
        assert student_p_value(-t / 2, 0.5, degrees) == pytest.approx(
            2 * stats.t.sf(t, degrees), rel=1e-8
        )
    for level in (0.9, 0.95, 1 - 0.05 / 8):
        expected = stats.t.ppf((1 + level) / 2, degrees)
        assert student_quantile(degrees, level) == pytest.approx(expected, rel=1e-7)


def test_without_an_error_there_is_no_p_value_and_no_end():
    assert math.isnan(student_p_value(1.0, math.nan, 3))
    assert math.isnan(student_p_value(1.0, 0.1, 0))
    assert (student_p_value(0.0, 0.0, 3), student_p_value(1.0, 0.0, 3)) == (1, 0)
    assert Estimate(1.0, math.nan, 0).ends() == (-math.inf, math.inf)
    assert Estimate(1.0, 0.1, 0).ends() == (-math.inf, math.inf)
    assert combined(
        [(1.0, Estimate(2.0, 0.1, 5)), (1.0, Estimate(1.0, math.nan, 0))]
    ).ends() == (-math.inf, math.inf)
    assert (
        Estimate(math.inf, 0.0, 5).less(Estimate(math.inf, 0.0, 5)).ends()[0] != 0
    )  # no crash


def test_right_and_wrong_answers_have_mcnemars_exact_test():
    for gained, lost in ((0, 5), (6, 0), (3, 9), (9, 3), (40, 71), (0, 0)):
        differences = [1.0] * gained + [-1.0] * lost + [0.0] * 7
        expected = (
            stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        )
        assert sign_flip_p_value(differences) == pytest.approx(expected)


def test_other_differences_have_all_their_signs_flipped():
    draw = random.Random(0)
    for n in (3, 8, 12):
        values = [draw.gauss(0.4, 1) for _ in range(n)]
        expected = stats.permutation_test(
            (values,),
            lambda x, axis: x.sum(axis),
            permutation_type="samples",
            n_resamples=2**n,
            vectorized=True,
        )
        assert sign_flip_p_value(values) == pytest.approx(expected.pvalue)


def test_of_many_differences_a_normal_distribution_is_as_good():
    draw = random.Random(0)
    for shift in (0.0, 0.3, 0.6):
        values = [draw.gauss(shift, 1) for _ in range(40)]
        expected = stats.ttest_1samp(values, 0).pvalue
        assert sign_flip_p_value(values) == pytest.approx(expected, abs=0.01)
    assert math.isnan(sign_flip_p_value([1.0, math.inf]))


def test_items_of_one_document_are_flipped_together():
    values, documents = [0.3, 0.1, -0.2, 0.5, 0.4, 0.1], "aabbcc"
    assert summed(values, documents) == pytest.approx([0.4, 0.3, 0.5])
    assert (
        sign_flip_p_value(values, documents)
        == sign_flip_p_value(summed(values, documents))
        == 2 / 8
    )


def test_the_error_over_documents_is_cluster_robust():
    values = [0.3, 0.1, 0.7, -0.2, 0.4]
    assert mean_and_error(values, range(5)) == pytest.approx(mean_and_error(values))
    # Three items each of two documents, 1 and 3: as if there were two values.
    twice = mean_and_error([1, 1, 1, 3, 3, 3], [4, 4, 4, 9, 9, 9])
    assert twice == pytest.approx(mean_and_error([1, 3]))
    assert math.isnan(mean_and_error([1, 2, 3], [0, 0, 0])[1])


@pytest.mark.parametrize(
    ("could_fall", "items", "needed"),
    [(5, 5, 6), (4, 8, 12), (1, 8, 48), (6, 8, None), (0, 8, None)],
)
def test_fewer_than_six_that_could_fall_are_too_few(could_fall, items, needed):
    assert too_few(could_fall, items) == needed
    if needed:  # the farthest outcome of what there is, and of what would do
        assert sign_flip_p_value([-1.0] * could_fall) >= 0.05
        assert sign_flip_p_value([-1.0] * round(could_fall * needed / items)) < 0.05


def test_a_difference_of_independent_estimates_is_welchs():
    draw = random.Random(0)
    one, other = (
        [draw.gauss(1, 1) for _ in range(6)],
        [draw.gauss(0, 3) for _ in range(11)],
    )
    ours, theirs = (
        Estimate(*mean_and_error(some), len(some) - 1) for some in (one, other)
    )
    less = ours.less(theirs)
    found = stats.ttest_ind(one, other, equal_var=False)
    assert student_p_value(*less) == pytest.approx(found.pvalue)
    assert less.ends() == pytest.approx(tuple(found.confidence_interval(0.95)))
    assert combined([(2.0, ours)]) == pytest.approx(
        (2 * ours.value, 2 * ours.error, ours.degrees)
    )


def test_agreement_on_all_has_an_error_too():
    """Agresti and Min's: half an item more in each of the four cells."""
    same = paired_difference([1.0] * 30, [1.0] * 30)
    assert same == pytest.approx((0, math.sqrt(1 / 32 / 32), 29))
    few = paired_difference([1.0, 0.0, 0.0, 1.0] * 10, [1.0, 1.0, 0.0, 1.0] * 10)
    apart, shift = 11 / 42, 10 / 42
    assert few == pytest.approx((-0.25, math.sqrt((apart - shift**2) / 42), 39))
    shares = [0.1, 0.4, 0.9]
    assert paired_difference(shares, [0.2, 0.2, 0.2]) == pytest.approx(
        (*mean_and_error([-0.1, 0.2, 0.7]), 2)
    )


def test_ranks_are_tested_as_scipy_does():
    draw = random.Random(0)
    for n in (6, 12, 29):
        values = [draw.gauss(0.1 * place, 1) for place in range(n)]
        found = stats.spearmanr(range(n), values)
        low, high = of_ranks(float(found.statistic), n).ends()
        assert (found.pvalue < 0.05) == (low > 0 or high < 0)
        critical = (high - low) / 2
        t = critical * math.sqrt((n - 2) / (1 - critical**2))
        assert 2 * stats.t.sf(t, n - 2) == pytest.approx(0.05)
    assert of_ranks(1.0, 2).ends() == (-math.inf, math.inf)


def test_rounds_have_half_as_many_degrees():
    found = of_rounds(Quartiles(median=1.2, low=1.19, high=1.22, n=9))
    assert found == pytest.approx((1.2, 0.93 * 0.03 / 3, 4))
