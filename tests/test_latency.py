"""Times of sublayers add up: with a clock that counts what is run, so that nothing here
depends on the machine.
"""

import json
import os

import pytest
import torch

from api import (
    Budget,
    RoundTimes,
    SearchRecord,
    Space,
    SublayerTimes,
    Workload,
    by_speedup,
    check_times,
    latency,
    measure_times,
    unsealed,
)
from command_line import QUICK
from families import family
from notall import Plan, UsageError, locate
from test_searching import Table, search

pytestmark = pytest.mark.any_transformers  # it is about times

WORK = Workload(prompt_tokens=8, generation_tokens=10, concurrency=2, rounds=1)
EACH = {"attn": (2.0, 0.3), "mlp": (3.0, 0.1)}  # prefill and decode milliseconds


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def clock(monkeypatch):
    """`compare` with a clock of its own: what each sublayer that runs takes, and 10 ms
    and 1 ms for the rest.
    """
    calls = []

    def compare(model, variants, workload, *, seed, progress):
        calls.append(sorted(variants))
        found = {}
        for name, variant in variants.items():
            ran = []
            handles = []
            for layer in model.model.layers:
                handles.append(
                    layer.self_attn.register_forward_hook(
                        lambda *_, ran=ran: ran.append("attn")
                    )
                )
                handles.append(
                    layer.mlp.register_forward_hook(
                        lambda *_, ran=ran: ran.append("mlp")
                    )
                )
            with variant(), torch.no_grad():
                model(
                    torch.ones(
                        workload.concurrency, workload.prompt_tokens, dtype=torch.int64
                    )
                )
            for handle in handles:
                handle.remove()
            prefill, decode = (
                start + sum(EACH[r][which] for r in ran)
                for which, start in enumerate((10.0, 1.0))
            )
            drift = [1.0, 1.5, 1.1][
                : workload.rounds
            ]  # the machine is slower in the second round
            found[name] = RoundTimes(
                tuple(d * prefill for d in drift),
                tuple(d * decode for d in drift),
                None,
            )
        return found

    monkeypatch.setattr(latency, "compare_speeds", compare)
    return calls


@pytest.fixture
def model():
    return family("llama").build(num_hidden_layers=6)


def test_sublayers_that_sum_to_more_than_the_model_leave_a_time():
    times = SublayerTimes(WORK, 10.0, {"attn.0": 6.0, "attn.1": 6.0})
    assert times.predicted_ms(Plan([0])) == 4.0
    assert times.predicted_ms(Plan([0, 1])) == 0.01


def test_each_sublayer_has_its_time_and_they_add_up(model, clock):
    times = measure_times(model, WORK)
    assert times.sublayer_ms["attn.3"] == pytest.approx(2.0 + 10 * 0.3)
    assert times.sublayer_ms["mlp.0"] == pytest.approx(3.0 + 10 * 0.1)
    assert times.dense_ms == pytest.approx(10 + 10 * 1 + 6 * (5 + 4))
    plan = Plan([0, 2, 3], [5])
    check = check_times(model, plan, times, rounds=3)
    assert check.predicted_ms == pytest.approx(times.dense_ms - 3 * 5 - 4)
    assert check.measured_speedup.median == pytest.approx(
        times.dense_ms / check.predicted_ms
    )
    assert check.off == pytest.approx(0)


