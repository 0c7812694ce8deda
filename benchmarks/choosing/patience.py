"""What more patience buys: what the search loses, and what it takes, by how many
evaluations in vain end it.

    python benchmarks/choosing/patience.py --data DATA   # an hour on one core

DATA holds `wikitext2/wiki.train.first1MB.txt`, to choose by, and
`wikitext2/wiki.test.raw`, to measure on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from inputs import load_asked, options_of
from torch import Tensor

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import nll
from notall.choosing.search_config import SearchConfig
from notall.choosing.space import Space, UnitKind
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.results.facts import Quality
from notall.results.table import Column, number, table, with_error, words
from notall.results.terminal import print_table

PATIENCES = (0, 4, 8, 12, 24)
BUDGETS = (
    ("attention", 4),
    ("attention", 8),
    ("block", 4),
    ("block", 6),
    ("portable", 4),
    ("portable", 8),
    ("sublayer", 16),
)


@dataclass(frozen=True)
class Searched:
    """What a search found with so much patience: what that loses on its own text and on
    another, and what it took.
    """

    budget: str
    patience: int
    own: float
    held_out: Quality
    forwards: float


COLUMNS: tuple[Column[Searched], ...] = (
    words("skip", lambda one: one.budget),
    number("patience", lambda one: one.patience, "d"),
    number("NLL added, own text", lambda one: one.own),
    with_error(
        "held-out ± s.e.",
        lambda one: (one.held_out.delta_nll, one.held_out.delta_nll_se),
    ),
    number("forward passes", lambda one: one.forwards, ".1f"),
)


def searched(
    model: Any, space: Space, count: int, train: list[Tensor], test: list[Tensor]
) -> list[Searched]:
    """A row a patience; each goes on from what the one before it evaluated."""
    rows = []
    with TemporaryDirectory() as folder:
        for patience in PATIENCES:
            found = choose_plan(
                model,
                "search",
                space,
                by_count(space, count),
                train,
                nll(train),
                out=Path(folder),
                config=SearchConfig(patience=patience, held_out=test),
            )
            assert found.held_out
            own = found.cost - found.dense_cost
            rows.append(
                Searched(
                    f"{count} {space}", patience, own, found.held_out[1], found.forwards
                )
            )
            print(rows[-1], found.plan, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    options = options_of(__doc__)
    options.add_argument(
        "--sequences", type=int, default=4, help="of 512 tokens each, to choose by"
    )
    options.add_argument(
        "--held-out", type=int, default=32, help="of 512 tokens each, to measure on"
    )
    arguments = options.parse_args()
    model, tokenizer = load_asked(arguments)
    structure = notall.locate(model)

    def batches(name: str, sequences: int, size: int) -> list[Tensor]:
        text = read_text(arguments.data / "wikitext2" / name)
        return token_batches(
            tokenizer, text, sequences=sequences, length=512, batch_size=size
        )

    train = batches("wiki.train.first1MB.txt", arguments.sequences, 1)
    test = batches("wiki.test.raw", arguments.held_out, 2)
    spaces = {"portable": Space(structure, portable=True)} | {
        kind: Space(structure, kind) for kind in get_args(UnitKind)
    }
    rows = [
        row
        for name, count in BUDGETS
        for row in searched(model, spaces[name], count, train, test)
    ]
    sizes = [f"{sum(tokens.numel() for tokens in some):,}" for some in (train, test)]
    title = (
        f"By the NLL of {sizes[0]} tokens of WikiText-2 train, measured on {sizes[1]}"
        " of its test"
    )
    print_table(table(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
