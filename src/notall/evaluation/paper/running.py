"""`notall paper`: measure what the paper measured, write its tables and figure, and hold its claims against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...measuring.similarity import measure_similarity
from ...measuring.speed import check_timing
from ...models.names import model_in_words
from ...progress import Progress, Stages, silent
from ...records.benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord, usual_metric
from ...records.claims import ClaimRecord
from ...records.columns import as_csv, as_markdown
from ...records.ledger import Ledger, working_in
from ...records.provenance import Provenance, place_of, windows_of
from ...records.record import Record
from ...records.similarity import SimilarityRecord
from ...structure.locating import locate
from ..battery import CONTEXTS, PARTS, Check, run_battery
from ..benchmarking import Benchmarks
from ..tasks import Limits, TaskShelf
from .claims import JUDGED, claims_of
from .grid import Configuration, paper_grid
from .scoreboard import (
    PaperTable,
    Scoreboard,
    battery_table,
    benchmark_table,
    heading_of,
    time_table,
    write_csv,
    write_tables,
)
from .times import time_grid

if TYPE_CHECKING:
    from ..ray_workers import Workers

LAST = {False: "the last layer skipped too", True: "the last layer kept"}
ENDINGS = {False: "last-skipped", True: "last-kept"}
# Of each kind of table: what it shows, and what its cells say.
CAPTIONS = {
    "benchmarks": (
        "Benchmarks of",
        "Per cent ± standard error; in brackets the difference to the dense model, paired by document, ± its standard "
        "error. * p < 0.05 (McNemar's exact test for accuracies; flipped signs of documents' differences for the "
        "average), not corrected for the number of comparisons. The average is over the tasks that every row has.",
    ),
    "battery": (
        "What accuracy hides of",
        "NLL in nats at so many tokens into a text, the share of passkeys found in texts of so many tokens, the "
        "expected calibration error of the next token, and greedy continuations beside the dense model's. In brackets "
        "the difference to the dense model ± its standard error; * worse, p < 0.05, not corrected for the number of "
        "comparisons.",
    ),
    "prefill": (
        "Prefill time (ms) of",
        "Median of {rounds} rounds, each of all rows in turn; in brackets how many times the dense model's speed "
        "[quartiles]. These ratios are taken within a round, so that they may differ from those of the medians.",
    ),
    "decode": (
        "Decode time per new token (ms) of",
        "{new} new tokens. Median of {rounds} rounds, each of all rows in turn, with a real KV cache; in brackets "
        "how many times the dense model's speed [quartiles]. These ratios are taken within a round, so that they may "
        "differ from those of the medians.",
    ),
}


@dataclass(frozen=True)
class Evaluation:
    """Which tasks of the harness, on how many documents, with how many examples."""

    tasks: Sequence[str] = ("openllm",)
    limits: Limits = field(default_factory=Limits)
    num_fewshot: int | None = None
    task_path: str | Path | TaskShelf | None = None
    batch_size: int | Literal["auto"] = "auto"
    truncate: bool = False
    generate_all: bool = False  # also tasks that generate text, on every configuration


@dataclass(frozen=True)
class TimeGrid:
    """At which prompt lengths and batch sizes the grid is timed, and how often."""

    prompts: Sequence[int] = (128, 512)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 16
    rounds: int = 5

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` as `check_timing` does."""
        for prompt in self.prompts:
            for batch_size in self.batch_sizes:
                check_timing(model, prompt, self.new_tokens, batch_size, self.rounds)


def run_paper(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Tensor],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    evaluation: Evaluation = Evaluation(),
    timing: TimeGrid = TimeGrid(),
    battery: Sequence[Tensor] = (),
    seed: int = 0,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> list[ClaimRecord]:
    """Benchmarks and times of the paper's grid and, on `batches` of token ids, its Fig. 1; what became of its claims.

    Tasks that generate text are run on dense and the largest fraction only, unless `generate_all`. `battery` are the
    windows for `run_battery`, if it is wanted. What is finished stays in `out`, and the same call goes on from there.
    Writes paper.md, a .tex for each table, the claims among them, and a .csv for each kind of records. Raises as
    `Benchmarks`, `run_battery` and `time_grid` do, before anything is computed.
    """
    timing.check(model)
    rows = paper_grid(locate(model))
    about = Provenance.of(provenance)
    progress(0, 1, "reading the tasks")
    asked = _benchmarks(model, tokenizer, rows, evaluation, out, about, workers) if evaluation.tasks else None
    stages = Stages(progress, 1 + 20 * bool(asked) + 10 * bool(battery) + 10)
    similarity = _similarity(model, batches, out, about, stages.stage(1))
    benchmarks = asked.run(stages.stage(20)) if asked else []
    checks = _battery(model, tokenizer, rows[1:], battery, out, about, seed, stages.stage(10)) if battery else []
    times = time_grid(model, rows, out, about, **asdict(timing), seed=seed, progress=stages.stage(10))
    return write_paper(out, similarity, benchmarks, times, checks)


