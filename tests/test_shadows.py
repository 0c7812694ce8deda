"""No command runs a file of the working folder, of OUT or of a model, though it is
called as a library is.

Each of these folders holds a `NAME.py` for every module there is, which leaves a mark
when it is run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import pytest

import notall
from api import COMMANDS
from tiny_tasks import saved, tiny_llama, write_tasks

pytestmark = pytest.mark.any_transformers  # it is about processes

SCRIPT = Path(sys.executable).with_name("notall")
# What libraries look for, and Python itself as it starts, where nothing of that name is
# installed.
ABSENT = (
    "sitecustomize",
    "usercustomize",
    "apex",
    "deepspeed",
    "flash_attn",
    "kernels",
    "mlx",
    "vllm",
    "wandb",
)
NAMES = {*sys.stdlib_module_names, *packages_distributions(), *ABSENT, "notall"}

# A run of each command on files that `place` makes. OUT is there before, full of
# shadows, but where it may not be.
PLAIN = "--dtype float32 --device cpu"
TEXT = f"--text text.txt --sequences 4 --length 24 --batch-size 2 {PLAIN}"
TIMES = f"--prompt-tokens 4 --generation-tokens 2 --rounds 1 {PLAIN}"
TIMED = f"--sequences 4 --length 24 --text text.txt {TIMES}"
TASKS = "--tasks tiny_choice,tiny_words --task-path tasks --limit 3 --num-fewshot 0"
LINES: dict[str, tuple[str, ...]] = {
    "inspect": (f"model {PLAIN}", "model.gguf"),
    "similarity": (f"model {TEXT} --out similarity",),
    "generate": (
        "model river --max-new-tokens 2 --device cpu --plan plan.json",
        "model.gguf river --max-new-tokens 2",
    ),
    "compare": (
        (
            f"model {TIMED} --out compare --skip attention:1 --criterion deepest"
            " --criterion leave-one-out"
        ),
    ),
    "search": (f"model {TEXT} -o search.json --skip attention:2 --patience 1",),
    "slim": (),  # runs search, bench, export and card, as below
    "plan": (
        "model -o paper.json --skip attention:1",
        "model -o block.json --skip block:1",
    ),
    "recipe": ("model --plan block.json -o cut.yaml",),
    "criteria": ("",),
    "repair": (f"model {TEXT} --plan plan.json --out repair",),
    "heal": (
        (
            "model --plan plan.json --text text.txt --tokens 32 --length 8 --batch-size"
            " 2 --device cpu --out heal"
        ),
    ),
    "bench": (f"model --skip block:0.5 {TIMES} --out bench",),
    "draft": (
        (
            "model --skip attention:0.25 --text text.txt --sequences 1 --most 1"
            f" {TIMES} --out draft"
        ),
    ),
    "eval": (f"model --plan plan.json {TEXT} {TASKS} --out eval",),
    "paper": (f"model {TIMED} {TASKS} --out paper",),
    "pareto": (
        (
            f"model.gguf --plan plan.json --repair none --types F16 {TIMED} --threads 1"
            " --out pareto"
        ),
    ),
    "sweep": (f"model {TIMED} --out sweep",),
    "tasks": ("tiny --task-path tasks",),
    "report": ("sweep -o page.html", "paper -o paper.html"),
    "reproduce": ("compare --out reproduce",),
    "export": (
        "model --plan plan.json --to hf --out hf",
        "model --plan plan.json --to nemotron-nas --out nas",
        "model.gguf --plan plan.json --to gguf --out gguf",
    ),
    "card": ("hf eval",),
}

# As the installed script does, one command after the other, in one process.
MANY = """
import json
import sys

from notall.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["notall", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code not in (0, None, 3):
            sys.exit(f"notall {' '.join(words)}: {ended.code}")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with models, a plan and a text, and shadows in it and in the
    models' folder.
    """
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(Path(notall.__file__).parents[1]))
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    folder = tmp_path / "working"
    plant(folder, NAMES, tmp_path / "marks")
    copytree(folder, folder / "model")
    (folder / "plan.json").write_text('{"attention": [1], "mlp": [2]}')
    (folder / "text.txt").write_text(
        "The river runs under the old stone bridge, and a green bird sings. " * 40
    )
    return folder


def plant(folder: Path, names: Iterable[str], marks: Path) -> None:
    """A file for each of these modules, which writes its path to `marks` when it is
    run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"{name}.py").write_text(
            f"open({str(marks)!r}, 'a').write(__file__ + chr(10))\n"
        )


def run(folder: Path, *words: object) -> str:
    """What Python prints with these words, in `folder`; it is to succeed, and no shadow
    to be run.
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    marks = folder.with_name("marks")
    assert not marks.exists(), f"run: {sorted(set(marks.read_text().split()))}"
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def saved_models(folder: Path) -> None:
    from families import family
    from tiny_gguf import WORDS, write_gguf

    saved(tiny_llama(), folder / "model")
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    write_gguf(family("llama").build(**sizes, eos_token_id=None), folder / "model.gguf")


def imported_before(folder: Path) -> set[str]:
    """What Python itself imports under -m, from the working folder first, before it
    runs a line of any package.
    """
    (folder / "bare").mkdir(parents=True)
    (folder / "bare" / "__main__.py").write_text("import sys\nprint(*sys.modules)")
    return set(run(folder, "-m", "bare").split())


@pytest.mark.parametrize("how", ["script", "module"])
def test_no_shadow_is_run_as_a_command_starts(how, place, tmp_path):
    """`python -m` has the working folder first on its path, and `__main__` takes it
    away.
    """
    if how == "script":
        if not SCRIPT.exists():
            pytest.skip("there is no script notall beside this Python")
        said = run(place, SCRIPT, "report", "--help")
    else:
        for name in {"notall", *imported_before(tmp_path / "before")}:
            (place / f"{name}.py").unlink(missing_ok=True)
        said = run(place, "-m", "notall", "report", "--help")
    assert "page" in said


def test_every_command_has_a_line():
    assert LINES.keys() == COMMANDS.keys()


@pytest.mark.long
@pytest.mark.slow
def test_no_command_runs_a_shadow(place, tmp_path):
    """In the working folder, in OUT and beside the model's weights; workers of engines
    included.
    """
    saved_models(place)
    write_tasks(place / "tasks", 6)
    lines = [[name, *line.split()] for name, of in LINES.items() for line in of]
    outs = {
        words[words.index("--out") + 1]
        for words in lines
        if "--out" in words and words[0] != "export"
    }
    for out in outs:
        plant(place / out, NAMES, tmp_path / "marks")
    if find_spec("xllamacpp") is None:
        lines = [
            words
            for words in lines
            if "gguf" not in words and words[:2] != ["pareto", "model.gguf"]
        ]
    (tmp_path / "many.py").write_text(MANY)
    run(place, tmp_path / "many.py", json.dumps(lines))
    assert [file.name for file in (place / "hf").glob("*.py")] == [
        "modeling_notall_llama.py"
    ]  # and none is copied


@pytest.mark.long
@pytest.mark.slow
def test_no_worker_of_a_cluster_runs_a_shadow(place, tmp_path):
    """Ray puts the working folder first on the path of its workers."""
    pytest.importorskip("ray")
    saved_models(place)
    train = "--tokens 32 --length 8 --batch-size 2 --device cpu --text text.txt"
    lines = [
        f"sweep model {TIMED} --out sweep --ray local",
        f"heal model --plan plan.json {train} --out heal --ray local",
    ]
    (tmp_path / "many.py").write_text(MANY)
    run(place, tmp_path / "many.py", json.dumps([line.split() for line in lines]))
