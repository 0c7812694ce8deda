"""What a results folder holds, whichever command wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import results
from ..errors import UsageError

Row = dict[str, Any]

# Files that have a section of their own, or that hold what others sum up.
RESULTS, SIMILARITY, SAMPLES = "results.jsonl", "similarity.jsonl", "samples.jsonl"
LEAVE_ONE_OUT = "leave_one_out.jsonl"
RAW = {"scores.jsonl", "answers.jsonl"}

KINDS = {"dense": "dense", "attention": "attention", "mlp": "MLP", "block": "block", "plan": "plan"}
SHORT = {"attention": "attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Folder:
    """Records by file name, without the suffix; a file that is absent has none."""

    records: tuple[Row, ...]
    similarity: tuple[Row, ...]
    leave_one_out: tuple[Row, ...]
    samples: tuple[Row, ...]
    others: Mapping[str, tuple[Row, ...]]

    @cached_property
    def provenance(self) -> Row:
        """Of the first record that has one."""
        others = (row for rows in self.others.values() for row in rows)
        rows = (*self.records, *self.similarity, *self.samples, *others)
        return next((row["provenance"] for row in rows if row.get("provenance")), {})

    @cached_property
    def plans(self) -> tuple[Row, ...]:
        """One record of each configuration: those of a sweep in their order, else what other files are about."""
        found: dict[str, Row] = {}
        for rows in (self.records, *(() if self.records else self.others.values())):
            for row in rows:
                if {"variant", "fraction", "keep_last", "plan"} <= row.keys():
                    found.setdefault(name_of(row), row)
        return tuple(found.values())

    @property
    def dense(self) -> Row | None:
        return next((record for record in self.records if record["variant"] == "dense"), None)

    @property
    def layers(self) -> int:
        """How many the model has, as far as the folder tells."""
        named = (index for record in self.plans for kind in SHORT for index in record["plan"].get(kind, ()))
        return max([*named, *(row["layer"] for row in (*self.similarity, *self.leave_one_out))], default=-1) + 1


def read_folder(path: Path) -> Folder:
    """Read what is there. Raises `UsageError` where nothing is, or a line is malformed."""
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}; make one with notall sweep --out {path}")
    known = {RESULTS, SIMILARITY, SAMPLES, LEAVE_ONE_OUT}
    folder = Folder(
        records=tuple(results.read(path / RESULTS, results.Record)),
        similarity=tuple(results.read(path / SIMILARITY)),
        leave_one_out=tuple(results.read(path / LEAVE_ONE_OUT)),
        samples=tuple(results.read(path / SAMPLES)),
        others={
            file.stem: tuple(rows)
            for file in sorted(path.glob("*.jsonl"))
            if file.name not in known | RAW and (rows := results.read(file))
        },
    )
    if not (folder.records or folder.similarity or folder.others):
        raise UsageError(f"{path} holds no results; make some with notall sweep --out {path}")
    return folder


def name_of(record: Mapping[str, Any]) -> str:
    """A configuration in words, such as `attention 10%, last layer kept`."""
    if record["variant"] == "dense":
        return "dense"
    kept = ", last layer kept" if record["keep_last"] else ""
    return f"{KINDS[record['variant']]} {record['fraction']:.0%}{kept}"


def sublayers(record: Mapping[str, Any]) -> list[str]:
    """What a record's plan skips, as `attn.3`, `mlp.3`."""
    return [f"{short}.{index}" for kind, short in SHORT.items() for index in record["plan"].get(kind, ())]


def flatten(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested records as `a.b`, value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)
