"""A mistake in Python is one line that says what to give, as one at the terminal is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import notall
from api import (
    Choice,
    Criterion,
    by_count,
    by_footprint,
    by_limit,
    check_faster,
    criteria,
    kl,
)
from families import family
from notall import Plan, RepairedPlan, Space, UsageError

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def model():
    return family("llama").build()


@pytest.fixture(scope="module")
def space(model):
    return Space(notall.locate(model), "mlp")


def chosen_by(model, space, way, **more):
    return notall.choose_plan(model, way, space, by_count(space, 2), [IDS], **more)


MISTAKES = {
    "a name for a model": (
        lambda m, s: notall.locate("gemma"),
        "give a model, as notall.load returns it, not str",
    ),
    "a model for its name": (
        lambda m, s: notall.load(m),
        "give a hub id, a folder or a file, not Llama",
    ),
    "a model for its structure": (
        lambda m, s: Space(m, "mlp"),
        r"structure of a model: notall.locate\(model\), not Llama",
    ),
    "that of a rule": (
        lambda m, s: notall.deepest(m, "mlp", 0.5),
        "structure of a model",
    ),
    "one plan": (
        lambda m, s: notall.evaluate(m, Plan([1]), [IDS]),
        r"a list of plans, such as \[plan\], not Plan",
    ),
    "a dict for a plan": (
        lambda m, s: notall.evaluate(m, [{"mlp": [1]}], [IDS]),
        "plans, such as .* not dict",
    ),
    "a dict to skip": (
        lambda m, s: notall.skip(m, {"mlp": [1]}).__enter__(),
        "give a plan, such as .* not dict",
    ),
    "a dict to remove": (
        lambda m, s: notall.remove(m, {"mlp": [1]}),
        "give a plan, such as .* not dict",
    ),
    "a dict to repair": (
        lambda m, s: notall.repair(m, {"mlp": [1]}, [IDS]),
        "give a plan, such as .* not dict",
    ),
    "a dict to heal": (
        lambda m, s: notall.heal(m, {"mlp": [1]}, [IDS], [IDS]),
        "give a plan, such as .* not dict",
    ),
    "no text": (
        lambda m, s: notall.evaluate(m, [Plan([1])], []),
        "there is no text to measure on",
    ),
    "no text to repair with": (
        lambda m, s: notall.repair(m, Plan([1]), []),
        "there is no text",
    ),
    "a tensor for a list": (
        lambda m, s: notall.evaluate(m, [Plan([1])], IDS),
        r"not a tensor of \(12,\), int64",
    ),
    "words": (
        lambda m, s: notall.evaluate(m, [Plan([1])], ["a word"]),
        "token ids as tensors .* not str",
    ),
    "numbers that are no ids": (
        lambda m, s: kl([IDS.float()]),
        r"not a tensor of \(2, 12\), float32",
    ),
    "one token": (
        lambda m, s: notall.evaluate(m, [Plan([1])], [IDS[:, :1]]),
        "a window of one token predicts nothing",
    ),
    "a foreign tokenizer": (
        lambda m, s: notall.evaluate(m, [Plan([1])], [IDS + 90]),
        "the model has no token 113",
    ),
    "an id below none": (
        lambda m, s: notall.evaluate(m, [Plan([1])], [IDS - 1]),
        "the model has no token -1",
    ),
    "a number for a budget": (
        lambda m, s: notall.choose_plan(m, "deepest", s, 3, [IDS]),
        "give a budget, such as .* not int",
    ),
    "a name for an objective": (
        lambda m, s: chosen_by(m, s, "deepest", objective="kl"),
        "an objective, such as",
    ),
    "a resource of another name": (
        lambda m, s: by_footprint(m, s, "kv", 0.3),
        "cannot save 'kv'.*: give one of params, weight_bytes, kv_bytes_per_token",
    ),
    "a kind that plans do not have": (
        lambda m, s: Plan(block=[1]),
        "attention, mlp, prefill, and no block; a block is named",
    ),
    "text for indices": (lambda m, s: Plan(attention="12"), "not '12'"),
    "a name to skip without": (
        lambda m, s: notall.skip("m", Plan([1])).__enter__(),
        "first the model, .* not str",
    ),
    "no language model": (
        lambda m, s: notall.locate(torch.nn.Linear(2, 2)),
        "Linear has no config: give a causal",
    ),
    "a tensor to compare layers by": (
        lambda m, s: notall.measure_similarity(m, IDS),
        r"not a tensor of \(12,\), int64",
    ),
    "a list of prompts": (
        lambda m, s: notall.generate_text(m, None, Plan(), ["a"]),
        "the prompt, a string, .* not list",
    ),
    "a prompt for a plan": (
        lambda m, s: notall.generate_text(m, None, "a", Plan()),
        "give a plan, .* not str",
    ),
    "text for a fraction": (
        lambda m, s: notall.deepest(notall.locate(m), "mlp", "0.3"),
        "give the fraction to skip, a number from 0 to 1, not str",
    ),
    "a count for a space": (
        lambda m, s: by_count(2, s),
        "give first the space, and then how many of it, not int",
    ),
    "text for a count": (
        lambda m, s: by_count(s, "2"),
        "give how many to skip, a number, not str",
    ),
    "text for a share": (
        lambda m, s: by_footprint(m, s, "params", "2"),
        "give how much to save, a number, not str",
    ),
    "text for nats": (
        lambda m, s: by_limit(s, "0.3"),
        "give a number of nats, not str",
    ),
    "text for a speedup": (
        lambda m, s: check_faster("1.1"),
        "give how many times as fast, a number, not str",
    ),
    "a budget of another space": (
        lambda m, s: notall.choose_plan(
            m, "cosine", Space(s.structure, "attention"), by_count(s, 2), [IDS]
        ),
        (
            r"the budget \(2 MLPs\) is of another space: make it of the space to choose"
            r" from"
        ),
    ),
    "a number for how to search": (
        lambda m, s: chosen_by(m, s, "deepest", config=12),
        r"give a notall\.SearchConfig, such as SearchConfig\(seed=1\), not int",
    ),
    "a choice for its plan": (
        lambda m, s: notall.skip(m, chosen_by(m, s, "deepest")).__enter__(),
        "not ChosenPlan; it is in its .plan",
    ),
    "weights by another name": (
        lambda m, s: RepairedPlan.of(Plan([1]), weight={}),
        (
            r"it has attention, mlp, prefill, weights, .* no weight \(did you mean"
            r" weights\?\)"
        ),
    ),
    "a file for a folder": (
        lambda m, s: RepairedPlan.load(__file__),
        "is a file: notall.Plan.load reads a plan without",
    ),
    "no folder": (
        lambda m, s: RepairedPlan.load("nowhere"),
        "there is no folder nowhere: give one that",
    ),
    "a folder for a plan": (
        lambda m, s: Plan.load(Path(__file__).parent),
        "a folder: notall.RepairedPlan.load reads",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(model, space, mistake):
    make, said = MISTAKES[mistake]
    with pytest.raises(UsageError, match=said) as caught:
        make(model, space)
    assert "\n" not in str(caught.value)


def test_a_plan_and_something_else_are_no_plan():
    with pytest.raises(TypeError, match="unsupported operand"):
        Plan([1]) | {"mlp": [1]}


def test_nothing_is_evaluated_inside_a_skip(model, space):
    with notall.skip(model, Plan([1])):
        for act in (
            lambda: notall.evaluate(model, [Plan([2])], [IDS]),
            lambda: chosen_by(model, space, "search"),
        ):
            with pytest.raises(UsageError, match=r"inside a `with notall\.skip"):
                act()
    assert len(notall.evaluate(model, [Plan([2])], [IDS])) == 1


def deepest(setting):
    """The deepest first."""
    return {unit: -int(unit[0].partition(".")[2]) for unit in setting.space.units}


def last(setting, budget):
    """Only the last ones."""
    units = setting.space.units[-2:]
    return Choice(frozenset(name for unit in units for name in unit), tuple(units))


@pytest.mark.parametrize(
    "way", [deepest, last, Criterion("mine", "the deepest", score=deepest), "deepest"]
)
def test_a_function_is_a_way_to_choose(model, space, way):
    assert chosen_by(model, space, way).plan.mlp == (2, 3)


def test_what_fails_in_notall_itself_is_seen_whole(model, space, monkeypatch):
    def broken(setting):
        raise ZeroDivisionError

    broken.__module__ = "notall.choosing.criteria.broken"
    monkeypatch.setitem(
        criteria.CRITERIA, "deepest", Criterion("deepest", "", score=broken)
    )
    with pytest.raises(ZeroDivisionError):
        chosen_by(model, space, "deepest")


def test_without_an_objective_it_is_the_kl_on_the_text(model, space):
    other = [IDS + 20]
    found = [
        chosen_by(model, space, "deepest", **more).cost
        for more in ({}, {"objective": kl([IDS])})
    ]
    assert found[0] == found[1]
    assert chosen_by(model, space, "deepest", objective=kl(other)).cost != found[0]


def test_a_folder_may_be_named_as_text(model, space, tmp_path):
    chosen_by(model, space, "search", out=str(tmp_path / "found"))
    assert (tmp_path / "found" / "evaluations.jsonl").is_file()
    repaired = notall.repair(model, Plan([1]), [IDS], out=str(tmp_path / "repaired"))
    assert RepairedPlan.load(str(tmp_path / "repaired")) == repaired


class TestARepairThatIsSaved:
    def test_is_the_same_when_it_is_loaded(self, model, tmp_path):
        repaired = notall.repair(model, Plan([1], [2]), [IDS])
        repaired.save(tmp_path / "kept")
        loaded = RepairedPlan.load(tmp_path / "kept")
        assert loaded == repaired
        assert loaded.weights.keys() == repaired.weights.keys()
        assert (loaded.refits, loaded.fingerprint) == (
            repaired.refits,
            repaired.fingerprint,
        )
        assert str(loaded.history) == str(repaired.history)
        ours, theirs = (
            notall.evaluate(model, [plan], [IDS])[0].nll for plan in (repaired, loaded)
        )
        assert ours == theirs

    def test_keeps_what_it_was_healed_from(self, model, tmp_path):
        repaired = notall.repair(model, Plan([1]), [IDS])
        healed = notall.heal(model, repaired, [IDS], [IDS + 20])
        healed.save(tmp_path / "kept")
        loaded = RepairedPlan.load(tmp_path / "kept")
        assert loaded == healed
        assert (
            [step.by for step in loaded.history]
            == [step.by for step in healed.history]
            == ["repair", "heal"]
        )

    def test_takes_a_new_folder(self, model, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(
            UsageError, match="holds something already: choose a new folder"
        ):
            notall.repair(model, Plan([1]), [IDS]).save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_is_not_called_repaired_without_weights(self):
        assert str(RepairedPlan.of(Plan([1]))) == "attention 1"
        weights = {"model.layers.0.mlp.down_proj.weight": torch.ones(2)}
        assert (
            str(RepairedPlan.of(Plan([1]), weights=weights)) == "attention 1 (repaired)"
        )


CONSUMER = """
import torch
import notall
from notall import Plan

