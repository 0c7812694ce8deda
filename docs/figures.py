"""Fill in the figures of the README and the documents from committed records.

    python docs/figures.py            # write them
    python docs/figures.py --check    # exit code 1 where one differs

A figure stands between two comments, of which the first names its record, its field and
which row:

    <!--= benchmarks/NAME.jsonl FIELD FORMAT key=value ... -->0.27 ± 0.02<!--/-->

FIELD and a key may be a path (`quality.delta_nll`), a value a pattern
(`judged=passkey_*`). One row is to match and to have the field. FORMAT is one of
Python's (`.1f`, `,d`, `.0%`, `s`), or

    ±.2f     a value and its standard error, FIELD_se
    [.2f     an interval, of a field that has a share, a median or a value, low and high
    right    items answered rightly, of all rows that match: FIELD is a share of recovery.items
    minutes  of seconds
    MB, GB   of bytes
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"<!--= (?P<told>[^>]*?) -->(?P<shown>[^<\n]*)<!--/-->")
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
UNITS = {"minutes": (60, ".0f"), "MB": (10**6, ",.0f"), "GB": (10**9, ".1f")}
NEEDED = ("command", "date", "machine")  # of a record


class Unknown(Exception):
    """A figure that no record has."""


def field(row: Any, path: str) -> Any:
    """What a path of names and numbers leads to, or None."""
    for name in path.split("."):
        row = (
            row[int(name)]
            if isinstance(row, list)
            else row.get(name)
            if isinstance(row, dict)
            else None
        )
    return row


def rows_of(record: str) -> list[Any]:
    path = ROOT / record
    if not path.is_file():
        raise Unknown(f"{record} is absent")
    content = path.read_text(encoding="utf-8")
    if missing := [name for name in NEEDED if f'"{name}"' not in content]:
        raise Unknown(f"{record} tells no {missing[0]}")
    return [json.loads(line) for line in content.splitlines()]


def figure(told: str) -> str:
    """What a marker asks for. Raises `Unknown`."""
    record, path, form, *keys = shlex.split(told)
    wanted = dict(key.split("=", 1) for key in keys)
    rows = [
        row
        for row in rows_of(record)
        if all(fnmatchcase(str(field(row, k)), v) for k, v in wanted.items())
    ]
    rows = [row for row in rows if field(row, path) is not None]
    if form == "right" and rows:
        return str(
            sum(round(field(row, path) * field(row, "recovery.items")) for row in rows)
        )
    if len(rows) != 1:
        raise Unknown(f"{len(rows)} rows match: {told}")
    value = field(rows[0], path)
    if form in UNITS:
        unit, form = UNITS[form]
        return format(value / unit, form)
    if form.startswith("±"):
        return f"{value:{form[1:]}} ± {field(rows[0], path + '_se'):{form[1:]}}"
    if form.startswith("["):
        middle = next(
            value[name] for name in ("share", "median", "value") if name in value
        )
        return "{:{form}} [{:{form}}, {:{form}}]".format(
            middle, value["low"], value["high"], form=form[1:]
        )
    return re.sub("(?<! )%", " %", format(value, form))


def filled(content: str) -> str:
    return FIGURE.sub(
        lambda found: f"<!--= {found['told']} -->{figure(found['told'])}<!--/-->",
        content,
    )


def main() -> None:
    stale = []
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        try:
            now = filled(content)
        except Unknown as problem:
            sys.exit(f"{page.relative_to(ROOT)}: {problem}")
        if now != content:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(now, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(
            f"figures differ from their records in {', '.join(stale)}: run python"
            " docs/figures.py"
        )


if __name__ == "__main__":
    main()
