"""What the figures hold, and that they can be opened anywhere."""

import re
import struct
from xml.etree import ElementTree

import pytest

import result_folders
from api import UsageError, axes, plots

pytestmark = pytest.mark.any_transformers  # it draws records, and runs no model

SIMILARITY = [
    {"layer": layer, "kind": kind, "cosine": 0.6 + 0.01 * layer}
    for layer in range(30)
    for kind in ("block", "attention", "mlp")
]


def record(variant, fraction, keep_last, lost, speedup):
    return {
        "variant": variant,
        "fraction": fraction,
        "keep_last": keep_last,
        "delta_nll": lost,
        "delta_nll_se": lost / 10,
        "speedup_decode": speedup,
        "speedup_decode_low": speedup - 0.02,
        "speedup_decode_high": speedup + 0.03,
    }


RECORDS = [record("dense", 0.0, False, 0.0, 1.0)] + [
    record(variant, fraction, keep_last, lost * (1 if keep_last else 2), 1 + fraction)
    for variant, lost in (("attention", 0.05), ("mlp", 1.2), ("block", 4.0))
    for fraction in (0.1, 0.25, 0.33)
    for keep_last in (False, True)
]


def points(chart):
    """The rows that the first layer draws."""
    whole = chart.to_dict()
    return whole["layer"][0].get("data", whole.get("data"))["values"]


