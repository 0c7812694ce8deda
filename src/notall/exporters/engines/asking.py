"""A question to an engine is asked in a process of its own: one that crashes takes nothing else with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from ...errors import UsageError, shortened
from .engine import Engine

LOADING = "error loading model: "  # what llama.cpp says before its reason


class EngineFailed(UsageError):
    """An engine could not do it; the message says what it said."""


def ask(engine: Engine, question: str, *, python: str | None = None, **about: Any) -> Any:
    """What the method `question` of the engine answers, as JSON has it; paths are given as texts.

    `python` is that of another environment with notall, where the engine is in none of ours.
    Raises `EngineFailed` where it fails, or the process ends.
    """
    asked = {"engine": engine.name, "settings": asdict(engine), "question": question, "about": about}
    command = [python or sys.executable, "-m", "notall.exporters.engines.worker"]
    apart = os.environ | {"PYTHONSAFEPATH": "1"}  # a file here that is called like a library is none
    run = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, errors="replace", env=apart)
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        raise EngineFailed(f"{engine.name} did not {question}: {_reason(run)}")
    answer = json.loads(lines[-1])
    if "failed" in answer:
        raise EngineFailed(f"{engine.name} did not {question}: {_told(run.stderr) or answer['failed']}")
    return answer["answer"]


def _reason(run: subprocess.CompletedProcess[str]) -> str:
    told = _told(run.stderr)
    if not told and run.returncode < 0:
        return f"its process was ended by signal {-run.returncode}, for want of memory perhaps"
    said = [line for line in run.stderr.splitlines() if line.strip()]
    return told or shortened(said[-1] if said else f"its process ended with {run.returncode}", 160)


def _told(stderr: str) -> str:
    """What llama.cpp gives as its reason, if it gives one."""
    return next((shortened(line.partition(LOADING)[2], 160) for line in stderr.splitlines() if LOADING in line), "")
