"""The report in a real browser: opened from a file, without a network, by people with
mouse, keyboard or phone.
"""

import re
import shutil

import pytest

import result_folders
import shown_pages
from api import Costs, PageParts, write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
if CHROMIUM is None:
    pytest.skip(
        "no chromium here: make browser, or apt-get install chromium",
        allow_module_level=True,
    )
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is absent: pip install 'notall[dev]'"
)
pytestmark = pytest.mark.any_transformers  # it looks at a page


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return shown_pages.page(
        tmp_path_factory.mktemp("results"), shown_pages.swept(), shown_pages.alike()
    )


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    return shown_pages.nasty(tmp_path_factory.mktemp("nasty"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return shown_pages.page(
        tmp_path_factory.mktemp("comparison"), shown_pages.compared()
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of a folder of each command, and one of a wide table, made when it is
    first asked for.
    """
    made = {}

    def page_of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = (
                shown_pages.page(folder, shown_pages.wide())
                if kind == "wide"
                else write_report(
                    result_folders.WRITERS[kind](folder), folder / "report.html"
                )
            )
        return made[kind]

    return page_of


KINDS = ("sweep", "compare", "wide", "search", "paper", "bench", "repair")


def slow(*parameters):
    """Another size, colour or kind of page: `make test` looks at one of each."""
    return pytest.param(*parameters, marks=pytest.mark.slow)


@pytest.fixture
def view(browser):
    """Open a report; whatever it complains of or fetches fails the test."""
    contexts, complaints = [], []

    def view(path, width=1280, colours="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=colours,
            offline=True,
            accept_downloads=True,
        )
        context.set_default_timeout(
            300_000
        )  # beside three other suites it waits for the processor
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                complaints.append(request.url) if request.url != path.as_uri() else None
            ),
        )
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-drawn]")
        return page

    yield view
    for context in contexts:
        context.close()
    assert complaints == []


def marks(page, figure, kind):
    """How many marks of a kind a figure draws that can be seen."""
    return page.locator(f"#{figure} .mark-{kind}.role-mark > *").count()


def hatched(page):
    return page.locator('#map .mark-rect.role-mark > path[fill^="url("]').count()


def boxes(page, selector):
    """Where elements are on the page: left, right, top, bottom."""
    return page.locator(selector).evaluate_all(
        "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left,"
        " box.right, box.top, box.bottom])"
    )


def resize(page, width, height=800):
    """And wait until what follows the width is drawn again."""
    page.set_viewport_size({"width": width, "height": height})
    page.evaluate(
        "new Promise(frame => requestAnimationFrame(() =>"
        " requestAnimationFrame(frame))).then(() => drawing)"
    )


@pytest.mark.parametrize("kind", [KINDS[0], *map(slow, KINDS[1:])])
def test_the_first_screen_says_what_can_be_left_out_and_nothing_is_wider_than_the_screen(
    view, pages, kind
):
    page = view(pages(kind))
    for width in (1680, 1280, 800, 390):
        resize(page, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for selector in ("#said", "#message code", "#copy-next"):
            ((left, right, top, bottom),) = boxes(page, selector)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= 800
    assert page.locator("#message code").inner_text().startswith("notall ")


@pytest.mark.parametrize(
    ("kind", "colours"),
    [
        ("sweep", "light"),
        *map(slow, KINDS[1:], ["dark", "light"] * 3),
    ],
)
def test_what_is_printed_is_whole_and_light(view, pages, kind, colours):
    """On a landscape A4; a phone's page is the hardest to print."""
    page = view(pages(kind), 390, colours)
    assert page.pdf(prefer_css_page_size=True).startswith(
        b"%PDF"
    )  # and tells the page that it is printed
    page.emulate_media(media="print", color_scheme=colours)
    resize(page, 1047, 718)
    wide = (  # as where a wide screen's are not drawn again
        "all => all.forEach(one => one.setAttribute('width', 3000))"
    )
    page.locator(".chart svg").evaluate_all(wide)
    charts = boxes(page, ".chart svg")
    assert len(charts) == int(page.get_attribute("body", "data-drawn"))
    for left, right, top, bottom in charts + boxes(page, "table"):
        assert 0 <= left < right <= 1047
        assert bottom - top > 40
    for element in (".scroll", ".said", ".prompt", ".provenance dd"):
        ways = page.locator(element).evaluate_all(
            "all => all.map(one => getComputedStyle(one).overflowY)"
        )
        assert set(ways) <= {"visible"}
    assert (
        page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    light = page.locator(".chart svg").evaluate_all(
        "all => all.every(one => getComputedStyle(one).filter == 'none')"
    )
    assert light == (colours == "light" or not charts)


@pytest.mark.parametrize("width", [360, slow(800), slow(1680)])
def test_no_label_of_a_point_lies_on_another(view, report, width):
    page = view(report, width)
    texts = boxes(page, "#tradeoff .mark-text.role-mark > text")
    labels = {
        tuple(round(side) for side in box) for box in texts
    }  # each is there twice, with its halo
    assert len(labels) > 5
    for a in labels:
        assert not [
            b
            for b in labels - {a}
            if a[0] < b[1] - 1
            and b[0] < a[1] - 1
            and a[2] < b[3] - 2
            and b[2] < a[3] - 2
        ]


def test_the_next_command_is_copied_whole(view, report):
    page = view(report)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#copy-next").click()
    page.wait_for_function(
        "document.querySelector('#copy-next').textContent == 'copied'"
    )
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "notall search tiny"


@pytest.mark.slow
def test_a_wide_table_scrolls_within_its_box_under_a_column_that_stays(view, pages):
    page = view(pages("wide"), 800)
    box = page.locator(".scroll:has(#table-results)")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    before = boxes(page, "#table-results tbody tr:first-child td:first-child")
    box.evaluate("box => box.scrollLeft = 300")
    assert boxes(page, "#table-results tbody tr:first-child td:first-child") == before
    told = page.locator("#table-results tbody tr").first.inner_text()
    assert told.startswith("dense")


def test_every_figure_is_drawn(view, report):
    page = view(report)
    assert page.get_attribute("body", "data-drawn") == "4"
    assert marks(page, "map", "rect") == 2 * result_folders.LAYERS + 2
    assert marks(page, "savings", "rect") == 4
    assert marks(page, "similarity", "symbol") >= 3 * result_folders.LAYERS
    assert marks(page, "tradeoff", "symbol") >= 18
    assert marks(page, "tradeoff", "rule") >= 2 * 18


def test_slider_buttons_and_keys_step_through_the_plans(view, report):
    page = view(report)
    slider = page.locator("#plan")
    assert page.locator("#plan-name").inner_text() == "attention 25%, last layer kept"
    assert hatched(page) == 2
    page.get_by_role("button", name="next plan").click()
    page.wait_for_function("views.map.signal('skipped').length == 3")
    assert page.locator("#plan-name").inner_text() == "attention 33%"
    assert hatched(page) == 3
    slider.focus()
    page.keyboard.press("End")
    page.wait_for_function("views.map.signal('skipped').length == 6")
    assert hatched(page) == 6
    assert page.locator("tr.chosen td").first.inner_text() == "block"
    assert "weights: 3.7 MiB of 3.8 MiB" in page.locator("#savings").inner_text()
    page.keyboard.press("Home")
    page.wait_for_function("views.map.signal('skipped').length == 0")
    assert hatched(page) == 0
    assert page.get_by_role("button", name="previous plan").is_disabled()
    assert slider.get_attribute("aria-valuetext") == "dense"


@pytest.mark.slow
def test_a_row_and_a_point_choose_their_plan(view, report):
    page = view(report)
    page.locator("#table-results button[data-show='12']").click()
    page.wait_for_function("document.querySelector('#plan').value == '12'")
    page.locator("#tradeoff .mark-symbol.role-mark path").nth(4).dispatch_event("click")
    page.wait_for_function("document.querySelector('#plan').value != '12'")


@pytest.mark.slow
def test_the_map_says_its_figures_under_the_pointer(view, report):
    page = view(report)
    page.locator("#map .mark-rect path").nth(3).hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.locator("#vg-tooltip-element").inner_text()
    for words in ("attn.3", "kept", "0.380", "0.6200"):
        assert words in told


def test_the_table_sorts_and_filters(view, report):
    page = view(report)
    lost = page.locator("#table-results tbody tr td:nth-child(3)")
    page.get_by_role("button", name="NLL added").click()
    values = [
        float(value)
        for value in lost.evaluate_all("cells => cells.map(cell => cell.dataset.value)")
    ]
    assert values == sorted(values)
    page.get_by_role("button", name="NLL added").press("Enter")
    again = [
        float(value)
        for value in lost.evaluate_all("cells => cells.map(cell => cell.dataset.value)")
    ]
    assert again == sorted(values, reverse=True)
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.get_by_label("filter").fill("mlp kept")
    assert page.locator("#table-results tbody tr:visible").count() == 3
    assert page.locator("[data-count]").inner_text() == "3 of 19 rows"


def test_figures_are_saved_and_numbers_copied(view, report, tmp_path):
    page = view(report)
    for kind, head in (("svg", b"<svg"), ("png", b"\x89PNG")):
        with page.expect_download() as waiting:
            page.locator(f"#map-figure [data-as={kind}]").click()
        waiting.value.save_as(tmp_path / kind)
        assert head in (tmp_path / kind).read_bytes()[:200]
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.locator("[data-copy=results]")
    button.click()
    page.wait_for_function(
        "document.querySelector('[data-copy=results]').textContent == 'copied'"
    )
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.splitlines()[0].startswith("step,lost")
    assert len(copied.splitlines()) == 20


@pytest.mark.parametrize("which", ["report", slow("comparison")])
@pytest.mark.parametrize(
    ("width", "colours"),
    [(1280, "light"), slow(1280, "dark"), slow(360, "light"), (360, "dark")],
)
def test_it_fits_and_can_be_read_in_every_size_and_colour(
    view, request, which, width, colours
):
    page = view(request.getfixturevalue(which), width, colours)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink = page.locator("#plans").evaluate("section => getComputedStyle(section).color")
    paper = page.locator("#plans").evaluate(
        "section => getComputedStyle(section).backgroundColor"
    )
    brightness = [
        sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)
    ]
    assert (brightness[0] < brightness[1]) == (colours == "light")
    assert (
        page.evaluate("() => views.map.background()")
        == {"light": "#ffffff", "dark": "#15181c"}[colours]
    )


@pytest.mark.slow
def test_the_colours_follow_the_reader(view, report):
    page = view(report)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "views.map.background() == '#15181c' && views.tradeoff.background() =="
        " '#15181c'"
    )


def test_every_control_is_reached_by_keyboard(view, report):
    page = view(report)
    wanted = page.locator("button:enabled, input").count()
    reached = set()
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "[...document.querySelectorAll('button,"
                " input')].indexOf(document.activeElement)"
            )
        )
    assert len(reached - {-1}) == wanted


