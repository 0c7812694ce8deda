"""notall eval, bench, draft, sweep, paper, pareto, tasks, report and reproduce: what
plans cost and save.
"""

import io
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..encodings import printable
from ..errors import UsageError, shortened
from ..experiments import (
    bench as benches,
    draft as drafts,
    options,
    pareto as fronts,
    reproduce as again,
    sweep as sweeps,
)
from ..experiments.driver import SimilarityRecord, Subject, write_similarity
from ..experiments.evaluate import QUALITIES, Evaluation, mend_of
from ..experiments.folder import check_folder
from ..experiments.paper import CLAIMS, PaperOptions, TimingGrid, run_paper
from ..experiments.recovery import RecoveryOptions, scores_table
from ..experiments.repair import NONE, RepairOptions
from ..experiments.search import uses_of
from ..experiments.used import windows_of
from ..experiments.verdict import Verdict, next_command
from ..exporters.manifest import check_verified
from ..extras import FIGURES, need
from ..models.names import model_in_words
from ..options import Json, KeepIn, Option, OutFolder, RunOptions, Workload
from ..plan import Plan, several
from ..progress import Stages
from ..results.facts import NAMED_TASKS, PLAN_CHECKS
from ..results.ledger import read
from ..results.provenance import behind, windows_in_words
from ..results.table import in_bytes, table
from ..results.terminal import next_report, progress_bar, show
from .app import MISSED, app, command, conclude, options_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 4  # windows that `pareto` chooses by and repairs with


