"""What is written replaces what had the name, whole, and leaves alone what a link leads to."""

import re
from pathlib import Path

import pytest

import notall
from api import files
from notall import Plan

pytestmark = pytest.mark.any_transformers  # it writes files


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: files.write_whole(path, "new"), id="text"),
        pytest.param(lambda path: files.write_whole(path, b"new"), id="bytes"),
        pytest.param(lambda path: Plan([1]).save(path), id="plan"),
    ],
)
def test_a_link_is_replaced_and_what_it_leads_to_stays(write, tmp_path):
    (tmp_path / "others").write_text("theirs")
    (tmp_path / "out").symlink_to(tmp_path / "others")
    write(tmp_path / "out")
    assert (tmp_path / "others").read_text() == "theirs"
    assert not (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others", "out"]


def test_tables_and_figures_are_written_so():
    folder = Path(notall.__file__).parent
    for file in (*(folder / "experiments").glob("*.py"), *(folder / "charts").glob("*.py")):
        assert not re.search(r"\.write_(text|bytes)\(", file.read_text()), file.name
