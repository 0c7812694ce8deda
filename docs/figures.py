"""Fill in the figures and the tables of the README and the documents from committed
records.

    python docs/figures.py            # write them
    python docs/figures.py --check    # exit code 1 where one differs

A page names a figure by its id, and a table by its name:

    It costs <!--=gsm8k.original-->49 %<!--/--> of them.

    <!--table repairs-->
    | ... |
    <!--/table-->

`docs/figures.yaml` says of each id what it is: RECORD FIELD FORMAT key=value ...

    gsm8k.original: benchmarks/NAME.jsonl dense .0% judged=shown_gsm8k

FIELD and a key may be a path (`quality.delta_nll`), a value a pattern
(`judged=passkey_*`). One row is to match and to have the field. FORMAT is one of
Python's (`.1f`, `,d`, `.0%`, `s`), or

    ±.2f     a value and its standard error, FIELD_se
    [.2f     an interval, of a field that has a share, a median or a value, low and high
    to.2f    the lowest and the highest median of several runs: RECORD is a pattern
    right    items answered rightly, of all rows that match: FIELD is a share of recovery.items
    minutes  of seconds
    MB, GB   of bytes

`docs/tables/PAGE.yaml` describes the tables of a page. A column has a title, a side and
the text of its cells, with figures in braces; a row has its first cells, of which `~` is
as its column says. What a figure is of comes from its cell, then from `of` of its row,
then from `of` of its table:

    repairs:
      of: benchmarks/NAME.jsonl
      columns:
        - [set, left]
        - [NLL added, right, '{quality.delta_nll ±.2f judged=wiki.test}']
      rows:
        - {of: set=attention:8, cells: [8 attentions]}
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FIGURE = re.compile(r"<!--=(?P<id>[^\s>]+)-->(?P<shown>[^<\n]*)<!--/-->")
TABLE = re.compile(r"<!--table (?P<name>[\w-]+)-->\n.*?<!--/table-->", re.S)
IN_CELL = re.compile(r"\{([^{}]*)\}")
PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks/LOG.md",
    *sorted((ROOT / "benchmarks").rglob("README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SIDES = {"left": "---", "right": "---:", "center": ":-:"}
UNITS = {"minutes": (60, ".0f"), "MB": (10**6, ",.0f"), "GB": (10**9, ".1f")}
NEEDED = ("command", "date", "machine")  # of a record


class Unknown(Exception):
    """A figure that no record has."""


# --------------------------------------------------------------------------------------
# A figure


def field(row: Any, path: str) -> Any:
    """What a path of names and numbers leads to, or None."""
    for name in path.split("."):
        if isinstance(row, list):
            row = row[int(name)]
        else:
            row = row.get(name) if isinstance(row, dict) else None
    return row


@cache
def rows_of(record: Path) -> list[Any]:
    if not record.is_file():
        raise Unknown(f"{record.name} is absent")
    content = record.read_text(encoding="utf-8")
    missing = [name for name in NEEDED if f'"{name}"' not in content]
    if missing:
        raise Unknown(f"{record.name} names no {missing[0]}")
    return [json.loads(line) for line in content.splitlines()]


def joined(*expressions: str) -> str:
    """One expression of several, the first of which say more than the later ones."""
    record, of_field, keys = "", [], {}
    for expression in expressions:
        words = shlex.split(expression)
        mine = [word for word in words if not is_key(word) and not is_record(word)]
        record = record or next(filter(is_record, words), "")
        of_field = of_field or mine
        keys = dict(word.split("=", 1) for word in words if is_key(word)) | keys
    return shlex.join([record, *of_field, *(f"{k}={v}" for k, v in keys.items())])


def is_record(word: str) -> bool:
    return word.endswith(".jsonl") and "=" not in word


def is_key(word: str) -> bool:
    return "=" in word


def parsed(expression: str) -> tuple[str, str, str, dict[str, str]]:
    """Record, field, format and keys of an expression."""
    record, path, form, *keys = shlex.split(expression)
    return record, path, form, dict(key.split("=", 1) for key in keys)


def records_of(pattern: str) -> list[Path]:
    """The files of a record, of which a pattern names several runs."""
    return sorted(ROOT.glob(pattern)) or [ROOT / pattern]


def matching(record: Path, path: str, wanted: dict[str, str]) -> list[Any]:
    """The rows of a record that have a field, and keys as they are wanted."""
    return [
        row
        for row in rows_of(record)
        if field(row, path) is not None
        and all(fnmatchcase(str(field(row, k)), v) for k, v in wanted.items())
    ]


def figure(expression: str) -> str:
    """What an expression asks for. Raises `Unknown`."""
    pattern, path, form, wanted = parsed(expression)
    records = records_of(pattern)
    rows = [row for record in records for row in matching(record, path, wanted)]
    if form == "right" and rows:
        right = (field(row, path) * field(row, "recovery.items") for row in rows)
        return str(sum(map(round, right)))
    if form.startswith("to") and len(rows) == len(records) > 1:
        medians = sorted(field(row, path)["median"] for row in rows)
        form = form.removeprefix("to")
        return f"{medians[0]:{form}} to {medians[-1]:{form}}"
    if len(rows) != 1 or len(records) != 1:
        raise Unknown(f"{len(rows)} rows match: {expression}")
    return shown(rows[0], path, form)


def shown(row: Any, path: str, form: str) -> str:
    """A field of a row by a format."""
    value = field(row, path)
    if form in UNITS:
        unit, form = UNITS[form]
        return format(value / unit, form)
    if form.startswith("±"):
        form = form[1:]
        return f"{value:{form}} ± {field(row, path + '_se'):{form}}"
    if form.startswith("["):
        form = form[1:]
        middle = next(value[k] for k in ("share", "median", "value") if k in value)
        return f"{middle:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
    return re.sub("(?<! )%", " %", format(value, form))


# --------------------------------------------------------------------------------------
# A table


def table(spec: dict[str, Any]) -> str:
    """Its lines of markdown. Raises `Unknown`."""
    lines = [
        line(title for title, *_ in spec["columns"]),
        line(SIDES[side] for _, side, *_ in spec["columns"]),
    ]
    for texts, of in cells(spec):
        lines.append(line(filled_cell(text, *of) for text in texts))
    return "\n".join(lines)


def cells(spec: dict[str, Any]) -> Iterator[tuple[list[str], tuple[str, str]]]:
    """The texts of each row of a table, and what their figures are of."""
    columns = spec["columns"]
    for row in spec["rows"]:
        own = row["cells"] + [None] * (len(columns) - len(row["cells"]))
        texts = [
            cell if cell is not None else (column[2] if len(column) > 2 else "")
            for cell, column in zip(own, columns)
        ]
        yield texts, (row.get("of", ""), spec.get("of", ""))


def filled_cell(text: str, *of: str) -> str:
    return IN_CELL.sub(lambda found: figure(joined(found[1], *of)), text)


def line(texts: Any) -> str:
    return "| " + " | ".join(texts) + " |"


# --------------------------------------------------------------------------------------
# A page


def filled(page: Path) -> str:
    """The text of a page with its figures and tables. Raises `Unknown`."""
    figures, tables = specs(ROOT / "docs/figures.yaml"), specs(tables_of(page))

    def of_id(found: re.Match[str]) -> str:
        name = found["id"]
        if name not in figures:
            raise Unknown(f"{name} is not in docs/figures.yaml")
        return f"<!--={name}-->{figure(figures[name])}<!--/-->"

    def of_name(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in tables:
            raise Unknown(f"{name} is not in {tables_of(page).name}")
        return f"<!--table {name}-->\n{table(tables[name])}\n<!--/table-->"

    content = page.read_text(encoding="utf-8")
    return TABLE.sub(of_name, FIGURE.sub(of_id, content))


def expressions() -> Iterator[tuple[Path, str]]:
    """Every figure of every page, as an expression."""
    ids = specs(ROOT / "docs/figures.yaml")
    for page in PAGES:
        for found in FIGURE.finditer(page.read_text(encoding="utf-8")):
            yield page, ids[found["id"]]
        for spec in specs(tables_of(page)).values():
            for texts, of in cells(spec):
                for found in IN_CELL.finditer(" ".join(texts)):
                    yield page, joined(found[1], *of)


@cache
def specs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def tables_of(page: Path) -> Path:
    """Where the tables of a page are described: `benchmarks-serving.yaml` has those of
    `benchmarks/serving/README.md`.
    """
    folders = page.parent.relative_to(ROOT).parts
    name = page.stem.lower()
    if page.name == "README.md" and folders:
        name = "-".join(folders)
    return ROOT / f"docs/tables/{name}.yaml"


def main() -> None:
    stale = []
    for page in PAGES:
        try:
            now = filled(page)
        except Unknown as problem:
            sys.exit(f"{page.relative_to(ROOT)}: {problem}")
        if now != page.read_text(encoding="utf-8"):
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
