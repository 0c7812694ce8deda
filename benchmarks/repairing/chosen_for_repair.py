"""Sets that are chosen by what they lose after a repair, beside sets that are chosen as
they are: both repaired.

    python benchmarks/repairing/chosen_for_repair.py --data DATA --out results/repairs     # hours on 2 cores
    python benchmarks/repairing/chosen_for_repair.py --data DATA --sets a8 --tokens 16384 --windows 8   # a look

Chosen on the first sequences of the text that the repair is fitted to, and measured on
other text: see methods.py beside this, whose repairs are used again. Called again with
the same --out, it goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from methods import LENGTH, SETS, Settings, load_asked, named, options_of, texts
from pydantic import Field
from torch import Tensor

import notall
from notall import Plan
from notall.choosing.budget import by_count
from notall.choosing.choice import ChosenPlan, choose_plan
from notall.choosing.search_config import SearchConfig
from notall.choosing.space import plan_of
from notall.measuring.quality import score, summarize
from notall.measuring.statistics import mean_and_error
from notall.repairing.methods import kept_repair
from notall.results import lines
from notall.results.provenance import Provenance
from notall.results.record import Number, Unsigned
from notall.results.table import Column, number, table, with_error, words
from notall.results.terminal import print_table, progress_bar

SPACES = {
    **{
        "a8": ("attention", 8),
        "a12": ("attention", 12),
        "b4": ("block", 4),
        "s16": ("sublayer", 16),
    },
    **{f"p{count}": ("portable", count) for count in (4, 8, 12)},
}


class Chosen(Settings):
    """What a set loses that was chosen in one way, as it is (`skipped_nll`) and, all
    else, after a repair.
    """

    chosen: str
    skipped_nll: Number
    skipped_nll_se: Unsigned
    less: Number = Field(
        description=(
            "NLL less that of the set that was chosen as it is, repaired, by window"
        )
    )
    less_se: Unsigned
    plan: str
    forwards: float | None = Field(None, description="forward passes to choose")
    seconds: float | None = Field(None, description="CPU seconds to choose")


COLUMNS: tuple[Column[Chosen], ...] = (
    words("skip", lambda row: row.set),
    words("chosen", lambda row: row.chosen),
    words("text", lambda row: row.text),
    with_error("NLL added", lambda row: (row.skipped_nll, row.skipped_nll_se)),
    with_error("repaired", lambda row: (row.delta_nll, row.delta_nll_se)),
    with_error("KL, repaired", lambda row: (row.kl, row.kl_se)),
    with_error(
        "top-1 agreement, repaired",
        lambda row: (row.top1_agreement, row.top1_agreement_se),
    ),
    with_error("less than chosen as it is", lambda row: (row.less, row.less_se)),
    number("forward passes to choose", lambda row: row.forwards, ",.1f"),
    number("CPU s to choose", lambda row: row.seconds, ",.0f"),
    words("plan", lambda row: row.plan),
)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=Path("results/repairs"))
    options.add_argument(
        "--tokens", type=int, default=131072, help="of calibration text"
    )
    options.add_argument(
        "--windows",
        type=int,
        default=32,
        help="of 512 tokens, of each text to measure on",
    )
    options.add_argument(
        "--sequences", type=int, default=16, help="to choose by, half of them to fit to"
    )
    options.add_argument(
        "--sets", nargs="+", choices=SPACES, default=["a8", "a12", "b4"]
    )
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    batches, held_out = texts(tokenizer, asked.data, asked.tokens, asked.windows)
    settings, called = named(asked, "model", "dtype", "tokens", "windows")
    path = asked.out / f"chosen-{called}-{asked.sequences}.jsonl"
    rows = [Chosen(**line) for line in lines.read_lines(path)]
    for of in asked.sets:
        if any(row.set == of for row in rows):
            continue
        first = torch.cat(list(batches))[: asked.sequences].split(1)
        found = chosen(model, of, first, asked)
        plans = {"as it is": plan_of(SETS[of].split()), "after a repair": found.plan}
        kept = asked.out / f"repairs-{called}"
        repaired = {
            way: kept_repair(kept, "refit", model, plan, batches)[0]
            for way, plan in plans.items()
        }
        spent: dict[str, Any] = {
            "forwards": found.forwards,
            "seconds": found.spent.seconds,
        }
        added = [
            Chosen(
                set=of,
                text=text,
                **row,
                **(spent if row["chosen"] == "after a repair" else {}),
                **settings,
            )
            for text, windows in held_out.items()
            for row in measured(model, plans, repaired, windows)
        ]
        lines.append(path, *(row.line() for row in added))
        rows += added
    title = (
        f"Repaired with {asked.tokens:,} tokens, measured on {asked.windows} x {LENGTH}"
        " of each"
    )
    print_table(table(title, COLUMNS, [row for row in rows if row.set in asked.sets]))


def chosen(model: Any, of: str, batches: Sequence[Tensor], asked: Any) -> ChosenPlan:
    """What the search finds by the KL that a cheap repair leaves."""
    kind, count = SPACES[of]
    structure = notall.locate(model)
    space = (
        notall.Space(structure, portable=True)
        if kind == "portable"
        else notall.Space(structure, kind)
    )
    about = Provenance(
        what={
            "model": Path(asked.model).name,
            "dtype": asked.dtype,
            "sequences": asked.sequences,
        }
    )
    print(f"{of}: choosing", file=sys.stderr, flush=True)
    with progress_bar() as bar:
        return choose_plan(
            *(model, "search", space, by_count(space, count), batches),
            out=asked.out / f"chosen-{of}-{asked.sequences}.search",
            config=SearchConfig(after_repair=True, provenance=about),
            progress=bar,
        )


def measured(
    model: Any,
    plans: Mapping[str, Plan],
    repaired: Mapping[str, Plan],
    windows: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """The figures of each way to choose; `less` is beside the first."""
    every = [*plans.values(), *repaired.values()]
    dense, *found = (
        reduce(add, parts)
        for parts in zip(*(score(model, every, tokens) for tokens in windows))
    )
    raw, mended = found[: len(plans)], found[len(plans) :]
    rows = []
    for way, before, after in zip(plans, raw, mended):
        skipped, quality = summarize(before, dense), summarize(after, dense)
        less, less_se = mean_and_error(
            [mine - first for mine, first in zip(after.nll, mended[0].nll)]
        )
        rows.append(
            {
                "chosen": way,
                "skipped_nll": skipped.delta_nll,
                "skipped_nll_se": skipped.delta_nll_se,
                **quality.model_dump(),
                "less": less,
                "less_se": less_se,
                "plan": " ".join(plans[way].names),
            }
        )
    return rows


if __name__ == "__main__":
    main()
