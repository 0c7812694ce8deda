"""How many tokens the benchmarks take when the answers to one question share what comes before them.

ARC-Challenge and HellaSwag with the leaderboard's examples, on the default model. Counted against the sequences that
lm-evaluation-harness would run one by one, what it takes to prove that sharing changes nothing included. The answers to
some of the questions are then computed one by one, too, and compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import notall
from notall import Plan
from notall.evaluation.harness import PlansLM, TaskResult, evaluate_job
from notall.evaluation.tasks import TaskShelf
from notall.records.columns import number, plain
from notall.reporting.console import show

TASKS = {"local_arc_challenge": 25, "local_hellaswag": 10}  # examples shown


def answered(lm: PlansLM, shelf: TaskShelf, name: str, limit: int) -> list[float]:
    """The log-likelihoods of all answers to the first `limit` questions."""
    found: list[TaskResult] = evaluate_job(lm, shelf.build(name, TASKS[name], limit))
    return [value for document in found[0].documents for value, _ in document.answers]


def measured(model: Any, tokenizer: Any, shelf: TaskShelf, name: str, limit: int, checked: int) -> dict[str, Any]:
    shared, alone = (PlansLM(model, tokenizer, [Plan()]) for _ in range(2))
    values = answered(shared, shelf, name, limit)
    alone.scorer.packs = False
    expected = answered(alone, shelf, name, checked)
    return {
        "task": name.removeprefix("local_"),
        "shots": TASKS[name],
        "documents": limit,
        "plain": shared.scorer.plain_tokens,
        "run": shared.scorer.tokens,
        "share": shared.scorer.tokens / shared.scorer.plain_tokens,
        "compared": len(expected),
        "difference": max(abs(ours - theirs) for ours, theirs in zip(values, expected)),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, default=Path("../shared/data"))
    options.add_argument("--limit", type=int, default=20, help="questions a task")
    options.add_argument("--checked", type=int, default=3, help="of them, computed one by one as well")
    options.add_argument("--dtype", default="float32")
    arguments = options.parse_args()
    if not arguments.data.is_dir():
        sys.exit(f"skipped: no folder {arguments.data} with tasks; give one with --data")
    model, tokenizer = notall.load(dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, arguments.data / "make_tasks.py", folder], check=True)
        shelf = TaskShelf(folder)
        rows = [measured(model, tokenizer, shelf, name, arguments.limit, arguments.checked) for name in TASKS]
    columns = [
        plain("task"),
        number("shots", "examples", "d"),
        number("documents", "questions", "d"),
        number("plain", "tokens one by one", ",d"),
        number("run", "tokens run", ",d"),
        number("share", "share", ".3f"),
        number("compared", "answers compared", "d"),
        number("difference", "largest difference, nats", ".1e"),
    ]
    show(rows, columns, title=f"Answers that share their question, {arguments.dtype} (target: at most 0.40)")


if __name__ == "__main__":
    main()