model, tokenizer = notall.load("smollm2")
plan: Plan = notall.deepest(notall.locate(model), "mlp", 0.1)
with notall.skip(model, plan) as skipped:
    tokens = skipped.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=4)
    same = model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=4)
nats: float = notall.evaluate(model, [plan], [torch.zeros(1, 2, dtype=torch.long)])[0].nll
"""


MISSPELT = {
    "attribute.py": (
        "import notall\nnotall.choose_pln()",
        'Module has no attribute "choose_pln"',
    ),
    "imported.py": ("from notall import skipp", 'has no attribute "skipp"'),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.any_transformers  # it reads types
def test_a_program_that_uses_it_passes_a_strict_type_checker_without_misspelt_names(
    tmp_path,
):
    """In one run, which reads all of torch."""
    (tmp_path / "consumer.py").write_text(CONSUMER)
    for name, (content, _) in MISSPELT.items():
        (tmp_path / name).write_text(content)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--no-incremental",
        "--config-file",
        "",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    *lines, told = done.stdout.splitlines()
    assert told.startswith("Found 2 errors in 2 files (checked 3"), done.stdout
    for line, (name, (_, said)) in zip(sorted(lines), MISSPELT.items(), strict=True):
        assert line.startswith(f"{name}:")
        assert said in line
