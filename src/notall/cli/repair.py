"""notall repair and heal: make up for what a plan skips."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UsageError
from ..experiments import repair as repairs
from ..experiments.folder import check_folder
from ..experiments.options import ModelOptions, read_plan
from ..experiments.repair import METHODS, REFIT, FitOptions
from ..experiments.verdict import Verdict, what_next
from ..options import Option, RunOptions
from ..plan import Plan
from ..results.ledger import read
from ..results.lines import refuse_unwritable
from ..results.provenance import Provenance
from ..results.repairs import HEALING, MEASURED, HealRecord, MeasuredRecord
from ..results.table import Table, table
from ..results.terminal import progress_bar
from .app import command, conclude

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..repairing.texts import RepairTexts

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
    from ..repairing.methods import repair_into
    from ..repairing.texts import measure

    check_folder(out, "repair")
    if offload:
        refuse_unwritable(offload)
    repairs.check_method(repair, offload)
    net, wanted, texts, settings = _begun(model, plan, text, run.seed)
    with progress_bar() as progress:
        fit = texts.together(text.batch_size)
        repaired = repair_into(out, repair, net, wanted, fit, settings, progress, offload)
        measured = measure(net, {"skipped": wanted, "repaired": repaired}, texts.other, out, settings, progress)
    quality = table(f"skip {wanted}: before the repair and after it", MEASURED, measured)
    tables = {"refits": repairs.refits_table(repaired, out)} if repair == REFIT else {}
    _ended(net, model.model, out, measured, tables | {"quality": quality}, run.as_json)


@command(example="notall heal smollm2 --plan repaired --text book.txt --text pages.jsonl --out healed")
def heal(
    model: ModelOptions,
    text: repairs.HealTexts,
    how: repairs.HealOptions,
    cluster: repairs.HealRayOptions,
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
    config, workers = how.config(run.seed), cluster.workers(model, text.batch_size)
    net, wanted, texts, settings = _begun(model, plan, text, run.seed, most=repairs.TOKENS // text.length)
    settings = Provenance.of(settings, sampled=True) if text.sample else settings
    with progress_bar() as progress:
        fit, stop = texts.together(text.batch_size), texts.stop(text.batch_size)
        if text.sample:
            fit = sampled(net, fit, out, settings, seed=run.seed, progress=progress)
        healed = heal_plan(
            net, wanted, fit, stop, config, out=out, provenance=settings, workers=workers, progress=progress
        )
        measured = measure(net, {wanted.state: wanted, "healed": healed}, texts.other, out, settings, progress)
    looks, title = read(out / HealRecord.file, HealRecord), "what it loses on text that was not trained on"
    quality = table(f"skip {wanted}: before the healing and after it", MEASURED, measured)
    tables = {"healing": table(f"{out}: {title}", HEALING, looks), "quality": quality}
    _ended(net, model.model, out, measured, tables, run.as_json)


def _begun(
    model: ModelOptions, path: Path | None, text: FitOptions, seed: int, most: int | None = None
) -> tuple[PreTrainedModel, Plan, RepairTexts, Provenance]:
    """A model, a plan that fits it, at most so many windows of texts, and where figures come from."""
    from ..structure.locating import locate

    if path is None:
        raise UsageError("give the plan with --plan: `notall search` or `notall plan` writes one")
    plan = read_plan(path)
    text.check()
    net, tokenizer = model.load()
    plan.check(locate(net))
    texts = text.draw(net, tokenizer, seed, most)
    return net, plan, texts, model.provenance(net, **texts.described)


def _ended(
    net: PreTrainedModel, spec: str, out: Path, measured: list[MeasuredRecord], tables: dict[str, Table], as_json: bool
) -> None:
    """Say what was measured, and what to do with the plan whose weights are in `out`."""
    last = measured[-1]
    verdict = Verdict.on(net, last.plan, last.quality, last.text, last.model)
    verdict = replace(verdict, next=what_next(verdict, spec, out)[1])
    conclude(verdict, tables, measured, as_json=as_json)
