"""The command that sets skipping beside quantising, in the engine that serves the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, shortened
from ..progress import Stages
from ..reporting.console import Shown, say, show_all
from ..reporting.progress_bars import progress_bar
from .app import MEASURE, app
from .inputs import Loading, load_model, provenance_of, read_plan, space_of, text_batches, words_of
from .options import (
    TIMING,
    BatchSize,
    Dtype,
    Json,
    KeepFirst,
    KeepLast,
    Kind,
    Length,
    Model,
    New,
    Portable,
    Prompt,
    Rounds,
    Seed,
    Sequences,
    TextSource,
)
from .repairing import warn_of_own_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..exporters.engines.front import Subject
    from ..exporters.engines.windows import Windows
    from ..records.front import FrontRecord
    from ..records.plan import Plan

TEXT_FIELDS = ("text", "text_sha256")
FIT, FEWEST = 128, 4  # windows


@app.command(
    rich_help_panel=MEASURE,
    epilog="Example:  notall front smollm2 --engine llama.cpp --kind attention --counts 4,8 --out front",
)
def front(
    model: Model = "smollm2",
    engine: Annotated[
        str, typer.Option(help="the engine: llama.cpp (for a .gguf file), transformers or vllm")
    ] = "llama.cpp",
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--types",
            metavar="TYPE",
            help="ways to hold weights: F16, Q8_0, Q5_K_M, Q4_K_M in llama.cpp, int8, int4 in transformers, int8 in "
            "vllm; with commas between them (default: all that usually run, and always plain weights)",
        ),
    ] = None,
    plan: Annotated[
        list[Path] | None, typer.Option(help="plan file, or the folder of a repair, to measure; repeat it for more")
    ] = None,
    speedups: Annotated[
        list[str] | None,
        typer.Option(help="find plans of these speedups in torch, such as 1.1,1.2 (the default)"),
    ] = None,
    counts: Annotated[
        list[str] | None, typer.Option(help="instead of --speedups: find plans that skip this many, such as 4,8")
    ] = None,
    kind: Kind = "sublayer",
    portable: Portable = False,
    keep_first: KeepFirst = False,
    keep_last: KeepLast = False,
    no_repair: Annotated[bool, typer.Option("--no-repair", help="measure plans without a repair only")] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(help="another model to measure beside this one; repeat it for more"),
    ] = None,
    text: TextSource = "prose",
    held_out: Annotated[str | None, typer.Option(help="text to measure on (default: other windows of --text)")] = None,
    fit: Annotated[int, typer.Option(help="number of windows of --text to choose by and to repair with")] = FIT,
    sequences: Sequences = 8,
    length: Length = 256,
    batch_size: BatchSize = 4,
    prompt: Prompt = 128,
    new: New = 32,
    rounds: Rounds = 5,
    threads: Annotated[
        int | None,
        typer.Option(help="threads of the engine (default: one for each core)", rich_help_panel=TIMING, min=1),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="folder for the records, the checkpoints, the table and the figure")
    ] = Path("front"),
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare skipping with quantising in the engine that serves the model: what is lost, how fast, how large.

    This measures the dense model and each plan, as it is and repaired, in each type: NLL as the engine computes it,
    times in turn, and bytes. It repairs plans before it quantises them. If you interrupt it, the same command
    continues where it stopped.
    """
    from ..choosing.latency import Workload
    from ..exporters.engines import engine_named
    from ..exporters.engines.front import Rounds as RoundsOf
    from ..exporters.engines.front import Subject, measure_front
    from ..exporters.engines.plans import found_plans, with_repairs
    from ..measuring.speed import cores
    from ..models.loading import dtype_name
    from ..records.front import DENSE
    from ..records.ledger import refuse_foreign
    from ..records.plan import Plan
    from ..records.provenance import Provenance
    from ..reporting.message import FIRST

    kind_of_engine = engine_named(engine)
    refuse_foreign(out, "front")
    given = _given_plans(plan or [])
    _check_fit(fit)
    wanted = {"counts": _numbers("--counts", counts)}
    wanted["speedups"] = _numbers("--speedups", speedups or ([] if given or counts else [FIRST]))
    count = threads or cores()
    for spec in (model, *(also or ())):
        kind_of_engine(count).check(spec)
    net, tokenizer = load_model(Loading(model, dtype, "cpu"))
    runs = kind_of_engine(count, dtype_name(net))
    kinds = runs.checked_types(words_of(types))
    own, windows, described = _texts(net, tokenizer, text, held_out, (fit, sequences), length, batch_size, seed)
    about = provenance_of(net, model, None, **described, seed=seed)
    measured_on = {name: described.get(name.replace("text", "held_out"), described[name]) for name in TEXT_FIELDS}
    kept = out / "plans"
    with progress_bar() as progress:
        stages = Stages(progress, 8)
        among = space_of(net, kind, portable, keep_first, keep_last)
        plans = given | found_plans(
            net,
            among,
            own,
            kept,
            about,
            **wanted,
            workload=Workload(prompt, new),
            seed=seed,
            progress=stages.stage(1),
        )
        for one in plans.values():
            one.check(among.anatomy)
            warn_of_own_text(one, measured_on)
        variants = [*plans.items()]
        if not no_repair:
            variants = with_repairs(net, plans, own, kept, about, progress=stages.stage(1))
        subjects = [Subject(name, model, one, windows) for name, one in [(DENSE, Plan()), *variants]]
        subjects += [_other(spec, tokenizer, windows) for spec in also or ()]
        del net  # what is measured needs its memory
        how = {"engine": engine, "threads": count, "prompt_tokens": prompt, "new_tokens": new}
        versions = {**about.where["versions"], runs.package: runs.version}
        run = Provenance(what=about.what | how, where=about.where | {"versions": versions})
        timed = RoundsOf(prompt, new, rounds)
        records = measure_front(runs, subjects, kinds, timed, out, run, progress=stages.stage(6))
    on_cores = f"{count} thread{'s' if count > 1 else ''}"
    on_what = measured_on["text"] if held_out else f"other windows of {measured_on['text']}"
    _show(records, out, f"{about.what['model']} in {engine}, {on_cores}; NLL on {on_what}", as_json=as_json)


