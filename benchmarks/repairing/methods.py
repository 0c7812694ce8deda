"""Ways to make up for what is skipped, side by side: what each gives back on two texts,
what it takes and what it adds.

    python benchmarks/repairing/methods.py --data DATA --out results/repairs   # hours on 2 cores
    python benchmarks/repairing/methods.py --data DATA --sets a8 --tokens 16384 --windows 8   # a look
    python benchmarks/repairing/methods.py --data DATA --model GGUF --sets gemma-a4 gemma-p8 --methods none refit
    python benchmarks/repairing/methods.py --data DATA --sets a8 b4 --methods others:linear_patch others:rotation

All are given the same text, windows of 512 tokens of WikiText-2 train and of C4
documents 151 to 300 in turn, and are measured on WikiText-2 test and on C4 documents 1
to 150. Called again with the same --out, it goes on. DATA holds
`wikitext2/wiki.train.first1MB.txt`, `wikitext2/wiki.test.raw` and `c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "choosing"))

from inputs import load_asked, options_of

from notall.choosing.space import plan_of
from notall.measuring.quality import evaluate
from notall.models.texts import Text, read_text, start_tokens, token_ids
from notall.models.windows import token_batches
from notall.repairing.methods import METHODS, kept_repair
from notall.results import lines
from notall.results.facts import DELTA_NLL, KL, TOP1, Quality
from notall.results.table import (
    Column,
    inherited,
    number,
    size,
    table,
    with_error,
    words,
)
from notall.results.terminal import print_table

LENGTH = 512
WAYS = [
    *METHODS,
    *(f"others:{name}" for name in ("linear_patch", "rotation", "streamline", "turns")),
]
SETS = {
    # found by the search on the default model: attentions, blocks, portable sets,
    # sublayers
    "a4": "attn.6 attn.7 attn.26 attn.29",
    "a8": "attn.6 attn.7 attn.8 attn.12 attn.22 attn.25 attn.26 attn.29",
    "a12": (
        "attn.4 attn.6 attn.7 attn.8 attn.9 attn.12 attn.17 attn.22 attn.25 attn.26"
        " attn.28 attn.29"
    ),
    "b2": "attn.13 mlp.13 attn.17 mlp.17",
    "b4": "attn.13 mlp.13 attn.14 mlp.14 attn.17 mlp.17 attn.26 mlp.26",
    "b6": (
        "attn.12 mlp.12 attn.13 mlp.13 attn.14 mlp.14 attn.15 mlp.15 attn.17 mlp.17"
        " attn.26 mlp.26"
    ),
    "p4": "mlp.5 attn.6 mlp.17 attn.18",
    "p8": "mlp.5 attn.6 mlp.13 attn.14 mlp.17 attn.18 mlp.25 attn.26",
    "p12": (
        "attn.3 mlp.3 mlp.4 attn.5 mlp.5 attn.6 mlp.6 attn.7 mlp.17 attn.18 mlp.25"
        " attn.26"
    ),
    "s16": (
        "attn.3 attn.5 mlp.5 attn.6 mlp.6 attn.7 attn.8 attn.9 attn.12 mlp.13 attn.14"
        " mlp.14 attn.22 attn.25 attn.26 attn.29"
    ),
    # the paper's rule, the last layer kept
    "d8": "attn.21 attn.22 attn.23 attn.24 attn.25 attn.26 attn.27 attn.28",
    "db4": "attn.25 mlp.25 attn.26 mlp.26 attn.27 mlp.27 attn.28 mlp.28",
    # found by the search that judges sets after a repair
    "after-a8": "attn.6 attn.7 attn.8 attn.15 attn.17 attn.21 attn.26 attn.28",
    "after-p4": "mlp.14 attn.15 mlp.16 attn.17",
    "after-b4": "attn.12 mlp.12 attn.14 mlp.14 attn.15 mlp.15 attn.17 mlp.17",
    # found by the search on Gemma 3 270M
    "gemma-a4": "attn.7 attn.9 attn.16 attn.17",
    "gemma-a8": "attn.3 attn.6 attn.7 attn.8 attn.9 attn.15 attn.16 attn.17",
    "gemma-b4": "attn.7 mlp.7 attn.8 mlp.8 attn.9 mlp.9 attn.14 mlp.14",
    "gemma-b8": (
        "attn.2 mlp.2 attn.4 mlp.4 attn.6 mlp.6 attn.7 mlp.7 attn.8 mlp.8 attn.9 mlp.9"
        " attn.14 mlp.14 attn.15 mlp.15"
    ),
    "gemma-p8": "attn.7 mlp.7 attn.8 mlp.8 attn.9 mlp.9 mlp.16 attn.17",
}


class Settings(Quality):
    """What a set loses on a text, and with what that was measured, as a line of a file
    has it.
    """

    set: str
    text: str
    model: str
    dtype: str
    tokens: int
    windows: int

    def line(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class Repaired(Settings):
    """What a set loses after a repair, and what that took and adds."""

    repair: str
    seconds: float
    added_bytes: int


LOSSES: tuple[Column[Quality], ...] = (DELTA_NLL, KL, TOP1)
COLUMNS: tuple[Column[Repaired], ...] = (
    words("skip", lambda row: row.set),
    words("repair", lambda row: row.repair),
    words("text", lambda row: row.text),
    *inherited(Repaired, LOSSES),
    number("CPU s to repair", lambda row: row.seconds, ",.1f"),
    size("added", lambda row: row.added_bytes),
)


@dataclass(frozen=True)
class Beside:
    """One figure of a set and text by each method, with its error."""

    set: str
    text: str
    by: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def back(self) -> float | None:
        """The share that ours gives back."""
        return (
            1 - self.by["refit"][0] / self.by["none"][0]
            if {"none", "refit"} <= self.by.keys()
            else None
        )


def beside(
    rows: Sequence[Repaired], figure: Callable[[Repaired], tuple[float, float]]
) -> list[Beside]:
    """A row a set and text."""
    found: dict[tuple[str, str], Beside] = {}
    for row in rows:
        found.setdefault((row.set, row.text), Beside(row.set, row.text)).by[
            row.repair
        ] = figure(row)
    return [*found.values()]


def with_method(name: str) -> Column[Beside]:
    return with_error(name, lambda row: row.by.get(name))


def named(asked: argparse.Namespace, *what: str) -> tuple[dict[str, Any], str]:
    """Options that decide what comes out, and their hash, by which files are called; of
    a path the last part.
    """
    settings = {name: getattr(asked, name) for name in what}
    settings["model"] = Path(asked.model).name
    return settings, hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


def texts(
    tokenizer: Any, data: Path, tokens: int, windows: int
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The calibration text, two kinds in turn, and the texts to measure on.

    Where one kind ends early the other has more, and windows of the first are spread
    evenly among its windows.
    """
    documents = [
        json.loads(line)["text"]
        for line in (data / "c4" / "sample300.jsonl").read_text().splitlines()
    ]
    first, last = (
        _text(name, part)
        for name, part in (("C4, 1-150", documents[:150]), ("C4", documents[150:]))
    )

    def drawn(text: Text, sequences: int) -> list[Tensor]:
        return token_batches(
            tokenizer, text, sequences=sequences, length=LENGTH, batch_size=1
        )

    own = LENGTH - len(start_tokens(tokenizer))  # of a window; the others are BOS
    fewer = min(tokens // LENGTH // 2, len(token_ids(tokenizer, last)) // own)
    more = tokens // LENGTH // 2 * 2 - fewer
    kinds = [drawn(_wiki(data, "wiki.train.first1MB.txt"), more), drawn(last, fewer)]
    placed = [
        ((place + 0.5) / len(rows), row)
        for rows in kinds
        for place, row in enumerate(rows)
    ]
    mixed = [row for _, row in sorted(placed, key=lambda pair: pair[0])]
    held_out = {
        text.name: drawn(text, windows)
        for text in (_wiki(data, "wiki.test.raw"), first)
    }
    return list(torch.cat(mixed).split(8)), held_out


def _text(name: str, documents: list[str]) -> Text:
    content = "\n\n".join(documents)
    return Text(name, hashlib.sha256(content.encode()).hexdigest(), content)


def _wiki(data: Path, name: str) -> Text:
    return read_text(data / "wikitext2" / name)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=Path("results/repairs"))
    options.add_argument(
        "--tokens", type=int, default=131072, help="of calibration text"
    )
    options.add_argument(
        "--windows",
        type=int,
        default=32,
        help="of 512 tokens, of each text to measure on",
    )
    options.add_argument(
        "--sets",
        nargs="+",
        choices=SETS,
        default=[name for name in SETS if not name.startswith(("after", "gemma"))],
    )
    options.add_argument("--methods", nargs="+", choices=WAYS, default=list(METHODS))
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    batches, held_out = texts(tokenizer, asked.data, asked.tokens, asked.windows)
    settings, called = named(asked, "model", "dtype", "tokens", "windows")
    path = asked.out / f"results-{called}.jsonl"  # other settings are another file
    kept = asked.out / f"repairs-{called}"
    rows = [Repaired(**line) for line in lines.read_lines(path)]
    for of in asked.sets:
        plan = plan_of(SETS[of].split())
        known = {row.repair for row in rows if row.set == of}
        lacking = [name for name in asked.methods if name not in known]
        made = {}
        for name in lacking:
            print(f"{of}: {name}", file=sys.stderr, flush=True)
            made[name] = kept_repair(kept, name, model, plan, batches)
        found: list[Repaired] = []
        for text, windows in held_out.items() if lacking else ():
            for name, quality in zip(
                lacking, evaluate(model, [made[name][0] for name in lacking], windows)
            ):
                repaired, seconds = made[name]
                costs = {"seconds": seconds, "added_bytes": repaired.added_bytes}
                about = {"set": of, "repair": name, "text": text, **costs, **settings}
                found.append(Repaired.model_validate(quality.model_dump() | about))
        if found:
            # A set's lines come together, so that none is half there.
            lines.append(path, *(row.line() for row in found))
        rows += found
    order = [*SETS], WAYS
    shown = [
        row for row in rows if row.set in asked.sets and row.repair in asked.methods
    ]
    shown.sort(
        key=lambda row: (order[0].index(row.set), row.text, order[1].index(row.repair))
    )
    title = (
        f"Repaired with {asked.tokens:,} tokens, measured on {asked.windows} x {LENGTH}"
        " of each"
    )
    print_table(table(title, COLUMNS, shown))
    columns: list[Column[Beside]] = [
        words("skip", lambda row: row.set),
        words("text", lambda row: row.text),
        number("refit gives back", lambda row: row.back, ".0%"),
        *map(with_method, WAYS),
    ]
    print_table(
        table(
            "NLL added",
            columns,
            beside(shown, lambda row: (row.delta_nll, row.delta_nll_se)),
        )
    )
    print_table(table("KL", columns, beside(shown, lambda row: (row.kl, row.kl_se))))


if __name__ == "__main__":
    main()