@pytest.mark.parametrize(("enough", "rounds"), [(0.6, 3), (0.3, 6), (-1.0, 12)])
def test_a_noisy_plan_is_timed_in_more_rounds_that_count_together(
    model, monkeypatch, enough, rounds
):
    """Speedups of 2, 3 and 4 leave an error of 0.54, and none with three more of 3:
    quartiles are 3.
    """
    asked = []

    def compare(model, variants, workload, **_):
        dense = (3.0, 3.0, 3.0) if asked else (2.0, 3.0, 4.0)
        asked.append(workload.rounds)
        none = (0.0, 0.0, 0.0)
        return {
            "dense": RoundTimes(dense, none, None),
            "skipped": RoundTimes((1.0, 1.0, 1.0), none, None),
        }

    monkeypatch.setattr(latency, "compare_speeds", compare)
    times = SublayerTimes(
        WORK, 3.0, {part.name: 0.1 for part in locate(model).sublayers}
    )
    check = check_times(model, Plan([1]), times, rounds=3, error=enough)
    assert asked == [3] * (rounds // 3)
    assert check.measured_speedup.n == rounds
    assert (check.measured_ms, check.measured_speedup.median) == (1.0, 3.0)


def test_a_check_tells_how_far_it_is(model, monkeypatch):
    told, none = [], (0.0, 0.0, 0.0)

    def compare(model, variants, workload, *, progress, **_):
        progress(1, 2, "timing skipped")
        dense = (2.0, 3.0, 4.0)
        return {
            "dense": RoundTimes(dense, none, None),
            "skipped": RoundTimes((1.0, 1.0, 1.0), none, None),
        }

    monkeypatch.setattr(latency, "compare_speeds", compare)
    times = SublayerTimes(
        WORK, 3.0, {part.name: 0.1 for part in locate(model).sublayers}
    )
    check_times(
        model,
        Plan([1]),
        times,
        rounds=3,
        error=-1.0,
        progress=lambda *one: told.append(one),
    )
    assert told == [(step + 0.5, 4, "timing skipped") for step in range(4)]


def test_what_is_far_out_of_reach_is_refused_before_each_sublayer_is_timed(
    model, clock, cache
):
    space = Space(locate(model), "mlp")
    with pytest.raises(
        UsageError,
        match=(
            r"^a speedup of 9 is far out of reach: .* is 1\.\d times as fast; ask for"
            r" less$"
        ),
    ):
        measure_times(model, WORK, wanted=(space, 9))
    assert clock == [["dense", "emptiest"]]
    assert not (cache / "times").exists()
    measure_times(model, WORK, wanted=(space, 1.2))
    assert clock[1:] == [["dense", "emptiest"], ["0", "1", "dense"]]


def test_they_are_measured_once(model, clock, cache):
    first = measure_times(model, WORK)
    again = measure_times(family("llama").build(num_hidden_layers=6), WORK)
    assert first == again
    assert clock == [["0", "1", "dense"], ["dense"]]
    clock.clear()
    for other in (Workload(8, 10, 1, 1), Workload(8, 11, 2, 1), Workload(9, 10, 2, 1)):
        measure_times(model, other)
    measure_times(family("llama").build(num_hidden_layers=5), WORK)
    assert clock == [["0", "1", "dense"]] * 4


def test_times_that_no_longer_hold_are_measured_anew_with_a_word(
    model, clock, monkeypatch
):
    """The original model takes 74 ms, and 12 of its sublayers 3 or 4 each."""
    first = measure_times(model, WORK)
    monkeypatch.setitem(EACH, "mlp", (4.0, 0.1))  # 80 ms: less than a tenth more
    assert measure_times(model, WORK) == first
    monkeypatch.setitem(EACH, "mlp", (3.0, 0.3))
    with pytest.warns(
        UserWarning,
        match=r"took 74 ms then and takes 86 ms now; they are measured anew",
    ):
        again = measure_times(model, WORK)
    assert again.sublayer_ms["mlp.3"] == pytest.approx(6.0)
    clock.clear()
    assert measure_times(model, WORK) == again
    assert clock == [["dense"]]
    monkeypatch.setitem(EACH, "mlp", (3.0, 0.1))  # faster again is another time too
    with pytest.warns(UserWarning, match="measured anew"):
        assert measure_times(model, WORK) == first


def test_damaged_times_are_measured_anew_with_a_word(model, clock, cache):
    first = measure_times(model, WORK)
    (kept,) = (cache / "times").iterdir()
    whole = kept.read_text()
    held = json.loads(unsealed(whole.encode()))
    for damage in (
        whole.replace("1", "2", 1),
        whole[: len(whole) // 2],
        "",
        "[1]",
        "\xff\x00",
        json.dumps(held | {"dense_ms": "slow"}),
        json.dumps(held | {"dense_ms": float("nan")}),
        json.dumps(held | {"dense_ms": 0}),
        json.dumps(held | {"sublayer_ms": [1.0]}),
        json.dumps(held | {"sublayer_ms": held["sublayer_ms"] | {"attn.0": None}}),
        json.dumps(held | {"sublayer_ms": {"attn.0": 1.0}}),
        json.dumps(held | {"dense_ms": str(held["dense_ms"])}),
        json.dumps(
            held
            | {"sublayer_ms": held["sublayer_ms"] | {"attn.0": 2 * held["dense_ms"]}}
        ),
        json.dumps(held | {"about": held["about"] | {"prompt_tokens": 9}}),
        whole[:-1] + ', "dense_ms": 1.0}',
        '{"about": ' + "[" * 5000 + "]" * 5000 + "}",
    ):
        kept.write_text(damage, encoding="latin-1")
        with pytest.warns(UserWarning, match=r"damaged.*measured anew"):
            assert measure_times(model, WORK) == first
        assert kept.read_text() == whole
    assert len(clock) == 17
    measure_times(model, WORK)
    assert clock[17:] == [["dense"]]


def test_a_full_disk_leaves_no_torn_times(model, clock, cache, monkeypatch):
    def fill(_):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        first = measure_times(model, WORK)
    assert list((cache / "times").iterdir()) == []
    assert measure_times(model, WORK) == first
    assert len(list((cache / "times").iterdir())) == 1


def test_another_dtype_is_measured_anew(model, clock):
    measure_times(model, WORK)
    measure_times(model.to(torch.bfloat16), WORK)
    assert len(clock) == 2


def test_another_attention_is_measured_anew(model, clock):
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        measure_times(model, WORK)
    assert clock == [["0", "1", "dense"]] * 2


def test_of_many_new_tokens_some_are_decoded_and_all_are_counted(
    model, clock, monkeypatch
):
    decoded, timed = [], latency.compare_speeds

    def noting(model, variants, workload, **options):
        decoded.append(workload.generation_tokens)
        return timed(model, variants, workload, **options)

    monkeypatch.setattr(latency, "compare_speeds", noting)
    times = measure_times(model, Workload(8, 100, 2, 1))
    assert decoded == [latency.DECODED]
    assert times.sublayer_ms["attn.3"] == pytest.approx(2.0 + 100 * 0.3)
    assert times.dense_ms == pytest.approx(10 + 100 * 1 + 6 * (5 + 40))


def test_sublayers_that_differ_are_timed_apart():
    """Windows and full attention; experts and plain MLPs."""
    groups = {
        len(latency._alike(family(name).build())) for name in ("gemma3", "qwen3_moe")
    }
    assert groups == {3}
    assert len(latency._alike(family("llama").build())) == 2


def test_a_group_of_one_is_timed_and_the_last_attention_is_not(model, clock):
    one = family("llama").build(num_hidden_layers=1)
    times = measure_times(one, WORK)
    assert times.sublayer_ms == {"attn.0": 0.0, "mlp.0": pytest.approx(4.0)}


def test_a_speedup_is_met_in_predicted_time(model, clock):
    times = measure_times(model, WORK)
    space = Space(locate(model))
    budget = by_speedup(space, times, 1.3)
    found = search(space, budget, Table(space, 1))
    assert times.dense_ms / times.predicted_ms(space.plan(found.skipped)) >= 1.3
    least = min(times.sublayer_ms.values())
    assert (
        times.dense_ms / (times.predicted_ms(space.plan(found.skipped)) + least)
        < 1.3 * 1.1
    )
    with pytest.raises(UsageError, match=r"out of reach.*2\.00"):
        by_speedup(
            Space(locate(model)),
            SublayerTimes(WORK, 100.0, dict.fromkeys(space.names, 50 / 12)),
            2.5,
        )
    with pytest.raises(UsageError, match=r"is none: give 1\.3"):
        by_speedup(space, times, 0.9)


def test_the_dear_sublayer_is_taken_for_the_time_it_saves():
    """At equal cost for the loss, what takes twice the time is skipped first."""
    net = family("llama").build()
    space = Space(locate(net))
    table = Table(space, 0)
    table.single = dict.fromkeys(space.order, 1.0)
    saves = {name: 2.0 if name.startswith("mlp") else 1.0 for name in space.names}
    found = search(space, Budget(saves, 6.0, "6 ms"), table, patience=0)
    assert [unit[0].partition(".")[0] for unit in found.order] == ["mlp"] * 3


def test_search_by_speedup_says_what_was_predicted_and_measured(
    run, clock, cache, folder, tmp_path
):
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    asked = [
        "--speedup",
        "1.05",
        "--prompt-tokens",
        "8",
        "--generation-tokens",
        "4",
        "-o",
        tmp_path / "plan.json",
    ]
    code, out, err = run(
        "search", folder, *asked, "--text", tmp_path / "text.txt", *QUICK, "--json"
    )
    assert (code, err) == (0, "")
    (record,) = (
        SearchRecord.model_validate_json(json.dumps(one))
        for one in json.loads(out)["search"]
    )
    assert record.chosen == "search by kl: 1.05x at prompt 8, 4 new, batch 1"
    assert record.check.predicted_speedup >= 1.05
    assert record.check.measured_speedup.low <= record.check.measured_speedup.median
    assert json.loads(out)["verdict"]["speedup"] == record.check.measured_speedup.median
    assert len(list((cache / "times").iterdir())) == 1
