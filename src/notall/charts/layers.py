"""Figures of a model's layers, of what a plan saves, and of how a training goes."""

import math
from collections.abc import Mapping, Sequence

import altair as alt

from ..plan import KIND_NAMES
from ..results.facts import KL, Similarity
from ..results.record import Fact, Number, is_number
from ..results.repairs import HealRecord, RefitRecord
from .style import GREY, INK, KIND_COLOURS, PAPER, by_colour, snug

# Hatching of what is skipped for every token, and of what the prompt alone skips:
# colours that the shades of neither theme have, and lines that lean the other way.
STRIPES, STRIPE, PROMPT_STRIPE = 7, "#e8731a", "#d02fd0"
UNKNOWN_COLOUR = "#8884"  # cells of which nothing is known, in either theme
LEAST_SHADE = 1e-9  # where all costs are 0
LEAST_CHANGE = 1e-5  # 1 − cosine, below which rounding decides
# than the longest bar is the axis: one noisy quartile does not shrink all bars
HEADROOM = 1.25
SHORT_NAMES = {"attention": "attn", "mlp": "mlp"}
SKIPPED, SKIPPED_IN_PROMPT = "skipped", "skipped in the prompt alone"
STATE_EXPRESSION = (
    f"indexof(skipped, datum.name) >= 0 ? '{SKIPPED}' "
    f": indexof(prompt, datum.name) >= 0 ? '{SKIPPED_IN_PROMPT}' : 'kept'"
)
BAR, WORDS = 9, -9  # pixels below and above the middle of a measure's band


class LayerCell(Fact):
    """A cell of the layer map: what is known of leaving a sublayer out."""

    name: str  # such as attn.3
    layer: int
    row: str
    cosine: Number
    cost: Number
    mixer: str | None


def sublayers(
    layers: int,
    costs: Mapping[tuple[str, int], float],
    similarity: Sequence[Similarity],
) -> list[LayerCell]:
    """The cells of a model of so many layers; where no `costs` of leaving out each are
    known, 1 − cosine stands in.
    """
    known: dict[tuple[str, int], Similarity] = {
        (row.kind, row.layer): row for row in similarity
    }
    hybrid = any(row.mixer for row in similarity)  # layers may lack one of the two
    cells = []
    for kind, short in SHORT_NAMES.items():
        for layer in range(layers):
            row = known.get((kind, layer))
            if not row and hybrid:
                continue
            cosine = row.cosine if row else math.nan
            cost = costs.get((kind, layer), math.nan) if costs else 1 - cosine
            cell = LayerCell(
                name=f"{short}.{layer}",
                layer=layer,
                row=KIND_NAMES[kind],
                cosine=cosine,
                cost=cost,
                mixer=row.mixer if row else None,
            )
            cells.append(cell)
    return cells


def layer_map(cells: Sequence[LayerCell], title: str) -> alt.LayerChart:
    """Columns = layers, two rows; shade = cost; the sublayers that the params name are
    hatched.

    `skipped` names those that are skipped for every token, `prompt` those that the
    prompt alone skips.
    """
    tips = [
        alt.Tooltip("name:N", title="sublayer"),
        alt.Tooltip("state:N", title="in this plan"),
        alt.Tooltip("cost:Q", title=title, format=".3f"),
        alt.Tooltip("cosine:Q", title="cosine, before and after", format=".4f"),
    ]
    if any(cell.mixer for cell in cells):
        tips.append(alt.Tooltip("mixer:N", title="kind of mixer"))
    rows = [KIND_NAMES[kind] for kind in SHORT_NAMES]
    flat = alt.Axis(ticks=False, domain=False)
    drawn = (
        alt.Chart(alt.Data(values=[cell.model_dump(mode="json") for cell in cells]))
        .transform_calculate(state=STATE_EXPRESSION)
        .encode(
            x=alt.X(
                "layer:O",
                title="layer",
                axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False),
            ),
            y=alt.Y("row:N", title=None, sort=rows, axis=flat),
            tooltip=tips,
        )
    )
    costs = [cell.cost for cell in cells if is_number(cell.cost)]
    framed = drawn.mark_rect(stroke=PAPER, strokeWidth=1.5)
    unknown = framed.encode(color=alt.value(UNKNOWN_COLOUR)).transform_filter(
        "!isValid(datum.cost)"
    )
    known = framed.encode(color=_logarithmic(costs, title)).transform_filter(
        "isValid(datum.cost)"
    )
    hatched = [
        drawn.mark_rect(
            fill=_stripes(colour, mirrored), stroke=colour, strokeWidth=2
        ).transform_filter(f"datum.state == '{state}'")
        for state, colour, mirrored in (
            (SKIPPED, STRIPE, False),
            (SKIPPED_IN_PROMPT, PROMPT_STRIPE, True),
        )
    ]
    layers = [unknown, *([known] if costs else []), *hatched]
    named = [alt.param(name=name, value=[]) for name in ("skipped", "prompt")]
    return alt.LayerChart(layer=layers).add_params(*named)


