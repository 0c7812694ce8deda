"""The results on the model card of an export: the records of its plan, as tables for
people and as metadata for hubs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..errors import UsageError, shortened
from ..experiments.bench import BenchRecord
from ..experiments.compare.records import ComparisonRecord, own_weights_name
from ..experiments.held_scores import UNREPAIRED
from ..experiments.recovery import JudgedRecord
from ..experiments.search.records import SearchRecord
from ..exporters.card import (
    CARD,
    ORIGINAL,
    Results,
    literal,
    write_new_card,
    write_results,
)
from ..exporters.manifest import plan_in, verification_of
from ..integrity import MANIFEST, SMALL_FILE_BYTES, check_manifest
from ..plan import Fingerprint, Plan
from ..results.facts import (
    QUALITY,
    RECOVERED,
    SPEED_CHECK,
    Quality,
    TaskScore,
    Times,
)
from ..results.ledger import read_records
from ..results.provenance import Provenance, behind, place_of
from ..results.record import Fact, RecordKey, is_number
from ..results.repairs import MeasuredRecord
from ..results.table import (
    Cell,
    Column,
    Table,
    number,
    table,
    with_error,
    with_quartiles,
    within,
    words,
)
from ..strict_json import Settings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Measured = JudgedRecord | MeasuredRecord | BenchRecord | SearchRecord | ComparisonRecord
KINDS: tuple[type[Measured], ...] = get_args(Measured)
UNKNOWN = {"in memory", ""}  # revisions that identify no model
NOTE = (
    "Each figure is compared with the original model's, on the same items. Recovery is"
    " the share of its score that is kept."
)


class MeasuredTask(Fact):
    """What the plan scores on a task, computed in a dtype."""

    score: TaskScore
    dtype: str


class MeasuredText(Fact):
    """What the plan loses on a text, computed in a dtype."""

    text: str
    quality: Quality
    dtype: str


SCORES: tuple[Column[MeasuredTask], ...] = (
    words("task", lambda one: one.score.task),
    words("metric", lambda one: one.score.usual_metric),
    *within((RECOVERED,), lambda one: one.score),
    with_error("this model", lambda one: (one.score.value, one.score.value_se)),
    number("original model", lambda one: one.score.value - one.score.delta),
    words("worse", lambda one: one.score.verdict),
    number("shots", lambda one: one.score.num_fewshot, "d"),
    number("documents", lambda one: one.score.documents, "d"),
    words("dtype", lambda one: one.dtype),
)
TEXTS: tuple[Column[MeasuredText], ...] = (
    words("text", lambda one: one.text),
    *within(QUALITY, lambda one: one.quality),
    number("sequences", lambda one: one.quality.sequences, "d"),
    words("dtype", lambda one: one.dtype),
)


def _times(record: BenchRecord) -> Times:
    assert record.skipped
    return record.skipped.times


BENCH_TIMES: tuple[Column[BenchRecord], ...] = (
    number("prompt tokens", lambda one: one.prompt_tokens, "d"),
    number("at once", lambda one: one.concurrency, "d"),
    with_quartiles("first token ms", lambda one: _times(one).prefill_ms),
    with_quartiles("original first token ms", lambda one: one.dense.times.prefill_ms),
    with_quartiles(
        "first token speedup", lambda one: _times(one).speedup_prefill, ".2f"
    ),
    with_quartiles("decode ms/token", lambda one: _times(one).decode_ms_per_token),
    with_quartiles(
        "original decode ms/token",
        lambda one: one.dense.times.decode_ms_per_token,
    ),
    with_quartiles("decode speedup", lambda one: _times(one).speedup_decode, ".2f"),
    number("rounds", lambda one: one.rounds, "d"),
    words("dtype", lambda one: _dtype(one)),
)
SEARCHED: tuple[Column[SearchRecord], ...] = (
    words("chosen", lambda one: one.chosen),
    *within(SPEED_CHECK, lambda one: one.check),
    words("dtype", lambda one: _dtype(one)),
)
SOURCES: tuple[Column[Provenance], ...] = (
    words("command", lambda one: one.where.get("command")),
    words("on", lambda one: place_of(one.where.get("machine"))),
    words("date", lambda one: one.where.get("date")),
)


@dataclass(frozen=True)
class Exported:
    """Which model an export is, as far as records can be of it: what it skips, of
    which original, and the digest of the weights that repair it.
    """

    plan: Plan
    origin: Settings  # model, fingerprint and revision of the original, as a record's
    weights: str  # "none" without a repair

    @classmethod
    def read(cls, manifest: Settings, folder: Path) -> Exported:
        """Of a manifest. Raises `UsageError` where it is damaged."""
        weights = manifest.get("repair", {}).get("weights", "none")
        return cls(plan_in(manifest, folder), manifest["dense"], str(weights))

    @property
    def model(self) -> str:
        """The original model, in words."""
        return _named(self.origin)

    def mismatch(self, record: Measured) -> str:
        """Of which other model a record is; "" where it is of this one."""
        if record.what.get("dummy_weights"):
            return "a model of random weights"
        if not self._is_original(record.what):
            return _named(record.what)
        if record.plan != self.plan:
            return f"a plan that skips {shortened(str(record.plan))}"
        if not self._has_weights(record):
            return "other weights: this plan, repaired in another way or not at all"
        return ""

    def _is_original(self, what: Settings) -> bool:
        """Whether that is of the original model: by its shape and its revision, as far
        as they are written down, and at least by one of them.
        """
        shape, own = (
            Fingerprint.parse(one.get("fingerprint")) for one in (what, self.origin)
        )
        if shape and own and not _alike(shape, own):
            return False
        revisions = {str(one.get("revision", "")) for one in (what, self.origin)}
        if revisions.isdisjoint(UNKNOWN):
            return len(revisions) == 1
        return bool(shape and own)

    def _has_weights(self, record: Measured) -> bool:
        """Times are those of any weights of a shape."""
        if isinstance(record, BenchRecord):
            return True
        if isinstance(record, SearchRecord):
            return record.check is not None or self.weights == "none"
        if isinstance(record, ComparisonRecord):
            repaired = self.weights != "none"
            wanted = own_weights_name(self.weights) if repaired else UNREPAIRED
            return record.repair == wanted
        return bool(record.what.get("weights", "none") == self.weights)


def _named(about: Settings) -> str:
    """A model by its name, its shape and its revision, as far as they are known."""
    model = shortened(str(about.get("model", "a model without a name")))
    shape, revision = about.get("fingerprint"), about.get("revision")
    known = [shortened(str(one))[:24] for one in (shape, revision) if one]
    return f"{model} ({', '.join(known)})" if known else model


def _alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether shapes are the same, as far as known: a GGUF file's has no digest, and
    its own name of the architecture.
    """
    if one.digest and other.digest:
        return one == other
    return (one.layers, one.hidden_size) == (other.layers, other.hidden_size)