def _benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Configuration],
    evaluation: Evaluation,
    out: Path,
    about: Provenance,
    workers: Workers | None,
) -> Benchmarks:
    most = max(row.fraction for row in rows)
    return Benchmarks(
        model,
        tokenizer,
        rows,
        evaluation.tasks,
        out,
        about,
        generating_rows=None if evaluation.generate_all else [row for row in rows if row.fraction in (0.0, most)],
        num_fewshot=evaluation.num_fewshot,
        limits=evaluation.limits,
        task_path=evaluation.task_path,
        batch_size=evaluation.batch_size,
        truncate=evaluation.truncate,
        workers=workers,
    )


def write_paper(
    out: Path,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[BatteryRecord] = (),
) -> list[ClaimRecord]:
    """Tables and claims from what was measured, into `out`."""
    records: list[Record] = [*similarity, *times, *benchmarks]
    about = next(record.provenance for record in records if record.provenance)
    board = Scoreboard(benchmarks) if benchmarks else None
    timed = _about(times[0]) if times else {}
    told = {"model": model_in_words(str(about.what.get("model")))} | {
        name: str(timed.get(field, "?")) for name, field in (("rounds", "rounds"), ("new", "new_tokens"))
    }
    made = {"benchmarks": _made(benchmarks), "battery": _made(checks), "prefill": _made(times), "decode": _made(times)}
    tables: list[PaperTable] = []
    for keep_last in LAST:
        frames: dict[str, pd.DataFrame] = {}
        if board:
            frames["benchmarks"] = benchmark_table(board, keep_last)
        if checks:
            frames["battery"] = battery_table(checks, keep_last)
        for quantity, name in (("prefill_ms", "prefill"), ("decode_ms_per_token", "decode")):
            if times:
                frames[name] = time_table(times, keep_last, quantity)
        for kind, frame in frames.items():
            caption = caption_of(kind, keep_last, **told, made=made[kind])
            tables.append(PaperTable(f"{kind}-{ENDINGS[keep_last]}", caption, frame))
    claims = [claim.model_copy(update={"provenance": about}) for claim in claims_of(similarity, board, times)]
    if claims:
        tables.append(_claims_table(claims, _evidence(told["model"], similarity, benchmarks, times)))
        write_csv(claims, out / "claims.csv")
    write_tables(tables, out)
    write_csv(benchmarks, out / "benchmarks.csv")
    if board and board.shared:
        (out / "averages.csv").write_text(as_csv(board.averages()), encoding="utf-8")
    write_csv(times, out / "times.csv")
    if checks:
        write_csv(checks, out / "battery.csv")
    _keep_claims(out, claims)
    (out / "paper.md").write_text(_story(about.flat, tables, claims, benchmarks), encoding="utf-8")
    return claims


def caption_of(kind: str, keep_last: bool, *, model: str, rounds: str, new: str, made: str) -> str:
    """What a table says under itself, in sentences; `made` is how, and on what."""
    shows, note = CAPTIONS[kind]
    skipped = f"{model} with the deepest of its attentions, MLPs or blocks skipped, {LAST[keep_last]}"
    return f"{shows} {skipped}. {note.format(rounds=rounds, new=new)} {made}"


def _claims_table(claims: Sequence[ClaimRecord], of: str) -> PaperTable:
    columns = ClaimRecord.columns
    frame = pd.DataFrame([[column.text(claim.row()) for column in columns] for claim in claims])
    frame.columns = [column.heading for column in columns]
    caption = (
        f"The claims of arXiv 2407.15516, as it makes them of Llama-2 7B and 13B, and our evidence on {of} {JUDGED}"
    )
    return PaperTable("claims", caption, frame.set_index([*frame.columns]))


def _evidence(
    model: str,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
) -> str:
    """What the claims are judged by, in sentences."""
    parts = [f"{model}."]
    if similarity and "sequences" in _about(similarity[0]):
        parts.append(f"Similarity: {windows_of(_about(similarity[0]))}.")
    parts += [f"Benchmarks: {_made(benchmarks)}"] if benchmarks else []
    parts += [f"Times: {_about(times[0]).get('rounds', '?')} rounds, {_made(times)}"] if times else []
    return " ".join(parts)


