"""Commands that choose what to skip."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, shortened
from ..models.names import model_in_words
from ..records.columns import Row
from ..records.provenance import place_of, windows_of
from ..reporting.console import Shown, say, show, show_all
from ..reporting.extras import FIGURES, installed, need
from ..reporting.progress_bars import progress_bar
from .app import CHOOSE, app
from .checks import check_file, check_folders, check_objectives, check_texts
from .ending import conclude, warn_if_worse
from .inputs import (
    AskedBudget,
    Loading,
    asked_budget,
    budget_line,
    deepest_plan,
    empty_model,
    load_model,
    provenance_of,
    space_of,
    two_texts,
    words_of,
)
from .options import (
    BUDGET,
    BatchSize,
    Device,
    DeviceMap,
    Dtype,
    Json,
    KeepFirst,
    KeepLast,
    Kind,
    Length,
    Model,
    New,
    Objective,
    OwnDtype,
    Portable,
    Prompt,
    Prompts,
    Revision,
    Seed,
    Sequences,
    SkippedKind,
    TaskLimit,
    TaskPath,
    TextSource,
    Trust,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.choice import ChosenPlan
    from ..choosing.comparison import Aim
    from ..choosing.space import Space
    from ..records.measured import State
    from ..records.plan import Plan
    from ..records.provenance import Provenance
    from ..reporting.verdict import Verdict

of_budget = partial(typer.Option, rich_help_panel=BUDGET)


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example:  notall plan smollm2 --skip attention --fraction 0.33 --keep-last -o plan.json",
)
def plan(
    model: Model = "smollm2",
    skip: Annotated[
        SkippedKind, typer.Option(metavar="KIND", help="what to leave out: attention, mlp or block")
    ] = SkippedKind.attention,
    fraction: Annotated[
        float, typer.Option(help="share of the layers to skip, 0 to 1; round(fraction x layers) are skipped")
    ] = 0.33,
    keep_last: Annotated[bool, typer.Option("--keep-last", help="preserve the last layer")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    dtype: OwnDtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write the paper's plan, which skips the deepest sublayers. This needs only a config."""
    from ..models.loading import dtype_name
    from ..records.plan import Plan
    from ..running.footprint import footprint
    from .columns import FOOTPRINT_COLUMNS

    net = empty_model(model, dtype, revision, trust_remote_code)
    chosen = deepest_plan(net, skip, fraction, keep_last)
    chosen.save(out)
    rows = [
        {"model": name, **asdict(footprint(net, which))} for name, which in (("dense", Plan()), ("skipped", chosen))
    ]
    show(rows, FOOTPRINT_COLUMNS, as_json=as_json, title=f"{out}: skip {chosen}, in {dtype_name(net)}")


