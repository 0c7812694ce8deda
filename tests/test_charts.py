"""What the figures hold, and that they can be opened anywhere."""

import math
import re
import struct
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import vl_convert

import result_folders
import shown_pages
from api import (
    Point,
    RefitRecord,
    Similarity,
    UsageError,
    charts_labels,
    charts_layers,
    charts_losses,
    charts_points,
    charts_style,
)

pytestmark = pytest.mark.any_transformers  # it draws facts, and runs no model

SIMILARITY = [
    Similarity(layer=layer, kind=kind, cosine=0.6 + 0.01 * layer, cosine_se=0.01)
    for layer in range(30)
    for kind in ("block", "attention", "mlp")
]
POINTS = [
    Point(
        f"{kind} {fraction:.0%}",
        lost * (1 if kept else 2),
        lost / 10,
        result_folders.spread(1 + fraction),
        fraction,
        kind,
        "kept" if kept else "skipped too",
        f"{fraction:.0%}",
    )
    for kind, lost in (("attention", 0.05), ("MLP", 1.2), ("block", 4.0))
    for fraction in (0.1, 0.25, 0.33)
    for kept in (False, True)
]


def trade(points, **how):
    titles = charts_losses.Titles("skipped", "last layer")
    settings = {"paths": True} | how
    return charts_losses.tradeoff(points, charts_style.KIND_COLOURS, titles, **settings)


def framed(chart, title="Quality lost"):
    return charts_style.framed(chart, title, "Lower right is better.")


def rows_of(chart):
    """The rows that the first layer draws."""
    whole = chart.to_dict()
    return whole["layer"][0].get("data", whole.get("data"))["values"]


