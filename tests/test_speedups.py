"""The speedup asked for is the speedup measured: by a machine that is made up, on which
skipping saves a part.
"""

import json
from dataclasses import replace

import numpy
import pytest
import torch

from api import (
    CHOICES,
    AfterRepair,
    Quartiles,
    SearchRecord,
    Setting,
    Space,
    SpeedCheck,
    SublayerTimes,
    Workload,
    by_count,
    by_footprint,
    by_speedup,
    choose_as_fast,
    choose_within,
    latency,
    outcomes,
    searching,
)
from command_line import QUICK
from families import family
from notall import load, locate
from test_searching import Table
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it is about times

BATCHES = [torch.arange(4 * 9).view(4, 9)]
DENSE, EACH = 100.0, 5.0  # milliseconds: twelve sublayers take sixty


@pytest.fixture
def machine(monkeypatch):
    """A function that says which share of its predicted time a skipped sublayer really
    saves, and how times spread.
    """
    timed = []

    def saves(share, spread=0.0):
        def check_times(model, plan, times, *, error, progress):
            predicted, real = times.predicted_ms(plan), DENSE - share * EACH * len(plan)
            timed.append(len(plan))
            ratio, rounds = DENSE / real, 5
            while 0.93 * 2 * spread / rounds**0.5 > error and rounds < 20:
                rounds += 5
            measured = Quartiles(
                median=ratio, low=ratio - spread, high=ratio + spread, n=rounds
            )
            return SpeedCheck(
                predicted_ms=predicted,
                measured_ms=real,
                predicted_speedup=DENSE / predicted,
                measured_speedup=measured,
            )

        monkeypatch.setattr(outcomes, "check_times", check_times)
        return timed

    return saves


@pytest.fixture
def setting():
    model = family("llama").build(num_hidden_layers=6)
    space = Space(locate(model))
    return Setting(model, space, [], Table(space, 3))


def asked(setting, faster):
    return by_speedup(
        setting.space,
        SublayerTimes(Workload(), DENSE, dict.fromkeys(setting.space.names, EACH)),
        faster,
    )


def test_what_is_as_fast_as_predicted_is_chosen_once(setting, machine):
    timed = machine(1.0)
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert timed == [len(found.choice.skipped)] == [5]  # 25 of 100 ms: 1.33 times
    assert found.met


def test_what_is_much_faster_than_asked_for_is_chosen_anew_and_what_costs_least_is_kept(
    setting, machine
):
    timed = machine(1.8)  # skipping saves almost twice as much as the times say
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert timed[0] == 5
    assert found.met
    assert len(found.choice.skipped) == min(timed) < 5


def test_what_is_a_little_faster_than_asked_for_is_kept(setting, machine):
    timed = machine(1.02)
    assert choose_as_fast("greedy", setting, asked(setting, 1.3)).met
    assert timed == [5]


def test_what_is_too_slow_corrects_the_times_and_the_next_is_as_fast(setting, machine):
    timed = machine(0.6)
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert timed == [5, 8]  # 15 ms saved, where 23 are needed: 3 a sublayer
    assert found.met
    assert found.check.measured_speedup.median == pytest.approx(DENSE / (DENSE - 8 * 3))
    assert found.check.predicted_speedup == pytest.approx(
        found.check.measured_speedup.median
    )


@pytest.mark.parametrize("after_repair", [False, True])
def test_a_set_for_a_speedup_grows_on_a_part_of_the_text_unless_repairs_are_fitted_to_it(
    setting, machine, monkeypatch, after_repair
):
    machine(1.0)
    grown_on = []

    def choose(way, setting, budget):
        grown_on.append(setting.grown_on)
        return greedily(way, setting, budget)

    greedily = outcomes.choose
    monkeypatch.setattr(outcomes, "choose", choose)
    if after_repair:
        setting = replace(
            setting, evaluator=AfterRepair(setting.model, BATCHES), batches=BATCHES
        )
    choose_as_fast("greedy", setting, by_count(setting.space, 1))
    choose_as_fast("greedy", setting, asked(setting, 1.05))
    assert grown_on[0] == 1.0
    assert {*grown_on[1:]} == {1.0 if after_repair else 0.25}


