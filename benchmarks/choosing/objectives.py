"""KL or NLL? What sets lose that the search chose by each, on little and on more of two
texts, measured on both texts.

    python benchmarks/choosing/objectives.py --data DATA --out results/objectives
    python benchmarks/choosing/objectives.py --data DATA --out results/objectives-gemma --model GGUF

DATA holds `c4/sample300.jsonl`, `wikitext2/wiki.train.first1MB.txt` and
`wikitext2/wiki.test.raw`. What is measured on comes from other articles than what is
chosen by. Evaluations are kept in --out: run again, it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inputs import load_asked, options_of
from torch import Tensor

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import Objective, kl, mix, nll
from notall.choosing.space import Space, UnitKind
from notall.measuring.quality import evaluate
from notall.measuring.speed import machine
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.results.facts import Quality
from notall.results.table import Column, number, table, with_error, words
from notall.results.terminal import print_table

LENGTH = 256
BUDGETS: tuple[tuple[UnitKind, float], ...] = (("attention", 0.27), ("block", 0.14))
OBJECTIVES: dict[str, Callable[[Sequence[Tensor]], Objective]] = {
    "kl": kl,
    "nll": nll,
    "kl + nll": lambda batches: mix([kl(batches), nll(batches)]),
}


@dataclass(frozen=True)
class Chosen:
    """A plan, by which objective on how much of which text it was chosen, and what it
    loses on each text.
    """

    skip: str
    text: str
    tokens: int
    by: str
    forwards: float
    plan: notall.Plan
    lost: dict[str, Quality] = field(default_factory=dict)


def columns_of(texts: Iterable[str]) -> list[Column[Chosen]]:
    def lost(text: str) -> tuple[Column[Chosen], ...]:
        return (
            with_error(
                f"{text}, NLL added",
                lambda one: (one.lost[text].delta_nll, one.lost[text].delta_nll_se),
            ),
            with_error(
                f"{text}, KL", lambda one: (one.lost[text].kl, one.lost[text].kl_se)
            ),
        )

    return [
        words("skip", lambda one: one.skip),
        words("chosen by", lambda one: one.text),
        number("tokens", lambda one: one.tokens, ","),
        words("by", lambda one: one.by),
        *(column for text in texts for column in lost(text)),
        number("forward passes", lambda one: one.forwards, ".1f"),
    ]


def texts(
    tokenizer: Any, data: Path, most: int, held_out: int
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Of each text what is chosen by, `most` sequences of it, and what is measured
    on.
    """
    wiki = (
        read_text(data / "wikitext2/wiki.train.first1MB.txt"),
        read_text(data / "wikitext2/wiki.test.raw"),
    )
    both = token_batches(
        tokenizer,
        read_text(data / "c4/sample300.jsonl"),
        sequences=most + held_out,
        length=LENGTH,
        batch_size=1,
    )
    chosen_by, measured = (
        token_batches(tokenizer, text, sequences=sequences, length=LENGTH, batch_size=1)
        for text, sequences in zip(wiki, (most, held_out))
    )
    return {"WikiText-2": (chosen_by, measured), "C4": (both[:most], both[most:])}


def main() -> None:
    options = options_of(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=(4, 16, 64),
        help=f"sequences of {LENGTH} tokens",
    )
    options.add_argument(
        "--held-out",
        type=int,
        default=64,
        help=f"sequences of {LENGTH} tokens of each text",
    )
    options.add_argument(
        "--by", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES)
    )
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    by_name = texts(tokenizer, asked.data, max(asked.sizes), asked.held_out)
    rows: list[Chosen] = []
    for kind, share in BUDGETS:
        space = Space(notall.locate(model), kind)
        budget = by_count(space, share)
        for text, (batches, _) in by_name.items():
            for size in asked.sizes:
                for name in asked.by:
                    out = asked.out / f"{kind}-{text}-{size}-{name}".replace(" ", "")
                    some = batches[:size]
                    found = choose_plan(
                        model,
                        "search",
                        space,
                        budget,
                        some,
                        OBJECTIVES[name](some),
                        out=out,
                    )
                    tokens = size * LENGTH
                    rows.append(
                        Chosen(
                            budget.description,
                            text,
                            tokens,
                            name,
                            found.forwards,
                            found.plan,
                        )
                    )
                    print(
                        budget.description,
                        text,
                        tokens,
                        name,
                        found.forwards,
                        found.plan,
                        flush=True,
                    )
    for text, (_, measured) in by_name.items():
        for row, quality in zip(
            rows, evaluate(model, [row.plan for row in rows], measured)
        ):
            row.lost[text] = quality
    about = machine(model.device)
    print(
        f"{about['cpu']}, {about['threads']} threads, {asked.dtype},"
        f" {about['versions']}"
    )
    title = (
        f"What is lost on {asked.held_out * LENGTH:,} held-out tokens of each text,"
        f" {asked.model}"
    )
    print_table(table(title, columns_of(by_name), rows))


if __name__ == "__main__":
    main()