@app.command(rich_help_panel=CHOOSE, epilog="Example:  notall search smollm2 --kind attention --count 8 -o plan.json")
def search(
    model: Model = "smollm2",
    text: TextSource = "prose",
    held_out: Annotated[
        str | None, typer.Option(help="text to measure the plan on (default: other windows of --text)")
    ] = None,
    kind: Kind = "sublayer",
    portable: Portable = False,
    keep_first: KeepFirst = False,
    keep_last: KeepLast = False,
    count: Annotated[float | None, of_budget(help="skip this many, or this share of them if below 1")] = None,
    params: Annotated[float | None, of_budget(help="save this many parameters, or this share of them")] = None,
    weights: Annotated[float | None, of_budget(help="save this many bytes of weights, or this share")] = None,
    kv: Annotated[float | None, of_budget(help="save this many bytes of KV cache a token, or this share")] = None,
    speedup: Annotated[float | None, of_budget(help="run this many times as fast on this machine")] = None,
    max_nll: Annotated[
        float | None,
        of_budget(
            help="skip as much as possible while NLL rises by at most this many nats; you can add it to another budget"
        ),
    ] = None,
    max_kl: Annotated[float | None, of_budget(help="the same for KL")] = None,
    prompt: Annotated[int, of_budget(help="with --speedup: prompt tokens")] = 512,
    new: Annotated[int, of_budget(help="with --speedup: new tokens")] = 128,
    batch: Annotated[int, of_budget(help="with --speedup: sequences at once")] = 1,
    criterion: Annotated[
        str, typer.Option(help="how to choose: a name of `notall criteria`, or your own module:function")
    ] = "search",
    objective: Objective = None,
    prompts: Prompts = None,
    task_path: TaskPath = None,
    task_limit: TaskLimit = 100,
    max_minutes: Annotated[
        float | None,
        typer.Option(help="stop looking after this many minutes; loading, timing and measuring come on top"),
    ] = None,
    patience: Annotated[int, typer.Option(min=0, help="stop after this many evaluations that bring nothing")] = 12,
    repair: Annotated[
        bool, typer.Option("--repair", help="judge each set after a quick repair, and repair the plan that is chosen")
    ] = False,
    front: Annotated[
        bool, typer.Option("--front", help="also draw the trade-off up to this plan, beside other criteria")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    sequences: Sequences = 16,
    length: Length = 512,
    batch_size: BatchSize = 2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose what to skip, by the search or another criterion, to meet a budget.

    It keeps its evaluations beside the plan, in OUT.search, and `notall report` makes a page of them.
    If you interrupt it, the same command continues where it stopped.
    """
    folder, beside = _checked_places(out, repair)
    amounts = {"count": count, "params": params, "weights": weights, "kv": kv}
    amounts |= {"max_nll": max_nll, "max_kl": max_kl, "speedup": speedup}
    asked = _refuse_before_loading(criterion, objective, front, repair, amounts, max_minutes)
    from ..choosing.answer_objectives import build_objective
    from ..choosing.choice import choose_plan, keep_choice
    from ..choosing.comparison import Aim
    from ..choosing.latency import Workload
    from ..records.search import SearchRecord
    from .repairing import other_windows, repaired_by

    check_texts(text, held_out)
    shelf = check_objectives([objective or asked.aim], prompts, task_path)
    loading = Loading(model, dtype, device, device_map, revision=revision, trust_remote_code=trust_remote_code)
    net, tokenizer = load_model(loading)
    among = space_of(net, kind, portable, keep_first, keep_last)
    batches, others, about = two_texts(net, tokenizer, text, held_out, sequences, length, batch_size, seed, fewer=True)
    other = {name: about.pop(name) for name in ("held_out", "held_out_sha256") if name in about}
    workload = Workload(prompt, new, batch)
    asked.check(net, among, workload)
    goal = build_objective(
        objective or asked.aim, net, tokenizer, batches, prompts=prompts, task_path=shelf, task_limit=task_limit
    )
    budget = asked.of(net, among, workload)
    settings = provenance_of(net, model, revision, **about)
    with progress_bar() as bar:
        found = choose_plan(
            net,
            criterion,
            among,
            budget,
            batches,
            goal,
            folder=folder,
            settings=settings,
            max_minutes=max_minutes,
            patience=patience,
            seed=seed,
            held_out=others,
            after_repair=repair,
            progress=bar,
        )
        replaced = _replaced(out, found.plan)
        found.plan.save(out)
        plans: dict[State, Plan] = {"skipped": found.plan}
        if repair:
            plans["repaired"] = repaired_by(net, tokenizer, found.plan, [text], beside, settings, bar)
    if replaced is not None:
        typer.echo(f"note: {out} skipped {replaced} before, and is replaced", err=True)
    record = found.record(provenance_of(net, model, revision, **about, **other, fingerprint=found.plan.fingerprint))
    keep_choice(folder, record)
    if front:
        _draw_front(net, among, found.plan, Aim(goal, batches), others or batches, folder / "front", settings, seed)
    held = {other["held_out"] if held_out else f"other windows of {about['text']}": others}
    held = other_windows(net, tokenizer, [text]) if repair and not held_out else held
    measured = {"quality": _quality(net, plans, held, folder, settings)} if repair else {}
    quality = [*measured["quality"].rows] if repair else [record.row()]
    told = next(iter(held)), budget.description, beside if repair else out, text
    verdict = _verdict(net, model, found, plans, quality, *told)
    title = f"{out}: {budget.description}, skip {found.plan}"
    table = Shown([record.row() | {"verdict": verdict.row()}], SearchRecord.columns, title)
    _show(table, measured | _retrieval(net, tokenizer, plans, batches, seed), alone=not repair, as_json=as_json)
    warn_if_worse(quality if repair else ())
    conclude(verdict, as_json=as_json)


def _replaced(out: Path, plan: Plan) -> Plan | None:
    """What `out` skipped before, if that is something else."""
    from ..records.plan import Plan

    try:
        before = Plan.load(out)
    except UsageError:
        return None
    return None if before.identity == plan.identity else before


def _checked_places(out: Path, repair: bool) -> tuple[Path, Path]:
    """The folders of a search and of its repair, beside its plan. Raises `UsageError` where they cannot be written."""
    folder, beside = (out.with_name(f"{out.stem}.{end}") for end in ("search", "repaired"))
    check_folders(search=folder, repair=beside if repair else None)
    check_file(out)
    return folder, beside


def _show(found: Shown, others: dict[str, Shown], *, alone: bool, as_json: bool) -> None:
    """What was found, and other tables; `alone` and without others its rows are all of the JSON."""
    if others or not alone:
        show_all({"search": found} | others, as_json=as_json)
    else:
        show(found.rows, found.columns, as_json=as_json, title=found.title)


def _retrieval(
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plans: dict[State, Plan],
    windows: Sequence[Tensor],
    seed: int,
) -> dict[str, Shown]:
    """Of a hybrid that lost attentions, whether it still finds what was said far back; else nothing."""
    from ..evaluation.retrieval import look_far_back, may_lose_retrieval
    from ..structure.locating import locate
    from .columns import CHECK_COLUMNS

    if not may_lose_retrieval(locate(net), plans["skipped"]):
        return {}
    rows = look_far_back(net, tokenizer, {str(name): plan for name, plan in plans.items()}, windows, seed=seed)
    title = "numbers found again far back, which perplexity does not see; worse: p < 0.05, and five a row are few"
    return {"passkeys": Shown(rows, CHECK_COLUMNS, title)}


def _verdict(
    net: PreTrainedModel,
    model: str,
    found: ChosenPlan,
    plans: dict[State, Plan],
    quality: Sequence[Row],
    text: str,
    asked: str,
    made: Path,
    repair_text: str,
) -> Verdict:
    """On the last of `plans`, which is in `made`, with the last row of `quality`, if any, on `text`.

    `repair_text` is what to repair with, should that come next.
    """
    from ..models.names import DEFAULT_TEXT
    from ..reporting.message import LITTLE
    from ..reporting.verdict import Verdict, left_out_of, mending, next_command
    from ..structure.locating import locate

    verdict = Verdict(
        *left_out_of(net, [*plans.values()][-1]),
        quality=next((row for row in reversed(quality) if "delta_nll" in row), None),
        text=text,
        speedup=found.times.measured_speedup if found.times else None,
        missed=found.missed and f"{asked}: {found.missed}",
        late=not found.in_time,
    )
    if not found.plan:
        return verdict.then("", next_command("search", model, **{"max-nll": LITTLE}, out=made))
    if locate(net).seated:  # its layers are neither cut out of a checkpoint nor repaired
        timed = next_command("bench", model, plan=made)
        return verdict.then(timed, timed)
    pruned = made.with_name(f"{made.stem}-pruned")
    repaired: dict[str, object] = {} if "repaired" in plans else {"repair": True}
    if "repaired" not in plans and repair_text != DEFAULT_TEXT:
        repaired["repair-text"] = repair_text
    otherwise = next_command("export", model, plan=made, **repaired, to="hf", out=pruned)
    return verdict.then(mending(model, made, "repaired" in plans), otherwise)


def _quality(
    net: PreTrainedModel,
    plans: dict[State, Plan],
    texts: dict[str, list[Tensor]],
    folder: Path,
    settings: Provenance,
) -> Shown:
    """What the plans cost on held-out texts, before the repair and after it."""
    from ..repairing.measured import measure
    from .repairing import shown_quality

    with progress_bar() as bar:
        measured = measure(net, plans, texts, folder, settings, bar)
    return shown_quality(measured, "before the repair, and after it")


def _refuse_before_loading(
    criterion: str,
    objective: str | None,
    front: bool,
    repair: bool,
    amounts: dict[str, float | None],
    max_minutes: float | None,
) -> AskedBudget:
    """The budget that `amounts` are.

    Raises:
        UsageError: with the way out of what a search cannot do together, or without an extra.
    """
    from ..choosing.choice import check_minutes
    from ..choosing.criteria import criterion as criterion_of

    if front:
        need(*FIGURES)
    if "task:" in (objective or ""):
        need("lm_eval")
    if repair and (objective or amounts["max_nll"] is not None):
        raise UsageError("--repair judges sets by the KL that a repair leaves: leave --objective out, and --max-nll")
    need(*criterion_of(criterion).needs)
    check_minutes(max_minutes)
    return asked_budget(amounts)


def _draw_front(
    net: PreTrainedModel,
    among: Space,
    plan: Plan,
    by: Aim,
    held_out: Sequence[Tensor],
    folder: Path,
    settings: Provenance,
    seed: int,
) -> None:
    """The trade-off up to `plan`, as a table and a figure in `folder`."""
    from ..choosing.comparison import compare_front
    from ..choosing.space import WHOLE
    from ..reporting.comparison_files import write_comparison

    most = len(plan.blocks) // among.length if among.kind in WHOLE else len(plan)
    with progress_bar() as bar:
        points = compare_front(net, among, most, by, held_out, folder, settings, seed=seed, progress=bar)
    write_comparison(
        points, folder, f"NLL added by up to {most} of {among}", f"Measured on {windows_of(settings.what)}."
    )


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example:  notall compare smollm2 --held-out book.txt --budget attention:4,8 --budget portable:8",
)
def compare(
    model: Model = "smollm2",
    text: TextSource = "prose",
    held_out: Annotated[str | None, typer.Option(help="text to measure on (default: other windows of --text)")] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="attention, mlp, block, period, sublayer or portable, and counts; repeat it for more "
            "(default: attention:4,8)"
        ),
    ] = None,
    criterion: Annotated[
        list[str] | None,
        typer.Option(
            help="a name of `notall criteria`, or your own module:function; repeat it for more (default: all)"
        ),
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="nll, kl, answers, task:NAME, or a sum; repeat it for more (default: kl)")
    ] = None,
    repair: Annotated[
        list[str] | None,
        typer.Option(
            help="also judge plans after a repair with --text: refit, replaceme, prune-and-comp, nbl, ghosted, or your "
            "own module:function; repeat it for more"
        ),
    ] = None,
    keep_first: KeepFirst = False,
    keep_last: KeepLast = False,
    prompts: Prompts = None,
    task_path: TaskPath = None,
    task_limit: TaskLimit = 100,
    tasks: Annotated[str | None, typer.Option(help="tasks to run every plan on, with commas between them")] = None,
    limit: Annotated[int | None, typer.Option(help="with --tasks: documents of each task")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="with --tasks: examples to show (default: the task's own number)")
    ] = None,
    rounds: Annotated[int, typer.Option(help="timed rounds; each times both models in turn, and 0 times nothing")] = 0,
    prompt: Prompt = 128,
    new: New = 16,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the records, table.md and front")] = Path(
        "comparison"
    ),
    sequences: Sequences = 16,
    length: Length = 512,
    batch_size: BatchSize = 2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare ways to choose on held-out text: each criterion at each budget, and what it took to find the plan.

    The criterion `quadratic` needs the extra `solver`; without it, the others are compared.
    If you interrupt it, the same command continues where it stopped.
    """
    if tasks or any("task:" in one for one in objective or ()):
        need("lm_eval")
    from ..choosing import comparison
    from ..choosing.answer_objectives import build_objective
    from ..choosing.criteria import criterion as criterion_of
    from ..choosing.criteria import every_criterion
    from ..measuring.plan_times import Timed
    from ..models.loading import dtype_name
    from ..records.comparison import columns_of, with_tasks
    from ..reporting.comparison_files import TIMED_ONCE, timed_once, write_comparison

    need(*(module for name in criterion or () for module in criterion_of(name).needs))
    methods = tuple(repair or ())
    comparison.Repairs(methods)  # refused before a model is loaded
    check_folders(compare=out)
    check_texts(text, held_out)
    aimed, asked = objective or ["kl"], words_of([tasks] if tasks else None)
    shelf = check_objectives(aimed, prompts, task_path, asked, num_fewshot, limit)
    net, tokenizer = load_model(
        Loading(model, dtype, device, device_map, revision=revision, trust_remote_code=trust_remote_code)
    )
    every = [name for name, one in every_criterion().items() if installed(*one.needs) and one.fits(net)]
    batches, others, described = two_texts(net, tokenizer, text, held_out, sequences, length, batch_size, seed)
    spaces = [budget_line(net, line, keep_first, keep_last) for line in budget or ["attention:4,8"]]
    build = partial(build_objective, prompts=prompts, task_path=shelf, task_limit=task_limit)
    aims = {name: comparison.Aim(build(name, net, tokenizer, batches), batches) for name in aimed}
    about = provenance_of(net, model, revision, **described)
    with progress_bar() as progress:
        records = comparison.compare_criteria(
            net,
            comparison.questions_of(criterion or every, list(aims), spaces),
            aims,
            others,
            out,
            about,
            tasks=comparison.Tasks(tuple(asked), tokenizer, limit, num_fewshot, shelf) if asked else None,
            timed=Timed(prompt, new, rounds=rounds) if rounds else None,
            repairs=comparison.Repairs(methods, batches) if methods else None,
            seed=seed,
            progress=progress,
        )
    made = f"Chosen by {windows_of(described)}, measured on {_as_many(described)}, in {dtype_name(net)}."
    if rounds:
        place = place_of(about.where["machine"], versions=False)
        made += f" Times of {prompt} prompt tokens and {new} new ones, {rounds} rounds, on {place}."
    write_comparison(records, out, f"Ways to choose what {shortened(model_in_words(about.what['model']))} skips", made)
    rows = [record.row() for record in records]
    shown = rows if as_json else [with_tasks(row) for row in rows]
    show(shown, columns_of(rows), as_json=as_json, title=f"{len(rows)} choices in {out}")
    if timed_once(records) and not as_json:
        say(TIMED_ONCE)
    if not as_json:
        say(f"The whole table is in {out / 'table.md'}, .tex and .csv, the plans are in {out / 'plans'}.")
        say(f"Next: notall report {out} -o {out / 'report.html'}")


def _as_many(described: Row) -> str:
    """The held-out windows, in words."""
    held_out = str(described["held_out"])
    return f"as many of {Path(held_out).name}" if "held_out_sha256" in described else "as many other ones"


@app.command(rich_help_panel=CHOOSE, epilog="Example:  notall criteria --json")
def criteria(as_json: Json = False) -> None:
    """List the ways to choose: what each goes by, and where it comes from."""
    from ..choosing.criteria import every_criterion
    from .columns import CRITERIA_COLUMNS

    rows: list[Row] = [
        {"criterion": one.name, "of": ", ".join(one.kinds), "goes by": one.description}
        for one in every_criterion().values()
    ]
    show(rows, CRITERIA_COLUMNS, as_json=as_json, title="criteria")
