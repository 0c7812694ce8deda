"""How many tokens the benchmarks take when the answers to one question share what comes
before them.

ARC-Challenge and HellaSwag with the leaderboard's examples, on the default model.
Counted against the sequences that lm-evaluation-harness would run one by one, what it
takes to prove that sharing changes nothing included. The answers to some of the
questions are then computed one by one, too, and compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import notall
from notall import Plan
from notall.evaluation.harness import PlansLM, evaluate_job
from notall.evaluation.scoring import Scorer
from notall.evaluation.task_scores import TaskResult
from notall.evaluation.tasks import TaskShelf
from notall.results.table import Column, number, table, words
from notall.results.terminal import print_table

TASKS = {"local_arc_challenge": 25, "local_hellaswag": 10}  # examples shown


@dataclass(frozen=True)
class Shared:
    """Tokens of a task's first questions, one by one and together; and how far answers
    are apart, of those compared.
    """

    task: str
    examples: int
    questions: int
    one_by_one: int
    run: int
    compared: int
    difference: float


COLUMNS: tuple[Column[Shared], ...] = (
    words("task", lambda row: row.task),
    number("examples", lambda row: row.examples, "d"),
    number("questions", lambda row: row.questions, "d"),
    number("tokens one by one", lambda row: row.one_by_one, ",d"),
    number("tokens run", lambda row: row.run, ",d"),
    number("share", lambda row: row.run / row.one_by_one),
    number("answers compared", lambda row: row.compared, "d"),
    number("largest difference, nats", lambda row: row.difference, ".1e"),
)


def answered(lm: PlansLM, shelf: TaskShelf, name: str, limit: int) -> list[float]:
    """The log-likelihoods of all answers to the first `limit` questions."""
    found: list[TaskResult] = evaluate_job(lm, shelf.build(name, TASKS[name], limit))
    return [value for sample in found[0].samples for value, _ in sample.answers]


def measured(
    model: Any, tokenizer: Any, shelf: TaskShelf, name: str, limit: int, checked: int
) -> Shared:
    shared, alone = (PlansLM(model, tokenizer, [Plan()]) for _ in range(2))
    assert isinstance(shared.scorer, Scorer)
    assert isinstance(alone.scorer, Scorer)
    values = answered(shared, shelf, name, limit)
    alone.scorer.packs = False
    expected = answered(alone, shelf, name, checked)
    return Shared(
        name.removeprefix("local_"),
        TASKS[name],
        limit,
        shared.scorer.plain_tokens,
        shared.scorer.tokens,
        len(expected),
        max(abs(ours - theirs) for ours, theirs in zip(values, expected)),
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--limit", type=int, default=20, help="questions a task")
    options.add_argument(
        "--checked", type=int, default=3, help="of them, computed one by one as well"
    )
    options.add_argument("--dtype", default="float32")
    arguments = options.parse_args()
    if not arguments.data.is_dir():
        sys.exit(
            f"skipped: no folder {arguments.data} with tasks; give one with --data"
        )
    model, tokenizer = notall.load(dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, arguments.data / "make_tasks.py", folder], check=True
        )
        shelf = TaskShelf(folder)
        rows = [
            measured(model, tokenizer, shelf, name, arguments.limit, arguments.checked)
            for name in TASKS
        ]
    title = (
        f"Answers that share their question, {arguments.dtype} (target: at most 0.40)"
    )
    print_table(table(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
