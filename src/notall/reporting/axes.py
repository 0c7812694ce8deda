"""Axes that one wide bar does not stretch, and labels of points that do not lie on each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SPARE = 0.25  # how far a bar may stretch an axis beyond its points, as a share of what they span
WIDTHS = (240, 320, 420, 560, 720, 900, 1200)  # of plots, in pixels, from a phone's to a wide screen's

Span = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A text beside a point: its box in pixels from the point, left, right, top and bottom."""

    point: tuple[float, float]  # across as a share of the plot, 0 to 1; down in pixels
    left: float
    right: float
    top: float
    bottom: float


def bounds(points: Iterable[float], ends: Iterable[float], least: float = 0.0) -> Span:
    """From the least to the greatest of the points and of the bars' ends, as far as those are near the points.

    `least` is how far beyond them is always near. Never of no width.
    """
    inside = [*points]
    low, high = min(inside), max(inside)
    spare = max(least, SPARE * (high - low))
    every = [*inside, *ends]
    low, high = max(low - spare, min(every)), min(high + spare, max(every))
    return (low, high) if low < high else (low - 0.1, high + 0.1)


def within(value: float, span: Span) -> float:
    """The nearest value of a span."""
    return min(max(value, span[0]), span[1])


def symlog(value: float, constant: float) -> float:
    """As Vega's scale of that name has it: linear near 0, logarithmic far from it."""
    return math.copysign(math.log1p(abs(value) / constant), value)


def needed_widths(labels: Sequence[Label], taken: Sequence[Label], padding: float) -> list[float | None]:
    """How wide a plot must be, in pixels, for each label to lie on no other; None: wider than any.

    Earlier labels go first. `taken` are boxes that are always there; `padding` is the plot's on either side, in pixels.
    What fits once fits in any wider plot too: the boxes part, and stay as large as they are.
    """
    needed: list[float | None] = [None] * len(labels)
    shown = [*taken]
    for width in WIDTHS:
        for place, label in enumerate(labels):
            if needed[place] is None and not any(_meet(label, other, width - 2 * padding) for other in shown):
                needed[place] = width
                shown.append(label)
    return needed


def _meet(one: Label, other: Label, across: float) -> bool:
    """Whether two boxes share a pixel where the points' axis is so many pixels wide."""
    apart = across * (other.point[0] - one.point[0])
    below = other.point[1] - one.point[1]
    beside = apart + other.left >= one.right or apart + other.right <= one.left
    return not (beside or below + other.top >= one.bottom or below + other.bottom <= one.top)
