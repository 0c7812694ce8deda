"""The process that an engine runs in: no file of the working folder is imported there,
and failures are said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import engines
from api import (
    ENGINES,
    TARGETS,
    EngineFailed,
    LlamaCpp,
    Transformers,
    call,
    engine_named,
    engines_worker,
    medians,
    target_named,
)
from families import family
from notall import Plan, UsageError, export
from tiny_gguf import WORDS, write_gguf

pytestmark = [pytest.mark.slow]

SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "eos_token_id": None,
}
# What the process imports first: of Python, of packages, and what starts it.
EARLY = (
    "json",
    "os",
    "shutil",
    "uuid",
    "subprocess",
    "tempfile",
    "typing",
    "numpy",
    "gguf",
    "xllamacpp",
    "pydantic",
)
needs_llamacpp = engines.needs("xllamacpp", "pip install xllamacpp")

MINE = """
from pathlib import Path
from notall.engines import Engine, Timing

class Mine(Engine):
    name, package, install = "mine", "json", "it is there"
    types = ("float32",)
    def quantise(self, plain, kind, out): out.write_text(kind)
    def score(self, checkpoint, windows): return [[0.5] * (len(one) - 1) for one in windows]
    def time(self, checkpoint, prompt, new): return Timing(1.0, 2.0, len(prompt) + new)
"""


@pytest.fixture
def dense(tmp_path):
    return write_gguf(family("llama").build(**SIZES), tmp_path / "dense.gguf")


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """A working folder with a file or a folder in place of each module; what is
    imported of it leaves a mark.
    """
    folder = tmp_path / "trapped"
    (folder / "notall").mkdir(parents=True)
    mark = (
        f"import builtins; builtins.open({str(tmp_path / 'mark')!r},"
        " 'a').write(__name__ + ' ')\n"
    )
    for name in EARLY:
        (folder / f"{name}.py").write_text(mark)
    (folder / "notall" / "__init__.py").write_text(mark)
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()


@pytest.fixture(params=[True, False], ids=["safe path", "as in Python 3.10"])
def any_python(request, monkeypatch):
    """Python 3.10 knows nothing of PYTHONSAFEPATH."""
    run = subprocess.run

    def old(*words, env, **more):
        return run(
            *words,
            env={
                name: value for name, value in env.items() if name != "PYTHONSAFEPATH"
            },
            **more,
        )

    if not request.param:
        monkeypatch.setattr(engines_worker.subprocess, "run", old)


@needs_llamacpp
@pytest.mark.usefixtures("any_python", "trapped")
def test_an_export_runs_no_file_of_the_working_folder(dense, tmp_path):
    export(dense, Plan([1], [1]), "gguf", tmp_path / "out")


@pytest.mark.usefixtures("any_python", "trapped")
@pytest.mark.parametrize("path", ["{lib}", "{sep}{lib}", "{lib}{sep}"])
def test_an_engine_imports_no_file_of_the_working_folder(path, tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setenv("PYTHONPATH", path.format(lib=tmp_path / "lib", sep=os.pathsep))
    assert call(
        engine_named("mine:Mine")(1), "score", checkpoint=Path("any"), windows=[[1, 2]]
    ) == [[0.5]]
    del sys.modules["mine"]


@pytest.mark.slow
def test_transformers_runs_no_modeling_file_of_a_checkpoint(tmp_path):
    plan = Plan(attention=[0, 3], mlp=[1])
    out = export(family("llama").build(), plan, "hf", tmp_path / "out", verify=False)
    (out / "modeling_notall_llama.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w')"
    )
    (scores,) = call(Transformers(1), "score", checkpoint=out, windows=[[5, 6, 7]])
    assert len(scores) == 2
    assert not (tmp_path / "mark").exists()


def test_packages_are_found_where_a_relative_path_says(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "lib")
    monkeypatch.syspath_prepend("lib")
    engine = engine_named("mine:Mine")(1)
    assert call(engine, "score", checkpoint=Path("any"), windows=[[1, 2, 3]]) == [
        [0.5, 0.5]
    ]
    del sys.modules["mine"]


def test_an_engine_of_others_is_named_in_place(tmp_path, monkeypatch):
    (tmp_path / "my_engine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    engine = engine_named("my_engine:Mine")(3)
    assert engine.checked_types([]) == ["float32"]
    assert (
        call(engine, "time", checkpoint=Path("any"), prompt=[1, 2], new=3)[
            "memory_bytes"
        ]
        == 5
    )
    call(
        engine, "quantise", plain=Path("any"), kind="int8", out=Path("packed")
    )  # relative paths are the caller's
    assert (tmp_path / "packed").read_text() == "int8"
    with pytest.raises(
        UsageError,
        match=(
            r"my_engine:Path is no engine: give a subclass of notall\.plugins\.Engine"
        ),
    ):
        engine_named("my_engine:Path")


def test_times_are_medians_after_one_to_warm_up():
    taken = iter([(900.0, 90.0), (3.0, 7.0), (1.0, 8.0), (2.0, 900.0)])
    timing = medians(lambda: next(taken), 0)
    assert (timing.prefill_ms, timing.decode_ms_per_token) == (2.0, 8.0)
    assert next(taken, None) is None
    assert timing.memory_bytes > 2**20  # all of this process


def test_what_an_engine_of_others_lacks_is_named(tmp_path, monkeypatch):
    half = (
        "from notall.engines import Engine\nclass Half(Engine):\n    name, types ="
        " 'half', ('plain',)\n"
    )
    (tmp_path / "half_engine.py").write_text(half)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(
        UsageError,
        match="half_engine:Half lacks install, package, quantise, score, time: give it",
    ):
        engine_named("half_engine:Half")


def test_engines_and_targets_are_found_in_one_place():
    assert [engine_named(name).name for name in ENGINES] == [*ENGINES]
    assert {engine_named(name).target for name in ENGINES} <= TARGETS.keys()
    assert len({target_named(name) for name in TARGETS}) == len(TARGETS)
    with pytest.raises(
        UsageError,
        match=(
            r"no export target 'ggufs' \(did you mean gguf\?\): choose .* module:Class"
        ),
    ):
        target_named("ggufs")


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="no llama.cpp")
def test_no_memory_for_a_process_is_said(monkeypatch):
    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(engines_worker.subprocess, "run", full)
    with pytest.raises(
        EngineFailed,
        match=r"llama\.cpp did not score: no process was started \(Cannot allocate",
    ):
        call(LlamaCpp(1), "score", checkpoint=Path("any.gguf"), windows=[[1, 2]])
