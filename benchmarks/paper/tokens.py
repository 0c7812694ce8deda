"""How many tokens the paper's benchmarks read, by document: the arithmetic behind the
hours on docs/reproducing-paper.md.

    python benchmarks/paper/tokens.py --task-path TASKS --tokenizer smollm2 --limit 30 \
        --out tokens.jsonl

The answers to one document share its context, as in `notall paper`.
"""

import argparse
import json
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import notall
from notall.evaluation.tasks import OPENLLM, Job, TaskShelf
from notall.measuring.speed import machine

ALL = {  # documents of each task
    "arc_challenge": 1172,
    "hellaswag": 10042,
    "mmlu": 14042,
    "truthfulqa_mc2": 817,
    "winogrande": 1267,
    "gsm8k": 1319,
}


def read_by_document(job: Job, tokenizer: Any) -> list[int]:
    """Tokens of each document: every context once, and each answer behind it."""

    def length(text: object) -> int:
        return len(tokenizer(text)["input_ids"]) if isinstance(text, str) else 0

    contexts: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    for name, task in job.tasks.items():
        for request in task.instances:
            context, answer = request.args[:2]
            seen = contexts[name, request.doc_id]
            seen[context] = seen.get(context, length(context)) + length(answer)
    return [sum(one.values()) for one in contexts.values()]


def main() -> None:
    """Write a header, and a row for each task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task-path", type=Path, help="folder of tasks on files")
    parser.add_argument("--tokenizer", default="smollm2", help="whose tokens")
    parser.add_argument("--limit", type=int, default=30, help="documents of each task")
    parser.add_argument("--out", type=Path, default=Path("tokens.jsonl"))
    asked = parser.parse_args()
    _, tokenizer = notall.load(asked.tokenizer)
    shelf = TaskShelf(asked.task_path)
    rows: list[dict[str, Any]] = [
        {
            "command": f"python benchmarks/paper/tokens.py --limit {asked.limit}",
            "machine": machine("cpu"),
            "model": asked.tokenizer,
            "date": str(date.today()),
        }
    ]
    for benchmark in OPENLLM:
        name = f"local_{benchmark.task}" if asked.task_path else benchmark.task
        limit = 1 if benchmark.task == "mmlu" else asked.limit  # of each subject
        found = read_by_document(shelf.build(name, limit=limit), tokenizer)
        each = sum(found) / len(found)
        row = {
            "task": benchmark.task,
            "documents": len(found),
            "tokens_each": round(each, 1),
            "whole": ALL[benchmark.task],
            "millions": round(each * ALL[benchmark.task] / 1e6, 2),
        }
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
    both = [row for row in rows[1:] if row["task"] != "gsm8k"]
    rows.append(
        {
            "task": "all but gsm8k",
            "millions": round(sum(r["millions"] for r in both), 1),
        }
    )
    asked.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main()
