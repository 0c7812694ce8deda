"""The command that makes up for what a plan skips."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..records.columns import Row
from ..reporting.console import Shown, show_all
from ..reporting.progress_bars import progress_bar
from .app import REPAIR, app
from .inputs import Loading, load_model, provenance_of, read_plan, text_batches
from .options import BatchSize, Device, DeviceMap, Dtype, Json, Length, Model, PlanFile, Revision, Seed, Trust

if TYPE_CHECKING:
    from torch import Tensor

    from ..running.repaired import RepairedPlan

MEASURED = 16  # windows of each text that what came out is measured on


@app.command(
    rich_help_panel=REPAIR,
    epilog="Example:  notall repair smollm2 --plan plan.json --text book.txt --text pages.jsonl --out repaired",
)
def repair(
    model: Model = "smollm2",
    plan: PlanFile = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the plan and its weights")] = Path("repaired"),
    text: Annotated[
        list[str] | None,
        typer.Option(help="as --text of eval; again for more: two kinds of text repair better than one. Else prose"),
    ] = None,
    held_out: Annotated[
        list[str] | None, typer.Option(help="to measure on; again for more. Else other windows of each --text")
    ] = None,
    sequences: Annotated[int, typer.Option(help="windows of text to fit to, of all texts together")] = 128,
    length: Length = 512,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Refit what a plan keeps, so that it makes up for what the plan skips: no training, no tensor more, no cost later.

    OUT is a plan with weights: give it as --plan to eval, generate, bench or export.
    Interrupted, the same command goes on where it stopped.
    """
    from ..measuring.quality import evaluate
    from ..records.ledger import refuse_foreign
    from ..records.repair import RefitRecord
    from ..repairing.refitting import repair as repair_plan
    from .columns import REPAIR_COLUMNS

    refuse_foreign(out, "repair")
    if plan is None:
        raise UsageError("give the plan to repair with --plan: `notall search` or `notall plan` writes one")
    wanted = read_plan(plan)
    loading = Loading(model, dtype, device, device_map, revision=revision, trust_remote_code=trust_remote_code)
    net, tokenizer = load_model(loading)
    texts = text or ["prose"]
    each = -(-sequences // len(texts))
    own, other, described = list[Any](), dict[str, Any](), list[Row]()
    for source in texts:
        wide = each if held_out else each + MEASURED
        rows, about = text_batches(net, tokenizer, source, wide, length, 1, seed)
        own.append(rows[:each])
        described.append({"text": about["text"], "text_sha256": about["text_sha256"]})
        if not held_out:
            other[f"{about['text']}, other windows"] = rows[each:]
    for source in held_out or ():
        rows, about = text_batches(net, tokenizer, source, MEASURED, length, 2, seed)
        other[about["text"]] = rows
    settings = provenance_of(net, model, revision, texts=described, sequences=sequences, length=length, seed=seed)
    with progress_bar() as progress:
        repaired = repair_plan(
            net, wanted, _together(own, batch_size), folder=out, settings=settings, progress=progress
        )
        shown: list[Row] = []
        for name, windows in other.items():
            progress(0, 1, f"measuring on {name}")
            found = evaluate(net, [wanted, repaired], windows)
            shown += [{"text": name, "model": of, **asdict(one)} for of, one in zip(("skipped", "repaired"), found)]
    refits: list[Row] = [refit.row() for refit in repaired.refits if as_json or refit.ridge is not None or refit.why]
    tables = {
        "refits": Shown(refits, RefitRecord.columns, f"{out}: {_counted(repaired)}"),
        "quality": Shown(shown, REPAIR_COLUMNS, f"skip {wanted}: before the repair and after it"),
    }
    show_all(tables, as_json=as_json)


def _counted(repaired: RepairedPlan) -> str:
    """How many of the sublayers that the repair came to were refit."""
    refit = [len(one.sublayers) for one in repaired.refits if one.ridge is not None]
    total = sum(len(one.sublayers) for one in repaired.refits)
    return f"{sum(refit)} of {total} kept sublayers refit; the others would not be better on what was held out"


def _together(texts: list[list[Tensor]], size: int) -> list[Tensor]:
    """Windows of all texts in turn, `size` at a time, so that each part of them holds some of each text."""
    from torch import cat

    rows = [row for windows in zip(*texts) for row in windows]
    return [cat(rows[start : start + size]) for start in range(0, len(rows), size)]