def encoding(chart, channel):
    return next(layer["encoding"][channel] for layer in chart.to_dict()["layer"] if channel in layer["encoding"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "made"
    plots.save(plots.similarity_chart(SIMILARITY, "Similarity by depth"), folder / "similarity")
    plots.save(plots.tradeoff_chart(RECORDS, "Quality lost"), folder / "trade.off")
    return folder


def test_each_figure_is_three_files(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {f"{stem}.{end}" for stem in ("similarity", "trade.off") for end in ("png", "svg", "html")}


@pytest.mark.parametrize("stem", ["similarity", "trade.off"])
def test_the_png_is_sharp_enough_for_a_wide_screen(saved, stem):
    head = (saved / f"{stem}.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    assert width > 1400
    assert height > 900


def texts(path):
    return [node.text for node in ElementTree.parse(path).iter() if node.tag.endswith("text")]


def test_the_svg_says_what_is_drawn(saved):
    found = texts(saved / "trade.off.svg")
    assert {"Quality lost", "dense", "attention", "MLP", "block", "kept", "skipped too", "1.10×"} <= set(found)
    assert [found.count(label) for label in ("10%", "25%", "33%")] == [
        12,
        12,
        12,
    ]  # 6 points, each with its halo
    assert {"Similarity by depth", "attention", "MLP", "block", "0", "29"} <= set(texts(saved / "similarity.svg"))


@pytest.mark.parametrize("stem", ["similarity", "trade.off"])
def test_the_page_fetches_nothing(saved, stem):
    page = (saved / f"{stem}.html").read_text()
    assert re.findall(r"<(?:script|link|iframe)[^>]*(?:src|href)\s*=", page) == []
    assert "cdn." not in page
    assert len(page) > 400_000  # the runtime is inside
    assert re.search(r'"editor":\s*false', page)


def test_figures_that_cannot_be_written_are_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^cannot write figures to .*file: .*choose another folder$"):
        plots.save(plots.similarity_chart(SIMILARITY, "Similarity"), tmp_path / "file" / "similarity")


NASTY = "</script><script>alert(1)</script><!-- \x00\x1b\u2028\ufffe"


def test_a_title_is_text_whatever_it_says(tmp_path):
    plots.save(plots.similarity_chart(SIMILARITY, NASTY), tmp_path / "figure")
    page = (tmp_path / "figure.html").read_text(encoding="utf-8").lower()
    assert page.count("<script") - page.count("</script") == 0
    assert "<script>alert" not in page
    assert "</script><script>alert(1)</script><!-- ∖x00∖x1b ∖ufffe" in texts(tmp_path / "figure.svg")


def test_every_similarity_is_drawn_by_layer_and_kind():
    drawn = {(row["layer"], row["kind"]): row["cosine"] for row in points(plots.similarity_chart(SIMILARITY, ""))}
    names = {"block": "block", "attention": "attention", "mlp": "MLP"}
    assert drawn == {(row["layer"], names[row["kind"]]): row["cosine"] for row in SIMILARITY}


def test_every_configuration_but_dense_is_drawn_with_its_bars():
    drawn = points(plots.tradeoff_chart(RECORDS, ""))
    assert len(drawn) == 18
    row = next(row for row in drawn if (row["skipped"], row["fraction"], row["last"]) == ("MLP", "25%", "kept"))
    assert (row["speedup"], row["speedup_low"], row["speedup_high"]) == (1.25, 1.23, 1.28)
    assert (row["lost"], row["lost_low"], row["lost_high"]) == pytest.approx((1.2, 1.08, 1.32))


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf")])
def test_what_is_no_number_is_left_out(missing, tmp_path):
    no_loss = RECORDS[1] | {"delta_nll": missing, "delta_nll_se": missing}
    no_error = RECORDS[2] | {"delta_nll_se": missing}
    drawn = points(plots.tradeoff_chart([no_loss, no_error], ""))
    assert [(row["lost_low"], row["lost"], row["lost_high"]) for row in drawn] == [(0.05, 0.05, 0.05)]
    similarity = [SIMILARITY[0], SIMILARITY[1] | {"cosine": missing}]
    assert [row["kind"] for row in points(plots.similarity_chart(similarity, ""))] == ["block"]


def test_losses_over_decades_are_spread_and_small_ones_are_linear():
    wide = encoding(plots.tradeoff_chart(RECORDS, ""), "y")
    assert wide["scale"]["type"] == "symlog"
    assert wide["axis"]["values"] == [0, 0.1, 0.2, 0.5, 1, 2, 5]
    better = encoding(plots.tradeoff_chart([*RECORDS, record("mlp", 0.1, True, -0.25, 1.1)], ""), "y")
    assert better["axis"]["values"] == [-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5]
    assert "type" not in encoding(plots.tradeoff_chart(RECORDS[:5], ""), "y")["scale"]


@pytest.mark.parametrize("kinds", [["attention"], ["mlp", "block"], ["attention", "mlp", "block"]])
def test_a_kind_has_its_colour_whichever_others_are_drawn(kinds):
    drawn = encoding(plots.tradeoff_chart([row for row in RECORDS if row["variant"] in kinds], ""), "color")["scale"]
    alike = encoding(plots.similarity_chart([row for row in SIMILARITY if row["kind"] in kinds], ""), "color")["scale"]
    wanted = {name: {"expr": f"colour_{name}"} for name in ("attention", "MLP", "block") if name.lower() in kinds}
    assert dict(zip(drawn["domain"], drawn["range"])) == wanted
    assert dict(zip(alike["domain"], alike["range"])) == wanted


WAYS = [
    result_folders.compared(way, "attention", count, 0.1 * count, repair=repair)
    for way in ("search", "cosine")
    for repair in ("none", "refit", "nbl")
    for count in (2, 4)
]


def front_of(records):
    rows = plots.front_rows(records)
    return plots.front_layers(rows, plots.criterion_colours(rows))


def test_a_repair_has_a_dash_and_a_mark_in_its_criterions_colour():
    scales = {channel: encoding(front_of(WAYS), channel)["scale"] for channel in ("color", "strokeDash", "shape")}
    assert scales["color"]["domain"] == ["search", "cosine"]
    assert scales["strokeDash"]["domain"] == scales["shape"]["domain"] == ["none", "refit", "nbl"]
    dashes, marks = scales["strokeDash"]["range"], scales["shape"]["range"]
    assert dashes[0] == [1, 0]  # what is not repaired is a whole line, whichever comes first
    assert len(set(map(tuple, dashes))) == len(set(marks)) == 3
    assert encoding(front_of(WAYS[2:]), "strokeDash")["scale"] == scales["strokeDash"]


def test_where_nothing_is_repaired_there_is_no_legend_of_repairs():
    drawn = front_of([row for row in WAYS if row["repair"] == "none"]).to_dict()
    assert not [layer for layer in drawn["layer"] if {"strokeDash", "shape"} & layer["encoding"].keys()]


def test_quality_against_speed_tells_repaired_plans_by_their_marks():
    rows = plots.front_rows(WAYS)
    drawn = plots.compared_layers(rows, plots.criterion_colours(rows))
    assert encoding(drawn, "shape")["field"] == "among"
    assert {row["among"] for row in rows} == {"attention", "attention, refit", "attention, nbl"}


@pytest.mark.parametrize("records", [[], RECORDS[:1], RECORDS[:2]])
def test_a_sweep_that_has_only_begun_can_be_drawn(records, tmp_path):
    plots.save(plots.tradeoff_chart(records, "Quality lost"), tmp_path / "tradeoff")
    assert texts(tmp_path / "tradeoff.svg").count("dense") == 2  # and its halo


def test_both_themes_name_the_same_colours():
    names = [[param["name"] for param in theme["params"]] for theme in (plots.LIGHT, plots.DARK)]
    assert names[0] == names[1]
    assert {"ink", "paper", "colour_attention", "colour_MLP", "colour_block"} <= set(names[0])


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 0.0), (1.2, 0.5), (1.1, 0.6), (1.2, 0.4), (1.5, 3.0), (1.4, 3.0), (0.9, 0.2)]
    slow_twin = [p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)]
    assert plots.front(points) == sorted(slow_twin) == [(1.0, 0.0), (1.2, 0.4), (1.5, 3.0)]


def tradeoff_spec(records, **size):
    return plots.spec_of(plots.tradeoff_chart(records, "").properties(**size))


def noisy(low, high):
    """A sweep of which one plan has quartiles that are far off."""
    first = RECORDS[1] | {"speedup_decode_low": low, "speedup_decode_high": high}
    return [RECORDS[0], first, *RECORDS[2:]]


def test_one_noisy_quartile_stretches_no_axis_and_is_marked_where_it_goes_on():
    wide, quiet = (encoding(plots.tradeoff_chart(records, ""), "x")["scale"] for records in (noisy(0.2, 3.0), RECORDS))
    assert quiet["domain"] == pytest.approx([1.0, 1.36])  # as far as the quiet bars go
    assert wide["domain"] == pytest.approx([1 - 0.15, 1.33 + 0.15])
    (row,) = [row for row in points(plots.tradeoff_chart(noisy(0.2, 3.0), "")) if row["speedup_high"] == 3.0]
    assert (row["speedup_low"], row["speedup_from"], row["speedup_to"]) == pytest.approx((0.2, 0.85, 1.48))
    arrows = {
        name: sum(layer["mark"].get("shape") == name for layer in tradeoff_spec(noisy(0.2, 3.0))["layer"])
        for name in ("triangle-left", "triangle-right")
    }
    assert arrows == {"triangle-left": 1, "triangle-right": 1}


def test_bounds_follow_the_bars_that_are_near_the_points():
    assert axes.bounds([1, 2], [0.9, 2.1]) == (0.9, 2.1)
    assert axes.bounds([1, 2], [-5, 9]) == (0.75, 2.25)
    assert axes.bounds([1, 2], [-5, 9], least=1) == (0, 3)
    assert axes.bounds([1], []) == (0.9, 1.1)


def overlaps(boxes):
    """How many pairs share a pixel; the slow twin of what the labels are laid out by."""
    pairs = ((a, b) for place, a in enumerate(boxes) for b in boxes[:place])
    return sum(a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3] for a, b in pairs)


