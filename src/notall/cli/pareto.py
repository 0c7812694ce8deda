"""notall pareto: skipping beside quantising, in the engine that serves the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, shortened
from ..experiments import pareto as fronts
from ..experiments.folder import check_folder
from ..experiments.options import HeldOutOptions, ModelOptions, words_of
from ..experiments.repair import NONE
from ..experiments.search import warn_of_own_text
from ..options import OutFolder, RunOptions, Workload
from ..plan import Plan, several
from ..progress import Stages
from ..results.table import table
from ..results.terminal import next_report, progress_bar, show
from .app import command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FEWEST = 4  # windows


@command(example="notall pareto smollm2 --engine llama.cpp --skip attention:4,8 --out pareto")
def pareto(
    engine: fronts.EngineOptions,
    plans: fronts.ParetoPlans,
    run: RunOptions,
    model: ModelOptions = ModelOptions(device="cpu"),
    text: HeldOutOptions = HeldOutOptions(sequences=128, length=256, held_out_sequences=8),
    workload: Workload = Workload(generation_tokens=32),
    out: OutFolder = Path("pareto"),
) -> None:
    """Compare skipping with quantising in the engine that serves the model: what is lost, how fast, how large.

    This measures the dense model and each plan, as it is and repaired, in each type: NLL as the engine computes it,
    times in turn, and bytes. It repairs plans before it quantises them. If you interrupt it, the same command
    continues where it stopped.
    """
    check_folder(out, "pareto")
    fronts.check_workload(workload)
    given, (counts, speedups) = plans.given(), plans.wanted
    if text.sequences < FEWEST:
        few = f"--sequences {shortened(text.sequences)} is too few to choose by and to repair with"
        raise UsageError(f"{few}: give {FEWEST} or more")
    for spec in (model.model, *engine.also):
        engine.of().check(spec)
    net, tokenizer = model.load()
    runs = engine.of(net)
    types = runs.checked_types(words_of(engine.types))
    with progress_bar("reading the text") as progress:
        own, others, described = text.both(net, tokenizer, seed=run.seed, progress=progress)
    windows = fronts.Windows.of(tokenizer, (row for batch in others for row in batch.tolist()))
    about = model.provenance(net, **described, seed=run.seed)
    source = "held_out" if text.held_out else "text"
    measured_on = {"text": described[source], "text_sha256": described[f"{source}_sha256"]}
    with progress_bar() as progress:
        stages = Stages(progress, 8)
        finding = fronts.Finding(net, plans.of(net), own, out / "plans", about, run.seed)
        wanted = given | finding.found(counts, speedups, workload, stages.stage(1))
        for one in wanted.values():
            one.check(finding.space.structure)
            warn_of_own_text(one, measured_on)
        variants = [*wanted.items()]
        if plans.repair != NONE:
            variants = finding.repaired(wanted, plans.repair, stages.stage(1))
        subjects = [
            fronts.Subject(
                name, model.model, one, windows, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
            for name, one in [(fronts.DENSE, Plan()), *variants]
        ]
        subjects += [_other(replace(model, model=spec, revision=None), tokenizer, windows) for spec in engine.also]
        del net, finding  # what is measured needs its memory
        measured = engine.provenance(about, runs, workload, held_out_sequences=len(windows.tokens))
        records = fronts.measure_pareto(runs, subjects, types, workload, out, measured, progress=stages.stage(6))
    on_what = measured_on["text"] if text.held_out else f"other windows of {measured_on['text']}"
    title = f"{about.what['model']} in {engine.engine}, {several(runs.threads, 'thread')}; NLL on {on_what}"
    fronts.write_pareto(records, out, title)
    said = fronts.sentence(records)
    where = f"The table is in {out / 'table.md'}, the checkpoints in {out / 'checkpoints'}."
    tables = {"pareto": table(f"{title}: {out}", fronts.COLUMNS, records)}
    show(tables, as_json=run.as_json, also={"verdict": said}, then=(said, where, next_report(out)))


def _other(model: ModelOptions, ours: PreTrainedTokenizerBase, windows: fronts.Windows) -> fronts.Subject:
    """Another model, with the same text in its own tokens."""
    from ..models.loading import identify

    _, theirs = model.load()
    known = identify(model.model)
    name = known["model"].removesuffix(".gguf")
    own, trusted = fronts.by_another(theirs, ours, windows), model.trust_remote_code
    return fronts.Subject(name, model.model, Plan(), own, about=known["revision"], trust_remote_code=trusted)
