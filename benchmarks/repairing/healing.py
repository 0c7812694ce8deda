"""What healing gives back: a short distillation from the skipped model and from the
repaired one, over its tokens.

    python benchmarks/repairing/healing.py --data DATA --out results/healing                  # hours on 2 cores
    python benchmarks/repairing/healing.py --data DATA --sets a8 --tokens 8192 --windows 8   # a look
    python benchmarks/repairing/healing.py --data DATA --train lora --warm-up 0.2 --sample   # other ways
    python benchmarks/repairing/healing.py --data DATA --sets b4 --passes 2                  # twice over the text
    python benchmarks/repairing/healing.py --data DATA --sets b4 --train-tokens 262144       # on more text
    python benchmarks/repairing/healing.py --data DATA --sets a8 b4 --begin repaired --minutes 3  # for a time

Trained on the text that the repair is fitted to, and measured on other text: see
methods.py beside this. Called again with the same --out, it goes on. DATA is as there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from methods import LENGTH, LOSSES, SETS, Settings, load_asked, options_of, texts

from notall.choosing.space import plan_of
from notall.measuring.quality import evaluate
from notall.measuring.speed import machine
from notall.repairing.healing import heal
from notall.repairing.methods import kept_repair
from notall.repairing.texts import sampled
from notall.repairing.train_config import TrainConfig, Trained
from notall.results import lines
from notall.results.ledger import read_records
from notall.results.provenance import Provenance, this_run
from notall.results.repairs import HEALING, HealRecord
from notall.results.table import Column, inherited, number, table, within, words
from notall.results.terminal import print_table, progress_bar

STOP = 8  # windows to stop by, half of each text
BATCH = 4
BEGINS = ("skipped", "repaired")
WHAT = (
    "model",
    "dtype",
    "tokens",
    "windows",
    "rate",
    "train",
    "warm_up",
    "sample",
)  # results of others lie elsewhere


class Healed(Settings):
    """What a set loses, skipped, as the healing begins with it, or healed; and how it
    was trained.
    """

    begun: str
    state: str
    cpu_minutes: float
    rate: float
    train: str
    warm_up: float
    sample: bool
    passes: int | None = None
    train_tokens: int | None = None
    minutes: float | None = None
    command: str | None = None
    date: str | None = None
    machine: dict[str, object] | None = None


@dataclass(frozen=True)
class Look:
    """How far a healing is."""

    set: str
    begun: str
    found: HealRecord


COLUMNS: tuple[Column[Healed], ...] = (
    words("skip", lambda row: row.set),
    words("begun with", lambda row: row.begun),
    words("text", lambda row: row.text),
    words("model", lambda row: row.state),
    *inherited(Healed, LOSSES),
    number("CPU min. of healing", lambda row: row.cpu_minutes, ".1f"),
)
CURVE: tuple[Column[Look], ...] = (
    words("skip", lambda look: look.set),
    words("begun with", lambda look: look.begun),
    *within(HEALING, lambda look: look.found),
)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=Path("results/healing"))
    options.add_argument(
        "--tokens",
        type=int,
        default=131072,
        help="to fit the repair to, and to train on",
    )
    options.add_argument(
        "--windows",
        type=int,
        default=32,
        help="of 512 tokens, of each text to measure on",
    )
    options.add_argument("--sets", nargs="+", choices=SETS, default=["a8", "b4", "p8"])
    options.add_argument("--begin", nargs="+", choices=BEGINS, default=list(BEGINS))
    options.add_argument("--rate", type=float, default=3e-4)
    options.add_argument("--train", choices=get_args(Trained), default="outputs")
    options.add_argument(
        "--warm-up",
        type=float,
        default=0.0,
        help="share of the tokens that aim at the stream",
    )
    options.add_argument(
        "--sample",
        action="store_true",
        help="train on what the original model writes itself",
    )
    options.add_argument(
        "--passes", type=int, default=1, help="over the text, in one training"
    )
    options.add_argument(
        "--train-tokens",
        type=int,
        help="to train on, where that is not what the repair is fitted to",
    )
    options.add_argument(
        "--minutes",
        type=float,
        help="CPU minutes to train for, over the text again and again",
    )
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    drawn, held_out = texts(
        tokenizer, asked.data, asked.tokens + STOP * LENGTH, asked.windows
    )
    fit = list(torch.cat(drawn)[:-STOP].split(8))
    trained = (asked.train_tokens or asked.tokens) + STOP * LENGTH
    rows = torch.cat(texts(tokenizer, asked.data, trained, asked.windows)[0])
    lesson, stop = rows[:-STOP], list(rows[-STOP:].split(BATCH))
    more = {
        "passes": asked.passes if asked.passes > 1 else None,
        "train_tokens": asked.train_tokens,
    }
    settings = {name: getattr(asked, name) for name in WHAT} | {
        name: value for name, value in more.items() if value
    }
    named = of_settings = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    if asked.minutes:  # whose repairs are the same ones
        settings["minutes"] = asked.minutes
        named = f"{of_settings}-{asked.minutes:g}min"
    path = asked.out / f"results-{named}.jsonl"  # other settings are another file
    found, curve = [Healed(**line) for line in lines.read_lines(path)], list[Look]()
    for of in asked.sets:
        plan = plan_of(SETS[of].split())
        for begun in asked.begin:
            folder = asked.out / f"{of}-{begun}-{named}"
            if not any((row.set, row.begun) == (of, begun) for row in found):
                by = "refit" if begun == "repaired" else "none"
                start, _ = kept_repair(
                    asked.out / f"repairs-{of_settings}", by, model, plan, fit
                )
                with progress_bar() as bar:
                    batches = list(lesson.split(BATCH)) * asked.passes
                    if asked.sample:
                        batches = sampled(
                            model,
                            batches,
                            asked.out,
                            Provenance(what={"model": asked.model}),
                            progress=bar,
                        )
                    config = TrainConfig(
                        asked.train,
                        rate=asked.rate,
                        warm_up=asked.warm_up,
                        minutes=asked.minutes,
                    )
                    healed = heal(
                        model, start, batches, stop, config, out=folder, progress=bar
                    )
                minutes = (
                    read_records(folder / HealRecord.file, HealRecord)[-1].seconds / 60
                )
                added: list[Healed] = []
                for text, windows in held_out.items():
                    models = {"skipped": plan, begun: start, "healed": healed}
                    for name, quality in zip(
                        models, evaluate(model, list(models.values()), windows)
                    ):
                        about = {
                            "set": of,
                            "begun": begun,
                            "text": text,
                            "state": name,
                            "cpu_minutes": minutes,
                            "machine": machine(model.device),
                            **this_run("python", "benchmarks/repairing/healing.py"),
                        }
                        added.append(
                            Healed.model_validate(
                                about | quality.model_dump() | settings
                            )
                        )
                lines.append(path, *(row.line() for row in added))
                found += added
            curve += [
                Look(of, begun, look)
                for look in read_records(folder / HealRecord.file, HealRecord)
            ]
    place = machine(model.device)
    print(
        f"{place['cpu']}, {place['threads']} threads, {asked.dtype},"
        f" {place['versions']}"
    )
    print_table(
        table(
            f"KL on {STOP} windows of both texts that it does not train on",
            CURVE,
            curve,
        )
    )
    title = (
        f"Healed with {asked.tokens:,} tokens, measured on {asked.windows} x {LENGTH}"
        " of each"
    )
    print_table(table(title, COLUMNS, found))


if __name__ == "__main__":
    main()
