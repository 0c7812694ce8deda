"""Prefill-only plans at the command line: written, taken as an option, and refused."""

import json

import pytest

from families import family
from notall import Plan, UsageError, deepest, locate

pytestmark = pytest.mark.usefixtures("short_prose")


def test_plan_writes_a_prefill_only_plan(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    code, out, err = run(
        "plan",
        folder,
        "--skip",
        "block:2",
        "--phase",
        "prefill",
        "--last-tokens",
        3,
        "-o",
        path,
    )
    assert (code, err) == (0, "")
    assert "skip prefill-only block 4, 5 (last 3 tokens whole)" in " ".join(out.split())
    plan = Plan.load(path)
    assert plan == Plan(prefill={"attention": [4, 5], "mlp": [4, 5], "last_tokens": 3})
    assert plan.note == "deepest 2 of 6 blocks, in the prompt alone"
    assert "No answer reads" not in out


def test_the_last_block_is_told_to_be_free(run, folder, tmp_path):
    path = tmp_path / "plan.json"
    code, out, _ = run(
        "plan", folder, "--skip", "block:1", "--phase", "prefill", "-o", path, "--json"
    )
    assert code == 0
    assert json.loads(path.read_text())["prefill"] == {
        "attention": [5],
        "mlp": [5],
        "last_tokens": 1,
    }
    assert [row["footprint"] for row in json.loads(out)["plan"]][:1] * 2 == [
        row["footprint"] for row in json.loads(out)["plan"]
    ]
    _, out, _ = run(
        "plan", folder, "--skip", "block:1", "--phase", "prefill", "-o", path
    )
    assert "No answer reads what this leaves out of the prompt" in out


@pytest.mark.parametrize(
    ("command", "mlp", "fix"),
    [
        ("repair", 5, "no attention is behind what this plan skips"),
        ("heal", 3, "this plan has none (prefill-only mlp 3): repair it first"),
    ],
)
def test_mlps_with_nothing_to_refit_or_train(run, folder, tmp_path, command, mlp, fix):
    path = tmp_path / "plan.json"
    Plan(prefill={"mlp": [mlp]}).save(path)
    code, out, err = run(command, folder, "--plan", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert fix in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--skip", "block:6", "--phase", "prefill"],
            "skips every attention in the prompt; keep at least one",
        ),
        (
            ["--skip", "block:1", "--last-tokens", 2],
            "--last-tokens says how much of a prompt runs whole: add --phase",
        ),
        (["--skip", "block:1", "--phase", "prefil"], "did you mean prefill?"),
        (
            ["--skip", "block:1", "--phase", "prefill", "--last-tokens", 0],
            "greater than or equal to 1",
        ),
    ],
)
def test_what_plan_refuses(run, folder, tmp_path, words, says):
    code, _, err = run("plan", folder, *words, "-o", tmp_path / "plan.json")
    assert (code, says in err) == (2, True), err
    assert not (tmp_path / "plan.json").exists()


def test_a_phase_needs_something_to_skip(run, folder):
    code, _, err = run("eval", folder, "--plan", "published:none", "--phase", "prefill")
    assert (code, "add --skip block:8" in err) == (2, True), err


def test_deepest_in_python():
    structure = locate(family("llama").build())
    assert deepest(structure, "mlp", count=1, phase="prefill") == Plan(
        prefill={"mlp": [3]}
    )
    assert not deepest(structure, "mlp", 0.0, phase="prefill")
    with pytest.raises(UsageError, match="phase is 'decode': give one of all, prefill"):
        deepest(structure, "mlp", 0.5, phase="decode")


