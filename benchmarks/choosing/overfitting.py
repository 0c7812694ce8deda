"""How much text is enough: what the search's choice loses on the text it went by and on another, by the size of it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import notall
from notall.budget import by_count
from notall.choosing import choose_plan
from notall.console import number, progress_bar, show, with_error
from notall.objective import nll
from notall.space import Space
from notall.texts import read_text, token_batches


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--held-out", type=int, default=16384)
    options.add_argument("--kind", default="attention")
    options.add_argument("--count", type=int, default=8)
    options.add_argument("--out", type=Path, default=Path("results/overfitting"))
    arguments = options.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"skipped: no folder {arguments.data} with texts; give one with --data")
    model, tokenizer = notall.load(dtype="float32")
    wiki, test = (
        read_text(arguments.data / f"wikitext2/{name}") for name in ("wiki.train.first1MB.txt", "wiki.test.raw")
    )
    length = arguments.length
    held_out = token_batches(tokenizer, test, sequences=arguments.held_out // length, length=length, batch_size=4)
    space = Space(notall.locate(model), arguments.kind)
    rows = []
    for tokens in arguments.tokens:
        batches = token_batches(tokenizer, wiki, sequences=tokens // length, length=length, batch_size=1)
        with progress_bar() as bar:
            found = choose_plan(
                model,
                "search",
                space,
                by_count(space, arguments.count),
                batches,
                nll(batches),
                folder=arguments.out / f"{arguments.kind}-{arguments.count}-{tokens}",
                held_out=held_out,
                progress=lambda done, doing, bar=bar, tokens=tokens: bar(done, 1.0, f"{tokens} tokens: {doing}"),
            )
        assert found.held_out
        quality = found.held_out[1]
        rows.append({
            "tokens": tokens,
            "calibration": found.cost - found.dense_cost,
            "held_out": quality.delta_nll,
            "held_out_se": quality.delta_nll_se,
            "gap": quality.delta_nll - found.cost + found.dense_cost,
            "forwards": found.forwards,
            "seconds": found.spent.seconds,
        })  # fmt: skip
    columns = [
        number("tokens", "calibration tokens", ",d"),
        number("calibration", "ΔNLL on them"),
        with_error("held_out", "ΔNLL on held-out text"),
        number("gap", "difference"),
        number("forwards", "forward passes", ",.1f"),
        number("seconds", "CPU s", ",.0f"),
    ]
    title = (
        f"{arguments.count} {arguments.kind} chosen on WikiText-2 train, measured on {len(held_out) * 4 * length:,} "
    )
    show(rows, columns, title=title + "tokens of its test split")


if __name__ == "__main__":
    main()
