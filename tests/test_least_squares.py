"""Ridge regression from sums and from tokens, against each other and against one
stacked least-squares problem.
"""

from __future__ import annotations

import math

import pytest
import torch

from api import DEAD, Moments, Rows, sums_for

pytestmark = pytest.mark.any_transformers  # it is arithmetic

METRIC = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)


def seen(
    tokens: int, features: int = 7, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Two batches; a feature is always 0, and another is massive."""
    draw = torch.Generator().manual_seed(seed)
    z, r = (
        torch.randn(tokens, wide, generator=draw, dtype=torch.float64)
        for wide in (features, len(METRIC))
    )
    z[:, 2], z[:, 3] = 0, 100 * z[:, 3]
    weights = torch.rand(tokens, generator=draw, dtype=torch.float64) + 0.1
    return list(zip(z.split(3), r.split(3), weights.split(3)))


def both(rows, biased):
    few, sums = (
        Rows(biased),
        Moments.none(7, len(METRIC), biased, torch.empty(0, dtype=torch.float64)),
    )
    for row in rows:
        few.add(*row)
        sums.add(*row)
    return few, sums


def stacked(rows, ridge, biased, alike):
    """Each token is an equation, and so is each feature that is held back."""
    z, r, weights = (torch.cat(parts) for parts in zip(*rows))
    roots = weights.sqrt()[:, None]
    sizes = (z * roots).square().sum(0)
    held_back = (
        torch.full_like(sizes, ridge)
        if alike
        else ridge * (sizes + DEAD * sizes.mean())
    )
    below = held_back.sqrt().diag()
    if biased:
        z, below = (
            torch.cat([z, torch.ones_like(roots)], 1),
            torch.cat([below, torch.zeros(len(below), 1)], 1),
        )
    aims = torch.cat([r * roots, torch.zeros(len(below), r.shape[1])])
    return torch.linalg.lstsq(torch.cat([z * roots, below]), aims).solution.T


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("ridge", [1e-3, 0.3, 10.0])
def test_both_are_one_stacked_problem(ridge, tokens, biased, alike):
    rows, others = seen(tokens), seen(6, seed=1)
    expected = stacked(rows, ridge, biased, alike)
    z, r, weights = (torch.cat(parts) for parts in zip(*others))
    known = torch.cat([z, torch.ones(len(z), 1)], 1) if biased else z
    squares = [
        (miss.square() * weights[:, None]).sum(0) @ METRIC
        for miss in (r - known @ expected.T, r)
    ]
    for each, held in zip(both(rows, biased), both(others, biased)):
        found = each.solve(ridge, alike=alike)
        scale = torch.cat(
            [z.abs().amax(0).clamp_min(1), torch.ones(int(biased))]
        )  # a massive feature's share is small
        torch.testing.assert_close(
            found * scale, expected * scale, rtol=1e-5, atol=1e-6
        )
        assert held.left(found, METRIC) == pytest.approx(
            float(squares[0] / squares[1]), rel=1e-5
        )
        together = (each + held).solve(ridge, alike=alike)
        expected_of_all = stacked(rows + others, ridge, biased, alike)
        torch.testing.assert_close(
            together * scale, expected_of_all * scale, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("biased", [False, True])
def test_an_endless_ridge_is_no_change_but_of_the_bias(biased):
    for each in both(seen(5), biased):
        found = each.solve(math.inf)
        assert found is None or not found[:, :7].any()


def test_no_ridge_on_few_tokens_leaves_it_open():
    assert all(each.solve(0.0) is None for each in both(seen(5), False))


def test_of_few_tokens_the_tokens_are_kept():
    like = torch.empty(0)
    assert isinstance(sums_for(6, 7, 3, False, like), Rows)
    assert isinstance(sums_for(7, 7, 3, False, like), Moments)


def test_a_second_ridge_and_more_tokens_are_no_other_problem():
    rows = seen(5)
    (few, _), more = both(rows, True), seen(3, seed=1)
    for ridge, alike in ((0.3, False), (3.0, False), (3.0, True)):
        torch.testing.assert_close(
            few.solve(ridge, alike=alike),
            stacked(rows, ridge, True, alike),
            rtol=1e-5,
            atol=1e-6,
        )
    few.add(*more[0])
    torch.testing.assert_close(
        few.solve(0.3), stacked(rows + more, 0.3, True, False), rtol=1e-5, atol=1e-6
    )
