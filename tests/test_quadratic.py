"""The quadratic criterion: what it measures against plain hooks, and what it solves
against all subsets.
"""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from api import (
    Budget,
    Evaluator,
    QuadraticProgram,
    Setting,
    Space,
    by_count,
    by_footprint,
    by_limit,
    choose,
    kl,
    nll,
    quadratic_measure as measure,
)
from families import family, silenced
from notall import UsageError, locate

pytestmark = pytest.mark.any_transformers  # it is about sets of sublayers

LAYERS = 5
BATCHES = list((torch.arange(8 * 9).view(8, 9) * 7 % 90 + 3).split(2))
SCREENED = BATCHES[0]  # a quarter


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def slow_rise(model):
    """What the NLL rises by without these sublayers: one sequence after the other, on
    the plain model with hooks.
    """
    known = {}

    @torch.no_grad()
    def cost(names):
        if names not in known:
            plan = Space(locate(model)).plan(names)
            with silenced(model, family("llama"), plan.attention, plan.mlp):
                losses = [
                    cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:])
                    for ids in SCREENED
                ]
            known[names] = float(sum(losses)) / len(losses)
        return known[names]

    return lambda *units: cost(frozenset(sum(units, ()))) - cost(frozenset())


def slow_sum(rise, units):
    """The rises without each of these units, and what those without two of them are
    above their sum.
    """
    more = [
        rise(one, other) - rise(one) - rise(other)
        for one, other in combinations(units, 2)
    ]
    return sum(rise(unit) for unit in units) + sum(max(each, 0.0) for each in more)


def cost_of(program, chosen):
    """What these cost, by their numbers."""
    return float(
        program.alone[[*chosen]].sum()
        + program.together[np.ix_(chosen, chosen)].sum() / 2
    )


def setting(model, kind="sublayer", **others):
    space = Space(
        locate(model),
        "sublayer" if kind == "portable" else kind,
        portable=kind == "portable",
    )
    return Setting(model, space, BATCHES, Evaluator(model, nll(BATCHES)), **others)


def disjoint(units):
    return len({name for unit in units for name in unit}) == sum(map(len, units))


@pytest.mark.parametrize("kind", ["attention", "block", "sublayer", "portable"])
def test_effects_are_what_skipping_one_and_two_does(model, slow_rise, kind):
    asked = setting(model, kind)
    units = asked.space.moves(frozenset())
    program = measure(asked, units)
    assert program.alone == pytest.approx([slow_rise(unit) for unit in units], abs=1e-5)
    for i, j in combinations(range(len(units)), 2):
        pair = units[i], units[j]
        assert cost_of(program, (i, j)) == pytest.approx(
            slow_sum(slow_rise, pair) if disjoint(pair) else math.inf, abs=1e-5
        )
        assert program.together[i, j] == program.together[j, i] >= 0
    off = program.together[np.isfinite(program.together)]
    assert (
        0 < (off > 1e-3).sum() < len(off) - len(units)
    )  # both of two that lose more together and of two that don't


def test_two_that_leave_no_attention_exclude_each_other():
    two = family("llama").build(num_hidden_layers=2)
    assert math.isinf(
        measure(setting(two, "attention"), [("attn.0",), ("attn.1",)]).together[0, 1]
    )
    chosen = choose("quadratic", setting(two), by_count(Space(locate(two)), 3)).skipped
    assert chosen in ({"attn.0", "mlp.0", "mlp.1"}, {"attn.1", "mlp.0", "mlp.1"})


def best_of_all(program, sizes, least, most):
    numbers = range(len(sizes))
    subsets = [chosen for count in numbers for chosen in combinations(numbers, count)]
    sums = {chosen: sizes[[*chosen]].sum() for chosen in subsets}
    fit = [chosen for chosen in subsets if least <= sums[chosen] <= most]
    fit = [
        chosen for chosen in fit if program.limited[[*chosen]].sum() <= program.limit
    ]
    return min((cost_of(program, chosen) for chosen in fit), default=math.inf)


