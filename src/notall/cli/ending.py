"""How a command ends: with a verdict, and with the exit code that goes with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from ..records.columns import Row
from ..reporting.console import say
from .app import MISSED

if TYPE_CHECKING:
    from ..reporting.verdict import Verdict


def warn_if_worse(rows: Iterable[Row]) -> None:
    """Of what was measured before a repair and after it, as tables have it: warn where that is worse, beyond errors."""
    lost = {(row.get("text"), row["model"]): row for row in rows if row["delta_nll"] is not None}
    for (text, state), after in lost.items():
        before = lost.get((text, "skipped"))
        if state != "repaired" or before is None:
            continue
        if after["delta_nll"] - before["delta_nll"] > (after["delta_nll_se"] or 0) + (before["delta_nll_se"] or 0):
            on = f" on {text}" if text else ""
            typer.echo(
                f"warning: the repair makes it worse{on}: {after['delta_nll']:.3f} nats where it was "
                f"{before['delta_nll']:.3f}; repair with more text, in another way, or not at all",
                err=True,
            )


def conclude(verdict: Verdict, *, as_json: bool) -> None:
    """Say what a plan comes to, which JSON holds already. Leave with `MISSED` where a budget was missed."""
    if not as_json:
        for line in verdict.lines():
            say(line, whole=line.startswith("Next:"))
    elif verdict.missed:
        print(f"missed {verdict.missed}", file=sys.stderr)
    if verdict.missed:
        raise typer.Exit(MISSED)
