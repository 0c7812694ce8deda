"""Measured plans as points: their series, colours and Pareto front."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

from ..results.record import Quartiles, is_number
from .style import INK, SPECTRUM, Colour, Colours

OTHER_WAYS = "other ways"
BEST = 4  # series that get a colour where there are more
LINEAR_BELOW = 0.1  # nats, below which the axis of losses is linear
# how far a bar may stretch an axis: a share of what points span, and of a speedup always
SPARE, NEAR = 0.25, 0.15

Span = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """A plan that was measured: what it loses with its standard error, how much it
    skips, its series and step.
    """

    name: str
    lost: float
    lost_se: float = math.nan
    speedup: Quartiles | None = None
    count: float = 0
    colour: str = ""
    shape: str = ""
    label: str = ""
    panel: str = ""
    plan: int | None = None

    @property
    def place(self) -> Span:
        """The speedup, nan where it was not timed, and the loss."""
        return (self.speedup.median if self.speedup else math.nan), self.lost

    @property
    def bar(self) -> Span:
        """The loss less its error, and with it."""
        error = self.lost_se if is_number(self.lost_se) else 0
        return self.lost - error, self.lost + error

    def row(self, colours: Colours, span: Span = (0, math.inf)) -> dict[str, object]:
        """What is drawn: `shown` is the name of its series in the legend; quartiles end
        where the axis does.
        """
        low, high = self.bar
        row = vars(self) | {
            "shown": self.colour if self.colour in colours else OTHER_WAYS,
            "lost_low": low,
            "lost_high": high,
            "lost_se": None,
            "speedup": None,
        }
        if times := self.speedup:
            row |= {
                "speedup": times.median,
                "speedup_low": times.low,
                "speedup_high": times.high,
                "speedup_from": max(span[0], times.low),
                "speedup_to": min(span[1], times.high),
            }
        return row


def front(points: Iterable[Span]) -> list[Span]:
    """Of (speedup, loss) pairs those that no other beats in both, from the slowest to
    the fastest.
    """
    best: list[Span] = []
    for speedup, lost in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or lost < best[-1][1]:
            best.append((speedup, lost))
    return best[::-1]


def colours_of(points: Sequence[Point]) -> Colours:
    """A colour for each series; of many for those of the least mean rank over all that
    was asked, the others are grey. The first search is in the colour of ink.
    """
    ranks = _ranks([point for point in points if is_number(point.lost)])
    names = sorted(ranks, key=ranks.__getitem__)
    if len(names) > BEST + 1:
        names = names[:BEST]
    names.sort(key=lambda name: not name.startswith("search"))
    colours: dict[str, Colour] = dict(zip(names, cycle(SPECTRUM)))
    if names and names[0].startswith("search"):
        colours[names[0]] = INK
    return colours


def _ranks(points: Sequence[Point]) -> dict[str, float]:
    """Of each series the sum of its ranks in each panel at each count, from 0, over how
    many answered; where it did not answer, it is the last.
    """
    asked: dict[tuple[str, float], dict[str, float]] = {}
    for point in points:
        best = asked.setdefault((point.panel, point.count), {})
        best[point.colour] = min(point.lost, best.get(point.colour, math.inf))
    orders = [sorted(best, key=best.__getitem__) for best in asked.values()]

    def rank(name: str, order: Sequence[str]) -> float:
        return order.index(name) / len(order) if name in order else 1

    series = dict.fromkeys(point.colour for point in points)
    return {name: sum(rank(name, order) for order in orders) for name in series}


def colours_in_turn(names: Iterable[str]) -> Colours:
    """A colour for each name; the first is in the colour of ink."""
    return dict(zip(dict.fromkeys(names), (INK, *SPECTRUM * 9)))


def bounds(points: Sequence[float], ends: Iterable[float], least: float = 0.0) -> Span:
    """From the least to the greatest of the points and of the bars' ends near them,
    which is `least` at least.
    """
    low, high = min(points), max(points)
    spare = max(least, SPARE * (high - low))
    every = [*points, *ends]
    low, high = max(low - spare, min(every)), min(high + spare, max(every))
    return (low, high) if low < high else (low - 0.1, high + 0.1)


def span_of_losses(points: Sequence[Point]) -> Span:
    """Of the axis: 0, the losses, and the ends of their bars as far as they are near."""
    return bounds(
        [0, *(point.lost for point in points)],
        [end for point in points for end in point.bar],
    )


def symlog(value: float) -> float:
    """As Vega's scale of that name has it: linear near 0, logarithmic far from it."""
    return math.copysign(math.log1p(abs(value) / LINEAR_BELOW), value)
