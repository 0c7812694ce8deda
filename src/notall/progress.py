"""How long work tells how far it is: `progress(done, of_how_much, what_is_being_done)`, in units of its own."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]


def silent(done: float, total: float, doing: str) -> None:
    """Tell nobody."""
