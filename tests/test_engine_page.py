"""docs/engines.md is what the kept lines render to."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.any_transformers
def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("engines_page", DOCS / "engines.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.render(page.read()) == (DOCS / "engines.md").read_text(encoding="utf-8"), "make engines"
