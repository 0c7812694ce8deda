"""What plans lose, against what they gain or what they skip: points with their errors
and labels, and the front.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import altair as alt

from ..results.facts import DELTA_NLL, SPEEDUPS
from ..results.record import Quartiles, is_number
from .style import (
    GREY,
    HEIGHT,
    INK,
    LIGHT,
    PALE,
    PAPER,
    SPECTRUM,
    Colours,
    by_colour,
    snug,
    titled,
)

OTHERS = "other ways"
BEST = 4  # series that get a colour where there are more
HELD_OUT = f"{DELTA_NLL.heading} on held-out text, {DELTA_NLL.unit}"
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 4], [1, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

LINEAR = 0.1  # nats, below which the axis of losses is linear
NATS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # ticks of losses
PADDING, PAD_OF_LOSSES = 28, 24  # pixels around the points, across and down
SPARE, NEAR = (
    0.25,
    0.15,
    # how far a bar may stretch an axis: as a share of what points span, and a speedup
    # always
)
WIDTHS = (
    240,
    420,
    720,
)  # of plots, in pixels: a phone's, a narrow window's, a wide one's
LETTER = 7.0  # pixels that one is wide, about

Span = tuple[float, float]
Box = tuple[float, float, float, float]  # left, right, top, bottom, in pixels
AROUND, DENSE_LABEL = (-6.0, 6.0, -6.0, 6.0), (-17.0, 17.0, 9.0, 23.0)


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
        return (self.speedup.median if self.speedup else math.nan), self.lost

    @property
    def bar(self) -> Span:
        """The loss less its error, and with it."""
        error = self.lost_se if is_number(self.lost_se) else 0
        return self.lost - error, self.lost + error

    def row(self, colours: Colours, span: Span = (0, math.inf)) -> dict[str, object]:
        """What is drawn: `shown` is what its series goes by in the legend; quartiles
        end where the axis does.
        """
        shown = self.colour if self.colour in colours else OTHERS
        row = vars(self) | {"shown": shown, "lost_se": None, "speedup": None}
        row |= zip(("lost_low", "lost_high"), self.bar)
        if times := self.speedup:
            row |= {
                "speedup": times.median,
                "speedup_low": times.low,
                "speedup_high": times.high,
            }
            row |= {
                "speedup_from": max(span[0], times.low),
                "speedup_to": min(span[1], times.high),
            }
        return row


def tradeoff(
    points: Sequence[Point],
    colours: Colours,
    *,
    colour: str,
    shape: str,
    lost: str = HELD_OUT,
    best: Sequence[Point] = (),
    dense: bool = True,
    paths: bool = False,
) -> alt.LayerChart:
    """What the timed points lose against their decode speedup, with the Pareto front; a
    ring follows the param `plan`.

    `colour` and `shape` are titles of the legend, `lost` that of the axis; `best` are
    the points of the front where it isn't what nothing beats in both; `dense`: that
    model, at (1, 0), is none of the points; `paths` join by count.
    """
    points = [point for point in points if point.speedup and is_number(point.lost)]
    line = sorted(point.place for point in best) or front(
        [(1.0, 0.0)] * dense + [point.place for point in points]
    )
    times = [point.speedup for point in points if point.speedup]
    span = bounds(
        [1.0, *(one.median for one in times)],
        [end for one in times for end in (one.low, one.high)],
        NEAR,
    )
    names = list(dict.fromkeys(point.shape for point in points))
    needed = _needed_widths(points, names, span, line, dense=dense)
    rows = [
        point.row(colours, span)
        | {
            "needs": width,
            "side": "right" if names.index(point.shape) else "left",
        }
        for point, width in zip(points, needed)
    ]
    scale = alt.Scale(domain=list(span), zero=False, nice=False, padding=PADDING)
    axis = alt.Axis(
        labelExpr="format(datum.value, '.2f') + '×'", tickCount=8, labelSeparation=6
    )
    x = alt.X(
        "speedup:Q",
        title=f"{SPEEDUPS[0].heading} over the original model",
        axis=axis,
        scale=scale,
    )
    series, chosen = _series(points, rows, x, lost, colours, colour)
    bare = alt.Legend(symbolFillColor=GREY, symbolStrokeWidth=0)
    marks = series.mark_point(filled=True, size=75).encode(
        shape=alt.Shape(
            "shape:N", title=shape, scale=_each(names, SHAPES), legend=bare
        ),
        tooltip=[*_told(colour, shape), alt.Tooltip("speedup:Q", format=".3f")],
    )
    dash = alt.StrokeDash("shape:N", title=shape, scale=_each(names, DASHES))
    joined = (
        [series.mark_line(strokeWidth=1).encode(order="count:Q", strokeDash=dash)]
        if paths
        else []
    )
    spread = series.mark_rule(strokeWidth=1.5).encode(
        x="speedup_from:Q", x2="speedup_to:Q"
    )
    of_front = alt.Data(
        values=[{"speedup": speedup, "lost": lost} for speedup, lost in line]
    )
    best_line = alt.Chart(of_front).mark_line(
        strokeWidth=5, opacity=0.35, color=GREY, strokeJoin="round"
    )
    best_line = best_line.encode(x="speedup:Q", y="lost:Q", order="speedup:Q")
    # Paths go up and to the right: there is room left of them above, and right of them
    # below.
    fitting = series.transform_filter("isValid(datum.needs) && datum.needs <= width")
    left, right = (
        fitting.transform_filter(alt.datum.side == side) for side in ("left", "right")
    )
    labels = [
        *_text(left, "label:N", "right", -7, -8),
        *_text(right, "label:N", "left", 7, 9),
    ]
    layers = [
        *joined,
        _errors(series),
        spread,
        *_beyond(series),
        best_line,
        marks.add_params(chosen),
        *labels,
    ]
    return _ringed([*layers, *(_dense() if dense else [])], series, "speedup")


def losses_by_count(points: Sequence[Point], colours: Colours) -> alt.LayerChart:
    """What points lose against how much they skip, a line a series and a dash a repair,
    none without one.
    """
    points = [point for point in points if is_number(point.lost)]
    names = list(dict.fromkeys(["none", *(point.shape for point in points)]))
    counts = alt.X(
        "count:Q",
        title="skipped",
        axis=alt.Axis(format="d", tickMinStep=1),
        scale=snug(16),
    )
    series, chosen = _series(
        points,
        [point.row(colours) for point in points],
        counts,
        HELD_OUT,
        colours,
        "criterion",
    )
    lines = series.mark_line(strokeWidth=1.5).encode(detail="colour:N")
    marks = series.mark_point(filled=True, size=50).encode(
        tooltip=_told("criterion", "repair")
    )
    if len(names) > 1:
        lines = lines.encode(
            strokeDash=alt.StrokeDash(
                "shape:N", title="repair", scale=_each(names, DASHES)
            )
        )
        marks = marks.encode(
            shape=alt.Shape("shape:N", title="repair", scale=_each(names, SHAPES))
        )
    return _ringed([lines, _errors(series), marks.add_params(chosen)], series, "count")


def losses_in_panels(points: Sequence[Point], title: str) -> alt.FacetChart:
    """`losses_by_count` to be saved: a part of the figure for each panel of the
    points.
    """
    layers = losses_by_count(points, colours_of(points)).properties(
        width=300, height=300
    )
    panels = layers.facet(
        facet=alt.Facet("panel:N", title=None), columns=2
    ).resolve_scale(x="independent")
    told = titled(title, "Lower is better. Bars: standard error.")
    return panels.properties(title=told, padding=16).configure(**LIGHT)


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
    was asked, the others are grey.

    Of what it did not answer a series is the last. The first search is in the colour of
    ink.
    """
    points = [point for point in points if is_number(point.lost)]
    asked: dict[tuple[str, float], dict[str, float]] = {}
    for point in points:
        best = asked.setdefault((point.panel, point.count), {})
        best[point.colour] = min(point.lost, best.get(point.colour, math.inf))
    orders = [
        (sorted(best, key=best.__getitem__), len(best)) for best in asked.values()
    ]
    ranks = {
        name: sum(
            order.index(name) / count if name in order else 1 for order, count in orders
        )
        for name in dict.fromkeys(point.colour for point in points)
    }
    names = sorted(ranks, key=ranks.__getitem__)
    names = sorted(
        names if len(names) <= BEST + 1 else names[:BEST],
        key=lambda name: not name.startswith("search"),
    )
    searched = names[:1] if names and names[0].startswith("search") else []
    return dict(zip(names, cycle(SPECTRUM))) | dict.fromkeys(searched, INK)


