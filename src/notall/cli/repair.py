"""notall repair and heal: make up for what a plan skips."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UsageError
from ..experiments import repair as repairs
from ..experiments.folder import check_folder
from ..experiments.options import ModelOptions, TaskChoice, read_plan
from ..experiments.recovery import RecoveryOptions, judged, scores_table
from ..experiments.repair import METHODS, REFIT, FitOptions
from ..experiments.verdict import Verdict, what_next
from ..options import Option, RunOptions
from ..plan import Plan
from ..results.facts import State
from ..results.ledger import read
from ..results.lines import refuse_unwritable
from ..results.provenance import Provenance
from ..results.repairs import HEALING, MEASURED, HealRecord
from ..results.table import Table, table
from ..results.terminal import progress_bar
from .app import command, conclude

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..repairing.texts import RepairTexts

WeightsFolder = Annotated[Path, Option("folder for the plan and its weights", ("--out", "-o"))]
PlanFile = Annotated[Path | None, Option("plan file, folder of a repair, or published:NAME")]


@command(example="notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl --out repaired")
def repair(
    model: ModelOptions,
    text: FitOptions,
    tasks: RecoveryOptions,
    run: RunOptions,
    plan: PlanFile = None,
    repair: Annotated[str, Option(f"how: {METHODS}", metavar="METHOD")] = REFIT,
    offload: Annotated[
        Path | None, Option("keep the text's streams in files in this folder, if memory is short", metavar="DIR")
    ] = None,
    out: WeightsFolder = Path("repaired"),
) -> None:
    """Refit the remaining weights, to recover a part of the loss.

    Nothing is trained, no tensor is added, and it costs nothing later. OUT is a plan with weights: give it as
    --plan to eval, generate, bench or export. If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.methods import repair_into

    check_folder(out, "repair")
    if offload:
        refuse_unwritable(offload)
    repairs.check_method(repair, offload)
    asked = _begun(model, plan, text, tasks, run.seed)
    with progress_bar() as progress:
        fit, skipped = asked.texts.together(text.batch_size), asked.plan
        repaired = repair_into(out, repair, asked.net, skipped, fit, asked.settings, progress, offload)
    tables = {"refits": repairs.refits_table(repaired, out)} if repair == REFIT else {}
    title = f"skip {skipped}: before the repair and after it"
    asked.end({"skipped": skipped, "repaired": repaired}, out, tables, title, run.as_json)


@command(example="notall heal smollm2 --plan repaired --text book.txt --text pages.jsonl --out healed")
def heal(
    model: ModelOptions,
    text: repairs.HealTexts,
    how: repairs.HealOptions,
    tasks: RecoveryOptions,
    cluster: repairs.HealRayOptions,
    run: RunOptions,
    plan: PlanFile = None,
    out: WeightsFolder = Path("healed"),
) -> None:
    """Train the remaining weights for some minutes by KL to the original model: recovery fine-tuning.

    The plan may be repaired already. Training stops early when text that it does not train on no longer gains.
    OUT is a plan with weights, like that of `notall repair`.
    If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.healing import heal as heal_plan
    from ..repairing.texts import sampled

    check_folder(out, "heal")
    config, workers = how.config(run.seed), cluster.workers(model, text.batch_size)
    asked = _begun(model, plan, text, tasks, run.seed, most=repairs.TOKENS // text.length)
    net, wanted, texts, settings = asked.net, asked.plan, asked.texts, asked.settings
    settings = Provenance.of(settings, sampled=True) if text.sample else settings
    with progress_bar() as progress:
        fit, stop = texts.together(text.batch_size), texts.stop(text.batch_size)
        if text.sample:
            fit = sampled(net, fit, out, settings, seed=run.seed, progress=progress)
        healed = heal_plan(
            net, wanted, fit, stop, config, out=out, provenance=settings, workers=workers, progress=progress
        )
    looks, title = read(out / HealRecord.file, HealRecord), "what it loses on text that was not trained on"
    tables = {"healing": table(f"{out}: {title}", HEALING, looks)}
    title = f"skip {wanted}: before the healing and after it"
    replace(asked, settings=settings).end({wanted.state: wanted, "healed": healed}, out, tables, title, run.as_json)


@dataclass(frozen=True)
class Asked:
    """A model, a plan that fits it, texts, tasks, and where figures come from."""

    spec: str
    net: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    plan: Plan
    texts: "RepairTexts"
    tasks: TaskChoice
    settings: Provenance

    def end(self, plans: Mapping[State, Plan], out: Path, tables: dict[str, Table], title: str, as_json: bool) -> None:
        """Measure the states of the plan whose weights are in `out`, and say it, and what to do with them."""
        from ..repairing.texts import measure

        with progress_bar() as progress:
            measured = measure(self.net, plans, self.texts.other, out, self.settings, progress)
            scores = judged(self.net, self.tokenizer, plans, self.tasks, out, self.settings, progress)
        tables = tables | {"quality": table(title, MEASURED, measured)}
        if scores:
            tables["tasks"] = scores_table(scores)
        last = measured[-1]
        verdict = Verdict.on(self.net, last.plan, last.quality, last.text, last.model)
        verdict = verdict.judged(scores, self.tasks.recovery)
        verdict = replace(verdict, next=what_next(verdict, self.spec, out)[1])
        conclude(verdict, tables, measured, as_json=as_json)


def _begun(
    model: ModelOptions, path: Path | None, text: FitOptions, tasks: RecoveryOptions, seed: int, most: int | None = None
) -> Asked:
    """What a command is asked for, with at most so many windows of texts."""
    from ..structure.locating import locate

    if path is None:
        raise UsageError("give the plan with --plan: `notall search` or `notall plan` writes one")
    plan = read_plan(path)
    text.check()
    choice = tasks.check()
    net, tokenizer = model.load()
    plan.check(locate(net))
    texts = text.draw(net, tokenizer, seed, most)
    return Asked(model.model, net, tokenizer, plan, texts, choice, model.provenance(net, **texts.described))
