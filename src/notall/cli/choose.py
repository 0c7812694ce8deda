"""notall compare, search, plan and criteria: choose what to skip."""

from pathlib import Path
from typing import Annotated

from ..errors import shortened
from ..experiments.compare import run as comparing
from ..experiments.compare.options import CompareOptions, check_runs
from ..experiments.folder import check_folder
from ..experiments.options.model import ModelOptions
from ..experiments.options.plan import LAST_TOKENS_HELP, PHASE, KeepLast, PlanOptions
from ..experiments.options.tasks import TaskOptions, refuse_judging
from ..experiments.options.text import HeldOutOptions, Split
from ..experiments.recovery import RecoveryOptions
from ..experiments.repair import RepairOptions
from ..experiments.search.options import BudgetOptions, ObjectiveOptions, SpaceOptions
from ..experiments.search.run import Search, Searched
from ..experiments.subject import Subject
from ..experiments.verdict import prompt_in_words
from ..models.gguf_sizes import size_notes
from ..models.names import model_in_words
from ..options import Json, Option, OutFolder, RunOptions, Workload
from ..plan import Phase, Plan, several
from ..report.comparison_tables import (
    TIMED_ONCE,
    columns_of,
    timed_once,
    write_comparison,
)
from ..report.plans import scores_table
from ..report.search import COLUMNS
from ..results.facts import FOOTPRINT, Footprint
from ..results.provenance import Provenance, behind, place_of, windows_in_words
from ..results.record import Fact
from ..results.repairs import MEASURED
from ..results.table import Column, Table, table, within, words
from ..results.terminal import next_report, progress_bar, show
from .app import command, conclude


@command(
    example=(
        "notall compare smollm2 --held-out book.txt --skip attention:4,8 --skip"
        " portable:8 --out comparison"
    )
)
def compare(
    model: ModelOptions,
    how: CompareOptions,
    tasks: TaskOptions,
    run: RunOptions,
    text: HeldOutOptions = HeldOutOptions(sequences=16, length=512, batch_size=2),
    workload: Workload = Workload(rounds=0),
    out: OutFolder = Path("comparison"),
) -> None:
    """Compare ways to choose on held-out text: each criterion at each budget, and what
    it took to find the plan.

    Plans are timed where --rounds says how often. If you interrupt it, the
    same command continues where it stopped.
    """
    check_folder(out, "compare")
    text.check()
    choice = tasks.check(objectives=how.check())
    by_answers = any("answers" in one for one in how.objective)
    refuse_judging(choice, [text.text], how.prompts if by_answers else None)
    net, tokenizer = model.load()
    timed = workload if workload.rounds else None
    runs = how.runs(net)
    check_runs(net, runs, timed)
    comparing.check_given(net, how.given.values())
    prompt = how.prompt_of(text.length)
    split = text.split(net, tokenizer, seed=run.seed)
    batches, about = split.calibration, model.provenance(net, **split.described)
    with progress_bar() as progress:
        records = comparing.compare_criteria(
            Subject(net, tokenizer, split.evaluation, out, about, run.seed),
            runs,
            how.objectives(net, tokenizer, batches, choice),
            comparing.Measuring(
                tasks=choice,
                workload=timed,
                repairs=how.repair,
                repair_text=batches,
                given=how.given,
                prompt_tokens=prompt,
            ),
            progress=progress,
        )
    title = (
        f"Ways to choose what {shortened(model_in_words(about.what['model']))} skips"
    )
    write_comparison(records, out, title, _made(about, split, timed, prompt))
    title = f"{several(len(records), 'choice')} in {out}"
    tables = {"comparison": table(title, columns_of(records), records)}
    where = (
        f"The whole table is in {out / 'table.md'}, .tex and .csv, the plans are in"
        f" {out / 'plans'}."
    )
    once = [TIMED_ONCE] if timed_once(records) else []
    show(tables, as_json=run.as_json, then=(*once, where, next_report(out)))


def _made(
    about: Provenance, split: Split, timed: Workload | None, prompt: int | None
) -> str:
    """By what plans are chosen, on what they are measured, and how they are timed."""
    others = "as many other ones"
    if not split.is_same:
        others = f"as many of {split.held_out.text.name}"
    made = (
        f"Chosen by {windows_in_words(split.described)}, measured on"
        f" {others}{behind(prompt)}, in {about.what['dtype']}."
    )
    if timed is None:
        return made
    place = place_of(about.where["machine"], versions=False)
    asked = (
        f"{several(timed.prompt_tokens, 'prompt token')} and {timed.generation_tokens}"
        " generated"
    )
    return f"{made} Times of {asked}, {several(timed.rounds, 'round')}, on {place}."


