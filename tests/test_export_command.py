"""`notall export`, as one types it."""

import json

import pytest
from transformers import AutoModelForCausalLM

from families import family
from notall import Plan, cli
from notall.exporters import verification


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs `notall export` on a tiny model in a folder: its exit code, stdout and stderr."""
    family("llama").build().save_pretrained(tmp_path / "dense")
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments, plan=None):
        (plan or Plan([1], [1])).save("plan.json")
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["notall", "export", "dense", "--plan", "plan.json", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


def test_a_folder_is_written_and_listed(run):
    code, out, _ = run("--to", "hf", "--out", "written", "--json")
    assert code == 0
    assert {"config.json", "model.safetensors", "notall.json", "README.md"} <= {row["file"] for row in json.loads(out)}
    assert AutoModelForCausalLM.from_pretrained("written").config.num_hidden_layers == 3


def test_nemotron_nas_is_a_target(run):
    assert run("--to", "nemotron-nas", "--out", "written", plan=Plan([2]))[0] == 0


@pytest.mark.parametrize(
    ("arguments", "plan", "said"),
    [
        (("--to", "hf", "--out", "dense"), None, "exists already"),
        (("--to", "hf", "--out", "new"), Plan([9]), "layers are 0 to 3"),
        (("--to", "hf", "--out", "new"), Plan([1], fingerprint="llama-30x576-1f0c2a9b"), "was made for llama-30x576"),
        (("--to", "gguf", "--out", "new"), None, "give that file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, plan, said, tmp_path):
    code, out, err = run(*arguments, plan=plan)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["dense", "plan.json"]


def test_no_verify_runs_nothing(run, monkeypatch):
    monkeypatch.setattr(verification, "verify", lambda *args: pytest.fail("the model was run"))
    assert run("--to", "hf", "--out", "written", "--no-verify")[0] == 0
