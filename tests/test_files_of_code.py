"""A file of the package is read in one sitting."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.any_transformers  # it reads files
PACKAGE = Path(__file__).parent.parent / "src" / "notall"
MOST_LINES = 400


def too_long(folder: Path) -> list[str]:
    """Files of more than `MOST_LINES` lines, with their number."""
    counts = {
        path.relative_to(folder): len(path.read_text(encoding="utf-8").splitlines())
        for path in folder.rglob("*.py")
    }
    return [f"{path}: {count}" for path, count in counts.items() if count > MOST_LINES]


def test_no_file_is_too_long():
    assert too_long(PACKAGE) == []


def test_one_that_is_too_long_is_seen(tmp_path):
    (tmp_path / "long.py").write_text("x = 1\n" * (MOST_LINES + 1))
    assert too_long(tmp_path) == [f"long.py: {MOST_LINES + 1}"]
