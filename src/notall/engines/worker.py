"""A method of an engine in a process of its own: one that crashes takes nothing else
with it.

It reads one call as JSON and answers with a line of JSON. It starts in an empty folder,
so that no file of the working folder, whatever it is called, is imported in place of a
library.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

from ..entry_points import importing_from
from ..errors import UsageError, shortened
from . import Engine


class EngineFailed(UsageError):
    """An engine failed; `reason` is what it said."""

    def __init__(self, reason: str, what: str = "") -> None:
        super().__init__(f"{what}: {reason}" if what else reason)
        self.reason = reason


def call(
    engine: Engine, method: str, *, python: str | None = None, **arguments: Any
) -> Any:
    """What a method of the engine returns, as JSON has it; `python` is another
    environment's. Raises `EngineFailed`.
    """
    request = {
        "engine": f"{type(engine).__module__}:{type(engine).__qualname__}",
        "settings": asdict(engine),
        "method": method,
        "arguments": arguments,
        "folder": os.getcwd(),
    }
    given = filter(
        None, os.environ.get("PYTHONPATH", "").split(os.pathsep)
    )  # an empty entry is the working folder
    safe = {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, given)),
        "PYTHONSAFEPATH": "1",
    }  # for its children too
    what = f"{engine.name} did not {method}"
    program = (
        os.path.abspath(shutil.which(python) or python) if python else sys.executable
    )
    try:
        with TemporaryDirectory(prefix="notall-") as empty:
            run = subprocess.run(
                [program, "-m", "notall.engines.worker"],
                input=json.dumps(
                    request, default=lambda path: {"path": os.path.abspath(path)}
                ),
                capture_output=True,
                text=True,
                errors="replace",
                cwd=empty,
                env=os.environ | safe,
            )
    except OSError as error:
        raise EngineFailed(f"no process was started ({error.strerror})", what) from None
    lines = run.stdout.splitlines()
    if lines and not run.returncode:
        answer = json.loads(lines[-1])
    elif run.returncode < 0:
        answer = {
            "failed": (
                f"its process was ended by signal {-run.returncode}, for want of memory"
                " perhaps"
            )
        }
    else:
        printed = [
            f"its process ended with {run.returncode}",
            *filter(str.strip, run.stderr.splitlines()),
        ]
        answer = {"failed": shortened(printed[-1], 160)}
    if "failed" in answer:
        raise EngineFailed(engine.reason(run.stderr) or answer["failed"], what)
    return answer["result"]


def main() -> None:
    """In that process: answer with what the method returns, or why it failed."""
    out = os.fdopen(
        os.dup(1), "w"
    )  # engines print to stdout; the answer has a file of its own
    os.dup2(2, 1)
    request = json.load(
        sys.stdin,
        object_hook=lambda value: (
            Path(value["path"]) if [*value] == ["path"] else value
        ),
    )
    module, _, name = request["engine"].partition(":")
    # else it was named in place, as module:Class
    is_installed = find_spec(module.partition(".")[0]) is not None
    with nullcontext() if is_installed else importing_from(Path(request["folder"])):
        engine = getattr(import_module(module), name)(**request["settings"])
    try:
        answer = {"result": getattr(engine, request["method"])(**request["arguments"])}
    # whatever it is, it is an answer about this model and no fault of the run
    except Exception as error:
        answer = {"failed": shortened(f"{type(error).__name__}: {error}", 200)}
        sleep(1)  # so that llama.cpp's thread can write its log
    print(json.dumps(answer, default=asdict), file=out, flush=True)
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
