"""Choosing what the prompt alone skips: judged by what follows a prompt."""

import json
from itertools import combinations

import pytest
import torch

from api import (
    Evaluator,
    JudgedRecord,
    PromptRepair,
    Quartiles,
    RoundTimes,
    Setting,
    SpeedCheck,
    SublayerTimes,
    Workload,
    by_count,
    by_footprint,
    by_limit,
    by_speedup,
    choose_as_fast,
    evaluate,
    kl,
    last_tokens_of,
    latency,
    measure_times,
    nll,
    outcomes,
    read,
    recovering,
    searching,
)
from command_line import QUICK
from families import TRANSFORMERS_5, family
from notall import Plan, SearchConfig, Space, UsageError, choose_plan, locate
from test_searching import Table
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # of sets and times

BATCHES = [
    torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
HELD = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(7))]
PROMPT = 8
REPAIRED = SearchConfig(after_repair=True)
WORK = Workload(prompt_tokens=8, generation_tokens=10, concurrency=2, rounds=1)
SAVES = {"attn": 1.5, "mlp": 3.0}  # milliseconds of a prompt
needs_5 = pytest.mark.skipif(
    not TRANSFORMERS_5,
    reason="of hybrids, which transformers 4 keeps in caches of their own",
)


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


def space(model, kind="block", **more):
    return Space(locate(model), kind, phase="prefill", **more)


@pytest.mark.parametrize("objective", [kl, nll])
def test_a_set_costs_what_its_plan_does(model, objective):
    among = space(model, "sublayer", last_tokens=2)
    evaluator = Evaluator(model, objective(BATCHES, prompt_tokens=PROMPT), space=among)
    sets = [
        frozenset(names)
        for names in (["attn.1"], ["mlp.3"], ["attn.0", "mlp.0", "mlp.2"], [])
    ]
    evaluator.set_prefix(sets[0])
    for skipped, cost in zip(sets, evaluator.costs(sets)):
        plan = among.plan(skipped)
        assert plan.prefill.last_tokens == (2 if skipped else 1)
        (found,) = evaluate(model, [plan], BATCHES, prompt_tokens=PROMPT)
        assert cost == pytest.approx(
            found.kl if objective is kl else found.nll, abs=2e-5
        )


@pytest.mark.parametrize("states_bytes", [2**30, 1])
def test_what_is_kept_of_a_prefix_changes_nothing(model, states_bytes):
    among = space(model, "sublayer")
    walking = Evaluator(
        model, kl(BATCHES, prompt_tokens=PROMPT), space=among, states_bytes=states_bytes
    )
    base = frozenset({"attn.2"})
    for skipped in ({"attn.2", "mlp.3"}, {"attn.2", "mlp.0"}, {"attn.2", "attn.3"}):
        walking.set_prefix(base)
        alone = Evaluator(model, kl(BATCHES, prompt_tokens=PROMPT), space=among)
        assert walking.cost(frozenset(skipped)) == pytest.approx(
            alone.cost(frozenset(skipped)), abs=1e-6
        )
        base = frozenset(skipped)


def test_the_search_finds_the_last_block_for_nothing(model):
    among = space(model)
    config = SearchConfig(held_out=HELD)
    found = choose_plan(
        model, "search", among, by_count(among, 1), BATCHES, config=config
    )
    assert found.plan == Plan(prefill={"attention": [3], "mlp": [3]})
    assert abs(found.cost) < 1e-6
    assert abs(found.held_out[1].kl) < 1e-6


def test_the_search_finds_the_best_of_all_sets(model):
    among = space(model)
    found = choose_plan(model, "search", among, by_count(among, 2), BATCHES)
    pairs = [
        Plan(prefill={"attention": pair, "mlp": pair})
        for pair in combinations(range(4), 2)
    ]
    costs = [one.kl for one in evaluate(model, pairs, BATCHES, prompt_tokens=PROMPT)]
    assert found.cost == pytest.approx(min(costs), abs=1e-6)
    assert found.plan == pairs[costs.index(min(costs))]


def test_a_limit_of_nats(model):
    among = space(model, "mlp")
    found = choose_plan(model, "search", among, by_limit(among, 1e-6), BATCHES)
    assert found.plan.prefill.mlp == (3,)


def test_it_goes_on_and_another_phase_is_other_work(model, tmp_path):
    among = space(model)
    first = choose_plan(
        model, "search", among, by_count(among, 2), BATCHES, out=tmp_path
    )
    again = choose_plan(
        model, "search", among, by_count(among, 2), BATCHES, out=tmp_path
    )
    assert (again.plan, again.cost) == (first.plan, first.cost)
    every = Space(locate(model), "block")
    with pytest.raises(
        UsageError,
        match="holds results with objective kl of sets that the prompt alone",
    ):
        choose_plan(
            model,
            "search",
            every,
            by_count(every, 2),
            BATCHES,
            kl(BATCHES, prompt_tokens=PROMPT),
            out=tmp_path,
        )


