"""Commands that measure what a plan costs and saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..models.names import model_in_words
from ..records.provenance import windows_of
from ..reporting.console import Shown, say, show, show_all
from ..reporting.extras import FIGURES, installed, need
from ..reporting.progress_bars import progress_bar, working
from ..reporting.similarity_files import write_similarity
from .app import MEASURE, OnRay, app
from .checks import check_folders, check_tasks, check_texts
from .ending import conclude, warn_if_worse
from .inputs import (
    AskedPlan,
    Loading,
    asked_plan,
    batch_size_of,
    battery_windows,
    dummy_model,
    load_model,
    provenance_of,
    text_batches,
    words_of,
    workers_on,
)
from .options import (
    Attention,
    BatchSize,
    Battery,
    Device,
    DeviceMap,
    Dtype,
    FewShot,
    Fraction,
    Json,
    Length,
    Limit,
    Model,
    New,
    PlanFile,
    Prompt,
    Ray,
    RayGpus,
    RayWorkers,
    Repair,
    RepairSequences,
    RepairText,
    Revision,
    Rounds,
    Seed,
    Sequences,
    Skip,
    SkipKeepLast,
    TaskBatch,
    TaskPath,
    Tasks,
    TextSource,
    Truncate,
    Trust,
)
from .repairing import repaired_by, warn_of_own_text

if TYPE_CHECKING:
    from ..records.measured import State
    from ..records.plan import Plan


@app.command(cls=OnRay, rich_help_panel=MEASURE, epilog="Example:  notall sweep smollm2 --out results")
def sweep(
    model: Model = "smollm2",
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the records and figures")] = Path("results"),
    text: TextSource = "prose",
    sequences: Sequences = 8,
    length: Length = 256,
    batch_size: BatchSize = 4,
    prompt: Prompt = 128,
    new: New = 16,
    rounds: Rounds = 5,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_gpus: RayGpus = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run the paper's grid: skip 10, 25 and 33 % of the attentions, MLPs or blocks, with the last layer and without.

    If you interrupt it, the same command continues where it stopped.
    """
    from ..evaluation.paper.sweep import sweep as sweep_grid
    from ..measuring.plan_times import Timed
    from ..records.ledger import read
    from ..records.similarity import SimilarityRecord
    from ..records.sweep import SweepRecord
    from ..reporting.sweep_files import write_sweep

    check_folders(sweep=out)
    check_texts(text)
    loading = Loading(model, dtype, device, device_map, attn_implementation, revision, trust_remote_code)
    net, tokenizer = load_model(loading)
    batches, described = text_batches(net, tokenizer, text, sequences, length, batch_size, seed)
    about = provenance_of(net, model, revision, **described)
    timed = Timed(prompt, new, rounds=rounds)
    with workers_on(ray, ray_workers, ray_gpus, net, loading) as workers, progress_bar() as progress:
        records = sweep_grid(
            net,
            batches,
            out,
            about,
            timed=timed,
            seed=seed,
            tokenizer=tokenizer,
            progress=progress,
            workers=workers,
        )
    rows = [record.row() for record in records]
    name = about.what["model"]
    write_sweep(records, out, model_in_words(about.what["model"]))
    depths = [record.row() for record in read(out / SimilarityRecord.file, SimilarityRecord)]
    write_similarity(depths, out / "similarity", model_in_words(about.what["model"]), windows_of(about.what))
    if installed(*FIGURES):
        from ..reporting import plots

        plots.save(plots.tradeoff_chart(rows, f"Quality lost against decode speedup, {name}"), out / "tradeoff")
    show(rows, SweepRecord.columns, as_json=as_json, title=f"{name}: {len(rows)} configurations in {out}")
    if not as_json:
        say(f"The tables are in {out / 'table.md'}, .tex and .csv, and {out / 'similarity'}.tex and .csv.")
        say(f"Next: notall report {out} -o {out / 'report.html'}")


