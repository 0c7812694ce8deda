"""Two figures: how similar the layers are, and what leaving them out costs and saves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import altair as alt
from altair.utils.mimebundle import spec_to_mimebundle

from ..errors import UsageError
from ..records.columns import Row, in_bytes, is_number
from ..records.comparison import UNREPAIRED
from ..records.front import DELTA_BITS, best_of, goes_by_bits, key_of, loss_of
from ..records.record import CONFIGURED, DELTA_NLL, KL, SPEEDUPS, VARIANTS
from .axes import Label, Span, bounds, needed_widths, symlog, within
from .printable import printable

# From Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {"attention": "#0072B2", "MLP": "#D55E00", "block": "#009E73"}
PALER = {"attention": "#56B4E9", "MLP": "#F08A4B", "block": "#2FC79A"}  # the same, to be read on black
SPECTRUM = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c564b", "#7f7f7f", "#9467bd",
            "#bcbd22", "#17becf", "#d62728", "#aec7e8", "#98df8a", "#ff9896", "#c5b0d5",
            "#393b79", "#8c6d31", "#843c39", "#7b4173")  # fmt: skip
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [12, 4], [1, 3])  # of plans as they are, then of each repair
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
LAST = {False: "skipped too", True: "kept"}

HEIGHT = 440  # pixels of a figure of quality against speed
LINEAR = 0.1  # nats, below which the axis of losses is linear
PAD_OF_LOSSES = 24  # pixels
POINT = (-6.0, 6.0, -6.0, 6.0)  # boxes around a point: left, right, top, bottom
LABELS = {LAST[False]: (-33.0, -7.0, -15.0, -2.0), LAST[True]: (7.0, 33.0, 2.0, 15.0)}
DENSE_LABEL = (-17.0, 17.0, 9.0, 23.0)
LETTER = 7.0  # pixels that one is wide, about
Box = tuple[float, float, float, float]
NEAR = 0.15  # of a speedup: so far beyond the points a quartile may always stretch the axis
PADDING = 28  # pixels around the points of a figure of speedups
LEAST_CHANGE = 1e-5  # 1 − cosine, below which rounding decides
BEST = 4  # criteria that get a colour where there are more
OTHERS = "other ways"
NATS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # ticks of losses
TIMES = alt.Axis(labelExpr="format(datum.value, '.2f') + '×'", tickCount=8, labelSeparation=6)
HELD_OUT = f"{DELTA_NLL.heading} on held-out text, {DELTA_NLL.unit}"
LAYER, SPEEDUP = CONFIGURED[2].heading, SPEEDUPS[0].heading
VEGALITE = alt.VEGALITE_VERSION.rpartition(".")[0]
MENU = {"export": True, "source": False, "compiled": False, "editor": False}  # what needs no network


def theme(
    ink: str, grey: str, pale: str, faint: str, paper: str, ramp: tuple[str, str], colours: Mapping[str, str]
) -> Mapping[str, Any]:
    """How every figure looks, as a Vega-Lite config; figures name its colours by the params that it defines."""
    plain = {"titleFontWeight": "normal", "titleFontSize": 12}
    named = {"ink": ink, "grey": grey, "pale": faint, "paper": paper} | {
        f"colour_{name}": hue for name, hue in colours.items()
    }
    return {
        "background": paper,
        "font": "system-ui, Helvetica, Arial, sans-serif",
        "params": [{"name": name, "value": value} for name, value in named.items()],
        "range": {"heatmap": list(ramp)},
        "title": {"color": ink, "fontSize": 16, "subtitleColor": grey, "subtitleFontSize": 12, "subtitlePadding": 6},
        "axis": {
            "labelFontSize": 11,
            "labelColor": grey,
            "titleColor": ink,
            "gridColor": pale,
            "domainColor": grey,
            "tickColor": grey,
            "titlePadding": 10,
            **plain,
        },
        "legend": {"labelFontSize": 12, "labelColor": grey, "titleColor": grey, **plain},
        "view": {"stroke": None},
    }


LIGHT = theme("#222222", "#666666", "#e6e6e6", "#b9bec5", "#ffffff", ("#eef1f5", "#08306b"), COLOURS)
DARK = theme("#e8eaed", "#a3a9b2", "#30353c", "#5b626c", "#15181c", ("#272c33", "#9ecbff"), PALER)


def similarity_chart(similarity: Sequence[Row], title: str) -> alt.LayerChart:
    """How far each layer's features are from the previous layer's, 1 − cosine, by depth (after the paper's Fig. 1).

    A row holds `layer` (from 0), `kind` (block, attention or mlp) and `cosine`.
    """
    return _dress(similarity_layers(similarity), title, "1 − cosine similarity. Low: little of the input is changed")


def tradeoff_chart(records: Sequence[Row], title: str) -> alt.LayerChart:
    """Quality lost (`delta_nll`) against decode speedup, a point for each configuration.

    Records are as in `results.Record`. A label is the fraction skipped; bars are one standard error of the
    loss and the quartiles of the speedup. Losses of 1 nat and more get a logarithmic scale, linear near 0.
    """
    told = [
        "Lower right is better. Labels: share of the layers skipped. Bars: standard error; quartiles of the speedup.",
        "Grey line: the front, where nothing measured is both faster and better.",
    ]
    return _dress(tradeoff_layers(records), title, told)


def similarity_layers(similarity: Sequence[Row]) -> alt.LayerChart:
    """What `similarity_chart` draws, without size, title and theme."""
    rows = [
        {
            "layer": row["layer"],
            "kind": VARIANTS[row["kind"]],
            "cosine": row["cosine"],
            "changed": max(1 - row["cosine"], LEAST_CHANGE),
        }
        for row in similarity
        if is_number(row["cosine"])
    ]
    logarithmic = alt.Scale(type="log", nice=False, padding=16)
    axis = alt.Axis(format="~g", tickCount=6)
    changed = alt.Y("changed:Q", title="1 − cosine similarity, before and after", scale=logarithmic, axis=axis)
    return _by_depth(rows, changed, alt.Tooltip("cosine:Q", format=".4f"))


def refit_layers(refits: Sequence[Row]) -> alt.LayerChart:
    """How much of the error each refit left, by depth, without size and theme; rows are as `RefitRecord` has them."""
    rows = []
    for refit in refits:
        kinds, layers = zip(*(name.split(".") for name in refit["sublayers"]))
        kind = {"attn": "attention", "mlp": "MLP"}[kinds[0]] if len(kinds) == 1 else "block"
        if is_number(refit["left"]):
            rows.append({"layer": int(layers[0]), "kind": kind, "left": refit["left"]})
    left = alt.Y("left:Q", title="error left", axis=alt.Axis(format=".0%"))
    return _by_depth(rows, left, alt.Tooltip("left:Q", title="error left", format=".1%"))


def healing_layers(looks: Sequence[Row]) -> alt.LayerChart:
    """The KL on text that is not trained on, over the training, without size and theme; rows as of `HealRecord`."""
    rows = [{"tokens": row["tokens"], "kl": row["held_out_kl"]} for row in looks if is_number(row["held_out_kl"])]
    lines = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("tokens:Q", title="tokens trained on", axis=alt.Axis(format=",d"), scale=_snug(12)),
        y=alt.Y("kl:Q", title=f"held-out {KL.titled}", scale=_snug(16)),
        tooltip=[alt.Tooltip("tokens:Q", format=",d"), alt.Tooltip("kl:Q", title=KL.heading, format=".4f")],
    )
    colour = alt.expr("colour_attention")
    return lines.mark_line(strokeWidth=2, color=colour) + lines.mark_point(filled=True, size=50, color=colour)


def _by_depth(rows: Sequence[Row], y: alt.Y, tooltip: alt.Tooltip) -> alt.LayerChart:
    """A line and a colour for each `kind` of `rows`, over the layers."""
    layers = alt.Axis(
        values=sorted({row["layer"] for row in rows}),
        format="d",
        labelOverlap=True,
        labelSeparation=4,
        grid=False,
    )
    chosen = alt.selection_point(fields=["kind"], bind="legend")
    lines = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("layer:Q", title="layer", axis=layers, scale=_snug(12)),
        y=y,
        color=_colour("kind", rows),
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
        tooltip=["kind:N", "layer:Q", tooltip],
    )
    points = lines.mark_point(filled=True, size=38).add_params(chosen)
    return lines.mark_line(strokeWidth=2) + points


def tradeoff_layers(records: Sequence[Row]) -> alt.LayerChart:
    """What `tradeoff_chart` draws, without size, title and theme. `plan` in its data counts the records from 0."""
    rows = [
        _tradeoff_row(record) | {"plan": number}
        for number, record in enumerate(records)
        if record["variant"] != "dense" and is_number(record["delta_nll"])
    ]
    rows, span = _clipped(rows)
    rows = _labelled(rows, span)
    series, chosen = _series(rows, _speedup(span), DELTA_NLL.titled, _colour("skipped", rows))
    fitting = _fitting(series)
    above = fitting.transform_filter(alt.datum.last == LAST[False])
    below = fitting.transform_filter(alt.datum.last == LAST[True])
    layers = [
        _paths(series),
        *_bars(series),
        *_beyond(series),
        _front(_best(rows)),
        _points(series).add_params(chosen),
        # Paths go up and to the right: there is room left of them above, and right of them below.
        *_labels(above, "fraction:N", align="right", dx=-7, dy=-8),
        *_labels(below, "fraction:N", align="left", dx=7, dy=9),
        *_dense(),
    ]
    return alt.LayerChart(layer=layers)


def _labelled(rows: Sequence[Row], span: Span) -> list[Row]:
    """`rows` with the width that a plot needs for their labels to lie on no other; those on the front go first."""
    best = front([(row["speedup"], row["lost"]) for row in rows])
    rows = [row | {"best": (row["speedup"], row["lost"]) in best} for row in rows]
    dense = [((1.0, 0.0), POINT), ((1.0, 0.0), DENSE_LABEL)]
    return _with_room(rows, span, [LABELS[row["last"]] for row in rows], dense)


def _with_room(
    rows: Sequence[Row], span: Span, boxes: Sequence[Box], others: Sequence[tuple[Span, Box]] = ()
) -> list[Row]:
    """`rows` with the width that a plot needs for the `boxes` around their labels to lie on no other; best ones first.

    `others` are boxes around more points, (speedup, loss), which no label may lie on either.
    """
    order = sorted(range(len(rows)), key=lambda place: not rows[place]["best"])
    down = _pixels_down(rows)

    def label(point: Span, box: Box) -> Label:
        return Label(((point[0] - span[0]) / (span[1] - span[0]), down(point[1])), *box)

    places = [(row["speedup"], row["lost"]) for row in rows]
    taken = [*(label(point, POINT) for point in places), *(label(*other) for other in others)]
    needed = dict(zip(order, needed_widths([label(places[one], boxes[one]) for one in order], taken, PADDING)))
    return [row | {"needs": needed[place]} for place, row in enumerate(rows)]


def _pixels_down(rows: Sequence[Row]) -> Callable[[float], float]:
    """Where a loss is in a figure of `HEIGHT`, as the scale of `_losses` has it."""
    low, high = _span_of_losses(rows)
    of = (lambda lost: symlog(lost, LINEAR)) if high >= 1 else float
    inside = HEIGHT - 2 * PAD_OF_LOSSES
    return lambda lost: HEIGHT - PAD_OF_LOSSES - (of(lost) - of(low)) / (of(high) - of(low)) * inside


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speedup, loss) pairs those that no other beats in both, from the slowest to the fastest."""
    best: list[tuple[float, float]] = []
    for speedup, lost in sorted(points, key=lambda point: (-point[0], point[1])):
        if not best or lost < best[-1][1]:
            best.append((speedup, lost))
    return best[::-1]


def _best(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The front of `rows` and of the dense model, which is none of them."""
    return front([(1.0, 0.0), *((row["speedup"], row["lost"]) for row in rows)])


def compared_layers(rows: Sequence[Row], colours: Mapping[str, Any]) -> alt.LayerChart:
    """Quality lost against decode speedup of `front_rows` that were timed: a colour a criterion, a shape a space.

    What is repaired has a shape of its own.
    """
    rows, span = _clipped(_emphasised(rows, colours))
    series, chosen = _series(rows, _speedup(span), HELD_OUT, _by_criterion(rows, colours))
    points = series.mark_point(filled=True, size=60).encode(
        shape=alt.Shape("among:N", title="among", legend=alt.Legend(symbolFillColor=alt.expr("grey"))),
        tooltip=[*_asked(), alt.Tooltip("speedup:Q", format=".3f")],
    )
    return alt.LayerChart(
        layer=[*_bars(series), *_beyond(series), _front(_best(rows)), points.add_params(chosen), *_dense()]
    )


def quantised_chart(records: Sequence[Row], title: str) -> alt.LayerChart:
    """What is lost against decode speedup of skipped and quantised models; rows are as `FrontRecord` has them."""
    told = [
        "Lower right is better. Labels: how weights are held. Bars: standard error; quartiles of the speedup.",
        "Grey line: the front. What loses more is on it where its speed is above all of that by quartiles.",
    ]
    return _dress(quantised_layers(records), title, told)


def quantised_layers(records: Sequence[Row]) -> alt.LayerChart:
    """What `quantised_chart` draws, without size, title and theme: a colour a model, a shape for what is repaired."""
    by_bits, best_ones = goes_by_bits(records), [key_of(row) for row in best_of(records)]
    rows = [
        _quantised_row(record, by_bits=by_bits) | {"best": key_of(record) in best_ones}
        for record in records
        if "speedup_decode" in record and loss_of(record, by_bits=by_bits) is not None
    ]
    names = list(dict.fromkeys(row["model"] for row in rows))
    colours = _each(names, (alt.expr("ink"), *SPECTRUM))
    title = DELTA_BITS.titled if by_bits else HELD_OUT
    rows, span = _clipped(rows)
    rows = _with_room(rows, span, [(7.0, 7.0 + LETTER * len(row["type"]), -15.0, -2.0) for row in rows])
    series, chosen = _series(rows, _speedup(span), title, alt.Color("model:N", sort=names, scale=colours))
    repaired = alt.Scale(domain=["no", "yes"], range=["circle", "square"])
    points = series.mark_point(filled=True, size=75).encode(
        shape=alt.Shape("repaired:N", scale=repaired, legend=alt.Legend(symbolFillColor=alt.expr("grey"))),
        tooltip=[
            *("model:N", "type:N", "repaired:N"),
            alt.Tooltip("speedup:Q", format=".3f"),
            alt.Tooltip("lost:Q", title=title, format=".4f"),
            alt.Tooltip("file:N"),
        ],
    )
    best = [(row["speedup"], row["lost"]) for row in rows if row["best"]]
    layers = [*_bars(series), *_beyond(series), _front(sorted(best)), points.add_params(chosen)]
    return alt.LayerChart(layer=[*layers, *_labels(_fitting(series), "type:N", align="left", dx=7, dy=-7)])


def _quantised_row(record: Row, *, by_bits: bool) -> Row:
    fields = ("delta_bits", "delta_bits_se") if by_bits else ("delta_nll", "delta_nll_se")
    measured = _measured(record | dict(zip(("delta_nll", "delta_nll_se"), (record[field] for field in fields))))
    repaired = "yes" if record["repaired"] else "no"
    told = {"model": record["model"], "type": record["type"], "file": in_bytes(record["file_bytes"])}
    return {**told, "repaired": repaired, **measured}


def front_chart(records: Sequence[Row], title: str) -> alt.FacetChart:
    """Quality lost (`delta_nll`) against what is skipped, a line a criterion, a panel for what it chose among.

    What was repaired is dashed in its criterion's colour, with a dash and a mark for each repair. Records are as
    `comparison.compare_criteria` answers them: criterion, aim, space, count, repair, delta_nll, delta_nll_se. Losses
    of 1 nat and more get a logarithmic scale, linear near 0.
    """
    rows = front_rows(records)
    layers = front_layers(rows, criterion_colours(rows)).properties(width=300, height=300)
    panels = layers.facet(facet=alt.Facet("space:N", title=None), columns=2).resolve_scale(x="independent")
    told = alt.Title(title, subtitle="Lower is better. Bars: standard error.", anchor="start", frame="group", offset=14)
    return panels.properties(title=told, padding=16).configure(**LIGHT)


def front_layers(rows: Sequence[Row], colours: Mapping[str, Any]) -> alt.LayerChart:
    """What a panel of `front_chart` draws of `front_rows`, without size, title and theme."""
    rows = _emphasised(rows, colours)
    counts = alt.X("count:Q", title="skipped", axis=alt.Axis(format="d", tickMinStep=1), scale=_snug(16))
    series, chosen = _series(rows, counts, HELD_OUT, _by_criterion(rows, colours))
    lines = series.mark_line(strokeWidth=1.5).encode(detail="criterion:N")
    points = series.mark_point(filled=True, size=50).encode(tooltip=_asked())
    repairs = list(dict.fromkeys([UNREPAIRED, *(row["repair"] for row in rows)]))
    if len(repairs) > 1:
        lines = lines.encode(strokeDash=alt.StrokeDash("repair:N", scale=_each(repairs, DASHES)))
        points = points.encode(shape=alt.Shape("repair:N", scale=_each(repairs, SHAPES)))
    return lines + _bars(series)[0] + points.add_params(chosen)


def front_rows(records: Sequence[Row]) -> list[Row]:
    """A row for each record with a loss; `plan` counts the records from 0."""
    return [
        _front_row(record, records) | {"plan": number}
        for number, record in enumerate(records)
        if is_number(record["delta_nll"])
    ]


def criterion_colours(rows: Sequence[Row]) -> Mapping[str, Any]:
    """A colour for each criterion of `front_rows`, of many for the few that lose least on the whole.

    The first search is in the colour of ink. What has no colour here is drawn grey, as one of `OTHERS`.
    """
    names = _best_criteria(rows)
    names = names if len(names) <= BEST + 1 else names[:BEST]
    names.sort(key=lambda name: not name.startswith("search"))
    searched = bool(names) and names[0].startswith("search")
    return dict(zip(names, cycle(SPECTRUM))) | ({names[0]: alt.expr("ink")} if searched else {})


def _best_criteria(rows: Sequence[Row]) -> list[str]:
    """By their mean rank over all that was asked, 0 to 1; one that did not answer is the last there."""
    asked: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        asked.setdefault((row["space"], row["count"]), []).append(row)
    ranks: dict[str, float] = dict.fromkeys((row["criterion"] for row in rows), 0.0)
    for answers in asked.values():
        best: dict[str, float] = {}
        for row in answers:
            best[row["criterion"]] = min(row["lost"], best.get(row["criterion"], math.inf))
        order = sorted(best, key=best.__getitem__)
        for name in ranks:
            ranks[name] += order.index(name) / len(order) if name in best else 1
    return sorted(ranks, key=ranks.__getitem__)


def spec_of(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart as a Vega-Lite spec, in which no name ends an expression of Vega's or the XML of an SVG."""
    spec: dict[str, Any] = _drawable(chart.to_dict())
    return spec


def _drawable(value: Any) -> Any:
    """`value` with its texts in one line of printable letters; a backslash would take away what Vega quotes them by."""
    if isinstance(value, str):
        return printable(value).replace("\\", "∖")
    if isinstance(value, dict):
        return {key: _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list) else value


def _page(spec: dict[str, Any]) -> str:
    bundle: Any = spec_to_mimebundle(
        spec,
        "html",
        mode="vega-lite",
        vega_version=alt.VEGA_VERSION,
        vegalite_version=alt.VEGALITE_VERSION,
        vegaembed_version=alt.VEGAEMBED_VERSION,
        embed_options={"actions": MENU},
        json_kwds={"cls": _InScript},
        template="inline",
    )
    return str(bundle["text/html"])


class _InScript(json.JSONEncoder):
    """JSON within a `<script>`, which no text in it ends."""

    def encode(self, value: Any) -> str:
        return super().encode(value).replace("<", "\\u003c")


def save(chart: alt.TopLevelMixin, stem: Path) -> None:
    """Write stem.png, stem.svg and stem.html, an interactive page that needs no network.

    Raises `UsageError` when they can't be written.
    """
    import vl_convert

    spec = spec_of(chart)
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{stem}.png").write_bytes(vl_convert.vegalite_to_png(spec, vl_version=VEGALITE, scale=2))
        Path(f"{stem}.svg").write_text(vl_convert.vegalite_to_svg(spec, vl_version=VEGALITE), encoding="utf-8")
        Path(f"{stem}.html").write_text(_page(spec), encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write figures to {stem.parent}: {error.strerror}; "
            "make room or give access, or choose another folder"
        ) from None


def _tradeoff_row(record: Row) -> Row:
    return {
        "skipped": VARIANTS[record["variant"]],
        "fraction": f"{record['fraction']:.0%}",
        "share": record["fraction"],
        "last": LAST[record["keep_last"]],
        **_measured(record),
    }


def _front_row(record: Row, records: Sequence[Row]) -> Row:
    """A criterion goes by its name, and by its aim too where there are several."""
    aims = {other["aim"] for other in records if other["criterion"] == record["criterion"]}
    names = [record["criterion"], *([record["aim"]] if len(aims) > 1 else [])]
    repair = record.get("repair", UNREPAIRED)
    return {
        "criterion": ", ".join(names),
        "space": record["space"],
        "repair": repair,
        "among": record["space"] + (f", {repair}" if repair != UNREPAIRED else ""),
        "count": record["count"],
        **_measured(record),
    }


def _measured(record: Row) -> Row:
    """The loss with its error, and the speedup with its quartiles, where it was timed."""
    lost, error = record["delta_nll"], record["delta_nll_se"]
    bar = error if is_number(error) else 0
    ends = [end for end in ("", "_low", "_high") if f"speedup_decode{end}" in record]
    return {"lost": lost, "lost_low": lost - bar, "lost_high": lost + bar} | {
        f"speedup{end}": record[f"speedup_decode{end}"] for end in ends
    }


def _series(rows: Sequence[Row], x: alt.X, title: str, colour: alt.Color) -> tuple[alt.Chart, alt.Parameter]:
    """Losses of a series a colour, the others dim while one is chosen in the legend; and that choice."""
    chosen = alt.selection_point(encodings=["color"], bind="legend")
    series = alt.Chart(alt.Data(values=list(rows))).encode(
        x=x,
        y=alt.Y("lost:Q", title=title, **_losses(rows)),
        color=colour,
        opacity=alt.condition(chosen, alt.value(1), alt.value(0.1)),
    )
    return series, chosen


def _bars(series: alt.Chart) -> list[alt.Chart]:
    """Errors of the loss, and quartiles of the speedup."""
    bar = series.mark_rule(strokeWidth=1.5)
    return [bar.encode(y="lost_low:Q", y2="lost_high:Q"), bar.encode(x="speedup_from:Q", x2="speedup_to:Q")]


def _beyond(series: alt.Chart) -> list[alt.Chart]:
    """An arrow where a bar goes on beyond the axis."""
    ends = {"speedup_from": ("triangle-left", "<"), "speedup_to": ("triangle-right", ">")}
    return [
        series.mark_point(filled=True, size=55, shape=shape)
        .encode(x=f"{end}:Q", tooltip=[alt.Tooltip(f"{beyond}:Q", title="quartile", format=".3f")])
        .transform_filter(f"datum.{beyond} {sign} datum.{end}")
        for (end, (shape, sign)), beyond in zip(ends.items(), ("speedup_low", "speedup_high"))
    ]


def _clipped(rows: Sequence[Row]) -> tuple[list[Row], Span]:
    """`rows` with their quartiles as far as the axis goes, `speedup_from` and `speedup_to`; and that axis."""
    ends = [row[f"speedup_{end}"] for row in rows for end in ("low", "high")]
    span = bounds([1.0, *(row["speedup"] for row in rows)], ends, NEAR)
    return [
        row | {"speedup_from": within(row["speedup_low"], span), "speedup_to": within(row["speedup_high"], span)}
        for row in rows
    ], span


def _speedup(span: Span) -> alt.X:
    scale = alt.Scale(domain=list(span), zero=False, nice=False, padding=PADDING)
    return alt.X("speedup:Q", title=f"{SPEEDUP} over the dense model", axis=TIMES, scale=scale)


def _front(best: Sequence[tuple[float, float]]) -> alt.Chart:
    """Through (speedup, loss) pairs."""
    data = alt.Data(values=[{"speedup": speedup, "lost": lost} for speedup, lost in best])
    line = alt.Chart(data).mark_line(strokeWidth=5, opacity=0.35, color=alt.expr("grey"), strokeJoin="round")
    return line.encode(x="speedup:Q", y="lost:Q", order="speedup:Q")


def _paths(series: alt.Chart) -> alt.Chart:
    """From the smallest fraction to the largest."""
    dash = alt.StrokeDash("last:N", title=LAYER, scale=_by_last([1, 0], [4, 3]))
    return series.mark_line(strokeWidth=1).encode(order="share:Q", strokeDash=dash)


def _points(series: alt.Chart) -> alt.Chart:
    return series.mark_point(filled=True, size=85).encode(
        shape=alt.Shape(
            "last:N",
            title=LAYER,
            scale=_by_last("circle", "square"),
            legend=alt.Legend(symbolFillColor=alt.expr("grey"), symbolStrokeWidth=0),
        ),
        tooltip=[
            "skipped:N",
            "fraction:N",
            alt.Tooltip("last:N", title=LAYER),
            alt.Tooltip("speedup:Q", format=".3f"),
            alt.Tooltip("lost:Q", title=DELTA_NLL.heading, format=".3f"),
        ],
    )


def _fitting(series: alt.Chart) -> alt.Chart:
    """What of `_with_room` has a label that lies on no other."""
    return series.transform_filter("isValid(datum.needs) && datum.needs <= width")


def _labels(series: alt.Chart, text: str, **place: Any) -> list[alt.Chart]:
    """On a white halo, to be read across lines."""
    halo = series.mark_text(fontSize=11, stroke=alt.expr("paper"), strokeWidth=3, **place)
    return [halo.encode(text=text), series.mark_text(fontSize=11, **place).encode(text=text)]


def _dense() -> list[alt.Chart]:
    row = {"speedup": 1, "lost": 0, "name": "dense"}
    dense = alt.Chart(alt.Data(values=[row])).encode(x="speedup:Q", y="lost:Q", color=alt.value(alt.expr("ink")))
    return [
        dense.mark_point(shape="diamond", filled=True, size=110, opacity=1),
        *_labels(dense, "name:N", align="center", dx=0, dy=16),
    ]


def _losses(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Scale and axis for losses that may be a hundredth of a nat or ten, and may be below 0."""
    low, high = _span_of_losses(rows)
    if high < 1:
        return {"scale": alt.Scale(domain=[low, high], zero=False, nice=False, padding=PAD_OF_LOSSES)}
    ticks = sorted(tick for size in (0, *NATS) for tick in {size, -size} if low <= tick <= high)
    scale = alt.Scale(type="symlog", constant=LINEAR, domain=[low, high], nice=False, padding=PAD_OF_LOSSES)
    return {"scale": scale, "axis": alt.Axis(values=ticks, format="~g")}


def _span_of_losses(rows: Sequence[Row]) -> Span:
    return bounds([0, *(row["lost"] for row in rows)], [row[f"lost_{end}"] for row in rows for end in ("low", "high")])


def _snug(padding: int) -> alt.Scale:
    """From the least to the greatest value, with some pixels around."""
    return alt.Scale(zero=False, nice=False, padding=padding)


def _by_last(skipped: Any, kept: Any) -> alt.Scale:
    return alt.Scale(domain=[LAST[False], LAST[True]], range=[skipped, kept])


def _colour(field: str, rows: Sequence[Row]) -> alt.Color:
    present = [name for name in COLOURS if any(row[field] == name for row in rows)]
    return alt.Color(
        f"{field}:N", scale=alt.Scale(domain=present, range=[alt.expr(f"colour_{name}") for name in present])
    )


def _each(names: Sequence[str], values: Sequence[Any]) -> alt.Scale:
    """A value in turn for each name."""
    return alt.Scale(domain=list(names), range=[value for _, value in zip(names, cycle(values))])


def _emphasised(rows: Sequence[Row], colours: Mapping[str, Any]) -> list[Row]:
    """`rows` with the name that each goes by in the legend, `shown`; the grey ones come first, below the others."""
    shown = [row | {"shown": row["criterion"] if row["criterion"] in colours else OTHERS} for row in rows]
    return sorted(shown, key=lambda row: bool(row["shown"] != OTHERS))


def _by_criterion(rows: Sequence[Row], colours: Mapping[str, Any]) -> alt.Color:
    """Of rows that `_emphasised` answered."""
    names = [name for name in (*colours, OTHERS) if any(row["shown"] == name for row in rows)]
    scale = alt.Scale(domain=names, range=[colours.get(name, alt.expr("pale")) for name in names])
    return alt.Color("shown:N", title="criterion", sort=names, scale=scale)


def _asked() -> list[Any]:
    return [
        "criterion:N",
        "space:N",
        "repair:N",
        "count:Q",
        alt.Tooltip("lost:Q", title=DELTA_NLL.heading, format=".3f"),
    ]


def _dress(chart: alt.LayerChart, title: str, subtitle: str | list[str]) -> alt.LayerChart:
    heading = alt.Title(title, subtitle=subtitle, anchor="start", frame="group", offset=14)
    return chart.properties(width=640, height=HEIGHT, title=heading, padding=16).configure(**LIGHT)
