"""Figures and tables of the README and the documents are those of committed records."""

from __future__ import annotations

import json

import pytest

from programs import program

pytestmark = pytest.mark.any_transformers  # it reads records
figures = program("docs/figures")
RECORD = [
    {"command": "python it.py", "date": "2026-11-29", "machine": {"cpu": "one"}},
    {
        "set": "a b",
        "on": "keys_1",
        "loss": {"nats": 0.1251, "nats_se": 0.02},
        "value": 0.5,
        "recovery": {"items": 12},
    },
    {
        "set": "a b",
        "on": "keys_2",
        "value": 1.0,
        "recovery": {"items": 4, "share": 0.9, "low": 0.8, "high": 1.0},
    },
]
TABLES = """
them:
  of: it.jsonl "set=a b"
  columns:
    - ['', left]
    - [value, right, '{value .1f} of 1']
    - [recovery, right, '{recovery [.1f}']
  rows:
    - {of: on=keys_1, cells: [the first, ~, '-']}
    - {of: on=keys_2, cells: [the second]}
    - {cells: [it, '', '{loss.nats .1f on=keys_1}']}
"""
LINES = """\
|  | value | recovery |
| --- | ---: | ---: |
| the first | 0.5 of 1 | - |
| the second | 1.0 of 1 | 0.9 [0.8, 1.0] |
| it |  | 0.1 |"""
MARKED = 200  # characters of comments in a line of a page


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of a repository with one record."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", [tmp_path / "page.md"])
    figures.specs.cache_clear()
    figures.rows_of.cache_clear()
    (tmp_path / "docs/tables").mkdir(parents=True)
    (tmp_path / "it.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in RECORD)
    )
    yield tmp_path / "page.md"
    figures.specs.cache_clear()
    figures.rows_of.cache_clear()


def asks(page, expression: str) -> None:
    """The page has one figure, which is to be `expression`."""
    page.write_text("It is <!--=it-->7<!--/--> nats.")
    (page.parent / "docs/figures.yaml").write_text(json.dumps({"it": expression}))


def check(monkeypatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["figures.py", *options])
    figures.main()


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_its_records(page):
    content = page.read_text(encoding="utf-8")
    assert figures.filled(page) == content, "python docs/figures.py"
    found = len(figures.FIGURE.findall(content))
    assert content.count("<!--=") == content.count("<!--/-->") == found
    found = len(figures.TABLE.findall(content))
    assert content.count("<!--table") == content.count("<!--/table-->") == found


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_line_is_read_without_its_comments_in_the_way(page):
    for line in page.read_text(encoding="utf-8").splitlines():
        marks = sum(len(f"<!--={name}-->") for name, _ in figures.FIGURE.findall(line))
        assert marks <= MARKED, line


def test_each_id_and_each_table_is_on_a_page():
    content = {page: page.read_text(encoding="utf-8") for page in figures.PAGES}
    everywhere = "".join(content.values())
    ids = {name for name, _ in figures.FIGURE.findall(everywhere)}
    assert ids == set(figures.specs(figures.ROOT / "docs/figures.yaml"))
    described = set((figures.ROOT / "docs/tables").glob("*.yaml"))
    assert described <= {figures.tables_of(page) for page in figures.PAGES}
    for page, text in content.items():
        names = figures.TABLE.findall(text)
        assert sorted(names) == sorted(figures.specs(figures.tables_of(page)))


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ('loss.nats ±.2f "set=a b"', "0.13 ± 0.02"),
        ("recovery [.1f on=keys_2", "0.9 [0.8, 1.0]"),
        ('value right on=keys_* "set=a b"', "10"),
        ("value .0% on=keys_1", "50 %"),
        ("machine.cpu s", "one"),
    ],
)
def test_a_figure_is_filled_in_and_one_that_differs_is_seen(
    page, expression, shown, monkeypatch
):
    asks(page, f"it.jsonl {expression}")
    with pytest.raises(SystemExit, match=r"differ from their records in page\.md"):
        check(monkeypatch, "--check")
    check(monkeypatch)
    assert page.read_text() == f"It is <!--=it-->{shown}<!--/--> nats."
    check(monkeypatch, "--check")


def test_a_table_is_written_and_one_that_differs_is_seen(page, monkeypatch):
    page.write_text("Before\n\n<!--table them-->\n| 7 |\n<!--/table-->\n\nBehind")
    (page.parent / "docs/tables/page.yaml").write_text(TABLES)
    with pytest.raises(SystemExit, match=r"differ from their records in page\.md"):
        check(monkeypatch, "--check")
    check(monkeypatch)
    written = f"Before\n\n<!--table them-->\n{LINES}\n<!--/table-->\n\nBehind"
    assert page.read_text() == written
    check(monkeypatch, "--check")


def test_a_cell_goes_before_its_row_and_a_row_before_its_table():
    words = figures.joined("a .1f x=1", "b .2f x=2 y=2", "it.jsonl y=3 z=3")
    record, *of_field = words.split()[:3]
    assert (record, of_field) == ("it.jsonl", ["a", ".1f"])
    assert set(words.split()[3:]) == {"x=1", "y=2", "z=3"}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("it.jsonl value .2f", r"page\.md: 2 rows match"),
        ("it.jsonl value .2f on=nothing", "0 rows match"),
        ("it.jsonl loss.none .2f on=keys_1", "0 rows match"),
        ("other.jsonl value .2f", r"other\.jsonl is absent"),
        ("undated.jsonl value .2f", r"undated\.jsonl names no date"),
    ],
)
def test_a_figure_that_no_record_has_is_refused(page, expression, message, monkeypatch):
    (page.parent / "undated.jsonl").write_text(
        '{"command": "it", "machine": 1, "value": 1}'
    )
    asks(page, expression)
    with pytest.raises(SystemExit, match=message):
        check(monkeypatch)


@pytest.mark.parametrize(
    "mark", ["<!--=none-->7<!--/-->", "<!--table none-->\n<!--/table-->"]
)
def test_a_name_that_is_not_described_is_refused(page, mark, monkeypatch):
    page.write_text(mark)
    with pytest.raises(SystemExit, match=r"page\.md: none is not in"):
        check(monkeypatch)
