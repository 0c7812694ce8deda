"""Choosing what the prompt alone skips: judged by what follows a prompt."""

import json
from itertools import combinations

import pytest
import torch

from api import Evaluator, by_count, by_footprint, by_limit, evaluate, kl, nll
from families import TRANSFORMERS_5, family
from notall import Plan, Space, UsageError, choose_plan, locate

BATCHES = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(2)]
HELD = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(7))]
PROMPT = 8
needs_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="of hybrids, which transformers 4 keeps in caches of their own")


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


def space(model, kind="block", **more):
    return Space(locate(model), kind, phase="prefill", **more)


@pytest.mark.parametrize("objective", [kl, nll])
def test_a_set_costs_what_its_plan_does(model, objective):
    among = space(model, "sublayer", last_tokens=2)
    evaluator = Evaluator(model, objective(BATCHES, prompt_tokens=PROMPT), space=among)
    sets = [frozenset(names) for names in (["attn.1"], ["mlp.3"], ["attn.0", "mlp.0", "mlp.2"], [])]
    evaluator.set_prefix(sets[0])
    for skipped, cost in zip(sets, evaluator.costs(sets)):
        plan = among.plan(skipped)
        assert plan.prefill.last_tokens == (2 if skipped else 1)
        (found,) = evaluate(model, [plan], BATCHES, prompt_tokens=PROMPT)
        assert cost == pytest.approx(found.kl if objective is kl else found.nll, abs=2e-5)


@pytest.mark.parametrize("states_bytes", [2**30, 1])
def test_what_is_kept_of_a_prefix_changes_nothing(model, states_bytes):
    among = space(model, "sublayer")
    walking = Evaluator(model, kl(BATCHES, prompt_tokens=PROMPT), space=among, states_bytes=states_bytes)
    base = frozenset({"attn.2"})
    for skipped in ({"attn.2", "mlp.3"}, {"attn.2", "mlp.0"}, {"attn.2", "attn.3"}):
        walking.set_prefix(base)
        alone = Evaluator(model, kl(BATCHES, prompt_tokens=PROMPT), space=among)
        assert walking.cost(frozenset(skipped)) == pytest.approx(alone.cost(frozenset(skipped)), abs=1e-6)
        base = frozenset(skipped)


def test_the_search_finds_the_last_block_for_nothing(model):
    among = space(model)
    found = choose_plan(model, "search", among, by_count(among, 1), BATCHES, held_out=HELD)
    assert found.plan == Plan(prefill={"attention": [3], "mlp": [3]})
    assert abs(found.cost) < 1e-6
    assert abs(found.held_out[1].kl) < 1e-6


def test_the_search_finds_the_best_of_all_sets(model):
    among = space(model)
    found = choose_plan(model, "search", among, by_count(among, 2), BATCHES)
    pairs = [Plan(prefill={"attention": pair, "mlp": pair}) for pair in combinations(range(4), 2)]
    costs = [one.kl for one in evaluate(model, pairs, BATCHES, prompt_tokens=PROMPT)]
    assert found.cost == pytest.approx(min(costs), abs=1e-6)
    assert found.plan == pairs[costs.index(min(costs))]


def test_a_limit_of_nats(model):
    among = space(model, "mlp")
    found = choose_plan(model, "search", among, by_limit(among, 1e-6), BATCHES)
    assert found.plan.prefill.mlp == (3,)


def test_it_goes_on_and_another_phase_is_other_work(model, tmp_path):
    among = space(model)
    first = choose_plan(model, "search", among, by_count(among, 2), BATCHES, out=tmp_path)
    again = choose_plan(model, "search", among, by_count(among, 2), BATCHES, out=tmp_path)
    assert (again.plan, again.cost) == (first.plan, first.cost)
    every = Space(locate(model), "block")
    with pytest.raises(UsageError, match="holds results with objective kl of sets that the prompt alone"):
        choose_plan(
            model, "search", every, by_count(every, 2), BATCHES, kl(BATCHES, prompt_tokens=PROMPT), out=tmp_path
        )


@needs_5
def test_mixers_without_keys_and_values_are_not_among_them():
    structure = locate(family("qwen3_next").build())
    names = Space(structure, "attention", phase="prefill").names
    assert names
    assert all(part.mixer == "full_attention" for part in structure.sublayers if part.name in names)
    among = Space(structure, "sublayer", phase="prefill")
    assert among.allows(frozenset(names))  # the others stay
    assert not space(family("llama").build()).allows(frozenset(f"attn.{index}" for index in range(4)))


@needs_5
def test_what_is_refused(model):
    among = space(model)
    cases = {
        "a prompt that skips leaves the checkpoint whole": lambda: space(model, portable=True),
        "what the prompt alone skips saves no params: give how many to skip": lambda: by_footprint(
            model, among, "params", 0.1
        ),
        "a search after a repair is of every token": lambda: choose_plan(
            model, "search", among, by_count(among, 1), BATCHES, after_repair=True
        ),
        "nothing says which tokens are the prompt": lambda: choose_plan(
            model, "search", among, by_count(among, 1), BATCHES, kl(BATCHES)
        ),
        "leaves nothing to score in windows of 16": lambda: kl(BATCHES, prompt_tokens=16),
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
    words = ["--skip", "block:2", "--phase", "prefill", "--sequences", 2, "--length", 24, "-o", plan]
    code, out, err = run("search", folder, *words, "--last-tokens", 2, "--json")
    assert code == 0, err
    found = json.loads(plan.read_text())
    assert found["attention"] == found["mlp"] == []
    assert found["prefill"]["attention"] == found["prefill"]["mlp"]
    assert (len(found["prefill"]["mlp"]), found["prefill"]["last_tokens"]) == (2, 2)
    assert "behind a prompt of 12 tokens" in json.loads(out)["verdict"]["said"]
    for more, says in (
        (["--repair", "refit"], "a search with --repair is of every token"),
        (["--objective", "answers", "--prompts", folder / "config.json"], "judged by the text behind it, and not by"),
        (["--kv", "0.1"], "give one budget"),
    ):
        code, _, err = run("search", folder, *words, *more)
        assert (code, says in err) == (2, True), err
    code, _, err = run("search", folder, "--skip", "mlp:1", "--last-tokens", 2, "-o", tmp_path / "other.json")
    assert (code, "add --phase prefill" in err) == (2, True), err