def _check_fit(fit: int) -> None:
    if fit < FEWEST:
        raise UsageError(f"--fit {shortened(fit)} is too few to choose by and to repair with: give {FEWEST} or more")


def _given_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """The plans of some files, by the names of these. Raises `UsageError` where two have the same."""
    given = {path.stem: read_plan(path) for path in paths}
    if len(given) < len(paths):
        raise UsageError("two of the plans have the same name: rename one")
    return given


def _show(records: Sequence[FrontRecord], out: Path, title: str, *, as_json: bool) -> None:
    """Write the table and the figure, and say what to take."""
    from ..records.front import FrontRecord
    from ..reporting.front_files import sentence, write_front

    rows = [record.row() for record in records]
    write_front(rows, out, title)
    said = sentence(rows)
    show_all({"front": Shown(rows, FrontRecord.columns, f"{title}: {out}")}, as_json=as_json, also={"verdict": said})
    if not as_json:
        say(said)
        say(f"The table is in {out / 'table.md'}, the checkpoints in {out / 'checkpoints'}.")
        say(f"Next: notall report {out} -o {out / 'report.html'}")


def _numbers(option: str, given: Iterable[str] | None) -> list[float]:
    """What an option that may be repeated says. Raises `UsageError` for what is no number."""
    words = words_of([*given] if given else None)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise UsageError(f"{option} {shortened(' '.join(words))} are no numbers: give some such as 1.1,1.2") from None


def _texts(
    net: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    held_out: str | None,
    counts: tuple[int, int],
    length: int,
    batch_size: int,
    seed: int,
) -> tuple[list[Tensor], Windows, dict[str, Any]]:
    """Batches to choose by and to repair with, windows to measure on, and what they are; none is in both."""
    from torch import cat

    from ..exporters.engines.windows import as_windows

    fit, measured = counts
    more = 0 if held_out else measured
    batches, described = text_batches(net, tokenizer, text, fit + more, length, batch_size, seed)
    described |= {"sequences": measured, "fit": fit}
    rows = cat(batches)
    own, other = rows[:fit], rows[fit:]
    if held_out:
        found, about = text_batches(net, tokenizer, held_out, measured, length, batch_size, seed)
        other = cat(found)
        described |= {"held_out": about["text"], "held_out_sha256": about["text_sha256"]}
    return list(own.split(batch_size)), as_windows(tokenizer, [other]), described


def _other(spec: str, ours: PreTrainedTokenizerBase, windows: Windows) -> Subject:
    """Another model, with the same text in its own tokens."""
    from ..exporters.engines.front import Subject
    from ..exporters.engines.windows import by_another
    from ..models.loading import identify
    from ..records.plan import Plan

    _, theirs = load_model(Loading(spec, "auto", "cpu"))
    known = identify(spec)
    name = known["model"].removesuffix(".gguf")
    return Subject(name, spec, Plan(), by_another(theirs, ours, windows), known["revision"])