def in_turn(names: Iterable[str]) -> Colours:
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


def _span_of_losses(points: Sequence[Point]) -> Span:
    return bounds(
        [0, *(point.lost for point in points)],
        [end for point in points for end in point.bar],
    )


def symlog(value: float) -> float:
    """As Vega's scale of that name has it: linear near 0, logarithmic far from it."""
    return math.copysign(math.log1p(abs(value) / LINEAR), value)


def _needed_widths(
    points: Sequence[Point],
    names: Sequence[str],
    span: Span,
    best: Sequence[Span],
    *,
    dense: bool,
) -> list[int | None]:
    """How wide a plot must be for each label to lie on nothing, those on the front
    first; None: wider than any.

    What fits once fits in any wider plot too: boxes part, and stay as large as they
    are.
    """
    low, high = _span_of_losses(points)
    of = symlog if high >= 1 else float  # as the scale of `_series` has it
    inside = HEIGHT - 2 * PAD_OF_LOSSES

    def moved(place: Span, box: Box) -> Box:
        """In a plot that is `width` pixels wide."""
        right = (width - 2 * PADDING) / (span[1] - span[0]) * place[0]
        down = (
            HEIGHT
            - PAD_OF_LOSSES
            - (of(place[1]) - of(low)) / (of(high) - of(low)) * inside
        )
        return box[0] + right, box[1] + right, box[2] + down, box[3] + down

    taken = [(point.place, AROUND) for point in points]
    taken += [((1.0, 0.0), box) for box in (AROUND, DENSE_LABEL) if dense]
    order = [number for number, point in enumerate(points) if point.label]
    order.sort(key=lambda number: points[number].place not in best)
    needed: list[int | None] = [None] * len(points)
    for width in WIDTHS:
        boxes = [moved(*one) for one in taken]
        for number in order:
            place, box = (
                points[number].place,
                _label_box(points[number].label, left=points[number].shape == names[0]),
            )
            label = moved(place, box)
            if needed[number] is None and not any(
                label[0] < other[1]
                and other[0] < label[1]
                and label[2] < other[3]
                and other[2] < label[3]
                for other in boxes
            ):
                needed[number] = width
                boxes.append(label)
                taken.append((place, box))
    return needed


