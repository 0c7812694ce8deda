"""docs/engines.md is what the kept lines render to."""

from pathlib import Path

import pytest

from programs import program

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.any_transformers
def test_the_page_is_up_to_date():
    page = program("docs/engines")
    assert page.render(page.read()) == (DOCS / "engines.md").read_text(
        encoding="utf-8"
    ), "make engines"
