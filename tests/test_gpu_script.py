"""benchmarks/gpu.sh, in small, on a machine without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.any_transformers  # of a script


def run(out, *words):
    if not SCRIPT.is_file():
        pytest.skip("there is no benchmarks/gpu.sh beside these tests")
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    return subprocess.run(
        [SCRIPT, *words], env=environment, capture_output=True, text=True
    )


def test_an_unknown_step_is_refused(tmp_path):
    done = run(tmp_path, "--smoke", "tabel")
    assert done.returncode == 2
    assert "give some of setup device tests readme table paper" in done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_it_says_what_passed_what_failed_and_what_was_not_covered(tmp_path):
    done = run(tmp_path, "--smoke", "device", "readme", "table")
    lines = done.stdout.splitlines()
    summary = lines[lines.index("== done") + 1 : lines.index("Not covered:")]
    assert [line.partition(",")[0] for line in summary] == [
        "device: FAILED",  # none is here
        "readme: passed",
        "table: passed",
    ]
    assert done.returncode == 1
    assert "- any device: none is here" in done.stdout
    assert (tmp_path / "on_device.md").read_text().count("| yes |") == 5