@needs_5
def test_mixers_without_keys_and_values_are_not_among_them():
    structure = locate(family("qwen3_next").build())
    names = Space(structure, "attention", phase="prefill").names
    assert names
    assert all(
        part.mixer == "full_attention"
        for part in structure.sublayers
        if part.name in names
    )
    among = Space(structure, "sublayer", phase="prefill")
    assert among.allows(frozenset(names))  # the others stay
    assert not space(family("llama").build()).allows(
        frozenset(f"attn.{index}" for index in range(4))
    )


@needs_5
def test_what_is_refused(model):
    among = space(model)
    cases = {
        "a prompt that skips leaves the checkpoint whole": lambda: space(
            model, portable=True
        ),
        "what the prompt alone skips saves no params: give how many to skip": (
            lambda: by_footprint(model, among, "params", 0.1)
        ),
        "takes four sequences or more": lambda: choose_plan(
            model, "search", among, by_count(among, 1), BATCHES[:1], config=REPAIRED
        ),
        "these times are of the phase all": lambda: by_speedup(
            among, SublayerTimes(WORK, 9.0, {}), 1.1
        ),
        "nothing says which tokens are the prompt": lambda: choose_plan(
            model, "search", among, by_count(among, 1), BATCHES, kl(BATCHES)
        ),
        "a plan skips sublayers in the prompt alone, and nothing says": (
            lambda: choose_plan(
                model,
                "search",
                among,
                by_count(among, 1),
                BATCHES,
                kl(BATCHES),
                REPAIRED,
            )
        ),
        "leaves nothing to score in windows of 16": lambda: kl(
            BATCHES, prompt_tokens=16
        ),
        "the prompt alone can skip nothing, as sublayers of": lambda: Space(
            locate(family("zamba2").build()), phase="prefill"
        ),
    }
    for says, use in cases.items():
        with pytest.raises(UsageError, match=says):
            use()


@pytest.mark.usefixtures("short_prose")
def test_search_at_the_command_line(run, folder, tmp_path):
    plan = tmp_path / "plan.json"
    words = [
        "--skip",
        "block:2",
        "--phase",
        "prefill",
        "--sequences",
        2,
        "--length",
        24,
        "-o",
        plan,
    ]
    code, out, err = run("search", folder, *words, "--last-tokens", 2, "--json")
    assert code == 0, err
    found = json.loads(plan.read_text())
    assert found["attention"] == found["mlp"] == []
    assert found["prefill"]["attention"] == found["prefill"]["mlp"]
    assert (len(found["prefill"]["mlp"]), found["prefill"]["last_tokens"]) == (2, 2)
    assert "behind a prompt of 12 tokens" in json.loads(out)["verdict"]["said"]
    for more, says in (
        (["--repair", "replaceme"], "keys and values of a prompt are refit"),
        (
            ["--objective", "answers", "--prompts", folder / "config.json"],
            "judged by the text behind it, and not by",
        ),
        (["--kv", "0.1"], "give one budget"),
    ):
        code, _, err = run("search", folder, *words, *more)
        assert (code, says in err) == (2, True), err
    code, _, err = run(
        "search",
        folder,
        "--skip",
        "mlp:1",
        "--last-tokens",
        2,
        "-o",
        tmp_path / "other.json",
    )
    assert (code, "add --phase prefill" in err) == (2, True), err


