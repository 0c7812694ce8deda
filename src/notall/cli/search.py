"""notall search, plan and criteria: choose what to skip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..experiments.measured import warn_if_worse
from ..experiments.options import HeldOutOptions, KeepLast, ModelOptions, PlanOptions
from ..experiments.repair import RepairOptions
from ..experiments.search import (
    COLUMNS,
    BudgetOptions,
    ObjectiveOptions,
    Search,
    SpaceOptions,
    StopOptions,
)
from ..options import Json, Option, RunOptions, Workload
from ..plan import Plan
from ..results.facts import FOOTPRINT, PLAN_CHECKS, Footprint
from ..results.progress_bars import progress_bar
from ..results.record import Fact
from ..results.repairs import MEASURED
from ..results.table import Column, table, within, words
from ..results.terminal import Tables, show
from .app import CHOOSE, command
from .ending import conclude

PlanFile = Annotated[Path, Option("where to write the plan", ("--out", "-o"))]


@command(CHOOSE, example="notall search smollm2 --skip attention:8 -o plan.json")
def search(
    model: ModelOptions,
    space: SpaceOptions,
    budget: BudgetOptions,
    by: ObjectiveOptions,
    until: StopOptions,
    repair: RepairOptions,
    run: RunOptions,
    text: HeldOutOptions = HeldOutOptions(sequences=16, length=512, batch_size=2),
    workload: Workload = Workload(prompt_tokens=512, generation_tokens=128),
    out: PlanFile = Path("plan.json"),
) -> None:
    """Choose what to skip, by the search or another importance criterion, to meet a budget.

    It keeps its evaluations in OUT.search, and `notall report` makes a page of them.
    If you interrupt it, the same command continues where it stopped.
    """
    asked = Search(model, space, text, budget, workload, by, until, repair, out, run.seed)
    with progress_bar() as progress:
        done = asked.run(progress)
    title = f"{out}: {done.budget}, skip {done.record.plan}"
    tables: Tables = {"search": (table(title, COLUMNS, [done.record]), [done.record])}
    if done.measured:
        tables["quality"] = (table("before the repair, and after it", MEASURED, done.measured), done.measured)
    if done.passkeys:
        note = "numbers found again far back, which perplexity does not see; worse: p < 0.05, and five a row are few"
        tables["passkeys"] = (table(note, PLAN_CHECKS, done.passkeys), done.passkeys)
    show(tables, as_json=run.as_json, also={"verdict": done.verdict.fact()})
    warn_if_worse(done.measured)
    conclude(done.verdict, as_json=run.as_json)


class Weighed(Fact):
    """A model and what it weighs."""

    model: str
    footprint: Footprint


WEIGHED: tuple[Column[Weighed], ...] = (
    words("model", lambda one: one.model),
    *within(FOOTPRINT, lambda one: one.footprint),
)


@command(CHOOSE, example="notall plan smollm2 --skip attention:0.33 --keep-last -o plan.json")
def plan(
    model: ModelOptions,
    skip: Annotated[
        str, Option("what to leave out, and how many of it or what share", metavar="attention|mlp|block[:HOW MANY]")
    ] = "attention:0.33",
    keep_last: KeepLast = False,
    out: PlanFile = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Write the paper's plan, which skips the deepest: `search --criterion deepest`, from a config alone."""
    from ..models.loading import dtype_name
    from ..running.footprint import footprint

    net = model.empty()
    chosen = PlanOptions(skip=skip, keep_last=keep_last).of(net)
    chosen.save(out)
    weighed = [
        Weighed(model=name, footprint=footprint(net, one)) for name, one in (("dense", Plan()), ("skipped", chosen))
    ]
    show({"plan": (table(f"{out}: skip {chosen}, in {dtype_name(net)}", WEIGHED, weighed), weighed)}, as_json=as_json)


class CriterionFact(Fact):
    """A way to choose."""

    criterion: str
    of: str
    goes_by: str


@command(CHOOSE, example="notall criteria --json")
def criteria(as_json: Json = False) -> None:
    """List the importance criteria: what each goes by, and where it comes from."""
    from ..choosing.criteria import every_criterion

    found = [
        CriterionFact(criterion=one.name, of=", ".join(one.kinds), goes_by=one.description)
        for one in every_criterion().values()
    ]
    columns: tuple[Column[CriterionFact], ...] = (
        words("criterion", lambda one: one.criterion),
        words("of", lambda one: one.of),
        words("goes by", lambda one: one.goes_by),
    )
    show({"criteria": (table("criteria", columns, found), found)}, as_json=as_json)
