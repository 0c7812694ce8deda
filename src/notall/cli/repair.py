"""notall repair and heal: make up for what a plan skips."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import UsageError
from ..experiments import repair as repairs
from ..experiments.folder import check_folder
from ..experiments.next_commands import what_next
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import read_plan
from ..experiments.options.tasks import TaskChoice, refuse_judging
from ..experiments.recovery import RecoveryOptions, judged
from ..experiments.repair import METHOD_HELP, REFIT, FitOptions
from ..experiments.used import uses_of
from ..experiments.verdict import Verdict
from ..options import Option, RunOptions
from ..plan import Plan, refuse_nothing_to_train
from ..repairing.fit_texts import SEQUENCES
from ..repairing.train_config import TrainConfig
from ..report.measured import refits_table
from ..report.plans import scores_table
from ..results.facts import State
from ..results.ledger import read_records
from ..results.lines import refuse_unwritable
from ..results.provenance import Provenance
from ..results.repairs import HEALING, MEASURED, HealRecord
from ..results.table import Table, table
from ..results.terminal import progress_bar
from .app import command, conclude

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..repairing.texts import RepairTexts

WeightsFolder = Annotated[
    Path, Option("folder for the plan and its weights", ("--out", "-o"))
]
PlanFile = Annotated[
    Path | None, Option("plan file, folder of a repair, or published:NAME")
]


@command(
    example=(
        "notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl"
        " --out repaired"
    )
)
def repair(
    model: ModelOptions,
    text: FitOptions,
    tasks: RecoveryOptions,
    run: RunOptions,
    plan: PlanFile = None,
    repair: Annotated[str, Option(f"how: {METHOD_HELP}", metavar="METHOD")] = REFIT,
    offload: Annotated[
        Path | None,
        Option("keep streams in files of a folder, if memory is short", (), "DIR"),
    ] = None,
    minutes: Annotated[
        float | None,
        Option(
            "then train for M minutes of CPU time, of all threads together", metavar="M"
        ),
    ] = None,
    out: WeightsFolder = Path("repaired"),
) -> None:
    """Refit the remaining weights, to recover a part of the loss.

    Without --minutes nothing is trained. OUT is a plan with weights: give it as --plan
    to eval, bench or export. No tensor is added, and it costs nothing later. For a plan
    that skips in the prompt alone it refits the prompt's keys and values instead, and
    puts linear maps in the place of MLPs; these weights are added. If you interrupt it,
    the same command continues where it stopped.
    """
    from ..repairing.healing import Training
    from ..repairing.methods import recover, repair_into
    from ..running.repaired import RepairedPlan

    config = TrainConfig(minutes=minutes, seed=run.seed)
    check_folder(out, "heal" if minutes else "repair")
    if offload:
        refuse_unwritable(offload)
    repairs.check_method(repair, offload)
    asked = _begun(model, plan, text, tasks, run.seed, training=bool(minutes))
    texts = asked.texts
    plans: dict[State, RepairedPlan] = {}
    with progress_bar() as progress:
        if minutes:
            # of the windows of a training as many as a repair has by default
            most = None if text.sequences else SEQUENCES
            train, stop = texts.together(repairs.STEP), texts.stop(repairs.STEP)
            plans["repaired"], plans["healed"] = recover(
                out,
                repair,
                asked.net,
                Training(asked.plan, train, stop, config),
                texts.together(text.batch_size, most),
                asked.settings,
                progress,
                offload,
            )
        else:
            plans["repaired"] = repair_into(
                out,
                repair,
                asked.net,
                asked.plan,
                texts.together(text.batch_size),
                asked.settings,
                progress,
                offload,
            )
    tables = {}
    if repair == REFIT:
        tables["refits"] = refits_table(plans["repaired"], out)
    asked.end({"skipped": asked.plan, **plans}, out, tables, run.as_json)


@command(
    example=(
        "notall heal smollm2 --plan repaired --text book.txt --text pages.jsonl --out"
        " healed"
    )
)
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
    """Train the remaining weights for some minutes by KL to the original model:
    recovery fine-tuning.

    The plan may be repaired already. Without --minutes, training stops early when
    held-out loss no longer falls. OUT is a plan with weights, like that of `notall
    repair`. If you interrupt it, the same command continues where it stopped.
    """
    from ..repairing.healing import heal as heal_plan
    from ..repairing.texts import sampled

    check_folder(out, "heal")
    config = how.config(run.seed)
    workers = cluster.workers(model, text.batch_size)
    asked = _begun(
        model,
        plan,
        text,
        tasks,
        run.seed,
        training=True,
        refuse=refuse_nothing_to_train,
    )
    if text.sample:
        settings = Provenance.of(asked.settings, sampled=True)
        asked = replace(asked, settings=settings)
    with progress_bar() as progress:
        fit = asked.texts.together(text.batch_size)
        stop = asked.texts.stop(text.batch_size)
        if text.sample:
            fit = sampled(
                asked.net, fit, out, asked.settings, seed=run.seed, progress=progress
            )
        healed = heal_plan(
            asked.net,
            asked.plan,
            fit,
            stop,
            config,
            out=out,
            provenance=asked.settings,
            workers=workers,
            progress=progress,
        )
    asked.end({asked.plan.state: asked.plan, "healed": healed}, out, {}, run.as_json)


@dataclass(frozen=True)
class RepairInputs:
    """A model, a plan that fits it, texts, tasks, and where figures come from."""

    spec: str
    net: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    plan: Plan
    texts: "RepairTexts"
    tasks: TaskChoice
    settings: Provenance

    def end(
        self,
        plans: Mapping[State, Plan],
        out: Path,
        tables: dict[str, Table],
        as_json: bool,
    ) -> None:
        """Measure the states of the plan whose weights are in `out`, and report it, and
        what to do with them.
        """
        from ..repairing.texts import measure_on_texts

        with progress_bar() as progress:
            measured = measure_on_texts(
                self.net, plans, self.texts.other, out, self.settings, progress
            )
            scores = judged(
                self.net,
                self.tokenizer,
                plans,
                self.tasks,
                out,
                self.settings,
                progress,
            )
        if looks := read_records(out / HealRecord.file, HealRecord):
            tables["healing"] = table(
                f"{out}: what it loses on text that was not trained on", HEALING, looks
            )
        tables["quality"] = table(
            f"skip {self.plan}: before and after", MEASURED, measured
        )
        if scores:
            tables["tasks"] = scores_table(scores)
        # of the last state of the plan, a record for each text
        last_state = measured[-1].model
        first, *others = (one for one in measured if one.model == last_state)
        verdict = Verdict.on(
            self.net, first.plan, first.quality, first.text, first.model, self.spec
        )
        verdict = replace(verdict, also={one.text: one.quality for one in others})
        verdict = verdict.judged(scores, self.tasks.recovery)
        _, command = what_next(verdict, self.spec, out)
        verdict = replace(verdict, next=command)
        conclude(verdict, tables, measured, as_json=as_json)


def _begun(
    model: ModelOptions,
    path: Path | None,
    text: FitOptions,
    tasks: RecoveryOptions,
    seed: int,
    *,
    training: bool,
    refuse: Callable[[Plan], None] = lambda plan: None,
) -> RepairInputs:
    """What a command is asked for; with windows to stop a training by, where there is
    one. `refuse` raises for a plan that the command can't take.
    """
    from ..repairing.prompt_refit import refuse_nothing_to_refit
    from ..structure.locating import locate

    if path is None:
        raise UsageError(
            "give the plan with --plan: `notall search` or `notall plan` writes one"
        )
    plan = read_plan(path)
    refuse(plan)
    text.check()
    model.check_plan(plan)
    choice = tasks.check()
    refuse_judging(choice, text.text)
    net, tokenizer = model.load()
    structure = locate(net)
    plan.check(structure)
    refuse_nothing_to_refit(structure, plan)
    texts = text.draw(net, tokenizer, seed, uses_of(plan, path), training=training)
    return RepairInputs(
        model.model,
        net,
        tokenizer,
        plan,
        texts,
        choice,
        model.provenance(net, **texts.described),
    )