# --- a speedup of the prompt
# --------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A `compare` on which a prompt takes 100 ms less what it skips, and a token 7 ms,
    whatever is skipped.
    """
    asked = []

    def compare(model, variants, workload, **_):
        asked.append(workload)
        plans = {name: variant.args[1] for name, variant in variants.items()}
        saved = {
            name: sum(SAVES[one.split(".")[0]] for one in plan.prefill.names)
            for name, plan in plans.items()
        }
        rounds = workload.rounds
        return {
            name: RoundTimes((100.0 - ms,) * rounds, (7.0,) * rounds, None)
            for name, ms in saved.items()
        }

    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "compare_speeds", compare)
    return asked


def test_times_of_a_prompt_are_of_its_first_token_and_kept_apart(
    model, clock, tmp_path
):
    times = measure_times(model, WORK, phase="prefill")
    assert times.dense_ms == 100.0
    assert (times.sublayer_ms["attn.2"], times.sublayer_ms["mlp.1"]) == pytest.approx(
        (1.5, 3.0)
    )
    assert times.predicted_ms(
        Plan(prefill={"attention": [1], "mlp": [0, 1]})
    ) == pytest.approx(92.5)
    assert {workload.generation_tokens for workload in clock} == {1}
    count = len(clock)
    longer = Workload(prompt_tokens=8, generation_tokens=99, concurrency=2, rounds=1)
    assert (
        measure_times(model, longer, phase="prefill").sublayer_ms == times.sublayer_ms
    )
    assert (
        len(clock) == count + 1
    )  # a look at whether they hold: decoding is no part of them
    assert len([*(tmp_path / "times").iterdir()]) == 1
    assert measure_times(model, WORK).sublayer_ms["mlp.1"] == 0.0
    assert len([*(tmp_path / "times").iterdir()]) == 2


@needs_5
def test_what_no_prompt_can_skip_has_no_time_of_it(clock):
    model = family("qwen3_next").build()
    bound = [part.name for part in locate(model).sublayers if part.state_bytes]
    times = measure_times(model, WORK, phase="prefill")
    assert bound
    assert {times.sublayer_ms[name] for name in bound} == {0.0}


@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_of_all_sets_that_are_as_fast_is_found(
    model, clock, monkeypatch, seed
):
    monkeypatch.setattr(
        outcomes,
        "choose",
        lambda _, setting, budget: searching.search_sets(setting, budget, {}),
    )
    among = space(model, "sublayer")
    table = Table(among, seed)
    budget = by_speedup(among, measure_times(model, WORK, phase="prefill"), 1.08)
    found = choose_as_fast("search", Setting(model, among, BATCHES, table), budget)
    every = (
        frozenset(some)
        for count in range(8)
        for some in combinations(among.names, count)
    )
    fast = [one for one in every if budget.met(one) and among.allows(one)]
    assert found.met
    assert found.check.measured_speedup.median >= 1.08
    assert table.cost(found.choice.skipped) == pytest.approx(min(map(table.cost, fast)))


def test_sets_of_a_prompt_that_save_otherwise_are_timed_each(model, monkeypatch):
    """They leave the same weights, so that weights do not tell them apart."""
    timed = []

    def check_times(model, plan, times, **_):
        timed.append(len(plan.prefill))
        ratio = 100 / (100 - 2 * len(plan.prefill))
        measured = Quartiles(median=ratio, low=ratio, high=ratio, n=5)
        return SpeedCheck(
            predicted_ms=1,
            measured_ms=1,
            predicted_speedup=1,
            measured_speedup=measured,
        )

    monkeypatch.setattr(outcomes, "check_times", check_times)
    among = space(model, "sublayer")
    budget = by_speedup(
        among,
        SublayerTimes(WORK, 100.0, dict.fromkeys(among.names, 4.0), "prefill"),
        1.12,
    )
    found = choose_as_fast(
        "greedy", Setting(model, among, BATCHES, Table(among, 0)), budget
    )
    assert timed == [3, 6]  # 6 ms of the 10.7 that are needed, and 12
    assert found.met


@pytest.mark.parametrize(("faster", "code"), [(1.08, 0), (1.4, 2)])
def test_search_for_a_speedup_of_the_prompt(run, tmp_path, clock, faster, code):
    folder = save_tiny_checkpoint(
        tmp_path / "tiny", num_hidden_layers=4, max_position_embeddings=1024
    )
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    words = [
        "search",
        folder,
        "--phase",
        "prefill",
        "--speedup",
        faster,
        "-o",
        tmp_path / "plan.json",
        *QUICK,
    ]
    left, out, err = run(*words, "--text", tmp_path / "text.txt", "--json")
    assert left == code, err
    if code:
        assert "is out of reach" in err
        return
    (record,) = json.loads(out)["search"]
    assert record["check"]["measured_speedup"]["median"] >= faster
    assert "1.08x to the first token at prompt 512, batch 1" in record["chosen"]
    assert "reads the prompt 1.08× as fast" in json.loads(out)["verdict"]["said"]


def test_search_leaves_with_3_where_the_prompt_stays_too_slow(
    run, tmp_path, clock, monkeypatch
):
    folder = save_tiny_checkpoint(
        tmp_path / "tiny", num_hidden_layers=4, max_position_embeddings=1024
    )
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(300))))
    names = [f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(4)]
    times = SublayerTimes(WORK, 100.0, dict.fromkeys(names, 10.0), "prefill")
    monkeypatch.setattr(latency, "measure_times", lambda *_, **__: times)
    words = [
        "search",
        folder,
        "--phase",
        "prefill",
        "--speedup",
        1.3,
        "-o",
        tmp_path / "plan.json",
        *QUICK,
    ]
    code, _, err = run(*words, "--text", tmp_path / "text.txt", "--json")
    assert code == 3
    assert "missed 1.3x to the first token" in err


# --- the deepest are a place to start from
# --------------------------------------------------------------------------------------


class Tails(Table):
    """Sublayers that are dear each but where the four deepest are skipped together,
    which no swap leads to.
    """

    GOOD = frozenset({"attn.2", "mlp.2", "attn.3", "mlp.3"})

    def cost(self, skipped, share=1.0):
        cost = super().cost(skipped, share)
        return (
            cost - 9.0 if skipped >= self.GOOD else cost + 2 * len(self.GOOD & skipped)
        )


def test_the_deepest_are_tried_and_kept_where_they_cost_less(model):
    among = space(model, "sublayer")
    for budget in (by_count(among, 4), by_limit(among, 1.0)):
        found = searching.search_sets(
            Setting(model, among, BATCHES, Tails(among, 0)), budget, {}
        )
        assert found.skipped >= Tails.GOOD
        assert frozenset(name for unit in found.order for name in unit) == found.skipped
    every = Space(locate(model), "sublayer")
    found = searching.search_sets(
        Setting(model, every, BATCHES, Tails(every, 0)), by_count(every, 4), {}
    )
    assert not found.skipped >= Tails.GOOD


@pytest.mark.parametrize("seed", range(6))
def test_a_search_is_no_worse_than_the_deepest(model, seed):
    among = space(model, "block")
    table = Table(among, seed, 1.0, forgiving=True)
    found = searching.search_sets(
        Setting(model, among, BATCHES, table), by_count(among, 2), {}
    )
    assert table.cost(found.skipped) <= table.cost(frozenset(sum(among.units[-2:], ())))


# --- after a repair
# --------------------------------------------------------------------------------------


def repairing(model):
    return PromptRepair.of(model, BATCHES, PROMPT)


def test_of_the_best_sets_the_one_that_a_refit_leaves_closest_is_chosen(model):
    among = space(model, "sublayer")
    evaluator = Evaluator(model, repairing(model).objective, space=among)
    plain = choose_plan(
        model, "search", among, by_count(among, 3), repairing(model).judged
    )
    found = choose_plan(
        model, "search", among, by_count(among, 3), BATCHES, config=REPAIRED
    )
    assert len(found.plan.prefill) == 3
    deepest = among.plan(sum(among.units[-3:], ()))
    kept = {
        plan: repairing(model).kept(plan) for plan in (found.plan, deepest, plain.plan)
    }
    assert max(kept.values()) == kept[found.plan]
    assert found.cost == pytest.approx(
        evaluator.cost(frozenset(found.plan.prefill.names)), abs=1e-6
    )
    assert "sets judged by what they keep: 4" in found.plan.note


def test_the_deepest_mlps_are_among_what_is_compared(model):
    """What stands in for them after a refit, the costs without one do not tell."""
    among, seen = space(model, "sublayer"), []
    mlps = among.plan(["mlp.1", "mlp.2", "mlp.3"])

    def kept(plan):
        seen.append(plan)
        return float(plan == mlps)

    config = SearchConfig(recovering=recovering.Recovering(kept, 2.0))
    found = choose_plan(
        model, "search", among, by_count(among, 3), BATCHES, config=config
    )
    assert found.plan == mlps
    assert among.plan(sum(among.units[-3:], ())) in seen


def test_a_limit_is_of_what_a_refit_leaves(model):
    """Blocks 2 and 3 cost less than the limit, and after a refit, to so few tokens,
    more.
    """
    among, limit = space(model, "block"), 0.025
    plain = choose_plan(
        model, "search", among, by_limit(among, limit), repairing(model).judged
    )
    assert -repairing(model).kept(plain.plan) > limit
    found = choose_plan(
        model, "search", among, by_limit(among, limit), BATCHES, config=REPAIRED
    )
    assert "as far as the KL after a refit allows" in found.plan.note
    assert -repairing(model).kept(found.plan) <= limit
    assert found.plan.prefill.blocks


def test_sets_that_only_a_refit_brings_below_the_limit_are_looked_at(
    model, monkeypatch
):
    among, limit = space(model, "block"), 0.03

    def kept(self, plan):
        return -evaluate(model, [plan], self.judged, PROMPT)[0].kl / 4

    monkeypatch.setattr(PromptRepair, "kept", kept)
    plain = choose_plan(
        model, "search", among, by_limit(among, limit), repairing(model).judged
    )
    found = choose_plan(
        model, "search", among, by_limit(among, limit), BATCHES, config=REPAIRED
    )
    assert (plain.plan.prefill.blocks, found.plan.prefill.blocks) == ((2, 3), (1, 2, 3))


def test_a_set_of_mlps_alone_is_compared_too(model):
    among = space(model, "mlp")
    found = choose_plan(
        model, "search", among, by_count(among, 2), BATCHES, config=REPAIRED
    )
    assert len(found.plan.prefill.mlp) == 2


# --- how many last tokens run whole
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "whole"), [(2048, 64), (256, 64), (100, 25), (12, 3), (3, 1)]
)
def test_last_tokens_are_64_or_a_quarter_of_the_prompt(prompt, whole):
    assert last_tokens_of(prompt) == whole


TIMED = ["--speedup", "1.05", "--prompt-tokens", 8, "--generation-tokens", 2]


@pytest.mark.slow
@pytest.mark.usefixtures("short_prose", "clock")
@pytest.mark.parametrize(
    ("more", "whole"),
    [
        (["--skip", "block:2"], 3),  # of 12 tokens ahead of those that are scored
        (TIMED, 2),  # of 8 that are timed
        (["--skip", "block:2", "--last-tokens", 1], 1),
    ],
)
def test_a_search_runs_the_end_of_the_prompt_whole(run, folder, tmp_path, more, whole):
    plan = tmp_path / "plan.json"
    words = ["--phase", "prefill", "--sequences", 2, "--length", 24, "-o", plan]
    code, _, err = run("search", folder, *words, *more)
    assert code in (0, 3), err
    assert json.loads(plan.read_text())["prefill"]["last_tokens"] == whole


# --- by what is kept of tasks
# --------------------------------------------------------------------------------------

ANSWERS = ["--tasks", "answers", "--limit", 4]
with_tasks = pytest.mark.usefixtures("own_tasks_only", "short_prose")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With room for an answer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_checkpoint(
        folder, num_hidden_layers=4, max_position_embeddings=512
    )


@pytest.mark.slow
@with_tasks
def test_a_recovery_without_a_phase_is_answered_for_every_token_and_for_the_prompt(
    run, checkpoint, tmp_path
):
    pytest.importorskip("lm_eval")
    out = tmp_path / "plan.json"
    words = [
        "search",
        checkpoint,
        *QUICK,
        "--text",
        "prose",
        "--skip",
        "block",
        *ANSWERS,
        "--recovery",
        0.01,
    ]
    code, shown, err = run(*words, "-o", out, "--json")
    assert code in (0, 3), err
    every, prompt = Plan.load(out), Plan.load(tmp_path / "plan-prefill.json")
    assert (bool(every), every.prefill) == (True, Plan().prefill)
    assert (len(prompt), bool(prompt.prefill)) == (0, True)
    told = json.loads(shown)
    assert len(told["search"]) == len(told["search_prefill"]) == 1
    assert "in the prompt" in told["verdict_prefill"]["said"]
    assert {one["task"] for one in told["tasks_prefill"]} == {"answers"}
    (score,) = read(tmp_path / "plan-prefill.search" / JudgedRecord.file, JudgedRecord)
    assert score.plan == prompt
    assert not (
        tmp_path / "plan-prefill.search" / "answers"
    ).exists()  # the original model answers once
    assert code == (
        3 if told["verdict"]["missed"] or told["verdict_prefill"]["missed"] else 0
    )
    code, shown, err = run(*words, "--phase", "prefill", "-o", tmp_path / "other.json")
    assert (
        Plan.load(tmp_path / "other.json").prefill.indices == prompt.prefill.indices
    ), err
    assert not (tmp_path / "other-prefill.json").exists()


@with_tasks
@pytest.mark.parametrize(
    "more",
    [
        ["--skip", "attention:1"],
        pytest.param(["--phase", "all"], marks=pytest.mark.slow),
        pytest.param(["--skip", "portable"], marks=pytest.mark.slow),
    ],
)
def test_a_recovery_of_every_token_alone_is_told_alone(run, checkpoint, tmp_path, more):
    pytest.importorskip("lm_eval")
    words = [
        "search",
        checkpoint,
        *QUICK,
        "--text",
        "prose",
        *ANSWERS,
        "--recovery",
        0.01,
        "--criterion",
        "deepest",
    ]
    code, shown, err = run(*words, *more, "-o", tmp_path / "plan.json", "--json")
    assert code in (0, 3), err
    assert "search_prefill" not in json.loads(shown)
    assert not (tmp_path / "plan-prefill.json").exists()
