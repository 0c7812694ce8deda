"""The lazy search: what plain greedy finds, for less; it goes on when killed, and is
done when its time is up.
"""

import random
import time
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

import forked
import notall
from api import (
    Evaluator,
    SearchCost,
    Setting,
    Space,
    by_count,
    by_footprint,
    by_limit,
    choice,
    choose,
    choose_greedily,
    evaluate,
    evaluator as evaluating,
    kl,
    mix,
    names_in,
    nll,
    records_lines as lines,
    searching,
    space_plan_of as plan_of,
)
from families import family
from notall import SearchConfig, UsageError, choose_plan, locate

pytestmark = pytest.mark.any_transformers  # it is about sets of sublayers

BATCHES = list((torch.arange(8 * 9).view(8, 9) * 7 % 90 + 3).split(2))
LAYERS = 8


@pytest.fixture(scope="module")
def model():
    return family("llama").build(num_hidden_layers=LAYERS)


class Table:
    """Costs that are made up: of each sublayer, and of pairs, never negative, so that
    rises never fall.
    """

    def __init__(self, space, seed, pairs=0.0, forgiving=False):
        draw = random.Random(seed)
        self.single = {name: draw.uniform(0, 1) for name in space.order}
        names = sorted(space.order)
        self.pairs = {
            pair: pairs * draw.uniform(-1 if forgiving else 0, 1)
            for pair in combinations(names, 2)
        }
        self.asked, self.asked_of_a_part, self.spent = (
            [],
            [],
            SearchCost(evaluations=0, executions=0, seconds=0),
        )

    def set_prefix(self, base):
        pass

    def cost(self, skipped, share=1.0):
        (self.asked if share == 1.0 else self.asked_of_a_part).append(skipped)
        extra = sum(self.pairs[pair] for pair in combinations(sorted(skipped), 2))
        return (
            3.0 + sum(self.single[name] for name in sorted(skipped)) + extra
        )  # in one order, for one rounding


def asked_of(space, evaluator, late=lambda: False, **options):
    """A setting of these, which is late where `late()` says so."""
    return type("Asked", (Setting,), {"late": property(lambda _: late())})(
        None, space, [], evaluator, **options
    )


def search(space, budget, evaluator, cheap=None, **options):
    return searching.search_sets(
        asked_of(space, evaluator, **options), budget, cheap or {}
    )


@pytest.mark.parametrize("kind", ["attention", "block", "sublayer", "portable"])
@pytest.mark.parametrize("seed", range(4))
def test_where_rises_never_fall_it_takes_what_plain_greedy_takes_and_asks_less(
    model, kind, seed
):
    portable = kind == "portable"
    space = Space(locate(model), "sublayer" if portable else kind, portable=portable)
    budget = by_count(space, 4 if portable else 5)
    lazy, plain = Table(space, seed, 0.05), Table(space, seed, 0.05)
    found = search(space, budget, lazy, patience=0)
    chosen = choose_greedily(Setting(model, space, [], plain), budget)
    assert (found.skipped, found.order) == (chosen.skipped, chosen.order)
    assert len(lazy.asked) < len(plain.asked)


@pytest.mark.parametrize("seed", range(6))
def test_swaps_never_make_it_worse_and_leave_no_better_single_swap_untried(model, seed):
    space = Space(locate(model), "attention")
    budget = by_count(space, 4)
    table = Table(space, seed, 1.5, forgiving=True)
    before = search(space, budget, table, patience=0)
    after = search(space, budget, table, patience=99)
    assert table.cost(after.skipped) <= table.cost(before.skipped)
    assert len(after.skipped) == 4
    assert frozenset(name for unit in after.order for name in unit) == after.skipped
    swaps = [
        after.skipped - {back} | {name}
        for back in after.skipped
        for name in space.names
        if name not in after.skipped
    ]
    assert len(swaps) == 16
    assert (
        table.cost(after.skipped)
        <= min(table.cost(swapped) for swapped in swaps) + 1e-9
    )


def test_some_swap_is_found(model):
    space = Space(locate(model), "attention")
    costs = []
    for seed in range(20):
        table = Table(space, seed, 1.5, forgiving=True)
        found = [search(space, by_count(space, 4), table, patience=p) for p in (0, 8)]
        costs.append([table.cost(one.skipped) for one in found])
    assert any(after < before for before, after in costs)


