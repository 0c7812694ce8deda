"""What the tests found of each architecture, kept in docs/architectures.jsonl, from
which the table is rendered.

A test compares what it finds with the kept line, and fails when that is out of date.
With NOTALL_RECORD=1 it writes the line instead: `make architectures` does so on both
lines of transformers.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock

KEPT = Path(__file__).parent.parent / "docs" / "architectures.jsonl"
RECORDING = bool(os.environ.get("NOTALL_RECORD"))
LINE = "4.57" if transformers.__version__.startswith("4.") else "5"


def compare_or_record(family: str, **found: Any) -> None:
    """Raises `AssertionError` where the kept line differs; another release need only
    agree on the verdict.
    """
    if found["verdict"] == "refused":
        # Numbers of a recomposition differ from machine to machine.
        found["reason"] = re.sub(r"\d\.\de-\d\d", "...", found["reason"])
    found = {
        "family": family,
        "line": LINE,
        "transformers": transformers.__version__,
    } | found
    if RECORDING:
        with FileLock(f"{KEPT}.lock"):
            others = [
                line
                for line in read()
                if (line["family"], line["line"]) != (family, LINE)
            ]
            lines = sorted(
                [*others, found],
                key=lambda line: (
                    line["verdict"],
                    line["family"].lower(),
                    line["line"],
                ),
            )
            KEPT.write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
            )
        return
    kept = next(
        (line for line in read() if (line["family"], line["line"]) == (family, LINE)),
        {},
    )
    compared = (
        found
        if kept.get("transformers") == transformers.__version__
        else {"verdict": found["verdict"]}
    )
    known = {name: kept.get(name) for name in compared}
    assert known == compared, (
        "docs/architectures.jsonl is out of date: make architectures"
    )


def read() -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
        if KEPT.exists()
        else []
    )
