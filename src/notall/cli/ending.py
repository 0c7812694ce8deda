"""How a command ends: with a verdict, and with the exit code that goes with it."""

from __future__ import annotations

import sys

import typer

from ..experiments.verdict import Verdict
from ..results.terminal import say
from .app import MISSED


def conclude(verdict: Verdict, *, as_json: bool) -> None:
    """Say what a plan comes to, which JSON holds already. Leave with `MISSED` where a budget was missed."""
    if not as_json:
        for line in verdict.lines():
            say(line, whole=line.startswith("Next:"))
    elif verdict.missed:
        print(f"missed {verdict.missed}", file=sys.stderr)
    if verdict.missed:
        raise typer.Exit(MISSED)
