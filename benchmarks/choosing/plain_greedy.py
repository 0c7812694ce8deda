"""The lazy search against plain greedy: on the same text, 20 of the default model's 60 sublayers.

Plain greedy is BlockPruner's algorithm. Here it runs on the engine that shares states; what it costs where every
candidate runs in full, as published, is counted beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import notall
from notall.comparison import Aim, Row, compare_criteria
from notall.console import number, plain, progress_bar, show, with_error
from notall.objective import nll
from notall.space import Space
from notall.texts import read_text, token_batches


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--held-out", type=int, default=32)
    options.add_argument("--out", type=Path, default=Path("results/plain-greedy"))
    arguments = options.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"skipped: no folder {arguments.data} with texts; give one with --data")
    model, tokenizer = notall.load(dtype="float32")
    wiki, test = (read_text(arguments.data / f"wikitext2/wiki.{n}") for n in ("train.first1MB.txt", "test.raw"))
    batches = token_batches(tokenizer, wiki, sequences=arguments.sequences, length=arguments.length, batch_size=1)
    held_out = token_batches(tokenizer, test, sequences=arguments.held_out, length=128, batch_size=4)
    space = Space(notall.locate(model))
    rows = [Row(name, "nll", space, arguments.count) for name in ("search", "greedy")]
    about = {"model": "smollm2", "length": arguments.length}
    with progress_bar() as progress:
        records = compare_criteria(
            model, rows, {"nll": Aim(nll(batches), batches)}, held_out, arguments.out, about, progress=progress
        )
    columns = [
        plain("criterion"),
        number("calibration_tokens", "calibration tokens", ",d"),
        with_error("delta_nll", "ΔNLL on held-out text"),
        number("evaluations", "evaluations", ",d"),
        number("executions", "sublayers run", ",.0f"),
        number("one_by_one", "run in full", ",.0f"),
        number("seconds", "CPU s", ",.0f"),
    ]
    show(records, columns, title=f"{arguments.count} of {len(space.units)} sublayers")
    found, greedy = records
    print(f"plain greedy, each candidate in full, runs {greedy['one_by_one'] / found['executions']:.1f} times as many "
          f"sublayers as the search")  # fmt: skip


if __name__ == "__main__":
    main()