class Rough(Table):
    """Tells on a part of the text about twice of what is true."""

    def cost(self, skipped, share=1.0):
        known = super().cost(skipped, share)
        return (
            known
            if share == 1.0
            else 2 * (known + random.Random("".join(sorted(skipped))).random())
        )


@pytest.mark.parametrize("seed", range(6))
def test_what_grows_on_a_part_of_the_text_is_refined_on_all_of_it(model, seed):
    space = Space(locate(model), "attention")
    table = Rough(space, seed, 1.5, forgiving=True)
    grown = search(space, by_count(space, 4), table, patience=0, grown_on=0.25)
    assert {*table.asked} == {frozenset(), grown.skipped}
    found = search(space, by_count(space, 4), table, patience=99, grown_on=0.25)
    assert table.cost(found.skipped) <= table.cost(grown.skipped)
    swaps = [
        found.skipped - {back} | {one}
        for back in found.skipped
        for one in {*space.names} - found.skipped
    ]
    assert table.cost(found.skipped) <= min(map(table.cost, swaps)) + 1e-9


def test_what_does_not_gain_on_the_part_that_a_set_grew_on_is_not_evaluated_on_all_of_the_text(
    model,
):
    space, gains = Space(locate(model), "attention"), 0
    for seed in range(6):
        table = Ordered(
            space, seed, 1.5, forgiving=True
        )  # which tells the same of every part
        found = search(space, by_count(space, 4), table, patience=99, grown_on=0.5)
        wholes = [
            skipped
            for skipped, share in table.calls
            if share == 1.0 and len(skipped) == 4
        ]
        costs = [Table.cost(table, skipped) for skipped in dict.fromkeys(wholes)]
        assert costs == sorted(costs, reverse=True)
        assert wholes[-1] == found.skipped
        gains += len(costs) - 1
    assert gains > 0


class Ordered(Table):
    """Notes what is asked for in its order, with the share of the text."""

    def cost(self, skipped, share=1.0):
        self.calls = [*getattr(self, "calls", []), (skipped, share)]
        return super().cost(skipped, share)


def swaps_asked(space, count, table, patience):
    """The sets that are asked for once it has grown, and how many swaps lowered the
    cost.
    """
    search(space, by_count(space, count), table, patience=0)
    grown, table.calls = table.calls, []
    search(space, by_count(space, count), table, patience=patience)
    return [call for call in table.calls[len(grown) - 1 :] if len(call[0]) == count]


def test_what_brings_nothing_ends_after_evaluations_worth_its_patience(model):
    space, table = Space(locate(model), "attention"), None
    for patience, times in (
        (1, 1),
        (2, 1),
        (3, 2),
        (8, 4),
    ):  # four swaps on a quarter, and one of them on all, are two
        table = Ordered(space, 1)  # costs that add up: no swap is worth while
        asked = swaps_asked(space, 4, table, patience)[1:]
        start = asked[0][0]
        assert (
            sum(share == 1.0 and skipped != start for skipped, share in asked) == times
        )
        assert (
            len({skipped for skipped, share in asked if share < 1 and skipped != start})
            == 4 * times
        )


def test_what_one_swap_tells_of_a_unit_orders_the_next(model):
    space = Space(locate(model), "attention")
    table = Ordered(space, 0)
    table.single = dict.fromkeys(table.single, 1.0) | {
        f"attn.{n}": 0.1 for n in range(3)
    }
    table.single |= {"attn.3": 0.3, "attn.4": 0.31}
    table.pairs["attn.3", "attn.4"] = 2.0  # nothing tells so before both are skipped
    asked = swaps_asked(space, 4, table, 1)
    start, tried = (
        asked[0][0],
        dict.fromkeys(skipped for skipped, share in asked if share < 1.0),
    )
    assert start == {f"attn.{n}" for n in range(4)}
    assert len({*tried} - {start}) == 4
    assert sum({"attn.3", "attn.4"} <= skipped for skipped in tried) == 1