@pytest.mark.parametrize("width", axes.WIDTHS)
def test_labels_lie_on_no_other_at_any_width_and_more_of_them_fit_a_wider_plot(width):
    across = [(7 * place % 19) / 19 for place in range(40)]
    labels = [axes.Label((x, 11 * place % 160), -30, -5, -14, -2) for place, x in enumerate(across)]
    needed = axes.needed_widths(labels, [], 20)
    shown = [label for label, need in zip(labels, needed) if need is not None and need <= width]
    inside = width - 40
    boxes = [
        (x * inside + one.left, x * inside + one.right, y + one.top, y + one.bottom)
        for one in shown
        for x, y in [one.point]
    ]
    assert overlaps(boxes) == 0
    left_out = [place for place, need in enumerate(needed) if need is None or need > width]
    for place in left_out:  # each of them would lie on one that goes before it or was there at a smaller width
        x, y = labels[place].point
        box = (x * inside - 30, x * inside - 5, y - 14, y - 2)
        assert overlaps([*boxes, box]) > 0


def test_labels_of_a_dense_figure_do_not_overlap_in_the_picture():
    crowded = [RECORDS[0]] + [
        record(variant, fraction, keep_last, 3 + place / 50, 1.2 + fraction / 10)
        for place, (variant, fraction, keep_last) in enumerate(
            (variant, fraction, keep_last)
            for variant in ("attention", "mlp", "block")
            for fraction in (0.1, 0.25, 0.33)
            for keep_last in (False, True)
        )
    ]
    chart = plots.tradeoff_chart(crowded, "")
    drawn = points(chart)
    (left, right), scale = encoding(chart, "x")["scale"]["domain"], encoding(chart, "y")["scale"]
    low, high = (axes.symlog(end, scale["constant"]) for end in scale["domain"])
    for width in axes.WIDTHS:

        def box(row, around, width=width):
            across = plots.PADDING + (row["speedup"] - left) / (right - left) * (width - 2 * plots.PADDING)
            up = (axes.symlog(row["lost"], scale["constant"]) - low) / (high - low)
            down = plots.HEIGHT - plots.PAD_OF_LOSSES - up * (plots.HEIGHT - 2 * plots.PAD_OF_LOSSES)
            return across + around[0], across + around[1], down + around[2], down + around[3]

        shown = [row for row in drawn if row["needs"] is not None and row["needs"] <= width]
        labels = [box(row, plots.LABELS[row["last"]]) for row in shown]
        assert overlaps(labels) == 0
        for label in labels:
            assert not [row for row in drawn if overlaps([label, box(row, plots.POINT)])]
    assert 0 < len(shown) < len(drawn)