def _label_box(text: str, *, left: bool) -> Box:
    """As `tradeoff` places it."""
    wide = LETTER * len(text)
    return (-7 - wide, -7.0, -15.0, -2.0) if left else (7.0, 7 + wide, 2.0, 15.0)


def _text(
    series: alt.Chart,
    text: str,
    align: Literal["left", "center", "right"],
    dx: int,
    dy: int,
) -> list[alt.Chart]:
    """On a white halo, to be read across lines."""
    halo = series.mark_text(
        fontSize=11, align=align, dx=dx, dy=dy, stroke=PAPER, strokeWidth=3
    )
    return [
        halo.encode(text=text),
        series.mark_text(fontSize=11, align=align, dx=dx, dy=dy).encode(text=text),
    ]


def _series(
    points: Sequence[Point],
    rows: Sequence[Mapping[str, object]],
    x: alt.X,
    title: str,
    colours: Colours,
    legend: str,
) -> tuple[alt.Chart, alt.Parameter]:
    """Losses of a series a colour, the others dim while one is chosen in the legend;
    and that choice.

    Losses of 1 nat and more get a logarithmic scale, linear near 0, where they may be
    hundredths, or below it.
    """
    low, high = _span_of_losses(points)
    kind = {"zero": False} if high < 1 else {"type": "symlog", "constant": LINEAR}
    y = alt.Y(
        "lost:Q",
        title=title,
        scale=alt.Scale(domain=[low, high], nice=False, padding=PAD_OF_LOSSES, **kind),
    )
    if high >= 1:
        ticks = sorted(
            tick for size in (0, *NATS) for tick in {size, -size} if low <= tick <= high
        )
        y = y.axis(values=ticks, format="~g")
    drawn = {
        name: colours.get(name, PALE)
        for name in (*colours, OTHERS)
        if any(row["shown"] == name for row in rows)
    }
    look, chosen = by_colour("shown", drawn, legend)
    below = sorted(rows, key=lambda row: row["shown"] != OTHERS)
    return alt.Chart(alt.Data(values=below)).encode(x=x, y=y, **look), chosen


