"""notall pareto: skipping against quantising in an engine."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, shortened
from ..experiments.folder import check_folder
from ..experiments.options.model import ModelOptions
from ..experiments.options.text import HeldOutOptions
from ..experiments.options.words import words_of
from ..experiments.pareto.checkpoints import checkpoint_bytes
from ..experiments.pareto.finding import Finding
from ..experiments.pareto.options import EngineOptions, ParetoPlans, check_workload
from ..experiments.pareto.run import DENSE_NAME, EngineModel, measure_pareto
from ..experiments.pareto.windows import Windows, by_another
from ..experiments.pareto.written import WrittenCheckpoints
from ..experiments.repair import NONE
from ..experiments.used import uses_of, windows_of
from ..exporters.manifest import check_verified
from ..options import OutFolder, RunOptions, Workload
from ..plan import Plan, several
from ..progress import Stages
from ..report.pareto import COLUMNS, sentence, write_pareto
from ..results.table import in_bytes, table
from ..results.terminal import next_report, progress_bar, show
from .app import command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST_WINDOWS = 4  # windows that `pareto` chooses by and repairs with


@command(
    example="notall pareto smollm2 --engine llama.cpp --skip attention:4,8 --out pareto"
)
def pareto(
    engine: EngineOptions,
    plans: ParetoPlans,
    run: RunOptions,
    model: ModelOptions = ModelOptions(device="cpu"),
    text: HeldOutOptions = HeldOutOptions(
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
    WrittenCheckpoints.of(out).check()
    check_workload(workload)
    given = plans.given()
    counts, speedups = plans.wanted
    engine.check_plans(given.values())
    unrepaired = any(one.state != "repaired" for one in given.values())
    repairs = plans.repair != NONE and unrepaired
    fits = bool(counts or speedups or repairs)
    if fits and text.sequences < FEWEST_WINDOWS:
        raise UsageError(
            f"--sequences {shortened(text.sequences)} is too few to repair by: give"
            f" {FEWEST_WINDOWS} or more"
        )
    for spec in (model.model, *engine.also):
        engine.of().check(spec)
        check_verified(spec)
    text.check()
    for one in given.values():
        model.check_plan(one)
    net, tokenizer = model.load()
    in_engine = engine.of(net)
    types = in_engine.checked_types(words_of(engine.types))
    used = [
        use
        for path, one in zip(plans.plan, given.values())
        for use in uses_of(one, path)
    ]
    apart = windows_of(used, net, tokenizer, [text.held_out or text.text])
    split = text.split(net, tokenizer, seed=run.seed, apart=apart, calibrates=fits)
    windows = Windows.of(tokenizer, split.held_out.rows.tolist())
    about = model.provenance(net, **split.described, seed=run.seed)
    with progress_bar() as progress:
        stages = Stages(progress, 8)
        finding = Finding(
            net, plans.of(net), split.calibration, out / "plans", about, run.seed
        )
        wanted = given | finding.found(counts, speedups, workload, stages.stage(1))
        for one in wanted.values():
            finding.check(one)
        variants = [*wanted.items()]
        if plans.repair != NONE:
            variants = finding.repaired(wanted, plans.repair, stages.stage(1))
        del net, finding  # what is measured needs its memory
        measured = measure_pareto(
            in_engine,
            [
                *_with_plans(model, [(DENSE_NAME, Plan()), *variants], windows),
                *_others(model, engine.also, tokenizer, windows),
            ],
            types,
            workload,
            out,
            engine.provenance(
                about, in_engine, workload, held_out_sequences=len(windows.tokens)
            ),
            progress=stages.stage(6),
        )
    title = (
        f"{about.what['model']} in {engine.engine},"
        f" {several(in_engine.threads, 'thread')}; NLL on {split.measured_on}"
    )
    write_pareto(measured, out, title)
    summary = sentence(measured)
    where = (
        f"The table is in {out / 'table.md'}, the checkpoints"
        f" ({in_bytes(checkpoint_bytes(out))}) in {out / 'checkpoints'}."
    )
    tables = {"pareto": table(f"{title}: {out}", COLUMNS, measured)}
    then = (summary, where, next_report(out))
    show(tables, as_json=run.as_json, also={"verdict": summary}, then=then)


def _with_plans(
    model: ModelOptions, plans: Sequence[tuple[str, Plan]], windows: Windows
) -> Iterator[EngineModel]:
    """The model without what each plan skips; a name may stand for a plan as it is and
    for the same one repaired.
    """
    for name, plan in plans:
        yield EngineModel(
            name,
            model.model,
            plan,
            windows,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )


def _others(
    model: ModelOptions,
    specs: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    windows: Windows,
) -> Iterator[EngineModel]:
    """Other models, each with the same text in its own tokens; loaded as `model` is."""
    from ..models.identity import identify
    from ..models.loading import load_tokenizer

    trusted = model.trust_remote_code
    for spec in specs:
        known = identify(spec)
        own_tokenizer, stored = load_tokenizer(spec, trust_remote_code=trusted)
        yield EngineModel(
            known["model"].removesuffix(".gguf"),
            spec,
            Plan(),
            by_another(own_tokenizer, tokenizer, windows),
            known["revision"],
            stored,
            trust_remote_code=trusted,
        )
