"""Every kind of record, and how lines that were written before kinds were named become theirs."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from . import lines
from .answers import AnswersRecord
from .bench import BenchRecord
from .benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord
from .claims import ClaimRecord
from .comparison import ChoiceRecord, ComparisonRecord, HeldOutRecord, PlanTimesRecord
from .drafting import DraftRecord
from .front import EngineScoresRecord, EngineTimesRecord, FrontRecord
from .healing import HealRecord
from .leave_one_out import LeaveOneOutRecord
from .measured import MeasuredRecord
from .provenance import PLACES
from .record import HeaderRecord, QualityFields, Record, TimeFields
from .repair import RefitRecord
from .search import EvaluationRecord, SearchRecord, SpeedCheck
from .similarity import SimilarityRecord
from .sweep import SampleRecord, ScoresRecord, SweepRecord

_ALL: tuple[type[Record], ...] = (
    *(SweepRecord, ScoresRecord, SampleRecord, SimilarityRecord, LeaveOneOutRecord),
    *(ComparisonRecord, ChoiceRecord, HeldOutRecord, PlanTimesRecord),
    *(SearchRecord, EvaluationRecord, BenchRecord, DraftRecord, RefitRecord, HealRecord, MeasuredRecord),
    *(BenchmarkRecord, BatteryRecord, TimesRecord, ClaimRecord, AnswersRecord),
    *(FrontRecord, EngineScoresRecord, EngineTimesRecord),
)
KINDS: dict[str, type[Record]] = {kind.model_fields["record"].default: kind for kind in _ALL}
_BY_FILE = {kind.file: kind for kind in _ALL}


def kind_at(path: Path) -> type[Record] | None:
    """What a file holds, by its first line; None where that is of no kind. Raises `UsageError` as `lines.read` does."""
    first = next(lines.numbered(path, most=1), None)
    if first is None:
        return _BY_FILE.get(path.name)
    return KINDS.get(str(upgraded(first[1], path).get("record")), _guess(first[1], path))


def upgraded(line: lines.Line, path: Path) -> lines.Line:
    """A line as it is written now: of those that name no kind, what their file and fields tell of it."""
    if "record" in line:
        return line
    kind = HeaderRecord if line.keys() == {"settings"} else _guess(line, path)
    if kind is None:
        return line
    about = line.get("provenance", line.get("settings"))
    fields = {name: value for name, value in line.items() if name not in ("provenance", "settings")}
    if about is not None:
        fields["provenance"] = about
    if isinstance(about, dict):
        fields["provenance"] = {
            "what": {name: value for name, value in about.items() if name not in PLACES},
            "where": {name: about[name] for name in PLACES if name in about},
        }
    if kind is SearchRecord:
        fields = _grouped(_grouped(fields, "quality", QualityFields), "check", SpeedCheck)
    if kind is ComparisonRecord:
        fields = _grouped(fields, "times", TimeFields)
    if kind is PlanTimesRecord:
        fields |= _left(fields.pop("left", None))
    return {"record": kind.model_fields["record"].default, **fields}


def _guess(line: lines.Line, path: Path) -> type[Record] | None:
    if path.parent.name == Path(EvaluationRecord.file).stem:
        return EvaluationRecord
    marks: dict[str, type[Record]] = {
        "criterion": ComparisonRecord,
        "left": PlanTimesRecord,
    }  # files of two kinds once had one name
    if path.name in (SweepRecord.file, TimesRecord.file):
        return next((marks[mark] for mark in marks if mark in line), _BY_FILE[path.name])
    return _BY_FILE.get(path.name)


def _grouped(fields: lines.Line, name: str, group: type[Any]) -> lines.Line:
    """`fields` with those of a group put together under `name`, where all of them are there."""
    if not group.model_fields.keys() <= fields.keys():
        return fields
    inside = {key: value for key, value in fields.items() if key in group.model_fields}
    return {key: value for key, value in fields.items() if key not in inside} | {name: inside}


def _left(text: Any) -> lines.Line:
    """The sizes that were once written as one text."""
    try:
        sizes = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return sizes if isinstance(sizes, dict) else {}
