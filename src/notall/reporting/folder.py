"""What a results folder holds, whichever command wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..records import lines
from ..records.answers import AnswersRecord
from ..records.bench import BenchRecord, pairs_of
from ..records.benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord
from ..records.claims import ClaimRecord
from ..records.columns import Row
from ..records.comparison import ChoiceRecord, ComparisonRecord, HeldOutRecord, PlanTimesRecord
from ..records.fingerprint import Fingerprint
from ..records.front import EngineScoresRecord, EngineTimesRecord
from ..records.kinds import kind_at
from ..records.leave_one_out import LeaveOneOutRecord
from ..records.ledger import header_of, read
from ..records.record import Record
from ..records.search import EvaluationRecord, SearchRecord
from ..records.similarity import SimilarityRecord
from ..records.sweep import SampleRecord, ScoresRecord, SweepRecord
from .costs import Costs, read_costs
from .rows import SHORT, kind_of, name_of

# Kinds that a page steps through, the first that is there, and those that have a section of their own.
STEPPED: tuple[type[Record], ...] = (SweepRecord, ComparisonRecord, SearchRecord, BenchRecord)
APART: tuple[type[Record], ...] = (SimilarityRecord, SampleRecord, LeaveOneOutRecord, ClaimRecord)
PAPER: tuple[type[Record], ...] = (BenchmarkRecord, BatteryRecord, TimesRecord)  # a table each
# Kinds that hold what others sum up.
RAW: tuple[type[Record], ...] = (
    *(ScoresRecord, AnswersRecord, EvaluationRecord),
    *(ChoiceRecord, HeldOutRecord, PlanTimesRecord),
    *(EngineScoresRecord, EngineTimesRecord),
)


@dataclass(frozen=True)
class Folder:
    """Records to step through, and those of other files by name, without the suffix; a file that is absent has none.

    `claims` are the paper's, beside what the model shows. `foreign` are files that no command of ours wrote: their
    lines as they are.
    """

    path: Path
    records: tuple[Row, ...]
    similarity: tuple[Row, ...]
    costs: Costs | None
    samples: tuple[Row, ...]
    others: Mapping[str, tuple[Row, ...]]
    claims: tuple[Row, ...]
    foreign: Mapping[str, tuple[Row, ...]]

    @property
    def kind(self) -> str | None:
        """The command that wrote the records, if there are any."""
        return kind_of(self.records[0]) if self.records else None

    @property
    def of_paper(self) -> bool:
        """Whether `notall paper` wrote it."""
        return not self.records and (bool(self.claims) or any(Path(kind.file).stem in self.others for kind in PAPER))

    @cached_property
    def provenance(self) -> Row:
        """Of the first record that has one."""
        return next(self._provenances(), {})

    def _provenances(self) -> Iterator[Row]:
        others = (row for rows in self.others.values() for row in rows)
        for row in (*self.records, *self.similarity, *self.samples, *others, *self.claims):
            if row.get("provenance"):
                yield row["provenance"]

    @cached_property
    def plans(self) -> tuple[Row, ...]:
        """The records, else one of each configuration or plan that other files are about."""
        found: dict[str, Row] = {}
        for rows in self.others.values():
            for row in rows:
                if "plan" in row:
                    found.setdefault(name_of(row), row)
        return self.records or tuple(found.values())

    @property
    def layers(self) -> int:
        """How many the model has at least, as far as the folder tells."""
        named = (index for record in self.plans for kind in SHORT for index in record["plan"].get(kind, ()))
        alone = (layer for _, layer in (self.costs.found if self.costs else ()))
        return max(max([*named, *alone], default=-1) + 1, self.known_layers)

    @cached_property
    def known_layers(self) -> int:
        """How many the model has; 0 where neither its shape nor the similarity of all layers is here."""
        shapes = (Fingerprint.parse(about.get("fingerprint")) for about in self._provenances())
        shape = next(filter(None, shapes), None)
        return max(shape.layers if shape else 0, max((row["layer"] + 1 for row in self.similarity), default=0))


def read_folder(path: Path) -> Folder:
    """Read what is there. Raises `UsageError` where nothing is, or a line is malformed."""
    if path.is_file():
        raise UsageError(f"{path} is a file: give the folder that it lies in")
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}; make one with notall sweep --out {path}")
    files = [(file, kind_at(file)) for file in sorted(path.glob("*.jsonl"))]
    by_kind = {kind: file for file, kind in files if kind}
    stepped = next((kind for kind in STEPPED if kind in by_kind), None)
    others = {
        file.stem: rows
        for file, kind in files
        if kind and kind not in (stepped, *APART, *RAW) and (rows := tuple(_rows(file, kind)))
    }
    folder = Folder(
        path=path,
        records=_latest(_rows(by_kind[stepped], stepped)) if stepped else (),
        similarity=_rows_of(by_kind, SimilarityRecord),
        costs=read_costs(path),
        samples=_rows_of(by_kind, SampleRecord),
        others=others,
        claims=_rows_of(by_kind, ClaimRecord),
        foreign={file.stem: rows for file, kind in files if not kind and (rows := tuple(lines.read(file)))},
    )
    if not (folder.records or folder.similarity or folder.others or folder.claims or folder.foreign):
        inside = next((child for child in sorted(path.iterdir()) if any(child.glob("*.jsonl"))), None)
        advice = f"{inside} does" if inside else f"make some with notall sweep --out {path}, or let a run end"
        if AnswersRecord in by_kind:  # of eval, whose results are not kept, or of a paper that has only begun
            advice = "answers alone make no page: let notall eval or notall paper end"
        raise UsageError(f"{path} holds no results; {advice}")
    return folder


def _rows_of(files: Mapping[type[Record], Path], kind: type[Record]) -> tuple[Row, ...]:
    return tuple(_rows(files[kind], kind)) if kind in files else ()


def _rows(file: Path, kind: type[Record]) -> list[Row]:
    records: Iterable[Record] = pairs_of(read(file, BenchRecord)) if kind is BenchRecord else read(file, kind)
    header = header_of(file) if kind.headed else None
    about = {"provenance": header.provenance.flat} if header else {}
    return [record.row() | about for record in records]


def _latest(records: list[Row]) -> tuple[Row, ...]:
    """Of each question the last answer; every measurement of a bench is one of its own."""
    if records and kind_of(records[0]) == "bench":
        return tuple(records)
    return tuple({name_of(record): record for record in records}.values())


def flatten(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """Nested records as `a.b`, value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)
