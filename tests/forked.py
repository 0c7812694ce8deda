"""Programs in processes of their own: forks of a clean one that has imported what takes
seconds to import.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["notall.cli", "transformers.models.llama.modeling_llama", "lm_eval.evaluator"]
)
NOTALL = "from api import cli; cli.main()"


def start(program: str, *arguments: Any, says: Path | None = None) -> BaseProcess:
    """`python -c program arguments`, with this process's path; to be waited for, or
    killed.

    What it prints goes to the files `out` and `err` in the folder `says`, if that is
    given.
    """
    words = [str(argument) for argument in arguments]
    process = CONTEXT.Process(
        target=_run, args=(program, words, sys.path, dict(os.environ), says)
    )
    process.start()
    return process


def run(program: str, *arguments: Any) -> CompletedProcess[str]:
    """What it printed and its exit code, or minus the signal that ended it."""
    with tempfile.TemporaryDirectory() as says:
        process = start(program, *arguments, says=Path(says))
        process.join()
        assert process.exitcode is not None
        out, err = ((Path(says) / name).read_text() for name in ("out", "err"))
    return CompletedProcess(arguments, process.exitcode, out, err)


def kill_at(path: Path, lines: int, program: str, *arguments: Any) -> None:
    """Run it until `path` has so many lines, and kill it then, in the middle of its
    work.
    """
    process = start(program, *arguments)
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()
    process.join()


def _run(
    program: str,
    words: list[str],
    path: list[str],
    environment: dict[str, str],
    says: Path | None,
) -> None:
    sys.argv, sys.path[:] = ["-c", *words], path
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")) if says else ():
        os.dup2(os.open(says / name, os.O_WRONLY | os.O_CREAT), number)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