@pytest.mark.parametrize("seed", range(12))
def test_the_solver_finds_the_best_of_all_subsets(seed):
    """Of costs of either sign, by number or by weight, where some exclude each other
    and some are limited.
    """
    draw = np.random.default_rng(seed)
    together = np.triu(
        np.where(draw.random((10, 10)) < 0.15, np.inf, draw.normal(size=(10, 10))), 1
    )
    program = QuadraticProgram(
        draw.normal(size=10),
        together + together.T,
        draw.integers(0, 2, 10).astype(float),
        2,
    )
    sizes, least, most = (
        (np.ones(10), 4, 4) if seed % 2 else (draw.random(10) + 0.1, 1.6, 2.1)
    )
    found = program.solve(sizes, least, most)
    assert found is not None
    assert cost_of(program, found) == pytest.approx(
        best_of_all(program, sizes, least, most)
    )
    assert least - 1e-6 <= sizes[[*found]].sum() <= most + 1e-6
    assert program.limited[[*found]].sum() <= 2


def test_the_solver_says_what_there_is_none_of_and_what_takes_too_long():
    excluding = np.where(np.eye(3), 0, np.inf)
    program = QuadraticProgram(np.array([2.0, 1.0, 3.0]), excluding, np.ones(3), 3)
    assert program.solve(np.ones(3), 1, 1) == (1,)
    assert program.solve(np.ones(3), 2, 2) is None
    draw = np.random.default_rng(0)
    wild = np.triu(draw.normal(size=(40, 40)), 1)
    with pytest.raises(UsageError, match="no set was found in 0 s: choose among fewer"):
        QuadraticProgram(draw.normal(size=40), wild + wild.T, np.ones(40), 40).solve(
            np.ones(40), 20, 20, seconds=0
        )


@pytest.mark.slow
def test_thirty_of_sixty_are_found_in_seconds_and_always_alike():
    """As many as the sublayers of 30 layers; what two lose together is of the size of
    what each loses.
    """
    draw = np.random.default_rng(0)
    alone = np.exp(1.2 * draw.normal(size=60))
    together = np.triu(np.sqrt(np.outer(alone, alone)) * draw.random((60, 60)), 1)
    program = QuadraticProgram(alone, together + together.T, np.ones(60), 60)
    found = program.solve(np.ones(60), 30, 30, seconds=20)
    assert found == program.solve(np.ones(60), 30, 30, seconds=20)
    rest = [i for i in range(60) if i not in found]
    swapped = [tuple({*found} - {back} | {into}) for back in found for into in rest]
    assert len(found) == 30
    assert cost_of(program, found) < min(cost_of(program, other) for other in swapped)