@command(
    name="eval",
    example="notall eval smollm2 --plan plan.json --tasks arc_easy --limit 50",
)
def evaluate(
    model: options.ModelOptions,
    plan: options.PlanOptions,
    text: options.TextOptions,
    tasks: RecoveryOptions,
    repair: RepairOptions,
    run: RunOptions,
    prompt_tokens: options.PromptTokens = None,
    diagnostics: options.Diagnostics = False,
    out: KeepIn = None,
) -> None:
    """Measure the loss of a plan: NLL, KL to the original model and agreement on a
    text, and benchmarks.

    Each figure comes with its standard error, and differences are paired with the
    original model's. A plan that skips in the prompt alone is scored on what follows
    the prompt.
    """
    from ..measuring.quality import check_prompt
    from ..structure.locating import locate

    kept = out.with_name(f"{out.name}.repaired") if out else None
    check_folder(out, "eval")
    plan.check(needed=True, model=model.model)
    text.check()
    repair.check(kept)
    if diagnostics:
        need("scipy")
    model.check_plan(plan.named)
    asked = tasks.check()
    options.refuse_judging(asked, repair.sources if repair else ())
    net, tokenizer = model.load()
    wanted = plan.of(net)
    wanted.check(locate(net))
    prompt = prompt_tokens or (text.length // 2 if wanted.prefill else None)
    check_prompt([wanted], text.length, prompt)
    with progress_bar() as progress:
        apart = windows_of(uses_of(wanted, plan.plan), net, tokenizer, [text.text])
        if repair:
            texts = repair.texts(net, tokenizer, progress, seed=run.seed)
            wanted = repair.apply(
                net, wanted, texts, kept, model.provenance(net), progress
            )
            apart += texts.fitted
        batches, described = text.windows(net, tokenizer, seed=run.seed, apart=apart)
        described |= {"prompt_tokens": prompt} if prompt else {}
        windows = (
            text.for_diagnostics(net, tokenizer, run.seed, apart)
            if diagnostics
            else None
        )
        settings = model.provenance(
            net, **described, fingerprint=locate(net).fingerprint
        )
        evaluation = Evaluation(
            net, tokenizer, wanted, asked, windows, out, run.seed, progress, prompt
        )
        found = evaluation.run(batches)
    records = evaluation.records(found, batches, settings)
    tables = {
        "quality": table(f"skip {wanted}{behind(prompt)}", QUALITIES, found.quality)
    }
    if found.scores:
        tables["tasks"] = scores_table(found.scores)
    if found.checks:
        tables["diagnostics"] = table(
            "what accuracy hides; worse: p < 0.05", PLAN_CHECKS, found.checks
        )
    timed = next_command("bench", model.model, **plan.words)
    judged_on = f"{described['text']}{behind(prompt)}"
    verdict = Verdict.on(
        net, wanted, found.quality[-1].quality, judged_on, spec=model.model
    )
    verdict = verdict.judged(found.scores, asked.recovery)
    verdict = verdict.then(
        timed if locate(net).stubbed else mend_of(model.model, plan, wanted), timed
    )
    conclude(verdict, tables, records, as_json=run.as_json)


@command(
    example="notall bench --shape llama-2-7b --dummy-weights --skip attention:0.33"
)
def bench(
    model: options.ModelOptions,
    shape: benches.ShapeOptions,
    plan: options.PlanOptions,
    run: RunOptions,
    workload: Workload = Workload(generation_tokens=32),
    out: KeepIn = None,
) -> None:
    """Time prefill and decode of the original and the skipped model, interleaved, with
    a real KV cache.
    """
    from ..structure.locating import locate

    check_folder(out, "bench")
    plan.check()
    net = shape.load(model, run.seed)
    wanted, named = plan.of(net), replace(model, model=shape.shape or model.model)
    about = named.provenance(
        net, dummy_weights=shape.dummy_weights, fingerprint=locate(net).fingerprint
    )
    with progress_bar() as progress:
        record = benches.bench(
            net, wanted, workload, about, out=out, seed=run.seed, progress=progress
        )
    title = f"{about.in_words}; {record.told}; median of {workload.rounds} [quartiles]"
    found = replace(
        table(title, benches.COLUMNS, benches.rows_of([record])), facts=(record,)
    )
    show(
        {"bench": found},
        as_json=run.as_json,
        then=[benches.conclusion(record)] if record.skipped else [],
    )


@command(example="notall draft smollm2 --plan plan.json")
def draft(
    model: options.ModelOptions,
    plan: options.PlanOptions,
    text: options.PromptOptions,
    how: drafts.DraftOptions,
    run: RunOptions,
    out: KeepIn = None,
) -> None:
    """Predict and measure the speedup of a plan as a draft model in speculative
    decoding.

    Windows of the text are prompts. The original model continues them itself; its text
    gives the acceptance of a draft, and the steps of both are timed: that predicts a
    speedup. At the best number of tokens, greedy generation is timed.
    """
    from torch import cat

    from ..structure.locating import locate

    check_folder(out, "draft")
    text.check()
    plan.check(needed=True, model=model.model)
    model.check_plan(plan.named)
    net, tokenizer = model.load()
    wanted = plan.of(net)
    read = options.TextOptions(
        text.text, text.sequences, how.prompt_tokens + how.generation_tokens, 1
    )
    apart = windows_of(uses_of(wanted, plan.plan), net, tokenizer, [text.text])
    windows, described = read.windows(net, tokenizer, seed=run.seed, apart=apart)
    about = model.provenance(
        net, **described, repair=wanted.digest, fingerprint=locate(net).fingerprint
    )
    with progress_bar() as progress:
        found = drafts.measure_draft(
            net,
            wanted,
            cat(windows),
            how,
            about,
            out=out,
            seed=run.seed,
            progress=progress,
        )
    title = (
        f"{about.in_words}, skip {wanted}: {several(text.sequences, 'prompt')}; median"
        f" of {how.rounds} [quartiles]"
    )
    told = drafts.verdict(found)
    tables = {"drafts": table(title, drafts.COLUMNS, found.records)}
    show(tables, as_json=run.as_json, also={"verdict": told}, then=[told["said"]])


@command(example="notall sweep smollm2 --out results")
def sweep(
    model: options.ModelOptions,
    text: options.TextOptions,
    workload: Workload,
    ray: options.RayOptions,
    run: RunOptions,
    out: OutFolder = Path("results"),
) -> None:
    """Run the paper's grid: skip 10, 25 and 33 % of the attentions, MLPs or blocks,
    with the last layer and without.

    If you interrupt it, the same command continues where it stopped.
    """
    check_folder(out, "sweep")
    text.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    about = model.provenance(net, **described)
    with ray.workers(net, model) as workers, progress_bar() as progress:
        records = sweeps.sweep(
            Subject(net, tokenizer, batches, out, about, run.seed, workers),
            workload,
            progress,
        )
    sweeps.write_sweep(records, out, model_in_words(about.what["model"]))
    _write_similarity(out, about.what)
    title = f"{about.what['model']}: {len(records)} configurations in {out}"
    where = (
        f"The tables are in {out / 'table.md'}, .tex and .csv, and"
        f" {out / 'similarity'}.tex and .csv."
    )
    show(
        {"results": table(title, sweeps.COLUMNS, records)},
        as_json=run.as_json,
        then=(where, next_report(out)),
    )


@command(
    example=(
        "notall paper smollm2 --limit 40 --limit mmlu=2 --limit gsm8k=12 --out paper"
    )
)
def paper(
    model: options.ModelOptions,
    text: options.TextOptions,
    how: PaperOptions,
    timing: TimingGrid,
    ray: options.RayOptions,
    run: RunOptions,
    tasks: options.TaskOptions = options.TaskOptions(tasks=("openllm",)),
    out: OutFolder = Path("paper"),
) -> None:
    """Run the paper's evaluation: Fig. 1, the tables of benchmarks and times, and a
    check of each claim.

    This needs the extras `eval` and `report`, and hours on a CPU: --limit says how many
    documents of each task are used, and mmlu is 57 tasks. If you interrupt it, the same
    command continues where it stopped.
    """
    need(*FIGURES, "lm_eval")
    check_folder(out, "paper")
    text.check()
    choice = tasks.check()
    net, tokenizer = model.load()
    batches, described = text.windows(net, tokenizer, seed=run.seed)
    about = model.provenance(net, **described)
    windows = text.for_diagnostics(net, tokenizer, run.seed) if how.diagnostics else ()
    with ray.workers(net, model) as workers, progress_bar() as progress:
        subject = Subject(net, tokenizer, batches, out, about, run.seed, workers)
        claims = run_paper(
            subject,
            choice,
            timing,
            windows=windows,
            generate_all=how.generate_all,
            progress=progress,
        )
    _write_similarity(out, about.what)
    title = f"The tables are in {out}/paper.md, and as .tex and .csv beside it"
    show(
        {"claims": table(title, CLAIMS, claims)},
        as_json=run.as_json,
        then=[next_report(out)],
    )


def _write_similarity(out: Path, what: dict[str, object]) -> None:
    found = read(out / SimilarityRecord.file, SimilarityRecord)
    write_similarity(
        found,
        out / "similarity",
        model_in_words(str(what["model"])),
        windows_in_words(what),
    )


@command(
    example="notall pareto smollm2 --engine llama.cpp --skip attention:4,8 --out pareto"
)
def pareto(
    engine: fronts.EngineOptions,
    plans: fronts.ParetoPlans,
    run: RunOptions,
    model: options.ModelOptions = options.ModelOptions(device="cpu"),
    text: options.HeldOutOptions = options.HeldOutOptions(
        sequences=128, length=256, held_out_sequences=8
    ),
    workload: Workload = Workload(generation_tokens=32),
    out: OutFolder = Path("pareto"),
) -> None:
    """Compare skipping with quantising in the engine that serves the model: loss, speed
    and size.

    This measures the original model and each plan, with and without a repair, in each
    type: NLL by the engine, times in turn, and bytes. It repairs, then quantises. A
    plan is measured once its export answers as the pruned model. If you interrupt it,
    the same command continues where it stopped.
    """
    check_folder(out, "pareto")
    fronts.Written.of(out).check()
    fronts.check_workload(workload)
    given, (counts, speedups) = plans.given(), plans.wanted
    engine.check_plans(given.values())
    repairs = plans.repair != NONE and any(
        one.state != "repaired" for one in given.values()
    )
    fits = bool(counts or speedups or repairs)
    if fits and text.sequences < FEWEST:
        raise UsageError(
            f"--sequences {shortened(text.sequences)} is too few to repair by: give"
            f" {FEWEST} or more"
        )
    for spec in (model.model, *engine.also):
        engine.of().check(spec)
        check_verified(spec)
    text.check()
    for one in given.values():
        model.check_plan(one)
    net, tokenizer = model.load()
    runs = engine.of(net)
    types = runs.checked_types(options.words_of(engine.types))
    used = [
        use
        for path, one in zip(plans.plan, given.values())
        for use in uses_of(one, path)
    ]
    apart = windows_of(used, net, tokenizer, [text.held_out or text.text])
    split = text.split(net, tokenizer, seed=run.seed, apart=apart, calibrates=fits)
    windows = fronts.Windows.of(tokenizer, split.held_out.rows.tolist())
    about = model.provenance(net, **split.described, seed=run.seed)
    with progress_bar() as progress:
        stages = Stages(progress, 8)
        finding = fronts.Finding(
            net, plans.of(net), split.calibration, out / "plans", about, run.seed
        )
        wanted = given | finding.found(counts, speedups, workload, stages.stage(1))
        for one in wanted.values():
            finding.check(one)
        variants = [*wanted.items()]
        if plans.repair != NONE:
            variants = finding.repaired(wanted, plans.repair, stages.stage(1))
        subjects = [
            fronts.Subject(
                name,
                model.model,
                one,
                windows,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            )
            for name, one in [(fronts.DENSE, Plan()), *variants]
        ]
        subjects += [
            _other(replace(model, model=spec, revision=None), tokenizer, windows)
            for spec in engine.also
        ]
        del net, finding  # what is measured needs its memory
        measured = engine.provenance(
            about, runs, workload, held_out_sequences=len(windows.tokens)
        )
        records = fronts.measure_pareto(
            runs, subjects, types, workload, out, measured, progress=stages.stage(6)
        )
    title = (
        f"{about.what['model']} in {engine.engine}, {several(runs.threads, 'thread')};"
        f" NLL on {split.measured_on}"
    )
    fronts.write_pareto(records, out, title)
    said = fronts.sentence(records)
    held = fronts.checkpoint_bytes(out)
    where = (
        f"The table is in {out / 'table.md'}, the checkpoints ({in_bytes(held)}) in"
        f" {out / 'checkpoints'}."
    )
    tables = {"pareto": table(f"{title}: {out}", fronts.COLUMNS, records)}
    show(
        tables,
        as_json=run.as_json,
        also={"verdict": said},
        then=(said, where, next_report(out)),
    )


def _other(
    model: options.ModelOptions,
    ours: "PreTrainedTokenizerBase",
    windows: fronts.Windows,
) -> fronts.Subject:
    """Another model, with the same text in its own tokens."""
    from ..models.identity import identify
    from ..models.loading import load_tokenizer

    known, trusted = identify(model.model), model.trust_remote_code
    theirs, stored = load_tokenizer(model.model, trust_remote_code=trusted)
    name, own = (
        known["model"].removesuffix(".gguf"),
        fronts.by_another(theirs, ours, windows),
    )
    return fronts.Subject(
        name,
        model.model,
        Plan(),
        own,
        known["revision"],
        stored,
        trust_remote_code=trusted,
    )


@command(example="notall tasks arc")
def tasks(
    word: Annotated[
        str,
        Option("list only names that hold this word", metavar="[WORD]", argument=True),
    ] = "",
    task_path: options.TaskPath = None,
    as_json: Json = False,
) -> None:
    """List what --tasks takes: checks that need no data, tasks of
    lm-evaluation-harness, openllm, the paper's six.
    """
    need("lm_eval")
    with progress_bar("reading the harness's tasks"):
        from ..evaluation.tasks import TaskShelf

        found = TaskShelf(task_path).listed(word)
    shots = (
        "; shots as the leaderboard shows them"
        if any(one.num_fewshot for one in found)
        else ""
    )
    show(
        {
            "tasks": table(
                f"{several(len(found), 'name')} for --tasks{shots}", NAMED_TASKS, found
            )
        },
        as_json=as_json,
    )


@command(example="notall report results -o report.html")
def report(
    folder: Annotated[
        Path, Option("folder of results", metavar="DIR", argument=True)
    ] = Path("results"),
    out: Annotated[Path, Option("where to write the page", ("--out", "-o"))] = Path(
        "report.html"
    ),
    join: Annotated[
        options.Words,
        Option("comparison to rank in the same table; repeat it for more"),
    ] = (),
) -> None:
    """Turn a results folder into one page that opens anywhere, without a network."""
    need(*FIGURES, "jinja2")
    from ..report.page import write_report

    print(printable(f"{write_report(folder, out, join)}: open it in a browser"))


@command(example="notall reproduce comparison --row cosine --out again")
def reproduce(
    folder: Annotated[
        Path, Option("folder of results", metavar="DIR", argument=True)
    ] = Path("results"),
    row: Annotated[
        options.Words,
        Option("only rows whose names begin with these words; repeat it for more"),
    ] = (),
    swap: Annotated[
        options.Words,
        Option(
            "another word for one of the recorded command; repeat it for more",
            ("--replace",),
            "WORD=OTHER",
        ),
    ] = (),
    functions: Annotated[
        Path | None,
        Option(
            "folder of modules whose functions the command may run (default: it runs"
            " none)",
            (),
            "DIR",
        ),
    ] = None,
    out: OutFolder = Path("reproduced"),
    as_json: Json = False,
) -> None:
    """Make a results folder again, from its records alone, and compare every figure.

    The recorded command runs again. A model, text, plan or function that has changed is
    refused by its digest. Exit code 3 follows where a figure differs beyond the
    tolerance.
    """
    found = again.reproduce(
        folder, row, swap, out, again.CommandLine(options_in, _run), functions
    )
    told = again.conclusion(found, folder)
    shown = [
        one
        for one in found
        if one.agreement != "equal" or not one.row.startswith("similarity")
    ]  # which are many
    tables = {
        "reproduced": replace(
            table(f"{folder}, made again in {out}", again.COLUMNS, shown),
            facts=tuple(found),
        )
    }
    show(tables, as_json=as_json, also={"verdict": told}, then=[told])
    if any(one.agreement in ("differs", "not made") for one in found):
        raise typer.Exit(MISSED)


def _run(line: list[str]) -> None:
    """A command in this process, without its tables; records name it as if it had been
    typed.
    """
    typed, sys.argv = sys.argv, ["notall", *line]
    try:
        with redirect_stdout(io.StringIO()):
            app(line, prog_name="notall", standalone_mode=False)
    finally:
        sys.argv = typed