def write_card(folder: Path, records: Sequence[Path] = ()) -> dict[str, Table]:
    """Write the model card of the export in `folder` where it has none, and put into it
    what the results folders `records` hold of its plan; returns the tables.

    Earlier results on the card go; what people wrote there stays. Raises `UsageError`
    where `folder` is no export, a results folder holds nothing of it, and for a damaged
    card.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{shortened(folder)} is no export, as it has no {MANIFEST}: give a folder"
            " that notall export wrote"
        )
    manifest = check_manifest(folder, most=SMALL_FILE_BYTES)
    exported = Exported.read(manifest, folder)
    found = [one for path in records for one in _records_in(path, exported)]
    if not (folder / CARD).exists():
        write_new_card(folder, manifest, str(verification_of(manifest)))
    elif not records:
        raise UsageError(
            f"{shortened(folder / CARD)} is there: give results folders to put into it,"
            " or delete it, and it is written anew"
        )
    tables = _tables_of(found, exported)
    if tables:
        figures = [
            _figure(one) for one in _tasks_of(found) if is_number(one.score.value)
        ]
        write_results(folder, Results([*_sections(tables)], figures))
    return tables


def _records_in(path: Path, exported: Exported) -> list[Measured]:
    """The records of an export in a results folder. Raises `UsageError` where there are
    none.
    """
    if not path.is_dir():
        raise UsageError(
            f"{shortened(path)} is no folder of results: give one that a command wrote"
            " with --out, or a search next to its plan"
        )
    found: list[Measured] = []
    for kind in KINDS:
        if (path / kind.file).is_file():
            found += read_records(path / kind.file, kind)
    others = [exported.mismatch(one) for one in found]
    if "" in others:
        return [one for one, other in zip(found, others) if not other]
    reason = "it has none of eval, bench, search, compare, repair or heal"
    if others:
        reason = f"they are of {others[-1]}"
    raise UsageError(
        f"{shortened(path)} holds no results of this export, which is of"
        f" {exported.model} and skips {shortened(str(exported.plan))}: {reason}"
    )


def _tables_of(found: Sequence[Measured], exported: Exported) -> dict[str, Table]:
    """Those that have a row, by their names."""
    timed = [one for one in found if isinstance(one, BenchRecord) and one.skipped]
    searched = [one for one in found if isinstance(one, SearchRecord) and one.check]
    texts = [*_texts_of(found, exported)]
    sources = {
        str(one.provenance.where.get("command")): one.provenance
        for one in found
        if one.provenance
    }
    tables = {
        "tasks": table("Tasks", SCORES, _tasks_of(found)),
        "text": table("Text", TEXTS, texts),
        "times": table("Time", BENCH_TIMES, timed),
        "search": table("Speed, as the search measured it", SEARCHED, searched),
        "measured": table("How it was measured", SOURCES, [*sources.values()]),
    }
    return {name: one for name, one in tables.items() if one.rows}


def _tasks_of(found: Sequence[Measured]) -> list[MeasuredTask]:
    """The scores on each task, each once."""
    tasks: dict[RecordKey, MeasuredTask] = {}
    for record in found:
        scores: Sequence[TaskScore] = ()
        if isinstance(record, JudgedRecord):
            scores = (record,)
        elif isinstance(record, ComparisonRecord):
            scores = record.tasks
        for one in scores:
            dtype = _dtype(record)
            key = (one.task, one.metric, one.documents, one.value, one.delta, dtype)
            tasks[key] = MeasuredTask(score=one, dtype=dtype)
    return [*tasks.values()]


def _texts_of(found: Sequence[Measured], exported: Exported) -> Iterator[MeasuredText]:
    """The loss on each text; a search's own where nothing else was measured of it."""
    measured = [one for one in found if isinstance(one, MeasuredRecord)]
    for one in measured:
        name = one.text.removesuffix(_prompt(one)) + _prompt(one)
        yield MeasuredText(text=name, quality=one.quality, dtype=_dtype(one))
    others: list[SearchRecord | ComparisonRecord] = []
    others += (one for one in found if isinstance(one, ComparisonRecord))
    if not measured and exported.weights == "none":  # a search measures unrepaired
        others += (one for one in found if isinstance(one, SearchRecord))
    for other in others:
        yield from _on_held_out(other)