@pytest.mark.parametrize(
    ("kind", "count"),
    [("attention", 2), ("mlp", 1), ("block", 2), ("sublayer", 3), ("portable", 4)],
)
def test_the_set_is_the_best_of_all_by_the_slow_sum(model, slow_rise, kind, count):
    asked = setting(model, kind)
    units = asked.space.moves(frozenset())
    chosen = choose("quadratic", asked, by_count(asked.space, count))
    sets = filter(
        disjoint,
        combinations(units, count // len(units[0]) if kind == "portable" else count),
    )
    sums = {units: slow_sum(slow_rise, units) for units in sets}
    assert sums[chosen.order] == pytest.approx(min(sums.values()), abs=1e-5)
    assert chosen.skipped == {name for unit in chosen.order for name in unit}
    assert len(chosen.skipped) == (2 * count if kind == "block" else count)


@pytest.mark.parametrize("resource", ["params", "kv_bytes_per_token"])
def test_the_set_saves_what_is_asked_for_and_at_most_one_more(
    model, slow_rise, resource
):
    asked = setting(model)
    budget = by_footprint(model, asked.space, resource, 0.35)
    sizes = budget.saves.values()
    chosen = choose("quadratic", asked, budget)
    assert budget.met(chosen.skipped)
    assert budget.saved(chosen.skipped) <= budget.target + max(sizes)
    assert all(
        budget.saves[name] for name in chosen.skipped
    )  # what saves nothing stays
    units = [unit for unit in asked.space.units if budget.saved(unit)]
    subsets = [
        one for count in range(1, len(units)) for one in combinations(units, count)
    ]
    fit = [
        one
        for one in subsets
        if budget.target <= sum(map(budget.saved, one)) <= budget.target + max(sizes)
    ]
    if resource == "kv_bytes_per_token":
        fit = [one for one in fit if len(one) == len(chosen.order)]
    assert slow_sum(slow_rise, chosen.order) == pytest.approx(
        min(slow_sum(slow_rise, one) for one in fit), abs=1e-5
    )


def test_even_where_all_that_is_skipped_is_a_gain_no_more_is_than_asked_for(
    model, monkeypatch
):
    asked = setting(model)
    monkeypatch.setattr(
        asked.evaluator,
        "costs",
        lambda sets, share=1.0: [-float(len(names)) for names in sets],
    )
    saves = {
        name: 1.0 if name.startswith("attn") else 2.3 for name in asked.space.names
    }
    assert (
        4
        <= Budget(saves, 4, "4").saved(
            choose("quadratic", asked, Budget(saves, 4, "4")).skipped
        )
        <= 4 + 2.3
    )
    assert len(choose("quadratic", asked, by_count(asked.space, 3)).skipped) == 3


def test_a_limit_is_kept_by_the_last_set_within_it(model):
    asked = replace(setting(model), evaluator=Evaluator(model, kl(BATCHES)))
    chosen = choose("quadratic", asked, by_limit(asked.space, 0.3)).skipped
    one_more = choose(
        "quadratic", asked, by_count(asked.space, len(chosen) + 1)
    ).skipped
    assert len(chosen) > 1
    assert asked.evaluator.cost(chosen) <= 0.3 < asked.evaluator.cost(one_more)
    assert choose("quadratic", asked, by_limit(asked.space, 0.0)).skipped == frozenset()


def test_late_it_chooses_by_the_units_alone(model, slow_rise):
    late = setting(model, deadline=-math.inf)
    chosen = choose("quadratic", late, by_count(late.space, 3))
    assert set(chosen.order) == set(sorted(late.space.units, key=slow_rise)[:3])
    assert late.evaluator.spent.evaluations == 1 + len(late.space.units)


def test_what_overflows_is_not_chosen(model, monkeypatch):
    asked = setting(model)
    costs = asked.evaluator.costs
    worse = [("mlp.1",), ("attn.0", "attn.2")]

    def overflowing(sets, share=1.0):
        found = zip(sets, costs(sets, share))
        return [
            math.inf if any(names.issuperset(one) for one in worse) else cost
            for names, cost in found
        ]

    monkeypatch.setattr(asked.evaluator, "costs", overflowing)
    chosen = choose("quadratic", asked, by_count(asked.space, 8)).skipped
    assert len(chosen) == 8
    assert not any(chosen.issuperset(one) for one in worse)


def test_nothing_to_save_is_nothing_skipped_and_too_much_is_refused(model):
    asked = setting(model, "attention")
    assert choose("quadratic", asked, by_count(asked.space, 0)).skipped == frozenset()
    assert asked.evaluator.spent.evaluations == 0
    with pytest.raises(
        UsageError,
        match="no set of the quadratic criterion saves so much: ask for less",
    ):
        choose(
            "quadratic",
            asked,
            Budget(by_count(asked.space, 1).saves, LAYERS, "so much"),
        )
    only = setting(family("llama").build(num_hidden_layers=1), "attention")
    with pytest.raises(UsageError, match="saves so much: ask for less"):
        choose("quadratic", only, Budget({"attn.0": 1.0}, 1, "so much"))