@pytest.mark.parametrize("seed", range(8))
def test_of_the_swaps_tried_on_a_part_the_best_is_evaluated_on_all_of_it(model, seed):
    space = Space(locate(model), "attention")
    table = Ordered(space, seed, 1.5, forgiving=True)
    now, tried, looks, evaluated, gained = None, {}, 0, 0, False
    for skipped, share in swaps_asked(space, 4, table, 99):
        cost = Table.cost(table, skipped)
        assert share == 1.0 or not gained  # what gains on a part is not kept waiting
        gained = False
        if share < 1.0:
            now = now or skipped
            if skipped != now and skipped not in tried:
                tried[skipped], looks = cost, looks + 1
                gained = cost < Table.cost(table, now)
        elif skipped in tried:
            assert cost == min(tried.values())
            assert looks <= searching.LOOKS
            del tried[skipped]
            looks, evaluated = 0, evaluated + 1
            if cost < Table.cost(table, now):
                now, tried = skipped, {}
    assert evaluated > 2


@pytest.mark.parametrize("other", ["mlp.3", "mlp.2", "mlp.6"])
def test_what_is_no_longer_needed_without_its_neighbour_is_found(model, other):
    space = Space(locate(model))
    table = Table(space, 0)
    table.single |= dict.fromkeys(table.single, 0.5) | {"attn.3": 0.1, other: 2.0}
    table.pairs["attn.3", other] = -2.0  # it costs nothing more where attn.3 is gone
    found = search(space, by_count(space, 2), table, patience=0)
    beside = other in ("mlp.2", "mlp.3")
    assert (found.skipped == {"attn.3", other}) == beside
    assert len(found.skipped) == 2
    assert search(space, by_count(space, 2), table, patience=99).skipped == {
        "attn.3",
        other,
    }


def test_a_portable_set_is_no_worse_than_whole_blocks(model):
    space = Space(locate(model), portable=True)
    blocks = Space(locate(model), "block")
    better = 0
    for seed in range(12):
        table = Table(space, seed, 1.0, forgiving=True)
        whole = table.cost(search(blocks, by_count(blocks, 3), table).skipped)
        found = search(space, by_count(space, 6), table)
        cost = table.cost(found.skipped)
        assert cost <= whole + 1e-9
        assert len(found.skipped) == 6
        assert space.allows(found.skipped)
        assert frozenset(name for unit in found.order for name in unit) == found.skipped
        better += cost < whole - 1e-9
    assert better


class Rows(Table):
    """Blocks that are dear each, and cheap where they follow each other from the second
    on.
    """

    GOOD = frozenset(
        f"{kind}.{index}" for kind in ("attn", "mlp") for index in (1, 2, 3, 4)
    )

    def cost(self, skipped, share=1.0):
        cost = super().cost(skipped, share)
        return cost - 6.0 if skipped >= self.GOOD else cost + len(self.GOOD & skipped)


@pytest.mark.parametrize(("kind", "portable"), [("block", False), ("sublayer", True)])
def test_a_run_of_blocks_that_no_swap_leads_to_is_found(model, kind, portable):
    space = Space(locate(model), kind, portable=portable)
    found = search(space, by_count(space, 8 if portable else 4), Rows(space, 0))
    assert found.skipped == Rows.GOOD
    assert frozenset(name for unit in found.order for name in unit) == found.skipped


def test_from_a_run_it_is_refined(model):
    space = Space(locate(model), "block")
    table = Table(space, 3, 1.0, forgiving=True)
    looking = searching._Search(
        asked_of(space, table, patience=99), by_count(space, 3), {}
    )
    looking.skipped, looking.cost = frozenset({"attn.0", "mlp.0"}), 1e9
    looking.start_from_a_run()
    runs = [names_in(space.units[first : first + 3]) for first in range(LAYERS - 2)]
    assert set(runs) <= {*table.asked_of_a_part}
    best = min(map(table.cost, runs))
    assert looking.cost < best
    assert looking.cost == table.cost(looking.skipped)
    assert len(looking.skipped) == 6


