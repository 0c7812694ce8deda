"""notall compare: ways to choose, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import shortened
from ..experiments.compare import (
    TIMED_ONCE,
    CompareOptions,
    Repairs,
    columns_of,
    compare_criteria,
    timed_once,
    write_comparison,
)
from ..experiments.driver import Subject
from ..experiments.options import HeldOutOptions, ModelOptions, TaskOptions
from ..models.names import model_in_words
from ..options import Json, OutFolder, Seed, Workload
from ..results.ledger import check_folder
from ..results.progress_bars import progress_bar
from ..results.provenance import Provenance, place_of, windows_in_words
from ..results.table import table
from ..results.terminal import say, show
from .app import CHOOSE, command


@command(
    CHOOSE, example="notall compare smollm2 --held-out book.txt --skip attention:4,8 --skip portable:8 --out comparison"
)
def compare(
    model: ModelOptions,
    how: CompareOptions,
    tasks: TaskOptions,
    text: HeldOutOptions = HeldOutOptions(sequences=16, length=512, batch_size=2),
    workload: Workload = Workload(rounds=0),
    out: OutFolder = Path("comparison"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare ways to choose on held-out text: each criterion at each budget, and what it took to find the plan.

    Plans are timed where --rounds says how often. The criterion `quadratic` needs the extra `solver`; without it, the
    others are compared. If you interrupt it, the same command continues where it stopped.
    """
    check_folder(out, "compare")
    text.check()
    choice = tasks.check(objectives=how.check())
    net, tokenizer = model.load()
    batches, held_out, described = text.both(net, tokenizer, seed=seed)
    about = model.provenance(net, **described)
    timed = workload if workload.rounds else None
    with progress_bar() as progress:
        records = compare_criteria(
            Subject(net, tokenizer, held_out, out, about, seed),
            how.runs(net),
            how.objectives(net, tokenizer, batches, choice),
            tasks=choice,
            workload=timed,
            repairs=Repairs(how.repair, batches) if how.repair else None,
            progress=progress,
        )
    title = f"Ways to choose what {shortened(model_in_words(about.what['model']))} skips"
    write_comparison(records, out, title, _made(about, described, timed))
    lines = table(f"{len(records)} choices in {out}", columns_of(records), records)
    show({"comparison": (lines, records)}, as_json=as_json)
    if as_json:
        return
    if timed_once(records):
        say(TIMED_ONCE)
    say(f"The whole table is in {out / 'table.md'}, .tex and .csv, the plans are in {out / 'plans'}.")
    say(f"Next: notall report {out} -o {out / 'report.html'}")


def _made(about: Provenance, described: Mapping[str, Any], timed: Workload | None) -> str:
    """How and on what it was measured, in sentences."""
    held_out = str(described.get("held_out"))
    others = f"as many of {Path(held_out).name}" if "held_out_sha256" in described else "as many other ones"
    made = f"Chosen by {windows_in_words(described)}, measured on {others}, in {about.what['dtype']}."
    if timed is None:
        return made
    place = place_of(about.where["machine"], versions=False)
    asked = f"{timed.prompt_tokens} prompt tokens and {timed.generation_tokens} new ones, {timed.rounds} rounds"
    return f"{made} Times of {asked}, on {place}."