def encoding(chart, channel):
    return next(
        layer["encoding"][channel]
        for layer in chart.to_dict()["layer"]
        if channel in layer["encoding"]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "made"
    charts_style.save(
        framed(charts_layers.similarity(SIMILARITY), "Similarity by depth"),
        folder / "similarity",
    )
    charts_style.save(framed(trade(POINTS)), folder / "trade.off")
    return folder


def test_each_figure_is_three_files(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {
        f"{stem}.{end}"
        for stem in ("similarity", "trade.off")
        for end in ("png", "svg", "html")
    }


@pytest.mark.parametrize("stem", ["similarity", "trade.off"])
def test_the_png_is_sharp_enough_for_a_wide_screen(saved, stem):
    head = (saved / f"{stem}.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    assert width > 1400
    assert height > 900


def texts(path):
    return [
        node.text
        for node in ElementTree.parse(path).iter()
        if node.tag.endswith("text")
    ]


def test_the_svg_says_what_is_drawn(saved):
    found = texts(saved / "trade.off.svg")
    assert {
        "Quality lost",
        "dense",
        "attention",
        "MLP",
        "block",
        "kept",
        "skipped too",
        "1.10×",
    } <= set(found)
    assert all(
        found.count(label) >= 8 for label in ("10%", "25%", "33%")
    )  # most of 6 points, each with its halo
    assert {"Similarity by depth", "attention", "MLP", "block", "0", "29"} <= set(
        texts(saved / "similarity.svg")
    )


@pytest.mark.parametrize("stem", ["similarity", "trade.off"])
def test_the_page_fetches_nothing(saved, stem):
    page = (saved / f"{stem}.html").read_text()
    assert re.findall(r"<(?:script|link|iframe)[^>]*(?:src|href)\s*=", page) == []
    assert "cdn." not in page
    assert len(page) > 400_000  # the runtime is inside
    assert re.search(r'"editor":\s*false', page)


def test_figures_that_cannot_be_written_are_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"^cannot write figures to .*file: .*choose another folder$"
    ):
        charts_style.save(
            framed(charts_layers.similarity(SIMILARITY)),
            tmp_path / "file" / "similarity",
        )


NASTY = "</script><script>alert(1)</script><!-- \x00\x1b\u2028\ufffe"


def test_a_title_is_text_whatever_it_says(tmp_path):
    charts_style.save(
        framed(charts_layers.similarity(SIMILARITY), NASTY), tmp_path / "figure"
    )
    page = (tmp_path / "figure.html").read_text(encoding="utf-8").lower()
    assert page.count("<script") - page.count("</script") == 0
    assert "<script>alert" not in page
    assert "</script><script>alert(1)</script><!-- ∖x00∖x1b ∖ufffe" in texts(
        tmp_path / "figure.svg"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["a\u2028b", 'a\\"b', "a\\", "a\x00b\x1b\n\x85\ufffe\u202eb", "<b> & </script>"],
)
def test_any_name_can_be_drawn(name):
    """By the compiler that the page has too, which parses its expressions."""
    points = [
        replace(point, name=name, colour=name, shape=name, label=name, plan=1)
        for point in POINTS[:2]
    ]
    colours = charts_points.colours_of([*points, *POINTS[2:4]])
    cells = charts_layers.sublayers(4, {("attention", 1): 0.5}, ())
    for chart in (
        charts_losses.tradeoff(
            [*points, *POINTS[2:4]], colours, charts_losses.Titles("criterion", "among")
        ),
        charts_losses.losses_by_count(points, colours),
        charts_layers.layer_map(cells, f"rise of {name}"),
    ):
        spec = charts_style.on_page(chart) | {
            "width": 300,
            "config": charts_style.LIGHT,
        }
        assert "<svg" in vl_convert.vegalite_to_svg(
            spec, vl_version=charts_style.VEGALITE
        )


def test_a_name_of_any_length_is_short_in_a_figure():
    spec = charts_style.on_page(trade([replace(POINTS[0], name="x" * 10_000)]))
    assert "x" * 100 in str(spec)
    assert "x" * 1_000 not in str(spec)


def test_every_similarity_is_drawn_by_layer_and_kind():
    drawn = {
        (row["layer"], row["kind"]): row["cosine"]
        for row in rows_of(charts_layers.similarity(SIMILARITY))
    }
    names = {"block": "block", "attention": "attention", "mlp": "MLP"}
    assert drawn == {(row.layer, names[row.kind]): row.cosine for row in SIMILARITY}


def test_every_point_is_drawn_with_its_bars():
    drawn = rows_of(trade(POINTS))
    assert len(drawn) == 18
    row = next(
        row
        for row in drawn
        if (row["colour"], row["label"], row["shape"]) == ("MLP", "25%", "kept")
    )
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == pytest.approx(
        (1.25, 1.1875, 1.375)
    )
    assert (row["lost"], row["lost_low"], row["lost_high"]) == pytest.approx(
        (1.2, 1.08, 1.32)
    )


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_what_is_no_number_is_left_out(missing):
    without = [
        replace(POINTS[0], lost=missing),
        replace(POINTS[1], lost_se=missing),
        replace(POINTS[2], speedup=None),
    ]
    drawn = rows_of(trade(without))
    assert [(row["lost_low"], row["lost"], row["lost_high"]) for row in drawn] == [
        (0.05, 0.05, 0.05)
    ]
    similarity = [SIMILARITY[0], SIMILARITY[1].model_copy(update={"cosine": missing})]
    assert [row["kind"] for row in rows_of(charts_layers.similarity(similarity))] == [
        "block"
    ]
    refit = RefitRecord(sublayers=("attn.3", "mlp.3"), left=0.9, ridge=0.3, seconds=0.1)
    drawn = charts_layers.by_depth([refit, refit.model_copy(update={"left": missing})])
    assert rows_of(drawn) == [
        {"layer": 3, "kind": "block", "left": 0.9}
    ]  # a parallel block is one


def test_losses_over_decades_are_spread_and_small_ones_are_linear():
    wide = encoding(trade(POINTS), "y")
    assert wide["scale"]["type"] == "symlog"
    assert wide["axis"]["values"] == [0, 0.1, 0.2, 0.5, 1, 2, 5]
    better = encoding(trade([*POINTS, replace(POINTS[0], lost=-0.25, lost_se=0)]), "y")
    assert better["axis"]["values"] == [-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5]
    assert "type" not in encoding(trade(POINTS[:5]), "y")["scale"]


@pytest.mark.parametrize(
    "kinds", [["attention"], ["MLP", "block"], ["attention", "MLP", "block"]]
)
def test_a_kind_has_its_colour_whichever_others_are_drawn(kinds):
    drawn = encoding(
        trade([point for point in POINTS if point.colour in kinds]), "color"
    )["scale"]
    some = [row for row in SIMILARITY if row.kind in [kind.lower() for kind in kinds]]
    alike = encoding(charts_layers.similarity(some), "color")["scale"]
    wanted = {
        name: {"expr": f"colour_{name}"}
        for name in ("attention", "MLP", "block")
        if name in kinds
    }
    assert dict(zip(drawn["domain"], drawn["range"])) == wanted
    assert dict(zip(alike["domain"], alike["range"])) == wanted


WAYS = [
    Point(way, 0.1 * count, count=count, colour=way, shape=repair)
    for way in ("search", "cosine")
    for repair in ("none", "refit", "nbl")
    for count in (2, 4)
]


def by_count(points):
    return charts_losses.losses_by_count(points, charts_points.colours_of(points))


def test_a_repair_has_a_dash_and_a_mark_in_its_criterions_colour():
    scales = {
        channel: encoding(by_count(WAYS), channel)["scale"]
        for channel in ("color", "strokeDash", "shape")
    }
    assert scales["color"]["domain"] == ["search", "cosine"]
    assert (
        scales["strokeDash"]["domain"]
        == scales["shape"]["domain"]
        == ["none", "refit", "nbl"]
    )
    dashes, marks = scales["strokeDash"]["range"], scales["shape"]["range"]
    assert dashes[0] == [
        1,
        0,
    ]  # what is not repaired is a whole line, whichever comes first
    assert len(set(map(tuple, dashes))) == len(set(marks)) == 3
    assert encoding(by_count(WAYS[2:]), "strokeDash")["scale"] == scales["strokeDash"]


def test_where_nothing_is_repaired_there_is_no_legend_of_repairs():
    drawn = by_count([point for point in WAYS if point.shape == "none"]).to_dict()
    assert not [
        layer
        for layer in drawn["layer"]
        if {"strokeDash", "shape"} & layer["encoding"].keys()
    ]


def test_panels_are_saved_as_one_figure(tmp_path):
    points = [
        replace(point, panel=panel)
        for panel in ("attention", "portable")
        for point in WAYS
    ]
    charts_style.save(
        charts_losses.losses_in_panels(points, "Criteria"), tmp_path / "front"
    )
    assert {"Criteria", "attention", "portable", "search", "refit"} <= set(
        texts(tmp_path / "front.svg")
    )


@pytest.mark.parametrize("points", [[], POINTS[:1]])
def test_a_sweep_that_has_only_begun_can_be_drawn(points, tmp_path):
    charts_style.save(framed(trade(points)), tmp_path / "tradeoff")
    assert texts(tmp_path / "tradeoff.svg").count("dense") == 2  # and its halo


def test_both_themes_name_the_same_colours():
    names = [
        [param["name"] for param in theme["params"]]
        for theme in (charts_style.LIGHT, charts_style.DARK)
    ]
    assert names[0] == names[1]
    assert {"ink", "paper", "colour_attention", "colour_MLP", "colour_block"} <= set(
        names[0]
    )


def test_the_front_is_what_nothing_beats_in_both():
    points = [
        (1.0, 0.0),
        (1.2, 0.5),
        (1.1, 0.6),
        (1.2, 0.4),
        (1.5, 3.0),
        (1.4, 3.0),
        (0.9, 0.2),
    ]
    slow_twin = [
        p
        for p in points
        if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)
    ]
    assert (
        charts_points.front(points)
        == sorted(slow_twin)
        == [(1.0, 0.0), (1.2, 0.4), (1.5, 3.0)]
    )


def line_of(chart):
    (line,) = [
        layer
        for layer in chart.to_dict()["layer"]
        if layer["mark"].get("strokeJoin") == "round"
    ]
    return [(row["speedup"], row["lost"]) for row in line["data"]["values"]]


def test_the_line_is_the_front_of_the_points_or_the_one_that_is_given():
    assert line_of(trade(POINTS))[0] == (1.0, 0.0)
    assert line_of(trade(POINTS[:2], dense=False)) == [POINTS[1].place]
    assert line_of(trade(POINTS, dense=False, best=[POINTS[4], POINTS[0]])) == [
        POINTS[0].place,
        POINTS[4].place,
    ]


def noisy(low, high):
    """Points of which one has quartiles that are far off."""
    wide = POINTS[0].speedup.model_copy(update={"low": low, "high": high})
    return [
        replace(POINTS[0], speedup=wide),
        *(replace(one, speedup=near(one.speedup)) for one in POINTS[1:]),
    ]


def near(speedup):
    return speedup.model_copy(
        update={"low": speedup.median - 0.02, "high": speedup.median + 0.03}
    )


def test_one_noisy_quartile_stretches_no_axis_and_is_marked_where_it_goes_on():
    wide, quiet = (
        encoding(trade(points), "x")["scale"]
        for points in (noisy(0.2, 3.0), noisy(1.08, 1.13))
    )
    assert quiet["domain"] == pytest.approx([1.0, 1.36])  # as far as the quiet bars go
    assert wide["domain"] == pytest.approx([1 - 0.15, 1.33 + 0.15])
    (row,) = [
        row for row in rows_of(trade(noisy(0.2, 3.0))) if row["speedup_high"] == 3.0
    ]
    assert (
        row["speedup_low"],
        row["speedup_from"],
        row["speedup_to"],
    ) == pytest.approx((0.2, 0.85, 1.48))
    layers = trade(noisy(0.2, 3.0)).to_dict()["layer"]
    shapes = [layer["mark"].get("shape") for layer in layers]
    assert (shapes.count("triangle-left"), shapes.count("triangle-right")) == (1, 1)


def test_bounds_follow_the_bars_that_are_near_the_points():
    assert charts_points.bounds([1, 2], [0.9, 2.1]) == (0.9, 2.1)
    assert charts_points.bounds([1, 2], [-5, 9]) == (0.75, 2.25)
    assert charts_points.bounds([1, 2], [-5, 9], least=1) == (0, 3)
    assert charts_points.bounds([1], []) == (0.9, 1.1)


def overlaps(boxes):
    """How many pairs share a pixel; the slow twin of what the labels are laid out
    by.
    """
    pairs = ((a, b) for place, a in enumerate(boxes) for b in boxes[:place])
    return sum(
        a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a, b in pairs
    )


CROWDED = [
    replace(point, lost=3 + place / 50, speedup=near(point.speedup))
    for place, point in enumerate(POINTS)
]


@pytest.mark.parametrize("width", charts_labels.WIDTHS)
def test_labels_of_a_dense_figure_do_not_overlap_in_the_picture(width):
    chart = trade(CROWDED)
    (left, right), scale = (
        encoding(chart, "x")["scale"]["domain"],
        encoding(chart, "y")["scale"],
    )
    low, high = (charts_points.symlog(end) for end in scale["domain"])

    def box(row, around):
        padding, pad = charts_labels.PADDING, charts_labels.PAD_OF_LOSSES
        across = padding + (row["speedup"] - left) / (right - left) * (
            width - 2 * padding
        )
        up = (charts_points.symlog(row["lost"]) - low) / (high - low)
        down = charts_style.HEIGHT - pad - up * (charts_style.HEIGHT - 2 * pad)
        return (
            across + around[0],
            across + around[1],
            down + around[2],
            down + around[3],
        )

    drawn = rows_of(chart)
    shown = [row for row in drawn if row["needs"] is not None and row["needs"] <= width]
    labels = [
        box(row, charts_labels.label_box(row["label"], left=row["side"] == "left"))
        for row in shown
    ]
    assert 0 < len(shown) < len(drawn)
    assert overlaps(labels) == 0
    for label in labels:
        assert not [
            row for row in drawn if overlaps([label, box(row, charts_labels.POINT_BOX)])
        ]


def test_of_labels_that_meet_the_best_one_is_shown():
    places = [(1.2, 0.1), (1.2, 0.101), (1.0, 0.0)]
    points = [
        Point("", lost, speedup=result_folders.spread(speedup), label="Q4_K_M")
        for speedup, lost in places
    ]
    found = {
        row["lost"]: row["needs"]
        for row in rows_of(trade(points, dense=False, best=[points[1], points[2]]))
    }
    assert found == {0.1: None, 0.101: 240, 0.0: 240}


MANY = [
    Point(way, lost * count, count=count, colour=way, panel=space)
    for space, counts in (("attention", (2, 4)), ("mlp", (2,)))
    for way, lost in (
        ("search", 0.1),
        ("a", 0.5),
        ("b", 0.2),
        ("c", 0.3),
        ("d", 0.4),
        ("e", 0.6),
        ("f", 0.7),
    )
    for count in counts
    if (way, space)
    != ("b", "mlp")  # not asked there, so not known to be among the best
]


def test_of_many_criteria_the_best_have_colours_and_the_rest_is_grey():
    colours = charts_points.colours_of(MANY)
    assert list(colours) == ["search", "c", "d", "b"]
    drawn = charts_losses.losses_by_count(MANY, colours)
    scale = encoding(drawn, "color")["scale"]
    assert scale["domain"] == ["search", "c", "d", "b", charts_points.OTHER_WAYS]
    assert (scale["range"][0], scale["range"][-1]) == (
        {"expr": "ink"},
        {"expr": "pale"},
    )
    shown = rows_of(drawn)
    assert [row["shown"] for row in shown].count(
        charts_points.OTHER_WAYS
    ) == 3 * 3  # a, e and f
    assert shown[0]["shown"] == charts_points.OTHER_WAYS  # below what has a colour
    lines = [
        layer for layer in drawn.to_dict()["layer"] if layer["mark"]["type"] == "line"
    ]
    assert (
        lines[0]["encoding"]["detail"]["field"] == "colour"
    )  # each grey one is a line of its own


def test_few_criteria_have_a_colour_each():
    points = [point for point in MANY if point.colour in ("search", "a", "b", "c", "f")]
    colours = charts_points.colours_of(points)
    assert set(colours) == {"search", "a", "b", "c", "f"}
    assert (
        charts_points.OTHER_WAYS
        not in encoding(by_count(points), "color")["scale"]["domain"]
    )
    assert (
        charts_points.colours_in_turn(["dense", "a", "dense"])["dense"]
        is charts_style.INK
    )


def test_what_changes_is_logarithmic_and_rounding_is_no_change():
    last = Similarity(layer=30, kind="block", cosine=1 + 1e-9, cosine_se=0.0)
    chart = charts_layers.similarity([*SIMILARITY, last])
    changed = {(row["layer"], row["kind"]): row["changed"] for row in rows_of(chart)}
    assert changed[3, "MLP"] == pytest.approx(0.37)
    assert changed[30, "block"] == charts_layers.LEAST_CHANGE
    drawn = encoding(chart, "y")
    assert drawn["scale"]["type"] == "log"
    assert drawn["title"].startswith("1 − cosine")


def shade_of(costs):
    layers = charts_layers.layer_map(
        charts_layers.sublayers(10, costs, ()), "cost"
    ).to_dict()["layer"]
    (shade,) = [
        layer["encoding"]["color"]
        for layer in layers
        if "scale" in layer["encoding"].get("color", {})
    ]
    return shade


def test_one_very_dear_sublayer_leaves_the_others_shades():
    """What stands between the others on the ramp is far more than a hundredth of it."""
    costs = [0.01, 0.1, 0.3, 9.0]
    shade = shade_of({("attention", layer): cost for layer, cost in enumerate(costs)})
    scale = shade["scale"]
    assert (scale["type"], scale["domain"]) == ("symlog", [0, 9.0])
    of = [
        math.log1p(cost / scale["constant"]) / math.log1p(9.0 / scale["constant"])
        for cost in costs
    ]
    assert all(after - before > 0.1 for before, after in zip(of, of[1:]))
    assert shade["legend"]["values"][0] == 0
    assert shade_of({("attention", 1): -0.5})["scale"]["domain"] == [
        -0.5,
        charts_layers.LEAST_SHADE,
    ]  # all gain


def test_cells_are_shaded_by_costs_or_else_by_similarity():
    rows = result_folders.similarity()
    cell = charts_layers.sublayers(10, {}, rows)[3]
    assert (cell.name, cell.row, cell.cosine, cell.cost) == (
        "attn.3",
        "attention",
        0.62,
        pytest.approx(0.38),
    )
    costs = charts_layers.sublayers(10, shown_pages.costs().found, rows)
    assert [one.cost for one in costs[:3]] == pytest.approx([0, 0.1, 0.2])
    hybrid = [
        row.model_copy(update={"mixer": "mamba"})
        for row in rows
        if (row.layer, row.kind) != (4, "mlp")
    ]
    names = [one.name for one in charts_layers.sublayers(10, {}, hybrid)]
    assert len(names) == 19
    assert "mlp.4" not in names


def test_one_noisy_quartile_leaves_the_bars_of_what_is_saved_long():
    bar = {"plan": 0, "name": "a", "measure": "each further token", "text": "t"}
    bars = [
        charts_layers.Saving(**bar, share=share, low=share, high=9 * share)
        for share in (1.0, 0.6)
    ]
    layers = charts_layers.savings(bars).to_dict()["layer"]
    (drawn,) = [layer for layer in layers if layer["mark"]["type"] == "bar"]
    assert drawn["encoding"]["x"]["scale"]["domain"] == [0, 1.25]
    assert max(row["high"] for row in drawn["data"]["values"]) > 5
    assert max(row["to"] for row in drawn["data"]["values"]) == 1.25


def test_a_training_is_its_kl_over_its_time():
    assert rows_of(charts_layers.training(result_folders.looks())) == [
        {"minutes": 0, "tokens": 0, "kl": 0.4},
        {"minutes": 1, "tokens": 512, "kl": 0.3},
        {"minutes": 2, "tokens": 1024, "kl": 0.25},
    ]
