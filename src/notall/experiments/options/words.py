"""Options that may be repeated, or hold several words."""

from __future__ import annotations

from collections.abc import Sequence

Words = tuple[str, ...]  # of an option that may be repeated


def words_of(values: Sequence[str]) -> list[str]:
    """The words of an option that may be repeated, or hold several with commas between
    them.
    """
    return [word for value in values for word in value.split(",") if word]