def test_where_whole_blocks_are_better_each_of_them_is_given_back_anew(
    model, monkeypatch
):
    """What it gained to give a pair back is of the set that is left, not of the one
    that the search goes on from.
    """
    space, wanted, known = Space(locate(model), portable=True), set(), 0

    def noting(self, other, progress, go_on_from=searching._Search.go_on_from):
        nonlocal wanted, known
        units = space.returns(other.skipped)
        wanted = {other.skipped.difference(unit) for unit in units}
        known += len(self.falls.keys() & units)
        go_on_from(self, other, progress)
        self.evaluator.asked_of_a_part.clear()

    monkeypatch.setattr(searching._Search, "go_on_from", noting)
    for seed in range(12):
        table = Table(space, seed, 1.0, forgiving=True)
        search(space, by_count(space, 6), table)
        assert wanted <= {*table.asked_of_a_part}
        wanted = set()
    assert known


def test_late_among_the_blocks_it_keeps_the_set_that_it_knows(model, monkeypatch):
    class Misleading(Table):
        def cost(self, skipped, share=1.0):
            return super().cost(skipped) if share == 1.0 else 3.0

    space, sizes = Space(locate(model), portable=True), []
    late = search(
        space,
        by_count(space, 6),
        Misleading(space, 0),
        late=lambda: sizes != sorted(sizes),  # once the search among the blocks began
        progress=lambda done, total, doing: sizes.append(int(doing.split()[0])),
    )
    same = {"kind": "block"}  # so that there are no others to look among
    monkeypatch.setattr(
        searching,
        "replace",
        lambda of, **new: of if new == same else replace(of, **new),
    )
    alone = search(space, by_count(space, 6), Misleading(space, 0))
    assert late.skipped == alone.skipped
    assert 0 in sizes[sizes.index(6) :]


def unshared(evaluator):
    """Sublayers that what was evaluated would run without shared states."""
    return sum(evaluator.forward - len(skipped) for skipped, _ in evaluator._known)


def test_neighbours_are_the_nearest_that_is_left_on_both_sides(model):
    structure = locate(model)
    skipped = frozenset({"attn.3", "mlp.3", "attn.4"})
    assert Space(structure).neighbours(("attn.3",), skipped) == [("mlp.2",), ("mlp.4",)]
    assert Space(structure, "attention").neighbours(
        ("attn.3",), frozenset({"attn.3"})
    ) == [("attn.2",), ("attn.4",)]
    assert Space(structure, "block").neighbours(
        ("attn.0", "mlp.0"), frozenset({"attn.0", "mlp.0"})
    ) == [("attn.1", "mlp.1")]
    pairs = Space(structure, portable=True).neighbours(
        ("attn.3", "mlp.3"), frozenset({"attn.3", "mlp.3"})
    )
    assert pairs == [("attn.2", "mlp.2"), ("mlp.2", "attn.4"), ("attn.4", "mlp.4")]


@pytest.mark.parametrize("objective", [nll, kl], ids=["nll", "kl"])
@pytest.mark.parametrize(
    "kind",
    [
        "block",
        "portable",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("attention", "sublayer")
        ),
    ],
)
def test_on_a_model_it_is_as_good_as_plain_greedy_for_less(model, kind, objective):
    portable = kind == "portable"
    space = Space(locate(model), "sublayer" if portable else kind, portable=portable)
    budget = by_count(space, 4)
    found, costs = {}, {}
    for name in ("search", "greedy"):
        asked = Setting(
            model, space, BATCHES, Evaluator(model, objective(BATCHES)), patience=8
        )
        found[name] = choose(name, asked, budget)
        spent = asked.evaluator.spent
        costs[name] = (
            spent.executions if name == "search" else unshared(asked.evaluator)
        )
        quality = evaluate(model, [space.plan(found[name].skipped)], BATCHES)[0]
        costs[name, "objective"] = quality.nll if objective is nll else quality.kl
        assert asked.evaluator.cost(found[name].skipped) == pytest.approx(
            costs[name, "objective"], rel=1e-5
        )
    assert (
        costs["search", "objective"] <= costs["greedy", "objective"] + 1e-4
    )  # the rounding of sums
    assert costs["search"] < costs["greedy"] * (
        0.5 if kind == "sublayer" else 0.75
    )  # swaps weigh more where there are few


