"""notall repair and heal: make up for what a plan skips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..errors import UsageError
from ..experiments.folder import check_folder
from ..experiments.heal import TOKENS, HealOptions, HealRayOptions, HealTexts
from ..experiments.measured import warn_if_worse
from ..experiments.options import ModelOptions, read_plan
from ..experiments.repair import REFIT, FitOptions, check_method, refits_table, repaired_by, verdict_of
from ..options import Option, RunOptions
from ..plan import Plan
from ..results.ledger import read
from ..results.lines import refuse_unwritable
from ..results.progress_bars import progress_bar
from ..results.repairs import HEALING, MEASURED, HealRecord, State
from ..results.table import table
from ..results.terminal import show
from .app import command, conclude

WeightsFolder = Annotated[Path, Option("folder for the plan and its weights", ("--out", "-o"))]
PlanFile = Annotated[Path | None, Option("plan file, or the folder of a repair")]


@command(example="notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl --out repaired")
def repair(
    model: ModelOptions,
    text: FitOptions,
    run: RunOptions,
    plan: PlanFile = None,
    repair: Annotated[
        str,
        Option("how: refit, replaceme, prune-and-comp, or a function of your own, as module:function", (), "METHOD"),
    ] = REFIT,
    offload: Annotated[
        Path | None, Option("keep the text's streams in files in this folder, if memory is short", (), "DIR")
    ] = None,
    out: WeightsFolder = Path("repaired"),
) -> None:
    """Refit what a plan keeps, so that it makes up for what the plan skips.

    Nothing is trained, no tensor is added, and it costs nothing later. OUT is a plan with weights: give it as
    --plan to eval, generate, bench or export. If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.texts import RepairTexts, measure
    from ..structure.locating import locate

    check_folder(out, "repair")
    if offload:
        refuse_unwritable(offload)
    check_method(repair, offload)
    wanted = _given(plan)
    text.check()
    net, tokenizer = model.load()
    wanted.check(locate(net))
    texts = RepairTexts.draw(
        net, tokenizer, text.texts, text.held_out, sequences=text.sequences, length=text.length, seed=run.seed
    )
    settings = model.provenance(net, **texts.described)
    with progress_bar() as progress:
        fit = texts.together(text.batch_size)
        repaired = repaired_by(repair, net, wanted, fit, out, settings, progress, offload)
        plans: dict[State, Plan] = {"skipped": wanted, "repaired": repaired}
        measured = measure(net, plans, texts.other, out, settings, progress)
    verdict = verdict_of(net, model.model, measured[-1], out)
    quality = table(f"skip {wanted}: before the repair and after it", MEASURED, measured)
    tables = {"refits": refits_table(repaired, out)} if repair == REFIT else {}
    show(tables | {"quality": quality}, as_json=run.as_json, also={"verdict": verdict.fact()})
    warn_if_worse(measured)
    conclude(verdict, as_json=run.as_json)


@command(example="notall heal smollm2 --plan repaired --text book.txt --text pages.jsonl --out healed")
def heal(
    model: ModelOptions,
    text: HealTexts,
    how: HealOptions,
    cluster: HealRayOptions,
    run: RunOptions,
    plan: PlanFile = None,
    tokens: Annotated[
        int | None, Option("instead of --sequences: tokens to train on, of all texts together (default: up to 131,072)")
    ] = None,
    out: WeightsFolder = Path("healed"),
) -> None:
    """Train what a plan keeps for some minutes, so that it answers as the dense model does: recovery fine-tuning.

    The plan may be repaired already. Training stops early when text that it does not train on no longer gains.
    OUT is a plan with weights, like that of `notall repair`.
    If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.healing import heal as heal_plan
    from ..repairing.texts import RepairTexts, measure, sampled
    from ..structure.locating import locate

    check_folder(out, "heal")
    wanted = _given(plan)
    text.check()
    config = how.config(run.seed)
    sequences = text.windows(tokens)
    workers = cluster.workers(model, text.batch_size)
    net, tokenizer = model.load()
    wanted.check(locate(net))
    texts = RepairTexts.draw(
        net,
        tokenizer,
        text.texts,
        text.held_out,
        sequences=sequences,
        most=TOKENS // text.length,
        length=text.length,
        seed=run.seed,
    )
    settings = model.provenance(net, **texts.described, **({"sampled": True} if text.sample else {}))
    with progress_bar() as progress:
        fit, stop = texts.together(text.batch_size), texts.stop(text.batch_size)
        if text.sample:
            fit = sampled(net, fit, out, settings, seed=run.seed, progress=progress)
        healed = heal_plan(
            net, wanted, fit, stop, config, out=out, provenance=settings, workers=workers, progress=progress
        )
        plans: dict[State, Plan] = {wanted.state: wanted, "healed": healed}
        measured = measure(net, plans, texts.other, out, settings, progress)
    looks = read(out / HealRecord.file, HealRecord)
    verdict = verdict_of(net, model.model, measured[-1], out)
    tables = {
        "healing": table(f"{out}: what it loses on text that was not trained on", HEALING, looks),
        "quality": table(f"skip {wanted}: before the healing and after it", MEASURED, measured),
    }
    show(tables, as_json=run.as_json, also={"verdict": verdict.fact()})
    conclude(verdict, as_json=run.as_json)


def _given(path: Path | None) -> Plan:
    if path is None:
        raise UsageError("give the plan with --plan: `notall search` or `notall plan` writes one")
    return read_plan(path)
