"""Layer indices as people write them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def in_ranges(indices: Iterable[int]) -> str:
    """Whole numbers in ascending order, with runs of three and more as `0-3`: `0-3, 7`."""
    runs = groupby(enumerate(sorted(indices)), key=lambda placed: placed[1] - placed[0])
    return ", ".join(_run([index for _, index in run]) for _, run in runs)


def _run(indices: list[int]) -> str:
    return f"{indices[0]}-{indices[-1]}" if len(indices) > 2 else ", ".join(map(str, indices))
