"""What commands of notall take: seconds, CPU seconds and the most memory, each in a
process and an empty folder.

    python benchmarks/costs.py --out costs.jsonl "export /models/MODEL.gguf --plan plan.json --to hf --out fast" ...

Threads are those of the environment (OMP_NUM_THREADS). What the commands write is gone
afterwards. Without a command, it shows what FILE holds, or measures some of the default
model.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from notall.measuring.speed import machine
from notall.results import lines
from notall.results.record import Amount, Count, Fact
from notall.results.table import Column, number, size, table, words
from notall.results.terminal import print_table
from notall.strict_json import Settings

USUAL = (
    "plan smollm2 --skip attention:8 -o plan.json",
    (
        "search smollm2 --skip attention:1 --text prose --sequences 4 --length 128"
        " --patience 0 -o plan.json"
    ),
    "export smollm2 --plan published:smollm2-attention-8-by-mix --to hf --out fast",
)


class Cost(Fact):
    command: str
    seconds: Amount
    cpu_seconds: Amount
    peak_bytes: Count
    threads: str
    date: str
    machine: Settings


COLUMNS: tuple[Column[Cost], ...] = (
    words("command", lambda one: one.command),
    number("seconds", lambda one: one.seconds, ",.0f"),
    number("CPU seconds", lambda one: one.cpu_seconds, ",.0f"),
    size("memory at most", lambda one: one.peak_bytes),
    words("threads", lambda one: one.threads),
)


def cost(command: str) -> Cost:
    """Run it to its end. Raises `SystemExit` where it fails."""
    given = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "notall", *given], cwd=folder, stdout=sys.stderr
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
    if (code := os.waitstatus_to_exitcode(status)) not in (0, 3):
        raise SystemExit(f"exit code {code}: notall {command}")
    told = shlex.join(
        [
            "notall",
            *(Path(word).name if Path(word).is_absolute() else word for word in given),
        ]
    )
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return Cost(
        command=told, seconds=seconds, cpu_seconds=used.ru_utime + used.ru_stime, peak_bytes=peak, threads=threads,
        date=f"{date.today()}", machine=machine("cpu"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="a line is added to it for each command"
    )
    parser.add_argument("commands", nargs="*", help="without the word notall")
    asked = parser.parse_args()
    rows = [Cost(**line) for line in lines.read_lines(asked.out)] if asked.out else []
    for command in asked.commands or (() if rows else USUAL):
        rows.append(cost(command))
        if asked.out:
            lines.append(asked.out, rows[-1].model_dump(mode="json"))
    print_table(table("what commands take", COLUMNS, rows))


if __name__ == "__main__":
    main()
