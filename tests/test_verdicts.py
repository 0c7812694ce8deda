"""The table users read says what the tests found."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from families import FAMILIES
from hybrid_families import HYBRIDS
from plain_families import NORMED_AFTER, OTHERS
from verdicts import KEPT, LINE, compare_or_record, read

PAGE = KEPT.with_suffix(".md")


def test_page_is_rendered_from_what_was_found() -> None:
    render = runpy.run_path(str(Path(KEPT).with_suffix(".py")))["render"]
    assert render(read()) == PAGE.read_text(encoding="utf-8"), (
        "docs/architectures.md is out of date"
    )


def test_enough_is_proved_and_refused() -> None:
    of_this_line = [line["verdict"] for line in read() if line["line"] == LINE]
    assert of_this_line.count("exact") >= 45
    assert of_this_line.count("refused") >= 8
    assert {line["family"] for line in read() if line["verdict"] == "exact"} <= {
        family.name for family in [*FAMILIES, *HYBRIDS, *OTHERS, *NORMED_AFTER]
    }


def test_an_old_line_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTALL_RECORD", raising=False)
    with pytest.raises(AssertionError, match="out of date"):
        compare_or_record("llama", verdict="refused", reason="planted")
