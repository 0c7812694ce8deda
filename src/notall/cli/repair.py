"""notall repair and heal: make up for what a plan skips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UsageError
from ..experiments.evaluate import warn_if_worse
from ..experiments.folder import check_folder
from ..experiments.options import ModelOptions, read_plan
from ..experiments.repair import (
    METHODS,
    REFIT,
    TOKENS,
    FitOptions,
    HealOptions,
    HealRayOptions,
    HealTexts,
    check_method,
    refits_table,
    repaired_by,
    verdict_of,
)
from ..options import Option, RunOptions
from ..plan import Plan
from ..results.ledger import read
from ..results.lines import refuse_unwritable
from ..results.progress_bars import progress_bar
from ..results.repairs import HEALING, MEASURED, HealRecord
from ..results.table import table
from ..results.terminal import show
from .app import command, conclude

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WeightsFolder = Annotated[Path, Option("folder for the plan and its weights", ("--out", "-o"))]
PlanFile = Annotated[Path | None, Option("plan file, or the folder of a repair")]


@command(example="notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl --out repaired")
def repair(
    model: ModelOptions,
    text: FitOptions,
    run: RunOptions,
    plan: PlanFile = None,
    repair: Annotated[str, Option(f"how: {METHODS}", metavar="METHOD")] = REFIT,
    offload: Annotated[
        Path | None, Option("keep the text's streams in files in this folder, if memory is short", metavar="DIR")
    ] = None,
    out: WeightsFolder = Path("repaired"),
) -> None:
    """Refit what a plan keeps, so that it makes up for what the plan skips.

    Nothing is trained, no tensor is added, and it costs nothing later. OUT is a plan with weights: give it as
    --plan to eval, generate, bench or export. If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.texts import measure

    check_folder(out, "repair")
    if offload:
        refuse_unwritable(offload)
    check_method(repair, offload)
    wanted = _given(plan)
    text.check()
    net, tokenizer = _loaded(model, wanted)
    texts = text.draw(net, tokenizer, run.seed)
    settings = model.provenance(net, **texts.described)
    with progress_bar() as progress:
        fit = texts.together(text.batch_size)
        repaired = repaired_by(repair, net, wanted, fit, out, settings, progress, offload)
        measured = measure(net, {"skipped": wanted, "repaired": repaired}, texts.other, out, settings, progress)
    quality = table(f"skip {wanted}: before the repair and after it", MEASURED, measured)
    verdict = verdict_of(net, model.model, measured[-1], out)
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
    out: WeightsFolder = Path("healed"),
) -> None:
    """Train what a plan keeps for some minutes, so that it answers as the dense model does: recovery fine-tuning.

    The plan may be repaired already. Training stops early when text that it does not train on no longer gains.
    OUT is a plan with weights, like that of `notall repair`.
    If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.healing import heal as heal_plan
    from ..repairing.texts import measure, sampled

    check_folder(out, "heal")
    wanted = _given(plan)
    text.check()
    config = how.config(run.seed)
    workers = cluster.workers(model, text.batch_size)
    net, tokenizer = _loaded(model, wanted)
    texts = text.draw(net, tokenizer, run.seed, most=TOKENS // text.length)
    settings = model.provenance(net, **texts.described, **({"sampled": True} if text.sample else {}))
    with progress_bar() as progress:
        fit, stop = texts.together(text.batch_size), texts.stop(text.batch_size)
        if text.sample:
            fit = sampled(net, fit, out, settings, seed=run.seed, progress=progress)
        healed = heal_plan(
            net, wanted, fit, stop, config, out=out, provenance=settings, workers=workers, progress=progress
        )
        measured = measure(net, {wanted.state: wanted, "healed": healed}, texts.other, out, settings, progress)
    looks = read(out / HealRecord.file, HealRecord)
    quality = table(f"skip {wanted}: before the healing and after it", MEASURED, measured)
    verdict = verdict_of(net, model.model, measured[-1], out)
    tables = {
        "healing": table(f"{out}: what it loses on text that was not trained on", HEALING, looks),
        "quality": quality,
    }
    show(tables, as_json=run.as_json, also={"verdict": verdict.fact()})
    conclude(verdict, as_json=run.as_json)


def _loaded(model: ModelOptions, plan: Plan) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that the plan fits, and its tokenizer."""
    from ..structure.locating import locate

    net, tokenizer = model.load()
    plan.check(locate(net))
    return net, tokenizer


def _given(path: Path | None) -> Plan:
    if path is None:
        raise UsageError("give the plan with --plan: `notall search` or `notall plan` writes one")
    return read_plan(path)