EXACT = (
    "No answer reads what this leaves out of the prompt: it changes nothing but the"
    " time to the first token."
)
PlanOut = Annotated[Path, Option("where to write the plan", ("--out", "-o"))]


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
    out: PlanOut = Path("plan.json"),
) -> None:
    """Choose what to skip, by the search or another importance criterion, to meet a
    budget.

    With --recovery it also measures tasks. With no other budget it skips as much as
    keeps their scores: without a --phase both for every token, in OUT, and for a
    prompt's alone, in OUT-prefill.json.
    It keeps its evaluations in OUT.search, and `notall report` makes a page of them.
    With --repair it reads twice --sequences windows. If you interrupt it, the same
    command continues where it stopped.
    """
    asked = Search(
        model, space, text, budget, workload, by, repair, tasks, out, run.seed
    )
    with progress_bar() as progress:
        done, *others = asked.run(progress)
    tables = _tables_of(done)
    for other in others:  # of the prompt alone
        tables |= {f"{name}_prefill": one for name, one in _tables_of(other).items()}
    also = {"prefill": others[0].verdict} if others else {}
    measured = [one for each in (done, *others) for one in each.measured]
    conclude(done.verdict, tables, measured, also=also, as_json=run.as_json)


def _tables_of(done: Searched) -> dict[str, Table]:
    title = f"{done.out}: {done.budget}, skip {done.record.plan}"
    tables = {"search": table(title, COLUMNS, [done.record])}
    if done.measured:
        quality = table("before the repair, and after it", MEASURED, done.measured)
        tables["quality"] = quality
    if done.scores:
        tables["tasks"] = scores_table(done.scores)
    return tables


class Weighed(Fact):
    """A model and what it weighs: a row of the table."""

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
        str,
        Option(
            "what to skip, and how many of it or what share",
            metavar="attention|mlp|block[:HOW MANY]",
        ),
    ] = "attention:0.33",
    keep_last: KeepLast = False,
    phase: Annotated[Phase, Option(PHASE)] = "all",
    last_tokens: Annotated[int, Option(LAST_TOKENS_HELP, least=1)] = 1,
    out: PlanOut = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Write the paper's plan, which skips the deepest: `search --criterion deepest`,
    from a config alone.

    With --phase prefill the plan skips them for a prompt's tokens alone, and decoding
    stays as it is. `--skip block:1` then costs nothing: no answer reads what the last
    block makes of earlier tokens.
    """
    from ..models.loading import dtype_name
    from ..running.skipping import footprint
    from ..structure.locating import locate

    net = model.empty()
    asked = PlanOptions(None, skip, keep_last, phase, last_tokens)
    asked.check()
    chosen = asked.of(net)
    chosen.save(out)
    plans = {"dense": Plan(), "skipped": chosen}
    weighed = [
        Weighed(model=name, footprint=footprint(net, one))
        for name, one in plans.items()
    ]
    saved = prompt_in_words(locate(net), chosen)
    then = [saved] if saved and not len(chosen) else []
    then += [EXACT] if locate(net).is_unread(chosen) else []
    then += size_notes(model.model, chosen)
    tables = {
        "plan": table(f"{out}: skip {chosen}, in {dtype_name(net)}", WEIGHED, weighed)
    }
    show(tables, as_json=as_json, then=then)


class CriterionFact(Fact):
    """An importance criterion: what it chooses among, and by what."""

    criterion: str
    of: str
    goes_by: str


CRITERIA_COLUMNS: tuple[Column[CriterionFact], ...] = (
    words("criterion", lambda one: one.criterion),
    words("of", lambda one: one.of),
    words("goes by", lambda one: one.goes_by),
)


@command(example="notall criteria --json")
def criteria(as_json: Json = False) -> None:
    """List the importance criteria, their inputs and their sources."""
    from ..choosing.criteria import every_criterion

    found = [
        CriterionFact(
            criterion=one.name, of=", ".join(one.kinds), goes_by=one.description
        )
        for one in every_criterion().values()
    ]
    show({"criteria": table("criteria", CRITERIA_COLUMNS, found)}, as_json=as_json)
