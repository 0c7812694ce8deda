"""How figures look, and how they become files: colours of both themes, titles, PNG, SVG
and HTML.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from ..encodings import printable
from ..errors import shortened
from ..files import write_whole, writing
from ..strict_json import Settings

Colour = str | alt.ExprRef
Colours = Mapping[str, Colour]  # by name, in the order of the legend

# From Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {"attention": "#0072B2", "MLP": "#D55E00", "block": "#009E73"}
# the same, to be read on black
PALER = {"attention": "#56B4E9", "MLP": "#F08A4B", "block": "#2FC79A"}
SPECTRUM = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8c564b",
    "#7f7f7f", "#9467bd", "#bcbd22", "#17becf", "#d62728", "#aec7e8", "#98df8a",
    "#ff9896", "#c5b0d5", "#393b79", "#8c6d31", "#843c39", "#7b4173",
)  # fmt: skip
KIND_COLOURS: Colours = {name: alt.expr(f"colour_{name}") for name in COLOURS}
INK, GREY, PALE, PAPER = (alt.expr(name) for name in ("ink", "grey", "pale", "paper"))

FIGURE_LETTERS = 300  # of a text in a figure
HEIGHT = 440  # pixels of a figure of quality against speed
VEGALITE = alt.VEGALITE_VERSION.rpartition(".")[0]
HIDDEN = "\ue000"  # which is printable in no text
# what needs no network
MENU = {"export": True, "source": False, "compiled": False, "editor": False}


def theme(
    ink: str,
    grey: str,
    pale: str,
    faint: str,
    paper: str,
    ramp: tuple[str, str],
    colours: Mapping[str, str],
) -> Settings:
    """How every figure looks, as a Vega-Lite config; figures name its colours by the
    params that it defines.
    """
    plain = {"titleFontWeight": "normal", "titleFontSize": 12}
    axis = {
        "labelFontSize": 11,
        "labelColor": grey,
        "titleColor": ink,
        "gridColor": pale,
        "domainColor": grey,
    }
    named = {"ink": ink, "grey": grey, "pale": faint, "paper": paper}
    named |= {f"colour_{name}": hue for name, hue in colours.items()}
    return {
        "background": paper,
        "font": "system-ui, Helvetica, Arial, sans-serif",
        "params": [{"name": name, "value": value} for name, value in named.items()],
        "range": {"heatmap": list(ramp)},
        "title": {
            "color": ink,
            "fontSize": 16,
            "subtitleColor": grey,
            "subtitleFontSize": 12,
            "subtitlePadding": 6,
        },
        "axis": {**axis, "tickColor": grey, "titlePadding": 10, **plain},
        "legend": {
            "labelFontSize": 12,
            "labelColor": grey,
            "titleColor": grey,
            **plain,
        },
        "view": {"stroke": None},
    }


LIGHT = theme(
    "#222222",
    "#666666",
    "#e6e6e6",
    "#b9bec5",
    "#ffffff",
    ("#eef1f5", "#08306b"),
    COLOURS,
)
DARK = theme(
    "#e8eaed", "#a3a9b2", "#30353c", "#5b626c", "#15181c", ("#272c33", "#9ecbff"), PALER
)


def framed(
    chart: alt.LayerChart, title: str, notes: str | Sequence[str]
) -> alt.LayerChart:
    """A figure to be saved: with a title, lines that say how to read it, a theme."""
    return chart.properties(
        width=640, height=HEIGHT, title=titled(title, notes), padding=16
    ).configure(**LIGHT)


def titled(title: str, notes: str | Sequence[str]) -> alt.TitleParams:
    """A title with lines below it, at the left of the whole figure."""
    lines = notes if isinstance(notes, str) else [*notes]
    return alt.TitleParams(
        title, subtitle=lines, anchor="start", frame="group", offset=14
    )


def by_colour(
    field: str, colours: Mapping[str, Colour], title: str | None = None
) -> tuple[Settings, alt.Parameter]:
    """A colour for each name in `field`, the others dim while one is chosen in the
    legend; and that choice.
    """
    names = [*colours]
    chosen = alt.selection_point(encodings=["color"], bind="legend")
    scale = alt.Scale(domain=names, range=[*colours.values()])
    colour = alt.Color(f"{field}:N", title=title or field, sort=names, scale=scale)
    return {
        "color": colour,
        "opacity": alt.condition(chosen, alt.value(1), alt.value(0.1)),
    }, chosen


def snug(padding: int) -> alt.Scale:
    """From the least to the greatest value, with some pixels around."""
    return alt.Scale(zero=False, nice=False, padding=padding)


def on_page(chart: alt.LayerChart, height: int = HEIGHT) -> Settings:
    """A figure of a page: without theme, and as wide as the page gives."""
    return _drawable(chart.properties(width="container", height=height).to_dict())


def _drawable(value: object) -> Any:
    """A spec in which no text ends an expression of Vega's, as a backslash does, or the
    XML of an SVG, nor is long.
    """
    if isinstance(value, str):
        return shortened(printable(value).replace("\\", "∖"), FIGURE_LETTERS)
    if isinstance(value, dict):
        return {key: _drawable(item) for key, item in value.items()}
    return [_drawable(item) for item in value] if isinstance(value, list) else value


def save(chart: alt.TopLevelMixin, stem: Path) -> None:
    """Write stem.png, .svg and .html, a page that needs no network. Raises `UsageError`
    when they can't be written.
    """
    import vl_convert

    spec = _drawable(chart.to_dict())
    with writing(f"figures to {stem.parent}"):
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            Path(f"{stem}.png"),
            vl_convert.vegalite_to_png(spec, vl_version=VEGALITE, scale=2),
        )
        write_whole(
            Path(f"{stem}.svg"), vl_convert.vegalite_to_svg(spec, vl_version=VEGALITE)
        )
        # No text in the spec ends the page: each < is written as JSON may write it.
        hidden = json.loads(json.dumps(spec).replace("<", HIDDEN))
        hidden["usermeta"] = {"embedOptions": {"actions": MENU}}
        page = vl_convert.vegalite_to_html(hidden, vl_version=VEGALITE, bundle=True)
        write_whole(Path(f"{stem}.html"), page.replace(HIDDEN, r"\u003c"))
