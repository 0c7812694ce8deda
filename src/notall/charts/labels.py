"""Where labels of points fit: how wide a plot must be for each."""

from collections.abc import Sequence

from .points import Point, Span, span_of_losses, symlog
from .style import HEIGHT

PADDING, PAD_OF_LOSSES = 28, 24  # pixels around the points, across and down
# of plots, in pixels: a phone's, a narrow window's, a wide one's
WIDTHS = (240, 420, 720)
LETTER = 7.0  # pixels that one is wide, about

Box = tuple[float, float, float, float]  # left, right, top, bottom, in pixels
Placed = tuple[Span, Box]  # a point in figures, and a box around it in pixels
POINT_BOX = (-6.0, 6.0, -6.0, 6.0)  # a point
DENSE_LABEL = (-17.0, 17.0, 9.0, 23.0)


def needed_widths(
    points: Sequence[Point],
    names: Sequence[str],
    span: Span,
    best: Sequence[Span],
    *,
    dense: bool,
) -> list[int | None]:
    """How wide a plot must be for each label to lie on nothing, those on the front
    first; None: wider than any. `span` is that of the axis of speedups.

    What fits once fits in any wider plot too: boxes part, and stay as large as they
    are.
    """
    losses = span_of_losses(points)
    taken: list[Placed] = [(point.place, POINT_BOX) for point in points]
    if dense:
        taken += [((1.0, 0.0), POINT_BOX), ((1.0, 0.0), DENSE_LABEL)]
    order = [number for number, point in enumerate(points) if point.label]
    order.sort(key=lambda number: points[number].place not in best)
    needed: list[int | None] = [None] * len(points)
    for width in WIDTHS:
        boxes = [_moved(*one, width, span, losses) for one in taken]
        for number in order:
            point = points[number]
            box = label_box(point.label, left=point.shape == names[0])
            label = _moved(point.place, box, width, span, losses)
            if needed[number] is None and not any(
                _overlap(label, other) for other in boxes
            ):
                needed[number] = width
                boxes.append(label)
                taken.append((point.place, box))
    return needed


def _moved(place: Span, box: Box, width: int, span: Span, losses: Span) -> Box:
    """A box around a point, in pixels of a plot that is `width` pixels wide."""
    scaled = symlog if losses[1] >= 1 else float  # as the axis of losses is
    low, high = map(scaled, losses)
    right = (width - 2 * PADDING) / (span[1] - span[0]) * place[0]
    share = (scaled(place[1]) - low) / (high - low)
    down = HEIGHT - PAD_OF_LOSSES - share * (HEIGHT - 2 * PAD_OF_LOSSES)
    return box[0] + right, box[1] + right, box[2] + down, box[3] + down


def _overlap(one: Box, other: Box) -> bool:
    across = one[0] < other[1] and other[0] < one[1]
    return across and one[2] < other[3] and other[2] < one[3]


def label_box(text: str, *, left: bool) -> Box:
    """Where a label lies around its point: above it on the left, or below on the
    right.
    """
    width = LETTER * len(text)
    return (-7 - width, -7.0, -15.0, -2.0) if left else (7.0, 7 + width, 2.0, 15.0)
