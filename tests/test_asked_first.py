"""What is wrong with a command is said before what takes long: models are read after
options, texts written last.
"""

from __future__ import annotations

import shutil

import pytest
import typer

from api import app, texts_mix
from notall import Plan, SearchConfig, TrainConfig, UsageError

pytestmark = pytest.mark.any_transformers  # of words and exit codes

SIZES = {
    "--sequences": (
        [
            "similarity",
            "search",
            "compare",
            "sweep",
            "paper",
            "eval",
            "draft",
            "repair",
            "heal",
        ],
        "0",
    ),
    "--length": (
        ["similarity", "search", "compare", "pareto", "sweep", "paper", "eval"],
        "1",
    ),
    "--batch-size": (
        [
            "similarity",
            "search",
            "compare",
            "pareto",
            "sweep",
            "paper",
            "eval",
            "repair",
            "heal",
        ],
        "0",
    ),
    "--held-out-sequences": (["search", "compare", "pareto"], "-1"),
    "--repair-sequences": (["search", "eval", "export"], "0"),
}
NEEDED = {
    "search": ["--skip", "mlp:1"],
    "eval": ["--skip", "mlp:1"],
    "draft": ["--skip", "mlp:1"],
    "repair": ["--plan", "{plan}"],
    "heal": ["--plan", "{plan}"],
    "export": ["--plan", "{plan}", "--to", "hf", "--repair", "refit"],
    "pareto": ["--engine", "transformers"],
}


@pytest.mark.parametrize(
    ("option", "command", "value"),
    [
        (option, command, value)
        for option, (commands, value) in SIZES.items()
        for command in commands
    ],
)
def test_numbers_that_make_no_windows_are_refused_before_a_model_is_read(
    run, tmp_path, option, command, value
):
    Plan([1]).save(tmp_path / "plan.json")
    more = [
        word.format(plan=tmp_path / "plan.json") for word in NEEDED.get(command, [])
    ]
    code, _, err = run(
        command,
        tmp_path / "no-model",
        *more,
        "--out",
        tmp_path / "out.json",
        option,
        value,
    )
    assert (code, err.count("\n")) == (2, 1), err
    assert "give at least 1, 2 and 1" in err


@pytest.fixture
def weightless(folder, tmp_path):
    """A model's folder without its weights."""
    shutil.copytree(
        folder, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    return tmp_path / "weightless"


PLANS = {
    "of a deeper model": (Plan([17]), "the plan names layer 17, but layers are 0 to 5"),
    "of another shape": (
        Plan([1], fingerprint="llama-2x8"),
        "this plan was made for llama-2x8",
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "command", ["eval", "draft", "repair", "heal", "pareto", "generate"]
)
def test_a_plan_of_another_model_is_refused_before_weights_are_read(
    run, weightless, tmp_path, command, plan
):
    wrong, says = PLANS[plan]
    wrong.save(tmp_path / "plan.json")
    more = {"pareto": ["--engine", "transformers"], "generate": ["a prompt"]}.get(
        command, []
    )
    code, _, err = run(command, weightless, *more, "--plan", tmp_path / "plan.json")
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err


@pytest.mark.parametrize(
    "words",
    [
        ["search", "--skip", "sublayer:999"],
        ["search", "--params", "1e300"],
        ["compare", "--skip", "attention:99"],
        ["compare", "--skip", "atention:1"],
        [
            "compare",
            "--skip",
            "attention:1",
            "--rounds",
            "1",
            "--prompt-tokens",
            "9999",
        ],
        ["search", "--skip", "mlp:1", "--length", "9999"],
    ],
)
def test_what_a_model_has_too_little_of_is_refused_before_a_text_is_written(
    run, folder, tmp_path, monkeypatch, words
):
    monkeypatch.setattr(
        texts_mix, "text_of", lambda *_, **__: pytest.fail("a text was written")
    )
    code, _, err = run(words[0], folder, *words[1:], "--out", tmp_path / "out.json")
    assert (code, err.count("\n")) == (2, 1), err


# --- options of one meaning each
# --------------------------------------------------------------------------------------


def given(command, *words):
    """The values of a command's options."""
    loaded = typer.main.get_command(app).commands[command].loaded()
    return loaded.make_context(
        command, ["model", *words], resilient_parsing=True
    ).params


@pytest.mark.parametrize("word", ["--per-step", "--batch-size"])
def test_the_batch_of_a_training_has_a_name_of_its_own_and_keeps_the_old_one(word):
    assert given("heal", word, "6")["batch_size"] == 6
    assert "--per-step" not in " ".join(help_of("repair"))


def help_of(command):
    loaded = typer.main.get_command(app).commands[command].loaded()
    return [
        f"{' '.join(param.opts)}: {param.help}"
        for param in loaded.params
        if param.param_type_name == "option"
    ]


@pytest.mark.parametrize(
    ("command", "option", "unit"),
    [
        ("search", "--max-minutes", "minutes by the clock"),
        ("repair", "--minutes", "minutes of CPU time"),
        ("heal", "--minutes", "minutes of CPU time"),
    ],
)
def test_a_time_says_of_which_clock_it_is(command, option, unit):
    (told,) = (one for one in help_of(command) if one.startswith(f"{option}: "))
    assert unit in told


def test_a_time_that_is_none_says_of_which_clock_it_would_be():
    with pytest.raises(
        UsageError, match="-1 minutes of CPU time are none to train for"
    ):
        TrainConfig(minutes=-1)
    with pytest.raises(UsageError, match="cannot end after -1 minutes by the clock"):
        SearchConfig(max_minutes=-1)