def test_costs_do_not_depend_on_the_prefix_or_on_company(model):
    space = Space(locate(model))
    draw = random.Random(1)
    sets = [frozenset(draw.sample(space.names, draw.randint(0, 7))) for _ in range(12)]
    alone = [
        Evaluator(model, mix([nll(BATCHES), kl(BATCHES, 0.5)])).cost(skipped)
        for skipped in sets
    ]
    assert Evaluator(model, mix([nll(BATCHES), kl(BATCHES, 0.5)])).costs(
        sets
    ) == pytest.approx(alone, rel=1e-6)
    bound = 3 * 2 * 9 * 32 * 4 * len(BATCHES)  # every sixth state or so
    for states_bytes in (bound, 2**30):
        walking = Evaluator(
            model, mix([nll(BATCHES), kl(BATCHES, 0.5)]), states_bytes=states_bytes
        )
        for base, skipped, cost in zip(sets[3:] + sets[:3], sets, alone):
            walking.set_prefix(base)
            assert walking.cost(skipped) == pytest.approx(cost, rel=1e-6)
            walking.set_prefix(skipped)
        held = sum(
            state.numel() * 4
            for cache in walking._prefix_caches.values()
            for state in cache.states.values()
        )
        assert held <= 1.1 * states_bytes + 2 * 9 * 32 * 4 * len(BATCHES)


def test_a_candidate_runs_only_what_is_behind_what_it_skips(model):
    evaluator = Evaluator(model, nll(BATCHES))
    runs = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(1))
        layer.mlp.register_forward_hook(lambda *_: runs.append(1))
    evaluator.cost(frozenset())
    assert len(runs) == 2 * LAYERS * len(BATCHES)
    for skipped, left in (
        (["attn.5"], 5),
        (["mlp.7"], 0),
        (["attn.7"], 1),
        (["attn.4", "mlp.6"], 6),
    ):
        runs.clear()
        before = evaluator.spent.executions
        evaluator.cost(frozenset(skipped))
        assert len(runs) == left * len(BATCHES)
        assert evaluator.spent.executions - before == pytest.approx(left)
    assert evaluator.spent.evaluations == 5
    for layer in model.model.layers:
        layer.self_attn._forward_hooks.clear()
        layer.mlp._forward_hooks.clear()


def test_a_part_of_the_text_is_the_first_batches_of_each_term(model):
    both = Evaluator(model, mix([nll(BATCHES), nll(BATCHES[2:], 2.0)]))
    part = Evaluator(model, mix([nll(BATCHES[:1]), nll(BATCHES[2:3], 2.0)]))
    assert both.cost(frozenset(["attn.3"]), 0.25) == pytest.approx(
        part.cost(frozenset(["attn.3"])), rel=1e-6
    )
    assert both.spent.executions == pytest.approx(15 * 4 / 12, rel=0.01)


def test_a_guess_is_never_taken_for_what_all_of_the_text_says(model):
    evaluator, skipped = Evaluator(model, nll(BATCHES)), frozenset(["attn.3"])
    guess, whole = evaluator.cost(skipped, 0.25), evaluator.cost(skipped)
    assert whole == Evaluator(model, nll(BATCHES)).cost(skipped) != guess
    assert evaluator.cost(skipped, 0.25) == guess


@pytest.mark.parametrize("objective", [nll, kl])
def test_a_part_of_a_few_long_batches_is_a_part(model, objective, monkeypatch):
    """Sequences are judged a few at a time, however many run together elsewhere, and
    come to the same.
    """
    ids = torch.cat(BATCHES)
    monkeypatch.setattr(
        "notall.choosing.objective.TOKENS_AT_ONCE", 2 * ids.shape[1] + 1
    )
    few = objective([ids])
    assert [len(batch.inputs["input_ids"]) for batch in few.batches] == [2] * 4
    assert len(few.part(0.25)) == 1
    monkeypatch.setattr("notall.choosing.objective.TOKENS_AT_ONCE", 10**6)
    (whole,) = objective([ids]).batches
    assert len(whole.inputs["input_ids"]) == 8
    plan = frozenset({"attn.1", "mlp.4"})
    costs = [Evaluator(model, one).cost(plan) for one in (few, objective([ids]))]
    assert costs[0] == pytest.approx(costs[1], abs=1e-6)


