"""The process in which one question to an engine is asked: `python -m notall.exporters.engines.worker`, with JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from ...errors import shortened

PATHS = ("checkpoint", "plain", "out")


def answer_to(asked: dict[str, Any]) -> dict[str, Any]:
    """What the engine answers, or why it failed."""
    from . import engine_named

    engine = engine_named(asked["engine"])(**asked["settings"])
    about = {name: Path(value) if name in PATHS else value for name, value in asked["about"].items()}
    try:
        found = getattr(engine, asked["question"])(**about)
    except Exception as error:  # whatever it is, it is an answer about this model and no fault of the run
        return {"failed": shortened(f"{type(error).__name__}: {error}", 200)}
    return {"answer": asdict(found) if is_dataclass(found) and not isinstance(found, type) else found}


def main() -> None:
    out = os.fdopen(os.dup(1), "w")  # engines print to stdout; the answer goes out by a door of its own
    os.dup2(2, 1)
    print(json.dumps(answer_to(json.load(sys.stdin))), file=out, flush=True)
    out.close()
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
