"""Commands where the locale is ASCII's, time runs backwards and there is no home;
archives in place of files.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest

import killing
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it is about the machine

# A year back, and a second less at each look: what goes by the clock of the wall ends
# wrong, or never.
BACKWARDS = """
import itertools, time
start, looks = time.time() - 365 * 86400, itertools.count()
time.time = lambda: start - next(looks)
time.time_ns = lambda: int(1e9 * time.time())
"""


# Runs commands as it is told to, each in a fork: of an interpreter that started where
# all is strange.
FORKING = """
import json, os, sys
from notall.cli import main
import lm_eval.evaluator, transformers.models.llama.modeling_llama

for line in sys.stdin:
    folder, words = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ["NOTALL_CACHE"] = os.path.join(folder, "cache")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("../said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["notall", *words]
        main()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with killing.made_ready(tmp_path_factory.mktemp("strange")) as place:
        (place.folder / "text.txt").write_text(
            "Größe 大小, naïve. The fox. " * 400, encoding="utf-8"
        )
        yield place


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """Run a command in a folder, where the machine is strange; answers its exit code
    and what it said.
    """
    folder = tmp_path_factory.mktemp("backwards")
    (folder / "sitecustomize.py").write_text(BACKWARDS)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    environment |= {
        "TZ": "Pacific/Kiritimati",
        "HOME": os.devnull,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    for variable in ("XDG_CACHE_HOME", "HF_HOME", "PYTHONIOENCODING"):
        environment.pop(variable, None)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", FORKING], env=environment, **pipes
    ) as process:

        def run(folder, command):
            print(
                json.dumps([str(folder), command.split()]),
                file=process.stdin,
                flush=True,
            )
            code = int(process.stdout.readline())
            return code, (folder.parent / "said").read_text(errors="replace")

        yield run
        process.stdin.close()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in killing.COMMANDS if "by Ray" not in name]
)
def test_no_command_goes_by_the_locale_the_clock_or_a_home(place, strange, name):
    """It writes what it writes elsewhere."""
    make, command = killing.COMMANDS[name]
    whole, expected = place.undisturbed(name)
    with place.case(make) as folder:
        code, said = strange(folder, command)
        assert code == whole.code, said[-2000:]
        assert "Traceback" not in said
        drawn = (".html", ".png", ".svg")  # are not, in this process
        found = {
            path: held
            for path, held in killing.files_in(folder).items()
            if not path.endswith(drawn)
        }
    expected = {
        path: held for path, held in expected.items() if not path.endswith(drawn)
    }
    assert killing.difference(found, expected, {}) is None


@pytest.mark.slow
def test_without_a_home_ray_is_refused_in_one_line(place):
    """It keeps a token there."""
    pytest.importorskip("ray")
    _, command = killing.COMMANDS["sweep by Ray"]
    with place.case(killing.nothing) as folder:
        environment = {
            **os.environ,
            "HOME": os.devnull,
            "NOTALL_CACHE": str(folder / "cache"),
        }
        words = [sys.executable, "-m", "notall", *command.split()]
        ended = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        (said,) = [
            line for line in ended.stderr.splitlines() if line.startswith("error:")
        ]
        assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
        assert said.startswith("error: no Ray cluster at local: ")
        assert said.endswith("RAY_AUTH_MODE=token and HOME")


ARCHIVES = {
    "inspect m.zip": "cannot load m.zip",
    "inspect m.tar.gz": "cannot load m.tar.gz",
    "inspect m.gguf": "m.gguf is no whole GGUF file",
    "eval m --plan m.zip": "m.zip is no plan: not valid JSON",
    "eval m --plan plan.json --text text.txt.gz": "the text text.txt.gz is not UTF-8",
    "eval m --plan plan.json --tasks t --task-path m.zip": "no task folder m.zip",
    "search m --skip attention:1 --objective answers --prompts text.txt.gz": (
        "the text text.txt.gz is not UTF-8"
    ),
    "export m --plan m.zip --to hf --out out": "m.zip is no plan",
    "repair m --plan m.zip --out out": "m.zip is no plan",
    "heal m --plan m.tar.gz --out out": "m.tar.gz is no plan",
    "report m.zip": "m.zip is a file: give the folder",
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    save_tiny_checkpoint(folder / "m")
    for kind in ("zip", "gztar"):
        shutil.make_archive(str(folder / "m"), kind, folder / "m")
    shutil.copy(folder / "m.zip", folder / "m.gguf")
    (folder / "text.txt.gz").write_bytes(gzip.compress(b"The fox jumps. " * 900))
    (folder / "plan.json").write_text('{"attention": [1], "mlp": []}')
    return folder


@pytest.mark.parametrize("command", ARCHIVES)
def test_an_archive_in_place_of_a_file_is_refused_in_one_line(
    archives, run, monkeypatch, command
):
    monkeypatch.chdir(archives)
    code, _, err = run(*command.split())
    assert (code, err.count("\n")) == (2, 1)
    assert f"error: {ARCHIVES[command]}" in err
    assert not (archives / "out").exists()