def _on_held_out(record: SearchRecord | ComparisonRecord) -> Iterator[MeasuredText]:
    """The loss on the text that a search or a comparison was measured on, if it was."""
    text, held = record.what.get("text"), record.what.get("held_out")
    name = f"{text}, {held}" if held == "other windows" else str(held or text)
    name += _prompt(record)
    if record.quality:
        yield MeasuredText(text=name, quality=record.quality, dtype=_dtype(record))


def _prompt(record: Measured) -> str:
    return behind(record.what.get("prompt_tokens"))


def _dtype(record: Measured) -> str:
    return str(record.what.get("dtype", ""))


def _figure(measured: MeasuredTask) -> EvalResult:
    """A score as the `model-index` of a card has it, with the original model's."""
    from huggingface_hub import EvalResult

    score = measured.score
    compared: Settings = {
        "dtype": measured.dtype,
        ORIGINAL: score.value - score.delta,
    }
    if is_number(score.value_se):
        compared["stderr"] = score.value_se
    if score.recovery:
        share, low, high = score.recovery.interval
        compared |= {"recovery": share, "recovery_low": low, "recovery_high": high}
    return EvalResult(
        task_type="text-generation",
        dataset_type=score.task,
        dataset_name=score.task,
        dataset_args={
            "num_few_shot": score.num_fewshot,
            "documents": score.documents,
        },
        metric_type=score.metric.partition(",")[0],
        metric_name=score.usual_metric,
        metric_value=score.value,
        metric_args=compared,
    )


def _sections(tables: dict[str, Table]) -> Iterator[str]:
    """The tables with their titles, in Markdown."""
    yield "## Results"
    yield NOTE
    for one in tables.values():
        yield f"### {one.title}"
        yield _in_words(one).markdown().rstrip()
        if one.legend:
            yield one.legend


def _in_words(found: Table) -> Table:
    """The same table, with words that are no markup."""
    rows = tuple(
        tuple(
            cell if column.right else Cell(cell.value, _plain(cell))
            for column, cell in zip(found.columns, row)
        )
        for row in found.rows
    )
    return replace(found, rows=rows)


def _plain(cell: Cell) -> str:
    # a table escapes its own bars
    return literal(str(cell)).replace(r"\|", "|")
