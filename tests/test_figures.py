"""Figures of the README and the documents are those of committed records."""

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


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "PAGES", [tmp_path / "page.md"])
    (tmp_path / "it.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in RECORD)
    )
    return tmp_path / "page.md"


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_its_records(page):
    content = page.read_text(encoding="utf-8")
    assert figures.filled(content) == content, "python docs/figures.py"
    assert (
        content.count("<!--=")
        == content.count("<!--/-->")
        == len(figures.FIGURE.findall(content))
    )


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ('loss.nats ±.2f "set=a b"', "0.13 ± 0.02"),
        ("recovery [.1f on=keys_2", "0.9 [0.8, 1.0]"),
        ('value right on=keys_* "set=a b"', "10"),
        ("value .0% on=keys_1", "50 %"),
        ("machine.cpu s", "one"),
    ],
)
def test_a_figure_is_filled_in_and_one_that_differs_is_seen(
    page, told, shown, monkeypatch
):
    page.write_text(f"It is <!--= it.jsonl {told} -->7<!--/--> nats.")
    monkeypatch.setattr("sys.argv", ["figures.py", "--check"])
    with pytest.raises(
        SystemExit, match=r"figures differ from their records in page\.md"
    ):
        figures.main()
    monkeypatch.setattr("sys.argv", ["figures.py"])
    figures.main()
    assert page.read_text() == f"It is <!--= it.jsonl {told} -->{shown}<!--/--> nats."
    monkeypatch.setattr("sys.argv", ["figures.py", "--check"])
    figures.main()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("it.jsonl value .2f", r"page\.md: 2 rows match"),
        ("it.jsonl value .2f on=nothing", "0 rows match"),
        ("it.jsonl loss.none .2f on=keys_1", "0 rows match"),
        ("other.jsonl value .2f", r"other\.jsonl is absent"),
        ("undated.jsonl value .2f", r"undated\.jsonl tells no date"),
    ],
)
def test_a_figure_that_no_record_has_is_refused(page, told, said):
    (page.parent / "undated.jsonl").write_text(
        '{"command": "it", "machine": 1, "value": 1}'
    )
    page.write_text(f"<!--= {told} -->7<!--/-->")
    with pytest.raises(SystemExit, match=said):
        figures.main()