MANY = [
    result_folders.compared(way, space, count, lost * count)
    for space, counts in (("attention", (2, 4)), ("mlp", (2,)))
    for way, lost in (("search", 0.1), ("a", 0.5), ("b", 0.2), ("c", 0.3), ("d", 0.4), ("e", 0.6), ("f", 0.7))
    for count in counts
    if (way, space) != ("b", "mlp")  # not asked there, so not known to be among the best
]


def test_of_many_criteria_the_best_have_colours_and_the_rest_is_grey():
    rows = plots.front_rows(MANY)
    colours = plots.criterion_colours(rows)
    assert list(colours) == ["search", "c", "d", "b"]
    drawn = plots.front_layers(rows, colours)
    scale = encoding(drawn, "color")["scale"]
    assert scale["domain"] == ["search", "c", "d", "b", plots.OTHERS]
    assert (scale["range"][0], scale["range"][-1]) == ({"expr": "ink"}, {"expr": "pale"})
    shown = points(drawn)
    assert [row["shown"] for row in shown].count(plots.OTHERS) == 3 * 3  # a, e and f
    assert shown[0]["shown"] == plots.OTHERS  # below what has a colour
    lines = [layer for layer in drawn.to_dict()["layer"] if layer["mark"]["type"] == "line"]
    assert lines[0]["encoding"]["detail"]["field"] == "criterion"  # each grey one is a line of its own


def test_few_criteria_have_a_colour_each():
    rows = plots.front_rows([row for row in MANY if row["criterion"] in ("search", "a", "b", "c", "f")])
    colours = plots.criterion_colours(rows)
    assert set(colours) == {"search", "a", "b", "c", "f"}
    assert plots.OTHERS not in encoding(plots.front_layers(rows, colours), "color")["scale"]["domain"]


def test_what_changes_is_logarithmic_and_rounding_is_no_change():
    chart = plots.similarity_chart([*SIMILARITY, {"layer": 30, "kind": "block", "cosine": 1 + 1e-9}], "")
    changed = {(row["layer"], row["kind"]): row["changed"] for row in points(chart)}
    assert changed[3, "MLP"] == pytest.approx(0.37)
    assert changed[30, "block"] == plots.LEAST_CHANGE
    drawn = encoding(chart, "y")
    assert drawn["scale"]["type"] == "log"
    assert drawn["title"].startswith("1 − cosine")


def test_of_labels_that_meet_the_best_one_is_shown():
    places = ((1.2, 0.1, False), (1.2, 0.101, True), (1.0, 0.0, False))
    rows = [
        {"speedup": speedup, "lost": lost, "lost_low": lost, "lost_high": lost, "best": best}
        for speedup, lost, best in places
    ]
    found = plots._with_room(rows, (0.9, 1.3), [(7.0, 50.0, -15.0, -2.0)] * 3)
    assert [row["needs"] for row in found] == [None, 240, 240]
