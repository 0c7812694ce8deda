"""Every criterion on the default model, at every budget, by several objectives, texts and sizes: one resumable command.

    python benchmarks/choosing/comparison.py --data DATA          # under three hours on 2 cores
    python benchmarks/choosing/comparison.py --data DATA --quick  # a look, under a quarter of an hour on one core

DATA holds `c4/sample300.jsonl`, `wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw` and `make_tasks.py`,
which writes the multiple-choice tasks; see benchmarks/README.md. Results, table and front land in --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import notall
from notall.asking import task
from notall.cli.inputs import provenance_of
from notall.comparison import Aim, Row, Tasks, compare_criteria, write
from notall.console import progress_bar
from notall.criteria import suits
from notall.grid import Timed
from notall.objective import kl, mix, nll
from notall.space import Space
from notall.texts import read_text, token_batches

ONE_SHOT = ("deepest", "random", "cosine", "angular", "magnitude", "first-order", "fisher", "gate-norm")


@dataclass(frozen=True)
class Sizes:
    """Sequences of `length` tokens: to calibrate on, on a few for what is costly, to measure on; and what is asked."""

    length: int
    sequences: int
    few: int
    held_out: int
    budgets: dict[str, tuple[int, ...]]
    portable: tuple[int, ...]
    by_nll: tuple[str, ...]  # where the search goes by NLL, too
    costly: tuple[tuple[str, str, int], ...]  # plain greedy and evolution, and the search on as little text
    tasks: tuple[str, ...]
    limit: int
    rounds: int


FULL = Sizes(
    length=512,
    sequences=16,
    few=2,
    held_out=32,
    budgets={"attention": (4, 8, 12), "sublayer": (8, 16), "block": (2, 4, 6)},
    portable=(4, 8, 12),
    by_nll=("attention",),
    costly=(
        *((name, "attention", 12) for name in ("greedy", "search")),
        *((name, "block", 6) for name in ("greedy", "search")),
        ("evolution", "attention", 8),
    ),
    tasks=("local_arc_challenge", "local_hellaswag", "local_winogrande"),
    limit=25,
    rounds=5,
)
QUICK = Sizes(
    length=128,
    sequences=4,
    few=2,
    held_out=8,
    budgets={"attention": (4, 8), "sublayer": (8,), "block": (2, 4)},
    portable=(4, 8),
    by_nll=("attention", "sublayer", "block", "portable"),
    costly=(),
    tasks=(),
    limit=0,
    rounds=0,
)


def rows(anatomy: notall.Anatomy, sizes: Sizes, others: list[str]) -> list[Row]:
    """All that is asked: one-shot criteria, losses, the search by other aims, and what is costly on a few sequences."""
    spaces = {str(s): s for s in (*(Space(anatomy, kind) for kind in sizes.budgets), Space(anatomy, portable=True))}  # type: ignore[arg-type]
    counts = {**sizes.budgets, "portable": sizes.portable}
    found = []
    for name, space in spaces.items():
        for criterion in (*ONE_SHOT, "leave-one-out", *(["search"] if name in sizes.by_nll else [])):
            if suits(criterion, space):
                found += [Row(criterion, "nll", space, count) for count in counts[name]]
        found += [Row("search", "kl", space, count) for count in counts[name]]
    for aim in others:  # objective x calibration text x size
        found.append(Row("search", aim, spaces["attention"], 8))
    for criterion, name, count in sizes.costly:
        found.append(Row(criterion, "nll, few", spaces[name], count))
    return found


def aims(model: Any, tokenizer: Any, data: Path, sizes: Sizes, task_path: Path | None) -> dict[str, Aim]:
    """NLL and KL on WikiText-2 train, NLL on C4 and on a few sequences, and a task's training questions."""
    wiki, c4 = (read_text(data / name) for name in ("wikitext2/wiki.train.first1MB.txt", "c4/sample300.jsonl"))

    def batches(text: Any, sequences: int) -> list[Any]:
        return token_batches(tokenizer, text, sequences=sequences, length=sizes.length, batch_size=1)

    many, others, few = batches(wiki, sizes.sequences), batches(c4, sizes.sequences), batches(wiki, sizes.few)
    found = {
        "nll": Aim(nll(many), many),
        "kl": Aim(kl(many), many),
        "nll, C4": Aim(nll(others), others),
        "nll, few": Aim(nll(few), few),
    }
    if sizes.tasks:
        questions = task(model, tokenizer, sizes.tasks[0], task_path, limit=50)
        found["task"] = Aim(questions, many)
        found["kl + 0.1*task"] = Aim(mix([kl(many), task(model, tokenizer, sizes.tasks[0], task_path, 50, 0.1)]), many)
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--out", type=Path, default=None)
    options.add_argument("--quick", action="store_true")
    arguments = options.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"skipped: no folder {arguments.data} with texts and tasks; give one with --data")
    sizes = QUICK if arguments.quick else FULL
    out = arguments.out or Path("results") / ("comparison-quick" if arguments.quick else "comparison")
    model, tokenizer = notall.load(dtype="float32")
    task_path = None
    if sizes.tasks:
        task_path = out / "task-files"
        subprocess.run([sys.executable, arguments.data / "make_tasks.py", task_path], check=True)
    asked = aims(model, tokenizer, arguments.data, sizes, task_path)
    text = read_text(arguments.data / "wikitext2/wiki.test.raw")
    held_out = token_batches(tokenizer, text, sequences=sizes.held_out, length=sizes.length, batch_size=2)
    about = provenance_of(model, "smollm2", None) | {"calibration": "WikiText-2 train", "held_out": text.name}
    del about["versions"], about["threads"]  # it may go on on another machine
    with progress_bar() as progress:
        records = compare_criteria(
            model,
            rows(notall.locate(model), sizes, [name for name in asked if name not in ("nll", "kl", "nll, few")]),
            asked,
            held_out,
            out,
            about,
            tasks=Tasks(sizes.tasks, tokenizer, sizes.limit, 0, task_path) if sizes.tasks else None,
            timed=Timed(rounds=sizes.rounds) if sizes.rounds else None,
            progress=progress,
        )
    write(records, out, "NLL added on WikiText-2 test by what is skipped, SmolLM2-135M-Instruct")
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
