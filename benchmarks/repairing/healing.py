"""What healing gives back: a short distillation from the skipped model and from the repaired one, over its tokens.

    python benchmarks/repairing/healing.py --data DATA --out results/healing                  # hours on 2 cores
    python benchmarks/repairing/healing.py --data DATA --sets a8 --tokens 8192 --windows 8   # a look
    python benchmarks/repairing/healing.py --data DATA --train lora --warm-up 0.2 --sample   # other ways
    python benchmarks/repairing/healing.py --data DATA --sets b4 --passes 2                  # twice over the text
    python benchmarks/repairing/healing.py --data DATA --sets b4 --train-tokens 262144       # on more text

Trained on the text that the repair is fitted to, and measured on other text: see methods.py beside this. Called again
with the same --out, it goes on. DATA is as there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from methods import LENGTH, SETS, load_asked, options_of, texts

from notall.choosing.space import plan_of
from notall.measuring.quality import evaluate
from notall.measuring.speed import machine
from notall.records import lines
from notall.records.columns import number, plain, with_error
from notall.records.healing import HealRecord
from notall.records.ledger import read
from notall.records.provenance import Provenance
from notall.repairing.healing import heal
from notall.repairing.methods.keeping import kept_repair
from notall.repairing.sampling import sampled
from notall.repairing.students import Trained
from notall.reporting.console import show
from notall.reporting.progress_bars import progress_bar

STOP = 8  # windows to stop by, half of each text
BATCH = 4
BEGINS = ("skipped", "repaired")
WHAT = ("model", "dtype", "tokens", "windows", "rate", "train", "warm_up", "sample")  # results of others lie elsewhere
COLUMNS = (
    *(plain("set", "skip"), plain("begun", "begun with"), plain("text"), plain("state", "model")),
    with_error("delta_nll", "NLL added"),
    with_error("kl", "KL"),
    with_error("top1_agreement", "top-1 agreement"),
    number("cpu_minutes", "CPU min. of healing", ".1f"),
)
CURVE = (plain("set", "skip"), plain("begun", "begun with"), *HealRecord.columns)


def main() -> None:
    options = options_of(__doc__)
    options.add_argument("--out", type=Path, default=Path("results/healing"))
    options.add_argument("--tokens", type=int, default=131072, help="to fit the repair to, and to train on")
    options.add_argument("--windows", type=int, default=32, help="of 512 tokens, of each text to measure on")
    options.add_argument("--sets", nargs="+", choices=SETS, default=["a8", "b4", "p8"])
    options.add_argument("--begin", nargs="+", choices=BEGINS, default=list(BEGINS))
    options.add_argument("--rate", type=float, default=3e-4)
    options.add_argument("--train", choices=get_args(Trained), default="outputs")
    options.add_argument("--warm-up", type=float, default=0.0, help="share of the tokens that aim at the stream")
    options.add_argument("--sample", action="store_true", help="train on what the dense model writes itself")
    options.add_argument("--passes", type=int, default=1, help="over the text, in one training")
    options.add_argument("--train-tokens", type=int, help="to train on, where that is not what the repair is fitted to")
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    drawn, held_out = texts(tokenizer, asked.data, asked.tokens + STOP * LENGTH, asked.windows)
    fit = list(torch.cat(drawn)[:-STOP].split(8))
    trained = (asked.train_tokens or asked.tokens) + STOP * LENGTH
    rows = torch.cat(texts(tokenizer, asked.data, trained, asked.windows)[0])
    lesson, stop = rows[:-STOP], list(rows[-STOP:].split(BATCH))
    more = {"passes": asked.passes if asked.passes > 1 else None, "train_tokens": asked.train_tokens}
    settings = {name: getattr(asked, name) for name in WHAT} | {name: value for name, value in more.items() if value}
    named = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    path = asked.out / f"results-{named}.jsonl"  # other settings are another file
    found, curve = lines.read(path), list[dict[str, Any]]()
    for of in asked.sets:
        plan = plan_of(SETS[of].split())
        for begun in asked.begin:
            folder = asked.out / f"{of}-{begun}-{named}"
            if not any((row["set"], row["begun"]) == (of, begun) for row in found):
                by = "refit" if begun == "repaired" else "none"
                start, _ = kept_repair(asked.out / f"repairs-{named}", by, model, plan, fit)
                with progress_bar() as bar:
                    batches = list(lesson.split(BATCH)) * asked.passes
                    if asked.sample:
                        batches = sampled(
                            model, batches, asked.out, Provenance(what={"model": asked.model}), progress=bar
                        )
                    way = {"train": asked.train, "warm_up": asked.warm_up, "rate": asked.rate}
                    healed = heal(model, start, batches, stop, **way, folder=folder, progress=bar)
                minutes = read(folder / HealRecord.file, HealRecord)[-1].seconds / 60
                added: list[dict[str, Any]] = []
                for text, windows in held_out.items():
                    models = {"skipped": plan, begun: start, "healed": healed}
                    for name, quality in zip(models, evaluate(model, list(models.values()), windows)):
                        about = {"set": of, "begun": begun, "text": text, "state": name, "cpu_minutes": minutes}
                        added.append(about | asdict(quality) | settings)
                lines.append(path, *added)
                found += added
            curve += [{"set": of, "begun": begun, **look.row()} for look in read(folder / HealRecord.file, HealRecord)]
    about = machine(model.device)
    print(f"{about['cpu']}, {about['threads']} threads, {asked.dtype}, {about['versions']}")
    show(curve, CURVE, title=f"KL on {STOP} windows of both texts that it does not train on")
    show(found, COLUMNS, title=f"Healed with {asked.tokens:,} tokens, measured on {asked.windows} x {LENGTH} of each")


if __name__ == "__main__":
    main()