def test_swaps_wait_until_the_times_hold(setting, machine, monkeypatch):
    """Two sets that grow alone, then the second again with swaps, which leave as much
    and are not timed anew.
    """
    timed, patience = machine(0.6), []

    def choose(_, setting, budget):
        patience.append(setting.patience)
        return searching.search_sets(setting, budget, {})

    monkeypatch.setattr(outcomes, "choose", choose)
    found = choose_as_fast("search", setting, asked(setting, 1.3))
    assert found.met
    assert patience == [0, 0, setting.patience]
    assert timed == [5, 8]


def test_growing_checks_and_swaps_are_told_as_one_count(setting, machine, monkeypatch):
    machine(0.6)
    told = []
    monkeypatch.setattr(
        outcomes,
        "choose",
        lambda _, setting, budget: searching.search_sets(setting, budget, {}),
    )
    setting = replace(
        setting, progress=lambda done, total, doing: told.append((done, total))
    )
    assert choose_as_fast("search", setting, asked(setting, 1.3)).met
    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert shares[0] < 0.1
    assert 0.8 < shares[-1] <= 1.0
    assert len({total for _, total in told}) == 1


def test_swaps_move_the_count_also_behind_many_checks(setting, machine, monkeypatch):
    """Three sets are timed before the swaps, where two are reckoned with."""
    timed, told, shares = machine(0.9), [], iter((0.7, 0.6, 0.6, 0.6))

    def slower(self, check, corrected=latency.SpeedBudget.corrected):
        machine(next(shares))
        return corrected(self, check)

    def choose(_, setting, budget):
        told.append([])
        return searching.search_sets(setting, budget, {})

    monkeypatch.setattr(latency.SpeedBudget, "corrected", slower)
    monkeypatch.setattr(outcomes, "choose", choose)
    setting = replace(
        setting, progress=lambda done, total, doing: told[-1].append(done / total)
    )
    choose_as_fast("search", setting, asked(setting, 1.3))
    assert len(timed) >= 3
    assert len({*told[-1]}) > 5
    assert max(told[-1]) < 1.0


def test_it_is_met_within_the_error_of_the_median(setting, machine):
    """1.2820 is 0.018 short of 1.3; the error of five rounds is 0.83 of half the
    distance of the quartiles.
    """
    for spread, sizes in ((0.023, [5]), (0.020, [5, 6])):
        timed = machine(0.88, spread)
        timed.clear()
        assert choose_as_fast("greedy", setting, asked(setting, 1.3)).met
        assert timed == sizes


def test_noise_is_timed_longer_and_excuses_little(setting, machine):
    """1.27 of 1.3 between quartiles of 1.17 and 1.37: five rounds leave an error of
    0.08, twenty of 0.04.
    """
    timed = machine(0.85, 0.1)
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert found.met
    assert found.check.measured_speedup.n == 20
    assert timed == [5, 6]
    timed.clear()
    machine(0.85, 0.03)
    choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert timed == [5, 6]


def test_where_it_cannot_be_had_the_fastest_comes_back_and_is_said_to_miss(
    setting, machine
):
    timed = machine(0.3)
    found = choose_as_fast(
        "greedy", setting, asked(setting, 1.3)
    )  # 18 ms at most, where 23 are needed
    assert timed == [5]
    assert not found.met
    timed = machine(0.0)
    assert not choose_as_fast("greedy", setting, asked(setting, 1.3)).met


def test_it_ends_after_some_choices_with_the_fastest(setting, monkeypatch, machine):
    """A machine on which less and less is saved: 22.5 ms, then 21, 21 and 20 of the 23
    that are needed.
    """
    timed = machine(0.9)
    shares = iter((0.7, 0.6, 0.5, 0.4))

    def slower(self, check, corrected=latency.SpeedBudget.corrected):
        machine(next(shares))
        return corrected(self, check)

    monkeypatch.setattr(latency.SpeedBudget, "corrected", slower)
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert timed == [5, 6, 7, 8]
    assert len(timed) == CHOICES
    assert (len(found.choice.skipped), found.met) == (5, False)


def test_when_it_is_late_what_was_chosen_is_not_chosen_anew(setting, machine):
    timed = machine(0.6)
    late = replace(setting, deadline=0.0)
    assert not choose_as_fast("greedy", late, asked(late, 1.3)).met
    assert timed == [5]


