"""A budget with a limit on what it may cost: both hold, or what can be had of each is
told.
"""

import json
import time
from dataclasses import replace

import pytest

from api import (
    SearchRecord,
    SublayerTimes,
    by_count,
    by_limit,
    choose,
    choose_within,
    latency,
    outcomes,
    within_limit,
)
from command_line import QUICK
from test_speedups import DENSE, EACH, asked, machine, setting  # noqa: F401
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it chooses by times that are given


@pytest.fixture
def costs(setting):  # noqa: F811
    """Each sublayer of the table costs a tenth of a nat, as many of them are
    skipped.
    """
    setting.evaluator.single = dict.fromkeys(setting.evaluator.single, 0.1)
    return setting


@pytest.fixture
def timing(machine):  # noqa: F811
    """A machine on which the times hold."""
    return machine(1.0)


def limited(budget, nats):
    return within_limit(budget, by_limit(budget.space, nats, "NLL"))


@pytest.mark.parametrize("criterion", ["greedy", "leave-one-out"])
def test_both_hold_where_they_can(costs, timing, criterion):
    found = choose_within(criterion, costs, limited(asked(costs, 1.3), 0.55))
    assert (len(found.choice.skipped), found.missed, timing) == (5, None, [5])


@pytest.mark.parametrize("criterion", ["greedy", "leave-one-out"])
def test_where_they_cannot_what_each_costs_the_other_is_told(costs, timing, criterion):
    found = choose_within(criterion, costs, limited(asked(costs, 1.3), 0.35))
    assert timing == [5, 3]
    assert len(found.choice.skipped) == 3
    assert (
        found.missed
        == "1.33 ± 0.00 times as fast costs 0.500 nats on the text it was chosen by; at"
        " 0.300 nats it is 1.18 ± 0.00 times as fast"
    )


def test_a_count_has_its_limit_too(costs):
    count = by_count(costs.space, 6)
    limit = by_limit(costs.space, 0.45)
    assert (
        choose_within(
            "greedy", costs, within_limit(count, by_limit(costs.space, 0.65))
        ).missed
        is None
    )
    found = choose_within("greedy", costs, within_limit(count, limit))
    assert len(found.choice.skipped) == 4
    assert (
        found.missed
        == "6 of 6 costs 0.600 nats on the text it was chosen by; at 0.400 nats it is 4"
        " of 6"
    )


@pytest.mark.parametrize("criterion", ["greedy", "leave-one-out"])
def test_late_what_is_found_keeps_to_the_limit_all_the_same(costs, timing, criterion):
    late = replace(costs, deadline=0.0)
    found = choose_within(criterion, late, limited(asked(costs, 1.3), 0.35))
    assert (
        costs.evaluator.cost(found.choice.skipped) - costs.evaluator.cost(frozenset())
        <= 0.35
    )
    assert "costs 0.500 nats on the text it was chosen by; at" in found.missed
    assert found.missed.endswith("; the time was up")


def test_the_first_choice_leaves_time_for_the_second(costs, timing, monkeypatch):
    """Of 100 seconds that are left."""
    given = []

    def choosing(criterion, asked_of, budget):
        given.append(asked_of.deadline - time.monotonic())
        return choose(criterion, asked_of, budget)

    monkeypatch.setattr(outcomes, "choose", choosing)
    choose_within(
        "greedy",
        replace(costs, deadline=time.monotonic() + 100),
        limited(asked(costs, 1.3), 0.35),
    )
    assert given[0] == pytest.approx(60, abs=5)
    assert given[-1] == pytest.approx(100, abs=5)


def test_what_misses_the_speedup_at_once_says_so_too(costs, machine):  # noqa: F811
    machine(0.3)
    found = choose_within("greedy", costs, limited(asked(costs, 1.3), 0.55))
    assert found.missed == "1.08 ± 0.00 times as fast is what was reached"


@pytest.mark.parametrize(("nats", "code"), [("9", 0), ("1e-09", 3)])
def test_search_takes_both_and_leaves_with_3(
    run, tmp_path, monkeypatch, timing, nats, code
):
    folder = save_tiny_checkpoint(
        tmp_path / "tiny", num_hidden_layers=6, max_position_embeddings=1024
    )
    each = {f"{kind}.{layer}": EACH for kind in ("attn", "mlp") for layer in range(6)}
    monkeypatch.setattr(
        latency,
        "measure_times",
        lambda _, workload, **__: SublayerTimes(workload, DENSE, each),
    )
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    command = [
        "search",
        folder,
        "--speedup",
        "1.1",
        "--max-kl",
        nats,
        "-o",
        tmp_path / "plan.json",
    ]
    left, out, err = run(
        *command, "--text", tmp_path / "text.txt", *QUICK, "--patience", "0", "--json"
    )
    (record,) = (
        SearchRecord.model_validate_json(json.dumps(one))
        for one in json.loads(out)["search"]
    )
    assert left == code
    assert (
        record.chosen
        == f"search by kl: 1.1x at prompt 512, 128 new, batch 1, at most {nats} more KL"
    )
    fast = record.check.measured_speedup.median >= 1.1
    assert (record.cost - record.dense_cost <= float(nats), fast) == (True, not code)
    assert ("missed 1.1x" in err) == bool(code)