@pytest.mark.parametrize("width", [slow(1280), 360])
def test_hostile_text_is_shown_as_text(view, nasty, width):
    page = view(nasty, width)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert "<script>window.pwned = 1</script>" in page.locator("h1").inner_text()
    assert len(page.locator("h1").inner_text()) < 200
    assert "<script>window.pwned" in page.locator(".said").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.get_by_label("filter").last.fill("=1+1")
    assert page.locator("#table-other tbody tr:visible").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_every_figure_of_a_comparison_is_drawn(view, comparison, colours):
    page = view(comparison, colours=colours)
    assert page.get_attribute("body", "data-drawn") == "5"
    assert marks(page, "map", "rect") == 2 * result_folders.LAYERS + 2
    assert marks(page, "savings", "rect") == 4
    for panel in ("front0", "front1"):
        assert marks(page, panel, "line") == 3
        assert marks(page, panel, "rule") == 6
        assert marks(page, panel, "symbol") == 2 * 6  # and their rings
    assert marks(page, "tradeoff", "symbol") == 2 * 12 + 1
    ink = {"light": "#222222", "dark": "#e8eaed"}[colours]
    assert (
        page.locator("#front0 .mark-line.role-mark path").first.get_attribute("stroke")
        == ink
    )


@pytest.mark.slow
def test_a_comparison_is_stepped_through_by_slider_points_and_rows(view, comparison):
    page = view(comparison)
    assert page.locator("#plan-name").inner_text() == "search by kl: 2 attentions"
    assert hatched(page) == 2
    page.get_by_role("button", name="next plan").click()
    page.wait_for_function("views.map.signal('skipped').length == 4")
    assert hatched(page) == 4
    page.locator("#front1 .mark-symbol.role-mark path").nth(5).dispatch_event("click")
    page.wait_for_function("document.querySelector('#plan').value == '11'")
    assert (
        page.evaluate(
            "[views.front0, views.front1, views.tradeoff].map(view =>"
            " view.signal('plan'))"
        )
        == [11] * 3
    )
    assert page.locator("tr.chosen").get_attribute("data-plan") == "11"
    rings = page.locator("#front1 .mark-symbol.role-mark path[stroke-width='2.5']")
    drawn = rings.evaluate_all(
        "rings => rings.map(ring => ring.getBoundingClientRect().width > 10)"
    )
    assert drawn == [False] * 5 + [True]
    page.locator("#table-results button[data-show='2']").click()
    page.wait_for_function("views.tradeoff.signal('plan') == 2")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_hostile_names_are_short_and_text(view, nasty, width):
    page = view(nasty, width)
    assert (
        "<script>window.pwned = 1</script>" in page.locator("#plan-name").inner_text()
    )
    assert len(page.locator("#plan-name").inner_text()) < 200
    assert len(page.locator("#table-results").inner_text()) < 4_000
    page.get_by_role("button", name="next plan").click()
    page.wait_for_function("views.savings.signal('plan') == 1")