def _stripes(colour: str, mirrored: bool) -> alt.LinearGradient:
    """Diagonal stripes over a cell of any size, maybe the other way: a gradient with
    hard edges.
    """
    stops = [
        alt.GradientStop(
            color=colour if half % 2 else "transparent", offset=edge / (2 * STRIPES)
        )
        for half in range(2 * STRIPES)
        for edge in (half, half + 1)
    ]
    start, end = (1, 0.64) if mirrored else (0, 0.36)
    return alt.LinearGradient(
        gradient="linear", x1=start, y1=0, x2=end, y2=1.19, stops=stops
    )


def _logarithmic(costs: Sequence[float], title: str) -> alt.Color:
    """A shade that shows small costs apart, whatever the largest; linear near 0, where
    errors are.
    """
    most = max([LEAST_SHADE, *costs])
    ticks = [0, *sorted(float(f"{most / 10**power:.0e}") for power in range(3))]
    legend = alt.Legend(
        orient="bottom", gradientLength=220, title=title, values=ticks, format="~g"
    )
    scale = alt.Scale(
        type="symlog", constant=most / 300, domain=[min([0, *costs]), most], nice=False
    )
    return alt.Color("cost:Q", scale=scale, legend=legend)


class Saving(Fact):
    """What a plan takes of the original model's time or bytes, as a share with its
    quartiles.
    """

    plan: int  # the number of the page's step
    name: str
    measure: str
    text: str
    share: float
    low: float
    high: float


def savings(bars: Sequence[Saving]) -> alt.LayerChart:
    """Bars of the plan that the param `plan` counts, from 0, and the original
    model's.
    """
    most = max([1.15, *(HEADROOM * bar.share for bar in bars)])
    rows = [{**bar.figures(), "to": min(bar.high, most)} for bar in bars]
    base = alt.Chart(alt.Data(values=rows)).transform_filter("datum.plan == plan")
    base = base.encode(y=alt.Y("measure:N", sort=None, title=None, axis=None))
    scale = alt.Scale(domain=[0, most], nice=False)
    axis = alt.Axis(format=".0%", tickCount=6)
    drawn = base.mark_bar(
        height=20, color=KIND_COLOURS["attention"], yOffset=BAR
    ).encode(
        x=alt.X(
            "share:Q", title="share of the original model's", scale=scale, axis=axis
        ),
        tooltip=["name:N", "measure:N", "text:N", alt.Tooltip("share:Q", format=".1%")],
    )
    spread = base.mark_rule(strokeWidth=2, color=INK, yOffset=BAR).encode(
        x="low:Q", x2="to:Q"
    )
    goes_on = base.mark_point(
        shape="triangle-right", filled=True, size=60, color=INK, yOffset=BAR, opacity=1
    )
    beyond = goes_on.encode(x="to:Q").transform_filter("datum.high > datum.to")
    words = [
        base.mark_text(align="left", x=2, yOffset=WORDS, fontSize=12, **look).encode(
            text="text:N"
        )
        for look in ({"stroke": PAPER, "strokeWidth": 4}, {"color": INK})  # on a halo
    ]
    whole = (
        alt.Chart(alt.Data(values=[{"share": 1}]))
        .mark_rule(strokeDash=[4, 3], color=GREY)
        .encode(x="share:Q")
    )
    return alt.LayerChart(layer=[drawn, whole, spread, beyond, *words]).add_params(
        alt.param(name="plan", value=0)
    )