@pytest.mark.parametrize("objective", [nll, kl])
def test_a_guess_goes_by_what_is_likely_and_asked(model, objective, monkeypatch):
    """On a part of the text, a part of the vocabulary; on all of it, all of it."""
    skipped = frozenset(["attn.1", "mlp.2"])
    whole = Evaluator(model, objective(BATCHES))
    exact, on_all_words = whole.cost(skipped), whole.cost(skipped, 0.25)
    monkeypatch.setattr(evaluating, "GUESSED_TOKENS", 30)
    some = Evaluator(model, objective(BATCHES))
    with torch.inference_mode():
        dense = model(BATCHES[0]).logits[:, :-1].flatten(0, 1)
        with notall.skip(model, plan_of(skipped)):
            ours = model(BATCHES[0]).logits[:, :-1].flatten(0, 1)
    targets = BATCHES[0][:, 1:].flatten()
    likely = dense.softmax(-1).sum(0).topk(30).indices
    words = (
        torch.cat([likely, targets]).unique()
        if objective is nll
        else likely.sort().values
    )
    log_p, log_q = (
        logits.double()[:, words].log_softmax(-1) for logits in (dense, ours)
    )
    if objective is nll:
        expected = -log_q.gather(1, torch.searchsorted(words, targets)[:, None]).mean()
    else:
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert some.cost(skipped, 0.25) == pytest.approx(float(expected), rel=1e-5)
    assert some.cost(skipped, 0.25) != pytest.approx(on_all_words, rel=1e-3)
    assert some.cost(skipped) == exact


def test_late_it_completes_the_set_by_what_it_knows(model):
    space = Space(locate(model), "attention")
    for asked in (0, 5, 12, 40):
        table = Table(space, 1, 0.05)
        found = search(space, by_count(space, 4), table, cheap=table.single and {(n,): 1.0 for n in space.names},
                       late=lambda table=table, asked=asked: len(table.asked) > asked)  # fmt: skip
        assert len(found.skipped) == 4
        assert found.skipped in table.asked


def test_late_before_anything_is_known_it_goes_by_the_cheap_scores(model):
    space = Space(locate(model), "attention")
    cheap = {(name,): -float(place) for place, name in enumerate(space.names)}
    found = search(
        space, by_count(space, 2), Table(space, 1), cheap=cheap, late=lambda: True
    )
    assert found.skipped == {"attn.7", "attn.6"}