def _made(records: Sequence[Record]) -> str:
    """How and where figures were measured, in sentences."""
    about = next((record.provenance for record in records if record.provenance), None)
    if about is None:
        return ""
    where = f"{about.what.get('dtype')} on {place_of(about.where.get('machine'), versions=False)}."
    asked = [record for record in records if isinstance(record, BenchmarkRecord)]
    return f"{_documents(asked)} {where}" if asked else where


def _keep_claims(out: Path, claims: Sequence[ClaimRecord]) -> None:
    """They follow from the other records, so that those of today take the place of earlier ones."""
    with working_in(out, "paper"):
        (out / ClaimRecord.file).unlink(missing_ok=True)
        if claims:
            Ledger(out, ClaimRecord).add(*claims)


def _similarity(
    model: PreTrainedModel, batches: Sequence[Tensor], out: Path, about: Provenance, progress: Progress
) -> list[SimilarityRecord]:
    progress(0, 1, "similarity by depth")
    with working_in(out, "paper"):
        held = Ledger(out, SimilarityRecord, about)
        wanted = [(block.index, kind) for block in locate(model).blocks for kind in ("block", "attention", "mlp")]
        if held.missing(wanted):
            rows = [SimilarityRecord(**asdict(row), provenance=about) for row in measure_similarity(model, batches)]
            held.add(*(row for row in rows if row.key not in held))
        progress(1, 1, "similarity by depth")
        return [held[key] for key in wanted]


def _battery(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Configuration],
    windows: Sequence[Tensor],
    out: Path,
    about: Provenance,
    seed: int,
    progress: Progress,
) -> list[BatteryRecord]:
    """One record a configuration and check; a part of the battery is kept as soon as it is done."""
    about = Provenance.of(about, seed=seed, windows=[len(windows), windows[0].numel()], contexts=[*CONTEXTS])
    plans = [row.plan for row in rows]
    with working_in(out, "paper"):
        held = Ledger(out, BatteryRecord, about)
        for place, part in enumerate(PARTS):
            progress(place, len(PARTS), f"battery: {part}, all configurations")
            counts = {sum(record.part == part and row.describes(record) for record in held) for row in rows}
            if len(counts) == 1 and counts != {0}:
                continue
            checks = run_battery(model, tokenizer, plans, windows, parts=[part], seed=seed)
            held.add(*(_battery_record(part, rows[check.plan], check, about) for check in checks))
        progress(1, 1, "battery")
        return [record for record in held if any(row.describes(record) for row in rows)]


def _battery_record(part: str, row: Configuration, check: Check, about: Provenance) -> BatteryRecord:
    figures = {name: value for name, value in asdict(check).items() if name != "plan"}
    return BatteryRecord(
        part=part,
        variant=row.variant,
        fraction=row.fraction,
        keep_last=row.keep_last,
        plan=row.plan,
        **figures,
        worse=check.worse,
        provenance=about,
    )


def _story(
    about: Mapping[str, Any],
    tables: Sequence[PaperTable],
    claims: Sequence[ClaimRecord],
    benchmarks: Sequence[BenchmarkRecord],
) -> str:
    """paper.md: the claims, and the tables that they are judged by."""
    lines = [
        f"# The evaluation of arXiv 2407.15516 on {model_in_words(str(about['model']))}",
        "",
        f"{about['dtype']} on {place_of(about.get('machine'))}. Weights: {about['revision']}.",
        *("", "## The paper's claims, and this model", ""),
        as_markdown([row.row() for row in claims], ClaimRecord.columns),
        JUDGED,
        *("", "## Similarity", "", "![Similarity by depth](similarity.png)"),
    ]
    if benchmarks:
        lines += ["", "## Benchmarks"]
    for title, kinds in (("", ["benchmarks"]), ("What accuracy hides", ["battery"]), ("Times", ["prefill", "decode"])):
        shown = [table for kind in kinds for table in tables if table.name.startswith(kind)]
        lines += ["", f"## {title}"] if title and shown else []
        for table in shown:
            lines += ["", table.caption, "", table.markdown()]
    return "\n".join([*lines, ""])


def _about(record: Record) -> Mapping[str, Any]:
    return record.provenance.what if record.provenance else {}


def _documents(benchmarks: Sequence[BenchmarkRecord]) -> str:
    asked = {(record.task, record.metric): record for record in benchmarks}
    told = (
        f"{heading_of(task)}, {one.num_fewshot}-shot, {usual_metric(metric)} of {one.documents} documents"
        for (task, metric), one in asked.items()
    )
    return f"lm-evaluation-harness {_about(benchmarks[0])['lm_eval']}: {'; '.join(told)}."