@app.command(
    rich_help_panel=MEASURE,
    name="eval",
    epilog="Example:  notall eval smollm2 --plan plan.json --text book.txt --tasks arc_easy --limit 50",
)
def evaluate(
    model: Model = "smollm2",
    plan: PlanFile = None,
    skip: Skip = None,
    fraction: Fraction = None,
    keep_last: SkipKeepLast = False,
    text: TextSource = "prose",
    sequences: Sequences = 8,
    length: Length = 256,
    tasks: Tasks = None,
    limit: Limit = None,
    num_fewshot: FewShot = None,
    task_path: TaskPath = None,
    truncate: Truncate = False,
    battery: Battery = False,
    repair: Repair = False,
    repair_text: RepairText = None,
    repair_sequences: RepairSequences = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="keep results in this folder, so that a killed run continues")
    ] = None,
    batch_size: TaskBatch = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what a plan costs: NLL, KL to the dense model and agreement on a text, and benchmarks if you name some.

    Each figure comes with its standard error, and differences are paired with the dense model's.
    """
    if tasks or battery:
        need("lm_eval")
    from ..evaluation.one_plan import GSM8K, evaluate_plan, keep
    from ..repairing.measured import about_measured
    from ..reporting.verdict import Verdict, left_out_of, next_command
    from ..structure.locating import locate
    from .columns import CHECK_COLUMNS, QUALITY_COLUMNS, TASK_COLUMNS

    kept = out.with_name(f"{out.name}.repaired") if out and repair else None
    check_folders(eval=out, repair=kept)
    asked = asked_plan(plan, skip, fraction, keep_last, needed=True, model=model)
    size = batch_size_of(batch_size)
    check_texts(text, *(repair_text or []))
    wanted_tasks, limits = words_of(tasks), words_of(limit)
    also = (GSM8K,) if battery else ()
    shelf = check_tasks(wanted_tasks, task_path, num_fewshot=num_fewshot, limits=limits, also=also)
    net, tokenizer = load_model(
        Loading(model, dtype, device, device_map, attn_implementation, revision, trust_remote_code)
    )
    wanted = asked.of(net)
    wanted.check(locate(net))
    windows = 4 if size == "auto" else size
    batches, described = text_batches(net, tokenizer, text, sequences, length, windows, seed)
    long_ones = battery_windows(net, tokenizer, text, seed) if battery else None
    if repair:
        with progress_bar() as progress:
            about = provenance_of(net, model, revision)
            wanted = repaired_by(net, tokenizer, wanted, repair_text, kept, about, progress, sequences=repair_sequences)
    warn_of_own_text(wanted, described, plan)
    with progress_bar() as progress:
        found = evaluate_plan(
            net,
            tokenizer,
            wanted,
            batches,
            tasks=wanted_tasks,
            limits=limits,
            num_fewshot=num_fewshot,
            task_path=shelf,
            truncate=truncate,
            batch_size=size,
            folder=out,
            battery=long_ones,
            progress=progress,
        )
    if out:
        settings = provenance_of(net, model, revision, **described, fingerprint=locate(net).fingerprint)
        abouts = {name: (one, about_measured(net, settings, one, batches)) for name, one in _states_of(wanted).items()}
        keep(out, found, described["text"], abouts)
    shown = {
        "quality": Shown(found.quality, QUALITY_COLUMNS, f"skip {wanted}"),
        "tasks": Shown(found.tasks, TASK_COLUMNS, "benchmarks, differences paired by document; worse: p < 0.05"),
        "battery": Shown(found.battery, CHECK_COLUMNS, "what accuracy hides; worse: p < 0.05"),
    }
    verdict = Verdict(*left_out_of(net, wanted), quality=found.quality[-1], text=described["text"])
    timed = next_command("bench", model, **asked.words)
    verdict = verdict.then(timed if locate(net).seated else _mend_of(model, asked, wanted), timed)
    tables = {name: table for name, table in shown.items() if table.rows}
    show_all(tables, as_json=as_json, also={"verdict": verdict.row()})
    warn_if_worse(found.quality)
    conclude(verdict, as_json=as_json)


def _states_of(plan: Plan) -> dict[State, Plan]:
    """What is measured of a plan: without what it skips, and repaired where it is."""
    from ..running.repaired import RepairedPlan

    states: dict[State, Plan] = {"skipped": getattr(plan, "unrepaired", plan)}
    return states | ({"repaired": plan} if isinstance(plan, RepairedPlan) else {})


def _mend_of(model: str, asked: AskedPlan, plan: Plan) -> str:
    """The command that may find something better than what was asked for."""
    from ..reporting.verdict import mending, next_command
    from ..running.repaired import RepairedPlan

    if asked.skip:
        return next_command("search", model, kind=asked.skip.value, count=asked.fraction, out="better.json")
    return mending(model, asked.path, isinstance(plan, RepairedPlan))


@app.command(
    rich_help_panel=MEASURE,
    epilog="Example:  notall bench --shape llama-2-7b --dummy-weights --skip attention --fraction 0.33",
)
def bench(
    model: Model = "smollm2",
    plan: PlanFile = None,
    skip: Skip = None,
    fraction: Fraction = None,
    keep_last: SkipKeepLast = False,
    shape: Annotated[
        str | None,
        typer.Option(help="instead of MODEL: llama-2-7b, llama-2-13b, llama-2-70b or a config.json"),
    ] = None,
    dummy_weights: Annotated[
        bool, typer.Option("--dummy-weights", help="use random weights, so that nothing is downloaded")
    ] = False,
    prompt: Prompt = 128,
    new: New = 32,
    batch_size: Annotated[int, typer.Option(help="sequences to run at once")] = 1,
    rounds: Rounds = 5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="keep the records here, for `notall report`")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time prefill and decode of the dense and the skipped model, alternating, with a real KV cache."""
    from ..measuring.plan_times import Timed
    from ..measuring.plan_times import bench as bench_plan
    from ..measuring.speed import machine
    from ..models.loading import dtype_name
    from ..records.bench import BenchRecord
    from ..reporting.verdict import left_out_of
    from ..structure.locating import locate

    check_folders(bench=out)
    asked = asked_plan(plan, skip, fraction, keep_last)
    if dummy_weights or shape:
        net = dummy_model(shape or model, dummy_weights, dtype, device, revision, trust_remote_code, seed)
    else:
        net, _ = load_model(
            Loading(
                model,
                dtype,
                device,
                attn_implementation=attn_implementation,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        )
    wanted = asked.of(net)
    about = provenance_of(
        net,
        shape or model,
        revision,
        dummy_weights=dummy_weights,
        fingerprint=locate(net).fingerprint,
    )
    timed = Timed(prompt, new, batch_size, rounds)
    with progress_bar() as progress:
        records = bench_plan(net, wanted, timed, about, out=out, seed=seed, progress=progress)
    here = machine(net.device)
    title = (
        f"{shape or model}, {dtype_name(net)}, batch {batch_size}, "
        f"prompt {prompt}, {new} new tokens; "
        f"{here['device_name']}, {here['threads']} threads; median of {rounds} [quartiles]"
    )
    show([record.row() for record in records], BenchRecord.columns, as_json=as_json, title=title)
    if not as_json and wanted:
        left_out, _, _ = left_out_of(net, wanted)
        dense, skipped = (record.prefill_ms + new * record.decode_ms_per_token for record in records)
        say(
            f"Without {left_out} the prompt and {new} new tokens take {skipped:,.0f} ms, where the dense model takes "
            f"{dense:,.0f}: {dense / skipped:.2f} times as fast, by medians."
        )


@app.command(rich_help_panel=MEASURE, epilog="Example:  notall tasks arc")
def tasks(
    word: Annotated[str, typer.Argument(metavar="[WORD]", help="list only names that hold this word")] = "",
    task_path: TaskPath = None,
    as_json: Json = False,
) -> None:
    """List what --tasks takes: tasks and groups of lm-evaluation-harness, and openllm, the paper's six."""
    need("lm_eval")
    from .columns import TASKS_COLUMNS

    with working("reading the harness's tasks"):
        from ..evaluation.tasks import TaskShelf

        rows = TaskShelf(task_path).listed(word)
    named = "1 name" if len(rows) == 1 else f"{len(rows):,} names"
    shots = "; shots as the leaderboard shows them" if any(row["num_fewshot"] for row in rows) else ""
    show(rows, TASKS_COLUMNS, as_json=as_json, title=f"{named} for --tasks{shots}")
