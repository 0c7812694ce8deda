"""notall compare, search, plan and criteria: choose what to skip."""

from pathlib import Path
from typing import Annotated

from ..errors import shortened
from ..experiments import compare as comparing
from ..experiments.driver import Subject
from ..experiments.folder import check_folder
from ..experiments.options import HeldOutOptions, KeepLast, ModelOptions, PlanOptions, TaskOptions
from ..experiments.recovery import RecoveryOptions, scores_table
from ..experiments.repair import RepairOptions
from ..experiments.search import COLUMNS, BudgetOptions, ObjectiveOptions, Search, SpaceOptions
from ..files import Settings
from ..models.gguf_sizes import size_notes
from ..models.names import model_in_words
from ..options import Json, Option, OutFolder, RunOptions, Workload
from ..plan import Plan
from ..results.facts import FOOTPRINT, Footprint
from ..results.provenance import Provenance, place_of, windows_in_words
from ..results.record import Fact
from ..results.repairs import MEASURED
from ..results.table import Column, table, within, words
from ..results.terminal import next_report, progress_bar, show
from .app import command, conclude


@command(example="notall compare smollm2 --held-out book.txt --skip attention:4,8 --skip portable:8 --out comparison")
def compare(
    model: ModelOptions,
    how: comparing.CompareOptions,
    tasks: TaskOptions,
    run: RunOptions,
    text: HeldOutOptions = HeldOutOptions(sequences=16, length=512, batch_size=2),
    workload: Workload = Workload(rounds=0),
    out: OutFolder = Path("comparison"),
) -> None:
    """Compare ways to choose on held-out text: each criterion at each budget, and what it took to find the plan.

    Plans are timed where --rounds says how often. The criterion `quadratic` needs the extra `solver`; without it, the
    others are compared. If you interrupt it, the same command continues where it stopped.
    """
    check_folder(out, "compare")
    text.check()
    choice = tasks.check(objectives=how.check())
    net, tokenizer = model.load()
    batches, held_out, described = text.both(net, tokenizer, seed=run.seed)
    about = model.provenance(net, **described)
    timed = workload if workload.rounds else None
    with progress_bar() as progress:
        records = comparing.compare_criteria(
            Subject(net, tokenizer, held_out, out, about, run.seed),
            how.runs(net),
            how.objectives(net, tokenizer, batches, choice),
            tasks=choice,
            workload=timed,
            repairs=how.repair,
            repair_text=batches,
            progress=progress,
        )
    title = f"Ways to choose what {shortened(model_in_words(about.what['model']))} skips"
    comparing.write_comparison(records, out, title, _made(about, described, timed))
    tables = {"comparison": table(f"{len(records)} choices in {out}", comparing.columns_of(records), records)}
    where = f"The whole table is in {out / 'table.md'}, .tex and .csv, the plans are in {out / 'plans'}."
    once = [comparing.TIMED_ONCE] if comparing.timed_once(records) else []
    show(tables, as_json=run.as_json, then=(*once, where, next_report(out)))


def _made(about: Provenance, described: Settings, timed: Workload | None) -> str:
    held_out = str(described.get("held_out"))
    others = f"as many of {Path(held_out).name}" if "held_out_sha256" in described else "as many other ones"
    made = f"Chosen by {windows_in_words(described)}, measured on {others}, in {about.what['dtype']}."
    if timed is None:
        return made
    place = place_of(about.where["machine"], versions=False)
    asked = f"{timed.prompt_tokens} prompt tokens and {timed.generation_tokens} new ones, {timed.rounds} rounds"
    return f"{made} Times of {asked}, on {place}."


PlanFile = Annotated[Path, Option("where to write the plan", ("--out", "-o"))]


@command(example="notall search smollm2 --skip attention:8 -o plan.json")
def search(
    model: ModelOptions,
    space: SpaceOptions,
    budget: BudgetOptions,
    by: ObjectiveOptions,
    repair: RepairOptions,
    tasks: RecoveryOptions,
    run: RunOptions,
    text: HeldOutOptions = HeldOutOptions(sequences=8, length=512, batch_size=2),
    workload: Workload = Workload(prompt_tokens=512, generation_tokens=128),
    out: PlanFile = Path("plan.json"),
) -> None:
    """Choose what to skip, by the search or another importance criterion, to meet a budget.

    With --recovery it also measures tasks. With no other budget it skips as much as keeps their scores.
    It keeps its evaluations in OUT.search, and `notall report` makes a page of them.
    With --repair it reads twice --sequences windows. If you interrupt it, the same command continues where it stopped.
    """
    asked = Search(model, space, text, budget, workload, by, repair, tasks, out, run.seed)
    with progress_bar() as progress:
        done = asked.run(progress)
    tables = {"search": table(f"{out}: {done.budget}, skip {done.record.plan}", COLUMNS, [done.record])}
    if done.measured:
        tables["quality"] = table("before the repair, and after it", MEASURED, done.measured)
    if done.scores:
        tables["tasks"] = scores_table(done.scores)
    conclude(done.verdict, tables, done.measured, as_json=run.as_json)


class Weighed(Fact):
    model: str
    footprint: Footprint


WEIGHED: tuple[Column[Weighed], ...] = (
    words("model", lambda one: one.model),
    *within(FOOTPRINT, lambda one: one.footprint),
)


@command(example="notall plan smollm2 --skip attention:0.33 --keep-last -o plan.json")
def plan(
    model: ModelOptions,
    skip: Annotated[
        str, Option("what to skip, and how many of it or what share", metavar="attention|mlp|block[:HOW MANY]")
    ] = "attention:0.33",
    keep_last: KeepLast = False,
    out: PlanFile = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Write the paper's plan, which skips the deepest: `search --criterion deepest`, from a config alone."""
    from ..models.loading import dtype_name
    from ..running.skipping import footprint

    net = model.empty()
    chosen = PlanOptions(skip=skip, keep_last=keep_last).of(net)
    chosen.save(out)
    plans = {"dense": Plan(), "skipped": chosen}
    weighed = [Weighed(model=name, footprint=footprint(net, one)) for name, one in plans.items()]
    title, notes = f"{out}: skip {chosen}, in {dtype_name(net)}", size_notes(model.model, chosen)
    show({"plan": table(title, WEIGHED, weighed)}, as_json=as_json, then=notes)


class CriterionFact(Fact):
    criterion: str
    of: str
    goes_by: str


CRITERIA: tuple[Column[CriterionFact], ...] = (
    words("criterion", lambda one: one.criterion),
    words("of", lambda one: one.of),
    words("goes by", lambda one: one.goes_by),
)


@command(example="notall criteria --json")
def criteria(as_json: Json = False) -> None:
    """List the importance criteria, their inputs and their sources."""
    from ..choosing.criteria import every_criterion

    found = [
        CriterionFact(criterion=one.name, of=", ".join(one.kinds), goes_by=one.description)
        for one in every_criterion().values()
    ]
    show({"criteria": table("criteria", CRITERIA, found)}, as_json=as_json)