def test_progress_grows_to_one(model):
    space, seen = Space(locate(model)), []
    search(
        space,
        by_count(space, 4),
        Table(space, 2),
        progress=lambda done, total, doing: seen.append(done / total),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_progress_never_goes_back_where_the_best_run_of_blocks_is_gone_on_from(model):
    """A run that costs little as a whole alone, which pairs do not come to."""
    space, seen = Space(locate(model), portable=True), []
    run = {f"{kind}.{index}" for kind in ("attn", "mlp") for index in (3, 4, 5)}

    class OfARun(Table):
        def cost(self, skipped, share=1.0):
            return 3.1 if skipped == run else super().cost(skipped, share)

    found = search(
        space,
        by_count(space, 6),
        OfARun(space, 0),
        progress=lambda *told: seen.append(told[0] / told[1]),
    )
    assert found.skipped == run
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_progress_moves_with_each_evaluation_however_many_swaps_gain(model):
    space, told, doings = Space(locate(model), "sublayer"), [], set()
    looking = searching._Search(
        asked_of(space, Table(space, 0)), by_count(space, 3), {}
    )

    def progress(done, total, doing):
        told.append(done / total)
        doings.add(doing)

    looking.progress = progress
    for _ in range(round(2 * looking.total)):
        looking._evaluate(frozenset())
    assert all(one < other for one, other in pairwise(told))
    assert told[9] == pytest.approx(10 / looking.total)
    assert told[-1] < 1.0
    assert doings == {"0 skipped, objective 3.0000"}


def test_before_anything_is_skipped_it_tells_what_costs_least_alone(model):
    space, told = Space(locate(model), "attention"), []
    table = Table(space, 0)
    search(
        space,
        by_count(space, 2),
        table,
        progress=lambda done, total, doing: told.append(doing),
    )
    best = min(space.names, key=table.single.__getitem__)
    assert (
        f"0 skipped, best of 8 tried alone: {best}, {table.single[best]:+.4f}" in told
    )
    assert told[0] == "0 skipped, objective 3.0000"
    assert any(one.startswith("1 skipped, objective 3.") for one in told)


def test_the_count_of_a_search_follows_the_time_that_it_is_given(model, monkeypatch):
    """At half of the time it is half through, however few sets it has looked at."""
    clock, told = [0.0], []
    monkeypatch.setattr(choice.time, "monotonic", lambda: clock[0])

    def progress(done, total, doing):
        told.append((clock[0], done / total))
        clock[0] += 6.0

    space = Space(locate(model), "attention")
    choose_plan(
        model,
        "search",
        space,
        by_count(space, 3),
        BATCHES,
        config=SearchConfig(max_minutes=1.0),
        progress=progress,
    )
    assert all(share >= min(1.0, seconds / 60) - 1e-9 for seconds, share in told)
    assert len(told) > 5


# --- budgets
# --------------------------------------------------------------------------------------


def test_counts_and_fractions(model):
    structure = locate(model)
    block, pairs = Space(structure, "block"), Space(structure, portable=True)
    budget = by_count(block, 3)
    assert not budget.met(frozenset(["attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2"]))
    assert budget.met(
        frozenset(["attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2"])
    )
    assert by_count(Space(structure), 0.25).target == 4
    with pytest.raises(UsageError, match="even"):
        by_count(pairs, 3)
    with pytest.raises(UsageError, match="whole number"):
        by_count(block, 2.5)
    with pytest.raises(UsageError, match="at most 7"):
        by_count(Space(structure, "attention"), 8)
    assert by_count(Space(structure, "attention", keep_last=1), 7).target == 7


@pytest.mark.parametrize("resource", ["params", "weight_bytes", "kv_bytes_per_token"])
def test_a_budget_of_a_resource_is_what_the_footprint_says(model, resource):
    from api import Plan, footprint

    space = Space(locate(model))
    budget = by_footprint(model, space, resource, 0.3)
    found = search(space, budget, Table(space, 3))
    dense, left = (
        getattr(footprint(model, plan), resource)
        for plan in (Plan(), space.plan(found.skipped))
    )
    assert dense - left == pytest.approx(budget.saved(found.skipped))
    assert dense - left >= 0.3 * dense
    least = min(saved for saved in budget.saves.values() if saved)
    assert dense - left < 0.3 * dense + 2 * max(budget.saves.values()) + least


def test_what_saves_more_for_what_it_costs_is_skipped_first(model):
    space = Space(locate(model))
    table = Table(space, 5)
    table.single = {
        name: 1.0 if name.startswith("attn") else 1.2 for name in space.order
    }
    budget = by_footprint(model, space, "params", 0.2)
    mlp, attention = budget.saves["mlp.0"], budget.saves["attn.0"]
    assert mlp > 1.2 * attention  # so MLPs save more for each nat
    assert {
        unit[0].partition(".")[0]
        for unit in search(space, budget, table, patience=0).order[:2]
    } == {"mlp"}
    assert budget.rate(("mlp.0",), -1.0, frozenset()) < budget.rate(
        ("attn.0",), -1.0, frozenset()
    )


def test_a_limit_takes_as_many_as_it_can(model):
    space = Space(locate(model), "attention")
    table = Table(space, 2)
    found = search(space, by_limit(space, 1.0), table)
    cheapest = sorted(table.single[name] for name in space.names)
    fit = next(n for n in range(9) if sum(cheapest[: n + 1]) > 1.0)
    assert len(found.skipped) == fit
    assert table.cost(found.skipped) - table.cost(frozenset()) <= 1.0
    with pytest.raises(UsageError, match="from 0"):
        by_limit(space, -1)


def test_spaces_that_hold_nothing_are_refused(model):
    structure = locate(model)
    with pytest.raises(UsageError, match="portable"):
        Space(structure, "attention", portable=True)
    with pytest.raises(UsageError, match="preserved"):
        Space(structure, keep_first=5, keep_last=5)
    with pytest.raises(UsageError, match="one of"):
        Space(structure, "heads")


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_portable_moves_reach_every_portable_set_and_no_other(name):
    """All sets of four layers by brute force: those whose maximal runs of skipped
    sublayers have even length.
    """
    net = family(name).build()
    space = Space(locate(net), portable=True)
    reached, waiting = {frozenset()}, [frozenset()]
    while waiting:
        skipped = waiting.pop()
        for unit in space.moves(skipped):
            if (grown := skipped.union(unit)) not in reached:
                reached.add(grown)
                waiting.append(grown)
    names = list(space.order)
    expected = set()
    for bits in range(2 ** len(names)):
        marks = "".join(
            "x" if bits >> place & 1 else "." for place in range(len(names))
        )
        even = all(len(run) % 2 == 0 for run in marks.split("."))
        if name == "gpt_neox":  # a parallel block is skipped whole
            even = all(
                marks[place] == marks[place + 1] for place in range(0, len(names), 2)
            )
        if even and "x" * len(names) != marks:
            expected.add(frozenset(n for n, mark in zip(names, marks) if mark == "x"))
    assert reached == expected
    for skipped in expected:
        assert all(
            skipped.difference(unit) in expected for unit in space.returns(skipped)
        )
        assert bool(space.returns(skipped)) == bool(skipped)


# --- killed and asked again
# --------------------------------------------------------------------------------------


def run_search(model, folder, delay=0.0, name="tiny"):
    space = Space(locate(model))
    evaluator = Evaluator(model, nll(BATCHES), folder=folder, settings={"model": name})
    if delay:
        evaluate_all = evaluator._evaluate

        def slowly(*arguments):
            time.sleep(delay)
            evaluate_all(*arguments)

        evaluator._evaluate = slowly
    asked = Setting(model, space, BATCHES, evaluator)
    return choose("search", asked, by_count(space, 6)), evaluator


SCRIPT = """
import sys
from pathlib import Path
import test_searching
from families import family
model = family("llama").build(num_hidden_layers=test_searching.LAYERS)
test_searching.run_search(model, Path(sys.argv[1]), delay=0.05)
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    expected, whole = run_search(model, tmp_path / "whole")
    folder = tmp_path / "killed"
    path = folder / "evaluations.jsonl"
    forked.kill_at(path, 25, SCRIPT, folder)
    killed = path.read_bytes()
    killed = killed[: killed.rfind(b"\n") + 1]
    found, again = run_search(model, folder)
    assert found == expected
    assert path.read_bytes().startswith(killed)
    found_lines, all_lines = (
        lines.read_lines(where / "evaluations.jsonl")
        for where in (folder, tmp_path / "whole")
    )
    assert [line.get("skipped") for line in found_lines] == [
        line.get("skipped") for line in all_lines
    ]
    assert again.spent.evaluations == whole.spent.evaluations
    assert (
        0 <= again.spent.executions - whole.spent.executions <= again.forward
    )  # the prefix's states, run again
    # All of it again costs nothing, and is counted as what it took.
    monkeypatch.setattr(
        Evaluator, "_evaluate", lambda *_: pytest.fail("it was evaluated again")
    )
    assert run_search(model, folder)[0] == expected


def test_what_was_evaluated_together_is_written_together(model, tmp_path, monkeypatch):
    written = []
    evaluator = Evaluator(model, nll(BATCHES), folder=tmp_path)
    monkeypatch.setattr(
        lines, "append", lambda path, *records: written.append(len(records))
    )
    evaluator.costs([frozenset(), frozenset({"attn.1"}), frozenset({"mlp.2"})])
    assert written == [1 + 3]  # with the header


def test_evaluations_of_other_settings_are_not_taken(model, tmp_path, monkeypatch):
    run_search(model, tmp_path)
    with pytest.raises(UsageError, match="results with model"):
        run_search(model, tmp_path, name="other")
    with pytest.raises(UsageError, match="results with calibration"):
        Evaluator(model, nll(BATCHES[:1]), folder=tmp_path, settings={"model": "tiny"})
    monkeypatch.setattr(
        evaluating, "GUESSED_TOKENS", 30
    )  # guesses on other words cannot be held together
    with pytest.raises(UsageError, match="results with guesses"):
        run_search(model, tmp_path)
