"""Quantities that the pages show with two figures.

    python docs/contradictions.py     # exit code 1 where there is one

A quantity is a field of a record, of one model, plan and setting. Where two records
have it, with two values, a page shows both as one range (FORMAT `to`, of
`docs/figures.py`), or `docs/settings.yaml` has the words by which the records differ,
and each page with a figure of such a record has these words:

    benchmarks/NAME.jsonl: the last 64 tokens whole
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import figures
import yaml

SETTINGS = figures.ROOT / "docs/settings.yaml"
PROGRAMS = {"front": "pareto"}  # names of earlier releases
# How long and when it was measured, and what it came to: no setting.
MEASURED = re.compile(
    r"command|date|run|rounds|seconds|n|sealed|versions|searches|skipped|evaluations"
    r"|executions|verdict|best|items|tasks|round_ms|.*_bytes|.*_tokens_per_.*"
)
# Of what a time does not depend on.
OF_TEXT = re.compile(
    r"text.*|held_out.*|sequences|length|windows|tokens|seed|subject|weights|limit"
    r"|questions"
)
TIMES = re.compile(r"speedup|_ms\b|_ms_|seconds")


class Shown(NamedTuple):
    """A figure of a page, and a row that it is of."""

    page: Path
    record: str
    quantity: dict[str, Any]
    text: str
    together: frozenset[str]  # the records of one figure


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """(path, value) of everything in a row but numbers with a fraction."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif value not in (None, "") and not isinstance(value, float):
        yield path, json.dumps(value)


def program(header: dict[str, Any]) -> str:
    """`python PATH` or `notall VERB`, of a record's command."""
    found = re.search(r'"command": "(\S+ \S+)', json.dumps(header))
    words = found[1].split() if found else [""]
    return " ".join(PROGRAMS.get(word, word) for word in words)


def quantity(header: dict[str, Any], row: dict[str, Any], path: str) -> dict[Any, Any]:
    """The settings of a field of a row: all of the row's and its file's that say what
    was measured.
    """
    common = {} if figures.field(header, path) is not None else header
    no_setting = [MEASURED, OF_TEXT] if TIMES.search(path) else [MEASURED]
    found = {"field": path, "program": program(header)}
    for names, value in leaves({**common, **row}):
        if not any(one.fullmatch(name) for one in no_setting for name in names):
            found[names] = value
    return found


def all_shown() -> Iterator[Shown]:
    """Every figure of every page. Raises `figures.Unknown`."""
    for page, expression in figures.expressions():
        pattern, path, form, wanted = figures.parsed(expression)
        records = figures.records_of(pattern)
        for record in records:
            header = figures.rows_of(record)[0]
            rows = figures.matching(record, path, wanted)
            if len(rows) != 1:
                continue  # a sum over rows
            yield Shown(
                page,
                str(record.relative_to(figures.ROOT)),
                quantity(header, rows[0], path),
                value_of(rows[0], path, form),
                frozenset(str(one.relative_to(figures.ROOT)) for one in records),
            )


def value_of(row: Any, path: str, form: str) -> str:
    """A field as a page shows it, of one run."""
    if form == "right":
        return str(figures.field(row, path))
    return figures.shown(row, path, re.sub("^to", "[", form))


def differ(one: Shown, other: Shown) -> bool:
    """One quantity, two values, and no figure that has both."""
    if one.record == other.record or one.text == other.text:
        return False
    if {one.record, other.record} <= one.together & other.together:
        return False
    common = one.quantity.keys() & other.quantity.keys()
    return all(one.quantity[key] == other.quantity[key] for key in common)


def states(page: Path, words: str) -> bool:
    return words in " ".join(page.read_text(encoding="utf-8").split())


def contradictions() -> list[str]:
    """A line for each pair of figures. Raises `figures.Unknown`."""
    stated = yaml.safe_load(SETTINGS.read_text(encoding="utf-8")) or {}
    groups = defaultdict(list)
    for shown in all_shown():
        groups[shown.quantity["field"], shown.quantity["program"]].append(shown)
    found = set()
    for group in groups.values():
        for one, other in combinations(group, 2):
            if differ(one, other) and not all(
                side.record in stated and states(side.page, stated[side.record])
                for side in (one, other)
            ):
                found.add(line(one, other))
    return sorted(found)


def line(*both: Shown) -> str:
    sides = (
        f"{one.text} ({one.page.relative_to(figures.ROOT)}, {one.record})"
        for one in both
    )
    return f"{both[0].quantity['field']}: " + " and ".join(sorted(sides))


if __name__ == "__main__":
    problems = contradictions()
    if problems:
        sys.exit("\n".join(problems))