@pytest.mark.parametrize(
    ("plan", "is_unread"),
    [
        (Plan(prefill={"attention": [3], "mlp": [3]}), True),
        (Plan(prefill={"mlp": [3]}), True),
        (Plan(prefill={"mlp": [2, 3]}), False),
        (Plan([3], prefill={"attention": [2], "mlp": [2, 3]}), True),
        (Plan([2, 3], [3], prefill={"mlp": [1, 2]}), True),
        (Plan([2], prefill={"mlp": [2, 3]}), False),
        (Plan([3], [3]), False),
    ],
)
def test_what_nothing_reads(plan, is_unread):
    assert locate(family("llama").build()).is_unread(plan) == is_unread


# --- eval
# --------------------------------------------------------------------------------------

TEXT = ["--sequences", 3, "--length", 24]


@pytest.fixture
def prefill_only(folder, tmp_path):
    path = tmp_path / "prefill.json"
    Plan(prefill={"attention": [1, 5], "mlp": [5]}).save(path)
    return path


def evaluated(run, folder, *words):
    code, out, err = run("eval", folder, *TEXT, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_eval_scores_what_follows_half_of_each_window(
    run, folder, prefill_only, tmp_path
):
    found = evaluated(run, folder, "--plan", prefill_only, "--out", tmp_path / "kept")
    dense, skipped = (row["quality"] for row in found["quality"])
    assert dense["kl"] == 0
    assert 0 < skipped["kl"] < 1
    assert ", behind a prompt of 12 tokens" in found["verdict"]["said"]
    same = evaluated(run, folder, "--plan", prefill_only, "--prompt-tokens", 12)
    assert same["quality"] == found["quality"]
    other = evaluated(run, folder, "--plan", prefill_only, "--prompt-tokens", 20)
    assert other["quality"] != found["quality"]
    (line,) = (tmp_path / "kept" / "measured.jsonl").read_text().splitlines()[-1:]
    assert json.loads(line)["plan"]["prefill"]["attention"] == [1, 5]
    assert '"prompt_tokens": 12' in (tmp_path / "kept" / "measured.jsonl").read_text()


def test_eval_of_another_plan_behind_a_prompt(run, folder):
    everywhere = evaluated(run, folder, "--skip", "mlp:1")
    behind = evaluated(run, folder, "--skip", "mlp:1", "--prompt-tokens", 12)
    assert (
        everywhere["quality"][1]["quality"]["nll"]
        != behind["quality"][1]["quality"]["nll"]
    )
    assert "behind a prompt" not in everywhere["verdict"]["said"]


def test_eval_of_the_last_block_says_that_nothing_is_lost(run, folder):
    found = evaluated(run, folder, "--skip", "block:1", "--phase", "prefill")
    assert abs(found["quality"][1]["quality"]["kl"]) < 1e-4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--prompt-tokens", 24],
            "leaves nothing to score in windows of 24: give 1 to 23",
        ),
        (
            ["--prompt-tokens", 1],
            "nothing is skipped where its last 1 run whole: give more than 1",
        ),
        (["--prompt-tokens", 0], "greater than or equal to 1"),
    ],
)
def test_prompts_that_eval_refuses(run, folder, prefill_only, words, says):
    code, _, err = run("eval", folder, *TEXT, "--plan", prefill_only, *words)
    assert (code, says in err) == (2, True), err


# --- inspect
# --------------------------------------------------------------------------------------


# older ones hold a recurrent state otherwise, and are refused
@pytest.mark.any_transformers
def test_inspect_says_what_always_runs_in_a_prompt(run, folder, tmp_path):
    family("qwen3_next").build().save_pretrained(tmp_path / "hybrid")
    code, out, err = run("inspect", tmp_path / "hybrid", "--json")
    assert code == 0, err
    bound = {part["sublayer"]: part["bound"] for part in json.loads(out)["sublayers"]}
    assert (
        bound["attn.0"]
        == "a linear_attention keeps other things than keys and values of each token"
    )
    assert bound["mlp.0"] == ""
    _, out, _ = run("inspect", tmp_path / "hybrid")
    assert "always runs" in out
    _, out, _ = run("inspect", folder)
    assert "in prompts" not in out