@pytest.mark.parametrize(("share", "code"), [(1.0, 0), (0.6, 0), (0.3, 3)])
def test_search_leaves_with_3_where_the_speedup_was_missed(
    run, tmp_path, monkeypatch, machine, share, code
):
    folder = save_tiny_checkpoint(
        tmp_path / "tiny", num_hidden_layers=6, max_position_embeddings=1024
    )
    names = [f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(6)]
    monkeypatch.setattr(
        latency,
        "measure_times",
        lambda _, w, **__: SublayerTimes(w, DENSE, dict.fromkeys(names, EACH)),
    )
    machine(share)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    command = [
        "search",
        folder,
        "--speedup",
        "1.3",
        "-o",
        tmp_path / "plan.json",
        "--text",
        tmp_path / "text.txt",
    ]
    left, out, err = run(*command, *QUICK, "--json")
    (record,) = (
        SearchRecord.model_validate_json(json.dumps(one))
        for one in json.loads(out)["search"]
    )
    assert left == code
    if code:
        assert (
            "missed 1.3x at prompt 512, 128 new, batch 1: 1.08 ± 0.00 times as fast"
            in err
        )
        assert err.count("\n") == 1
    else:
        assert (err, record.check.measured_speedup.median >= 1.3) == ("", True)


# --- a budget is not called met by chance
# --------------------------------------------------------------------------------------


def noisy(true, noise, seed):
    """A check of a model that is `true` times as fast, on a machine whose times vary by
    a factor of e**noise.
    """
    draw = numpy.random.default_rng(seed)

    def took(milliseconds, rounds):
        return (milliseconds * numpy.exp(draw.normal(0, noise, rounds))).tolist()

    def compare(model, plans, workload, *_, **__):
        return {
            "dense": took(DENSE, workload.rounds),
            "skipped": took(DENSE / true, workload.rounds),
        }

    return compare


@pytest.mark.parametrize(
    ("true", "noise", "faster", "least", "most"),
    [
        (1.66, 1.0, 3.0, 0, 2),  # as many as 8 of 100 were called met
        (1.2, 0.2, 1.3, 0, 7),  # 23
        (1.2, 0.4, 1.3, 0, 8),  # 35
        (1.32, 0.01, 1.3, 97, 100),
        (1.4, 0.1, 1.3, 75, 100),
    ],
)
def test_a_noisy_machine_meets_no_speedup_by_chance(
    setting, monkeypatch, true, noise, faster, least, most
):
    budget, met = asked(setting, 1.3), 0
    budget = replace(budget, faster=faster)
    plan = setting.space.plan(["mlp.1"])
    for seed in range(100):
        monkeypatch.setattr(latency, "_compare", noisy(true, noise, seed))
        error = latency.MOST_ERROR * faster
        met += budget.reached(
            latency.check_times(setting.model, plan, budget.times, error=error)
        )
    assert least <= met <= most


def test_what_noise_leaves_open_says_so(setting, machine):
    machine(1.0, 0.4)  # 1.33 of 1.3, with an error of 0.17
    found = choose_as_fast("greedy", setting, asked(setting, 1.3))
    assert not found.met
    assert (
        "is what was reached; the times vary too much to tell: run it again on a quiet"
        " machine" in found.missed
    )


def without_one_attention(model):
    """The parameters of all sublayers but one attention: sets of pairs leave an MLP,
    too.
    """
    attention, *_ = parts = locate(model).sublayers
    return sum(part.parameters for part in parts) - attention.parameters


def test_what_saves_too_little_misses_a_budget_of_bytes_too(setting):
    """Of pairs that leave an ordinary model no set may save as much as all that may be
    skipped.
    """
    space = Space(setting.space.structure, portable=True)
    budget = by_footprint(
        setting.model, space, "params", without_one_attention(setting.model)
    )
    found = choose_within("greedy", replace(setting, space=space), budget)
    assert not budget.met(found.choice.skipped)
    assert (
        found.missed
        == f"{budget.saved(found.choice.skipped):,.0f} of {budget.target:,.0f} is what"
        " was reached"
    )


def test_search_leaves_with_3_where_a_set_saves_too_little(run, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    amount = without_one_attention(load(folder, dtype="float32", device="cpu")[0])
    command = [
        "search",
        folder,
        "--skip",
        "portable",
        "--params",
        amount,
        "--criterion",
        "deepest",
        *QUICK,
    ]
    code, _, err = run(
        *command,
        "--text",
        tmp_path / "text.txt",
        "-o",
        tmp_path / "plan.json",
        "--json",
    )
    assert code == 3
    assert "is what was reached" in err
