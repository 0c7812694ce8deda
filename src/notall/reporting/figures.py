"""The figures of a report. They say `plan` where they follow the plan that is stepped to, from 0."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from ..records.columns import Row, in_bytes
from ..records.record import VARIANTS
from . import plots
from .folder import Folder
from .rows import SHORT, name_of, shorten, sublayers

STRIPES, STRIPE = 7, "#e8731a"  # hatching, of a colour that the shades of neither theme have
UNKNOWN = "#8884"  # cells of which nothing is known, in either theme
TIMES = {
    "prefill": ("prefill_ms", "first token"),
    "decode": ("decode_ms_per_token", "each further token"),
}
BYTES = {"weight_bytes": "weights", "kv_bytes_per_token": "KV cache a token", "state_bytes": "states"}
LEAST_SHADE = 1e-9  # where all costs are 0
WIDER = 1.25  # than the longest bar is the axis: one noisy quartile does not shrink all bars
FRONT = "front"  # what the names of its panels begin with
BESIDE = {
    "refits": plots.refit_layers,
    "healing": plots.healing_layers,
    "front": plots.quantised_layers,
}  # above the table of that name
NAMES = ("criterion", "aim", "space")


def draw_all(folder: Folder) -> dict[str, Row]:
    """Vega-Lite specs by the name of the figure, without theme, as wide as the page gives."""
    drawn: dict[str, alt.LayerChart] = {}
    if folder.plans and folder.layers:
        drawn["map"] = draw_map(folder).properties(height=104)
    if saved := savings_rows(folder.records):
        drawn["savings"] = draw_savings(saved).properties(height=48 * len({row["measure"] for row in saved}))
    if folder.similarity:
        drawn["similarity"] = plots.similarity_layers(folder.similarity).properties(height=340)
    if folder.kind == "sweep" and len(folder.records) > 1:
        drawn["tradeoff"] = draw_tradeoff(folder.records).properties(height=plots.HEIGHT)
    if folder.kind == "compare":
        drawn |= draw_comparison(folder.records)
    beside = {name: draw(folder.others[name]) for name, draw in BESIDE.items() if name in folder.others}
    drawn |= {name: chart.properties(height=300) for name, chart in beside.items()}
    return {name: plots.spec_of(chart.properties(width="container")) for name, chart in drawn.items()}


def map_rows(folder: Folder) -> tuple[list[Row], str]:
    """A row a sublayer with what is known of leaving it out, and how that was got: measured, similarity or nothing."""
    measured = folder.costs.found if folder.costs else {}
    cosines = {(row["kind"], row["layer"]): row["cosine"] for row in folder.similarity}
    mixers = {(row["kind"], row["layer"]): row.get("mixer") for row in folder.similarity}
    source = "measured" if measured else "similarity" if cosines else "nothing"
    rows = []
    for kind, short in SHORT.items():
        for layer in range(folder.layers):
            if mixers and (kind, layer) not in mixers:
                continue  # layers of hybrids may lack one of the two
            cosine = cosines.get((kind, layer))
            changed = None if cosine is None else 1 - cosine
            cost = measured.get((kind, layer)) if measured else changed
            about = {"name": f"{short}.{layer}", "layer": layer, "row": VARIANTS[kind]}
            told = {"mixer": mixer} if (mixer := mixers.get((kind, layer))) else {}
            rows.append(about | told | {"cosine": cosine, "cost": cost})
    return rows, source


def draw_map(folder: Folder) -> alt.LayerChart:
    """Columns = layers, two rows; shade = cost; the sublayers that the param `skipped` names are hatched."""
    rows, source = map_rows(folder)
    title = shorten(folder.costs.title) if folder.costs else "changed: 1 − cosine"
    cells = (
        alt.Chart(alt.Data(values=rows))
        .transform_calculate(state="indexof(skipped, datum.name) >= 0 ? 'skipped' : 'kept'")
        .encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)),
            y=alt.Y(
                "row:N", title=None, sort=[VARIANTS[kind] for kind in SHORT], axis=alt.Axis(ticks=False, domain=False)
            ),
            tooltip=[
                alt.Tooltip("name:N", title="sublayer"),
                alt.Tooltip("state:N", title="in this plan"),
                alt.Tooltip("cost:Q", title=title, format=".3f"),
                alt.Tooltip("cosine:Q", title="cosine, before and after", format=".4f"),
                *([alt.Tooltip("mixer:N", title="kind of mixer")] if any("mixer" in row for row in rows) else []),
            ],
        )
    )
    shade = _logarithmic([row["cost"] for row in rows if row["cost"] is not None], title)
    framed = cells.mark_rect(stroke=alt.expr("paper"), strokeWidth=1.5)
    unknown = framed.encode(color=alt.value(UNKNOWN)).transform_filter("!isValid(datum.cost)")
    shaded = [] if source == "nothing" else [framed.encode(color=shade).transform_filter("isValid(datum.cost)")]
    hatched = cells.mark_rect(fill=_stripes(), stroke=STRIPE, strokeWidth=2).transform_filter(
        "datum.state == 'skipped'"
    )
    return alt.LayerChart(layer=[unknown, *shaded, hatched]).add_params(alt.param(name="skipped", value=[]))


def _logarithmic(costs: Sequence[float], title: str) -> alt.Color:
    """A shade that tells small costs apart beside a large one; linear near 0, where errors are."""
    most = max([LEAST_SHADE, *costs])
    linear = most / 300
    decades = [most / 10**power for power in range(3)]
    ticks = [0, *sorted(float(f"{tick:.0e}") for tick in decades)]
    legend = alt.Legend(orient="bottom", gradientLength=220, title=title, values=ticks, format="~g")
    scale = alt.Scale(type="symlog", constant=linear, domain=[min([0, *costs]), most], nice=False)
    return alt.Color("cost:Q", scale=scale, legend=legend)


def _stripes() -> alt.LinearGradient:
    """Diagonal stripes over a cell of any size, as a gradient with hard edges."""
    edges = [(half / (2 * STRIPES), (half + 1) / (2 * STRIPES), half % 2) for half in range(2 * STRIPES)]
    stops = [
        alt.GradientStop(color=STRIPE if on else "transparent", offset=edge)
        for start, end, on in edges
        for edge in (start, end)
    ]
    return alt.LinearGradient(gradient="linear", x1=0, y1=0, x2=0.36, y2=1.19, stops=stops)


def savings_rows(records: Sequence[Row]) -> list[Row]:
    """For each record and measure its share of the dense model's; of times as they were paired, round by round.

    The dense model is the record before that skips nothing; where there is none, bytes have nothing to be a share of.
    """
    rows: list[Row] = []
    dense: Row | None = None
    for plan, record in enumerate(records):
        about = {"plan": plan, "name": shorten(name_of(record))}
        dense = dense if sublayers(record) else record
        for name, (key, title) in TIMES.items():
            if f"speedup_{name}" not in record:
                continue
            low, middle, high = (record[f"speedup_{name}{end}"] for end in ("_low", "", "_high"))
            share = {"share": 1 / middle, "low": 1 / high, "high": 1 / low}
            text = f"{title}: {record[key]:,.1f} ms, {middle:.2f}× as fast"
            rows.append(about | {"measure": title, "text": text} | share)
        for key, title in BYTES.items():
            if dense and dense.get(key) and record.get(key) is not None:
                share = dict.fromkeys(("share", "low", "high"), record[key] / dense[key])
                text = f"{title}: {in_bytes(record[key])} of {in_bytes(dense[key])}"
                rows.append(about | {"measure": title, "text": text} | share)
    return rows


def draw_savings(rows: Sequence[Row]) -> alt.LayerChart:
    """What the plan takes of the dense model's time and bytes."""
    most = max([1.15, *(WIDER * row["share"] for row in rows)])
    rows = [row | {"to": min(row["high"], most)} for row in rows]
    base = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter("datum.plan == plan")
        .encode(y=alt.Y("measure:N", sort=None, title=None, axis=None))
    )
    bars = base.mark_bar(height={"band": 0.42}, color=alt.expr("colour_attention"), yOffset=9).encode(
        x=alt.X(
            "share:Q",
            title="share of the dense model's",
            scale=alt.Scale(domain=[0, most], nice=False),
            axis=alt.Axis(format=".0%", tickCount=6),
        ),
        tooltip=["name:N", "measure:N", "text:N", alt.Tooltip("share:Q", format=".1%")],
    )
    spread = base.mark_rule(strokeWidth=2, color=alt.expr("ink"), yOffset=9).encode(x="low:Q", x2="to:Q")
    goes_on = base.mark_point(shape="triangle-right", filled=True, size=60, color=alt.expr("ink"), yOffset=9, opacity=1)
    beyond = goes_on.encode(x="to:Q").transform_filter("datum.high > datum.to")
    place = {"align": "left", "x": 2, "yOffset": -9, "fontSize": 12}
    halo = base.mark_text(**place, stroke=alt.expr("paper"), strokeWidth=4).encode(text="text:N")
    words = base.mark_text(**place, color=alt.expr("ink")).encode(text="text:N")
    whole = alt.Chart(alt.Data(values=[{"share": 1}])).mark_rule(strokeDash=[4, 3], color=alt.expr("grey"))
    return (bars + whole.encode(x="share:Q") + spread + beyond + halo + words).add_params(
        alt.param(name="plan", value=0)
    )