def similarity(rows: Sequence[Similarity]) -> alt.LayerChart:
    """How far each layer's features are from the previous layer's, 1 − cosine, by depth
    (after the paper's Fig. 1).
    """
    data = []
    for row in rows:
        if is_number(row.cosine):
            changed_by = max(1 - row.cosine, LEAST_CHANGE)
            figures = {"cosine": row.cosine, "changed": changed_by}
            data.append((KIND_NAMES[row.kind], row.layer, figures))
    scale = alt.Scale(type="log", nice=False, padding=16)
    axis = alt.Axis(format="~g", tickCount=6)
    changed = alt.Y(
        "changed:Q",
        title="1 − cosine similarity, before and after",
        scale=scale,
        axis=axis,
    )
    return _lines(data, changed, alt.Tooltip("cosine:Q", format=".4f"))


def by_depth(refits: Sequence[RefitRecord]) -> alt.LayerChart:
    """How much of the error each refit left, by depth; a parallel block's are one."""
    names = {short: KIND_NAMES[kind] for kind, short in SHORT_NAMES.items()}
    data = []
    for refit in refits:
        short, _, layer = refit.sublayers[0].partition(".")
        if is_number(refit.left):
            kind = "block" if len(refit.sublayers) > 1 else names[short]
            data.append((kind, int(layer), {"left": refit.left}))
    left = alt.Y("left:Q", title="error left", axis=alt.Axis(format=".0%"))
    return _lines(data, left, alt.Tooltip("left:Q", title="error left", format=".1%"))


def training(looks: Sequence[HealRecord]) -> alt.LayerChart:
    """The KL on text that is not trained on, over the CPU time."""
    known = [look for look in looks if is_number(look.held_out_kl)]
    rows = [
        {"minutes": one.seconds / 60, "tokens": one.tokens, "kl": one.held_out_kl}
        for one in known
    ]
    drawn = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("minutes:Q", title="CPU minutes", scale=snug(12)),
        y=alt.Y("kl:Q", title=f"held-out {KL.titled}", scale=snug(16)),
        tooltip=[
            alt.Tooltip("tokens:Q", format=",d"),
            alt.Tooltip("kl:Q", title=KL.heading, format=".4f"),
        ],
    )
    colour = KIND_COLOURS["attention"]
    return drawn.mark_line(strokeWidth=2, color=colour) + drawn.mark_point(
        filled=True, size=50, color=colour
    )


def _lines(
    data: Sequence[tuple[str, int, Mapping[str, float]]], y: alt.Y, tooltip: alt.Tooltip
) -> alt.LayerChart:
    """A line and a colour for each kind, over the layers."""
    rows = [{"kind": kind, "layer": layer, **figures} for kind, layer, figures in data]
    drawn = {
        name: colour
        for name, colour in KIND_COLOURS.items()
        if any(row["kind"] == name for row in rows)
    }
    look, chosen = by_colour("kind", drawn)
    ticks = sorted({layer for _, layer, _ in data})
    layers = alt.Axis(
        values=ticks, format="d", labelOverlap=True, labelSeparation=4, grid=False
    )
    x = alt.X("layer:Q", title="layer", axis=layers, scale=snug(12))
    lines = alt.Chart(alt.Data(values=rows)).encode(
        x=x, y=y, tooltip=["kind:N", "layer:Q", tooltip], **look
    )
    return lines.mark_line(strokeWidth=2) + lines.mark_point(
        filled=True, size=38
    ).add_params(chosen)
