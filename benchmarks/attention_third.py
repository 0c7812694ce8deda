"""A third of the attentions of the default model against dense: prefill and decode,
short and long prompts.
"""

from __future__ import annotations

import notall
from notall.experiments.bench import bench
from notall.measuring.speed import machine
from notall.options import Workload
from notall.report.bench import COLUMNS, BenchRow, bench_rows
from notall.results.provenance import Provenance
from notall.results.table import Column, table, words
from notall.results.terminal import print_table

MODEL: Column[BenchRow] = words(
    "model", lambda row: "skipped" if row.model is row.bench.skipped else "dense"
)


def main() -> None:
    model, _ = notall.load()
    about = machine(model.device)
    plan = notall.deepest(notall.locate(model), "attention", 0.33, keep_last=True)
    for prompt in (128, 1024):
        record = bench(
            model,
            plan,
            Workload(prompt, 24, rounds=7),
            Provenance(what={"model": "smollm2"}),
        )
        title = (
            f"33 % of attentions, prompt {prompt}, {about['cpu']}, {about['threads']}"
            f" threads, {model.dtype}"
        )
        print_table(table(title, (MODEL, *COLUMNS[1:]), bench_rows([record])))


if __name__ == "__main__":
    main()
