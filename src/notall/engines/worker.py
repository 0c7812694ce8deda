"""A method of an engine in a process of its own: one that crashes takes nothing else with it.

The process, `python -m notall.engines.worker`, reads one call as JSON and answers with a line of JSON. It starts in an
empty folder, so that no file of the working folder, whatever it is called, is imported in place of a library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import UsageError, shortened
from . import Engine


class EngineFailed(UsageError):
    """An engine failed; `reason` is what it said."""

    def __init__(self, reason: str, what: str = "") -> None:
        super().__init__(f"{what}: {reason}" if what else reason)
        self.reason = reason


def call(engine: Engine, method: str, *, python: str | None = None, **arguments: Any) -> Any:
    """What a method of the engine returns, as JSON has it.

    `python` is that of another environment with notall, where the engine is in none of ours.
    Raises `EngineFailed` where the method fails, or its process ends.
    """
    request = {
        "engine": f"{type(engine).__module__}:{type(engine).__qualname__}",
        "settings": asdict(engine),
        "method": method,
        "arguments": arguments,
        "folder": os.getcwd(),
    }
    what = f"{engine.name} did not {method}"
    program = os.path.abspath(shutil.which(python) or python) if python else sys.executable
    try:
        with TemporaryDirectory(prefix="notall-") as empty:
            run = subprocess.run(
                [program, "-m", "notall.engines.worker"],
                input=json.dumps(request, default=lambda path: {"path": os.path.abspath(path)}),
                capture_output=True,
                text=True,
                errors="replace",
                cwd=empty,
                env=os.environ | {"PYTHONPATH": _python_path(), "PYTHONSAFEPATH": "1"},  # the second for its children
            )
    except OSError as error:
        raise EngineFailed(f"no process was started ({error.strerror})", what) from None
    lines = run.stdout.splitlines()
    answer = json.loads(lines[-1]) if lines and not run.returncode else {"failed": _ending(run)}
    if "failed" in answer:
        raise EngineFailed(engine.reason(run.stderr) or answer["failed"], what)
    return answer["result"]


def _python_path() -> str:
    """PYTHONPATH by full paths; an empty entry, which stands for the working folder, is left out."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(folder) for folder in given if folder)


def _ending(run: subprocess.CompletedProcess[str]) -> str:
    if run.returncode < 0:
        return f"its process was ended by signal {-run.returncode}, for want of memory perhaps"
    printed = [line for line in run.stderr.splitlines() if line.strip()]
    return shortened(printed[-1] if printed else f"its process ended with {run.returncode}", 160)


# --- in that process --------------------------------------------------------------------------------------------------


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """What the method returns, or why it failed."""
    engine = _engine_class(request["engine"], request["folder"])(**request["settings"])
    try:
        found = getattr(engine, request["method"])(**request["arguments"])
    except Exception as error:  # whatever it is, it is an answer about this model and no fault of the run
        return {"failed": shortened(f"{type(error).__name__}: {error}", 200)}
    return {"result": asdict(found) if is_dataclass(found) and not isinstance(found, type) else found}


def _engine_class(name: str, folder: str) -> Any:
    module, _, attribute = name.partition(":")
    if find_spec(module.partition(".")[0]) is None:
        sys.path.append(folder)  # of an engine that was named in place, as module:Class
    return getattr(import_module(module), attribute)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # engines print to stdout; the answer has a file of its own
    os.dup2(2, 1)
    request = json.load(sys.stdin, object_hook=lambda value: Path(value["path"]) if [*value] == ["path"] else value)
    print(json.dumps(answer_to(request)), file=out, flush=True)
    out.close()
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
