"""No quantity has two figures on the pages, unless they say how the two differ."""

from __future__ import annotations

import json
import sys

import pytest

from programs import ROOT, program

pytestmark = pytest.mark.any_transformers  # it reads records
sys.path.append(str(ROOT / "docs"))  # as when it is run
contradictions = program("docs/contradictions")
figures = contradictions.figures
HEADER = {
    "command": "python time_it.py --out a",
    "date": "2026-11-29",
    "machine": {"cpu": "one"},
    "model": "small",
    "rounds": 4,
}
ROW = {"kind": "attention", "prompt": 128, "speedup": {"low": 1.0, "high": 1.2}}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes two runs that give 1.1 and `second`, and the words on how they differ."""
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(contradictions, "SETTINGS", tmp_path / "docs/settings.yaml")
    pages = [tmp_path / "one.md", tmp_path / "other.md"]
    monkeypatch.setattr(figures, "PAGES", pages)
    (tmp_path / "docs").mkdir()

    def written(second=1.4, settings=None, text="", ids=None, **row):
        figures.specs.cache_clear()
        figures.rows_of.cache_clear()
        for name, median, header, own in (
            ("a", 1.1, HEADER, {}),
            ("b", second, HEADER | {"date": "2026-12-01", "rounds": 7}, row),
        ):
            speedup = ROW["speedup"] | {"median": median}
            lines = [header, ROW | {"speedup": speedup} | own]
            content = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / f"run-{name}.jsonl").write_text(content)
        expressions = ids or {
            "a": "run-a.jsonl speedup [.2f",
            "b": "run-b.jsonl speedup [.2f",
        }
        (tmp_path / "docs/figures.yaml").write_text(json.dumps(expressions))
        (tmp_path / "docs/settings.yaml").write_text(json.dumps(settings or {}))
        pages[0].write_text("It is <!--=a-->0<!--/-->.")
        pages[1].write_text(f"It is <!--=b-->0<!--/-->.{text}")
        return contradictions.contradictions()

    yield written
    figures.specs.cache_clear()
    figures.rows_of.cache_clear()


def test_the_pages_contradict_each_other_nowhere():
    assert contradictions.contradictions() == []


def test_each_record_with_a_setting_is_shown():
    shown = {one.record for one in contradictions.all_shown()}
    settings = figures.specs(contradictions.SETTINGS)
    assert settings.keys() <= shown


def test_two_figures_of_one_quantity_are_seen(write):
    (found,) = write()
    assert "1.10 [1.00, 1.20] (one.md, run-a.jsonl)" in found
    assert "1.40 [1.00, 1.20] (other.md, run-b.jsonl)" in found


def test_equal_figures_are_let_be(write):
    assert write(second=1.1) == []


@pytest.mark.parametrize("row", [{"prompt": 512}, {"kind": "mlp"}, {"model": "large"}])
def test_another_setting_is_another_quantity(write, row):
    assert write(**row) == []


def test_a_range_shows_both_runs(write):
    both = "run-[ab].jsonl speedup to.2f"
    assert write(ids={"a": both, "b": both}) == []
    assert len(write(ids={"a": both, "b": "run-b.jsonl speedup [.2f"})) == 1
    assert figures.figure(both) == "1.10 to 1.40"


def test_words_on_how_they_differ_stand_on_the_page(write):
    settings = {"run-a.jsonl": "It is", "run-b.jsonl": "on a warm machine"}
    assert len(write(settings=settings)) == 1
    assert write(settings=settings, text=" This is\non a warm\nmachine.") == []
