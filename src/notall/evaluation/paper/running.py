"""`notall paper`: measure what the paper measured, write its tables and figure, and hold its claims against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...measuring.similarity import measure_similarity
from ...progress import Progress, Stages, silent
from ...records.benchmarks import BatteryRecord, BenchmarkRecord, TimesRecord
from ...records.columns import as_markdown
from ...records.ledger import Ledger, working_in
from ...records.provenance import Provenance
from ...records.record import Record
from ...records.similarity import SimilarityRecord
from ...structure.locating import locate
from ..battery import CONTEXTS, PARTS, Check, run_battery
from ..benchmarking import run_benchmarks
from ..tasks import Limits
from .claims import COLUMNS, Claim, claims_of
from .grid import Configuration, paper_grid
from .scoreboard import Scoreboard, battery_table, benchmark_table, time_table, write_csv, write_tables
from .times import time_grid

if TYPE_CHECKING:
    from ..ray_workers import Workers

LAST = {False: "any layer may be skipped, the last one too", True: "the last layer is kept"}


@dataclass(frozen=True)
class Evaluation:
    """Which tasks of the harness, on how many documents, with how many examples."""

    tasks: Sequence[str] = ("openllm",)
    limits: Limits = field(default_factory=Limits)
    num_fewshot: int | None = None
    task_path: str | Path | None = None
    batch_size: int | Literal["auto"] = "auto"
    truncate: bool = False
    generate_all: bool = False  # also tasks that generate text, on every configuration


@dataclass(frozen=True)
class TimeGrid:
    """At which prompt lengths and batch sizes the grid is timed, and how often."""

    prompts: Sequence[int] = (128, 512)
    batch_sizes: Sequence[int] = (1,)
    new_tokens: int = 16
    rounds: int = 3


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
) -> list[Claim]:
    """Benchmarks and times of the paper's grid and, on `batches` of token ids, its Fig. 1; what became of its claims.

    Tasks that generate text are run on dense and the largest fraction only, unless `generate_all`. `battery` are the
    windows for `run_battery`, if it is wanted. What is finished stays in `out`, and the same call goes on from there.
    Writes paper.md, a .tex for each table and a .csv for each kind of records. Raises as `run_benchmarks`,
    `run_battery` and `time_grid` do.
    """
    rows = paper_grid(locate(model))
    most = max(row.fraction for row in rows)
    about = Provenance.of(provenance)
    stages = Stages(progress, 1 + 20 * bool(evaluation.tasks) + 10 * bool(battery) + 10)
    similarity = _similarity(model, batches, out, about, stages.stage(1))
    benchmarks = (
        run_benchmarks(
            model,
            tokenizer,
            rows,
            evaluation.tasks,
            out,
            about,
            generating_rows=None if evaluation.generate_all else [r for r in rows if r.fraction in (0.0, most)],
            num_fewshot=evaluation.num_fewshot,
            limits=evaluation.limits,
            task_path=evaluation.task_path,
            batch_size=evaluation.batch_size,
            truncate=evaluation.truncate,
            progress=stages.stage(20),
            workers=workers,
        )
        if evaluation.tasks
        else []
    )
    checks = _battery(model, tokenizer, rows[1:], battery, out, about, seed, stages.stage(10)) if battery else []
    times = time_grid(model, rows, out, about, **asdict(timing), seed=seed, progress=stages.stage(10))
    return write_paper(out, similarity, benchmarks, times, checks)


def write_paper(
    out: Path,
    similarity: Sequence[SimilarityRecord],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
    checks: Sequence[BatteryRecord] = (),
) -> list[Claim]:
    """Tables and claims from what was measured, into `out`."""
    records: list[Record] = [*benchmarks, *times, *similarity]
    about = next(record.provenance for record in records if record.provenance)
    board = Scoreboard(benchmarks) if benchmarks else None
    tables = {}
    for keep_last in (False, True):
        ending = "last-kept" if keep_last else "last-skipped"
        if board:
            tables[f"benchmarks-{ending}"] = benchmark_table(board, keep_last)
        if checks:
            tables[f"battery-{ending}"] = battery_table(checks, keep_last)
        for quantity, name in (("prefill_ms", "prefill"), ("decode_ms_per_token", "decode")):
            if times:
                tables[f"{name}-{ending}"] = time_table(times, keep_last, quantity)
    write_tables(tables, out)
    write_csv(benchmarks, out / "benchmarks.csv")
    write_csv(times, out / "times.csv")
    if checks:
        write_csv(checks, out / "battery.csv")
    claims = claims_of(similarity, board, times)
    (out / "paper.md").write_text(_story(about.flat, tables, claims, benchmarks, times), encoding="utf-8")
    return claims


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
    tables: Mapping[str, Any],
    claims: Sequence[Claim],
    benchmarks: Sequence[BenchmarkRecord],
    times: Sequence[TimesRecord],
) -> str:
    """paper.md: the tables, and the claims beside them."""
    lines = [
        f"# The evaluation of arXiv 2407.15516 on {about['model']}",
        "",
        f"{about['dtype']} on {_place(about.get('machine'))}. Weights: {about['revision']}.",
        "",
        "![Similarity by depth](similarity.png)",
    ]
    if benchmarks:
        lines += ["", "## Benchmarks", "", _documents(benchmarks), ""]
        lines += [
            "Per cent ± standard error; in brackets the difference to the dense model, paired by document, "
            "± its standard error. * p < 0.05 (McNemar's exact test for accuracies), not corrected for the number of "
            "comparisons. The average is over the tasks that every row has.",
        ]
        lines += _section(tables, "benchmarks")
    if any(name.startswith("battery") for name in tables):
        lines += ["", "## What accuracy hides", ""]
        lines += [
            "NLL in nats at so many tokens into a text, the share of passkeys found in texts of so many tokens, the "
            "expected calibration error of the next token, and greedy continuations beside the dense model's. In "
            "brackets the difference to the dense model ± its standard error; * worse, p < 0.05, not corrected for the "
            "number of comparisons.",
        ]
        lines += _section(tables, "battery")
    if times:
        lines += ["", "## Times", ""]
        lines += [
            f"Milliseconds (median of {_about(times[0])['rounds']} rounds, all configurations in turn, a real KV "
            "cache); in brackets how many times the dense model's speed [quartiles of the rounds' own ratios].",
        ]
        lines += _section(tables, "prefill") + _section(tables, "decode")
    lines += ["", "## The paper's claims, and this model", "", as_markdown([asdict(row) for row in claims], COLUMNS)]
    lines += ["A difference counts from two standard errors; a speed when the quartiles agree.", ""]
    return "\n".join(lines)


def _place(machine: Any) -> str:
    """Where it was measured, as far as that was written down."""
    try:
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        return f"{machine['device_name']}, {machine['cores']} cores, threads: {machine['threads']}; {versions}"
    except (TypeError, KeyError, AttributeError):
        return "a machine that is not told"


def _section(tables: Mapping[str, Any], kind: str) -> list[str]:
    lines = []
    for keep_last, told in LAST.items():
        table = tables.get(f"{kind}-{'last-kept' if keep_last else 'last-skipped'}")
        if table is not None:
            lines += ["", f"### {kind.capitalize()}: {told}", "", table.reset_index().to_markdown(index=False)]
    return lines


def _about(record: Record) -> Mapping[str, Any]:
    return record.provenance.what if record.provenance else {}


def _documents(benchmarks: Sequence[BenchmarkRecord]) -> str:
    counts = {record.task: (record.num_fewshot, record.documents) for record in benchmarks}
    told = (f"{task} {shots}-shot, {documents} documents" for task, (shots, documents) in counts.items())
    return f"lm-evaluation-harness {_about(benchmarks[0])['lm_eval']}: {'; '.join(told)}."
