"""notall bench and draft: how much faster a plan is, alone and as a draft model."""

from dataclasses import replace

from ..experiments import bench as benching, draft as drafting
from ..experiments.bench import ShapeOptions
from ..experiments.draft import DraftOptions
from ..experiments.folder import check_folder
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import PlanOptions
from ..experiments.options.text import PromptOptions, TextOptions
from ..experiments.used import uses_of, windows_of
from ..options import KeepIn, RunOptions, Workload
from ..plan import several
from ..report import bench as bench_tables, draft as draft_tables
from ..results.table import table
from ..results.terminal import progress_bar, show
from .app import command


@command(
    example="notall bench --shape llama-2-7b --dummy-weights --skip attention:0.33"
)
def bench(
    model: ModelOptions,
    shape: ShapeOptions,
    plan: PlanOptions,
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
    wanted = plan.of(net)
    named = replace(model, model=shape.shape or model.model)
    about = named.provenance(
        net, dummy_weights=shape.dummy_weights, fingerprint=locate(net).fingerprint
    )
    with progress_bar() as progress:
        record = benching.bench(
            net, wanted, workload, about, out=out, seed=run.seed, progress=progress
        )
    title = (
        f"{about.in_words}; {bench_tables.workload_of(record)};"
        f" median of {workload.rounds} [quartiles]"
    )
    rows = table(title, bench_tables.COLUMNS, bench_tables.bench_rows([record]))
    tables = {"bench": replace(rows, facts=(record,))}
    then = [bench_tables.conclusion(record)] if record.skipped else []
    show(tables, as_json=run.as_json, then=then)


@command(example="notall draft smollm2 --plan plan.json")
def draft(
    model: ModelOptions,
    plan: PlanOptions,
    text: PromptOptions,
    how: DraftOptions,
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
    read = TextOptions(
        text.text, text.sequences, how.prompt_tokens + how.generation_tokens, 1
    )
    apart = windows_of(uses_of(wanted, plan.plan), net, tokenizer, [text.text])
    windows, described = read.windows(net, tokenizer, seed=run.seed, apart=apart)
    about = model.provenance(
        net, **described, repair=wanted.digest, fingerprint=locate(net).fingerprint
    )
    with progress_bar() as progress:
        found = drafting.measure_draft(
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
    verdict = draft_tables.verdict(found)
    tables = {"drafts": table(title, draft_tables.COLUMNS, found.records)}
    then = [verdict["said"]]
    show(tables, as_json=run.as_json, also={"verdict": verdict}, then=then)