def draw_tradeoff(records: Sequence[Row]) -> alt.LayerChart:
    """`plots.tradeoff_chart` with a ring around the plan."""
    points = [
        {"plan": number, "speedup": record["speedup_decode"], "lost": record["delta_nll"]}
        for number, record in enumerate(records)
        if record["delta_nll"] is not None
    ]
    return _ringed(plots.tradeoff_layers(records), points, "speedup")


def draw_comparison(records: Sequence[Row]) -> dict[str, alt.LayerChart]:
    """A panel of the front for each space that was chosen from, and quality against speed where that was measured."""
    rows = plots.front_rows([record | {name: shorten(record[name]) for name in NAMES} for record in records])
    colours = plots.criterion_colours(rows)
    drawn = {}
    for number, space in enumerate(spaces(records)):
        panel = [row for row in rows if row["space"] == shorten(space)]
        drawn[f"{FRONT}{number}"] = _ringed(plots.front_layers(panel, colours), panel, "count").properties(height=340)
    timed = [row for row in rows if "speedup" in row]
    if timed:
        chart = _ringed(plots.compared_layers(timed, colours), timed, "speedup")
        drawn["tradeoff"] = chart.properties(height=plots.HEIGHT)
    return drawn


def spaces(records: Sequence[Row]) -> list[str]:
    """What was chosen from, by those that have a loss to draw."""
    return list(dict.fromkeys(record["space"] for record in records if record["delta_nll"] is not None))


def _ringed(chart: alt.LayerChart, points: Sequence[Row], x: str) -> alt.LayerChart:
    """The chart with a ring around the point of the plan that is stepped to."""
    ring = (
        alt.Chart(alt.Data(values=list(points)))
        .mark_point(strokeWidth=2.5, stroke=alt.expr("ink"), fill=None, opacity=1)
        .encode(x=f"{x}:Q", y="lost:Q", size=alt.condition("datum.plan == plan", alt.value(330), alt.value(0)))
    )
    return (chart + ring).add_params(alt.param(name="plan", value=0))
