"""Do windows of one document count as independent? Errors of paired losses over
windows, and over documents.

    python benchmarks/clustered.py --data DATA --out clustered.jsonl   # ten CPU minutes

Twice: windows drawn at random over the text, as notall does, and all windows of the
first documents. The error over documents is cluster-robust: sqrt(C / (C - 1) sum over
documents of (sum of d - mean)^2) / n, of windows' differences d, n in C documents
(Cameron and Miller 2015, A Practitioner's Guide to Cluster-Robust Inference, II.A).
DATA holds `wikitext2/test_pages.jsonl` and `c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from notall import Plan, load
from notall.measuring.quality import score
from notall.measuring.speed import machine
from notall.measuring.statistics import mean_and_error
from notall.models.texts import fields, read_file
from notall.results.provenance import this_run
from notall.results.record import Amount, Count, Fact
from notall.results.table import Column, number, table, words
from notall.results.terminal import print_table
from notall.strict_json import Settings

TEXTS = {
    "WikiText-2 test": ("wikitext2/test_pages.jsonl", "page"),
    "C4": ("c4/sample300.jsonl", "text"),
}
PLANS = ("smollm2-attention-8-by-mix", "smollm2-block-4-by-mix")
LENGTH, DRAWN, MOST = 512, 32, 48  # tokens of a window; windows


class Error(Fact):
    text: str
    drawn: bool
    plan: str
    windows: Count
    documents: Count
    added: float
    over_windows: Amount
    over_documents: Amount
    ratio: Amount
    command: str
    date: str
    machine: Settings


COLUMNS: tuple[Column[Error], ...] = (
    words("text", lambda one: one.text),
    words(
        "drawn", lambda one: "at random" if one.drawn else "all of the first documents"
    ),
    words("plan", lambda one: one.plan),
    number("windows", lambda one: one.windows, "d"),
    number("documents", lambda one: one.documents, "d"),
    number("NLL added", lambda one: one.added, ".3f"),
    number("error over windows", lambda one: one.over_windows, ".4f"),
    number("over documents", lambda one: one.over_documents, ".4f"),
    number("ratio", lambda one: one.ratio, ".2f"),
)


def windows_of(
    tokenizer: Any, documents: Sequence[str], drawn: bool
) -> tuple[Tensor, list[int]]:
    """Windows of a text, (windows, LENGTH), and of which document the middle of each
    is.
    """
    tokens = [
        tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]
        for text in documents
    ]
    of = torch.tensor([place for place, ids in enumerate(tokens) for _ in ids])
    count = len(of) // LENGTH
    chosen = (
        torch.randperm(count, generator=torch.Generator().manual_seed(0))[:DRAWN]
        if drawn
        else torch.arange(MOST)
    )
    rows = torch.tensor([*chain.from_iterable(tokens)])[: count * LENGTH].view(
        count, LENGTH
    )[chosen]
    return rows, of[chosen * LENGTH + LENGTH // 2].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if not asked.data.is_dir():
        sys.exit(f"skipped: no folder {asked.data} with texts; give one with --data")
    model, tokenizer = load("smollm2")
    plans = [Plan.load(f"published:{name}") for name in PLANS]
    about = this_run("python", "benchmarks/clustered.py")
    found = []
    for (text, (file, name)), drawn in product(TEXTS.items(), (True, False)):
        documents = fields(
            asked.data / file, read_file(asked.data / file, "a text"), name
        )
        windows, of = windows_of(tokenizer, documents, drawn)
        parts = [score(model, plans, batch) for batch in windows.split(4)]
        for number_of, plan in enumerate(PLANS, 1):
            ours, dense = (
                [loss for part in parts for loss in part[at].nll]
                for at in (number_of, 0)
            )
            values = [a - b for a, b in zip(ours, dense)]
            (added, plain), (_, robust) = (
                mean_and_error(values),
                mean_and_error(values, of),
            )
            found.append(
                Error(
                    text=text, drawn=drawn, plan=plan, windows=len(of), documents=len({*of}), added=added,
                    over_windows=plain, over_documents=robust, ratio=robust / plain, machine=machine("cpu"), **about,
                )
            )  # fmt: skip
    if asked.out:
        asked.out.write_text(
            "".join(json.dumps(one.model_dump(mode="json")) + "\n" for one in found),
            encoding="utf-8",
        )
    print_table(table("errors over windows and over documents", COLUMNS, found))


if __name__ == "__main__":
    main()