@pytest.mark.slow
def test_a_long_table_scrolls_in_itself_under_its_headings(view, tmp_path):
    rows = [{"check": f"check {number}", "lost": number} for number in range(200)]
    page = view(shown_pages.page(tmp_path, shown_pages.alike(), checks=rows))
    assert page.evaluate("document.documentElement.scrollHeight") < 4000
    box, heading = page.locator(".long"), page.locator("#table-checks thead")
    box.evaluate("box => box.scrollTop = 2000")
    inside = box.evaluate("box => box.getBoundingClientRect().top")
    assert (
        abs(heading.evaluate("head => head.getBoundingClientRect().top") - inside) < 2
    )


@pytest.mark.slow
def test_cells_of_which_nothing_is_known_are_grey(view, tmp_path):
    known = {
        place: cost
        for place, cost in shown_pages.costs().found.items()
        if place[0] == "attention"
    }
    shown = PageParts(
        steps=shown_pages.steps()[5:6], costs=Costs(known, "KL added", "some text")
    )
    page = view(shown_pages.page(tmp_path, shown))
    assert hatched(page) == 3
    assert page.locator("#plan").is_hidden()
    cells = page.locator("#map .mark-rect.role-mark > path[fill]").evaluate_all(
        "cells => cells.map(cell => cell.getAttribute('fill'))"
    )
    assert cells.count("#8884") == result_folders.LAYERS  # the MLPs
    assert (
        len({fill for fill in cells if fill.startswith("rgb")}) == result_folders.LAYERS
    )


@pytest.mark.slow
@pytest.mark.parametrize(("width", "colours"), [(1280, "light"), (390, "dark")])
@pytest.mark.parametrize(("figure", "count"), [("refits", 5), ("healing", 3)])
def test_a_repair_is_a_figure_over_its_table(
    view, tmp_path, figure, count, width, colours
):
    page = view(
        shown_pages.page(tmp_path, shown_pages.repaired(figure)), width, colours
    )
    assert page.get_attribute("body", "data-drawn") == "2"
    assert marks(page, figure, "symbol") == count
    assert hatched(page) == 3
    assert page.locator("#table-measured tbody tr").count() == 2
    assert page.locator(f"#table-{figure} tbody tr").count() == count
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_folder_of_one_file_is_a_page_too(view, tmp_path):
    page = view(shown_pages.page(tmp_path, lost=[{"criterion": "cosine", "lost": 0.1}]))
    assert page.locator("#table-lost tbody tr").count() == 1
