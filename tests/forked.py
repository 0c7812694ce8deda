"""Programs in processes of their own: forks of a clean one that has imported what takes seconds to import."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["notall", "notall.cli", "transformers.models.llama.modeling_llama", "lm_eval.evaluator"]
)


def start(program: str, *arguments: Any) -> BaseProcess:
    """`python -c program arguments`, with this process's path; to be waited for, or killed."""
    words = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(target=_run, args=(program, words, sys.path, dict(os.environ)))
    process.start()
    return process


def run(program: str, *arguments: Any) -> int:
    """Its exit code, or minus the signal that ended it."""
    process = start(program, *arguments)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(program: str, words: list[str], path: list[str], environment: dict[str, str]) -> None:
    sys.argv, sys.path[:] = ["-c", *words], path
    os.environ.update(environment)
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