def _errors(series: alt.Chart) -> alt.Chart:
    return series.mark_rule(strokeWidth=1.5).encode(y="lost_low:Q", y2="lost_high:Q")


def _beyond(series: alt.Chart) -> list[alt.Chart]:
    """An arrow where a bar goes on beyond the axis."""
    ends = (
        ("from", "low", "triangle-left", "<"),
        ("to", "high", "triangle-right", ">"),
    )
    return [
        series.mark_point(filled=True, size=55, shape=shape)
        .encode(
            x=f"speedup_{end}:Q",
            tooltip=[alt.Tooltip(f"speedup_{whole}:Q", title="quartile", format=".3f")],
        )
        .transform_filter(f"datum.speedup_{whole} {sign} datum.speedup_{end}")
        for end, whole, shape, sign in ends
    ]


def _dense() -> list[alt.Chart]:
    row = {"speedup": 1, "lost": 0, "name": "dense"}
    dense = alt.Chart(alt.Data(values=[row])).encode(
        x="speedup:Q", y="lost:Q", color=alt.value(INK)
    )
    point = dense.mark_point(shape="diamond", filled=True, size=110, opacity=1)
    return [point, *_text(dense, "name:N", "center", 0, 16)]


def _ringed(layers: Sequence[alt.Chart], series: alt.Chart, x: str) -> alt.LayerChart:
    """With a ring around the point of the plan that the param `plan` counts; at first
    there is none.
    """
    ring = alt.Chart(series.data).transform_filter("isValid(datum.plan)")
    ring = ring.mark_point(strokeWidth=2.5, stroke=INK, fill=None, opacity=1)
    size = alt.condition("datum.plan == plan", alt.value(330), alt.value(0))
    ring = ring.encode(x=f"{x}:Q", y="lost:Q", size=size)
    return alt.LayerChart(layer=[*layers, ring]).add_params(
        alt.param(name="plan", value=-1)
    )


def _told(colour: str, shape: str) -> list[alt.Tooltip]:
    titles = {
        "name:N": "plan",
        "colour:N": colour,
        "shape:N": shape,
        "count:Q": "skipped",
    }
    return [
        *(alt.Tooltip(field, title=title) for field, title in titles.items()),
        alt.Tooltip("lost:Q", format=".3f"),
    ]


def _each(names: Sequence[str], values: Sequence[str | list[int]]) -> alt.Scale:
    return alt.Scale(
        domain=list(names), range=[value for _, value in zip(names, cycle(values))]
    )
