"""The search against plain greedy, which runs every candidate in full at every step: CPU seconds, and held-out loss.

    python benchmarks/choosing/against_greedy.py --data DATA   # plain greedy alone takes some ten minutes of one core

DATA holds `wikitext2/wiki.train.first1MB.txt` and `wikitext2/wiki.test.raw`. Both choose on the same tokens by NLL; the
search is run before plain greedy and after it, with nothing kept in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from inputs import load_asked, options_of
from torch import Tensor
from torch.nn.functional import cross_entropy

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import nll
from notall.choosing.space import Skipped, Space
from notall.measuring.quality import gather, score
from notall.measuring.speed import machine
from notall.measuring.statistics import mean_and_error
from notall.models.texts import read_text, token_batches
from notall.records.columns import number, plain
from notall.reporting.console import show
from notall.reporting.progress_bars import progress_bar


@torch.inference_mode()
def plainly(model: Any, space: Space, skipped: Skipped, batches: Sequence[Tensor]) -> float:
    losses = []
    with notall.skip(model, space.plan(skipped)):
        for tokens in batches:
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(float(cross_entropy(logits.float(), tokens[:, 1:].flatten())))
    return sum(losses) / len(losses)


def greedy(model: Any, space: Space, count: int, batches: Sequence[Tensor]) -> tuple[Skipped, int]:
    """What plain greedy skips, and how many forward passes of all batches, in sublayers that ran, that takes."""
    skipped: Skipped = frozenset()
    ran = 0
    with progress_bar() as progress:
        for step in range(count):
            candidates = [skipped.union(unit) for unit in space.moves(skipped)]
            progress(step, count, f"plain greedy, {len(candidates)} candidates")
            skipped = min(candidates, key=lambda each: plainly(model, space, each, batches))
            ran += len(candidates) * (len(space.names) - len(skipped))
    return skipped, ran // len(space.names)


def main() -> None:
    options = options_of(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--count", type=int, default=20, help="sublayers that are skipped")
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--held-out", type=int, default=32, help="sequences of 512 tokens")
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    train, test = (read_text(asked.data / "wikitext2" / name) for name in ("wiki.train.first1MB.txt", "wiki.test.raw"))
    batches = token_batches(tokenizer, train, sequences=asked.sequences, length=asked.length, batch_size=1)
    held_out = token_batches(tokenizer, test, sequences=asked.held_out, length=512, batch_size=2)
    space = Space(notall.locate(model))
    budget = by_count(space, asked.count)
    plainly(model, space, frozenset(), batches)  # warm

    def search() -> tuple[Skipped, float, float]:
        start = time.process_time()
        chosen = choose_plan(model, "search", space, budget, batches, nll(batches))
        return frozenset(str(chosen.plan).split()), time.process_time() - start, chosen.forwards

    first = search()
    start = time.process_time()
    skipped, forwards = greedy(model, space, asked.count, batches)
    plain_seconds = time.process_time() - start
    second = search()
    assert first[0] == second[0]
    plans = [space.plan(each) for each in (first[0], skipped)]
    per_batch = [score(model, plans, tokens) for tokens in held_out]
    qualities = gather(per_batch)
    ours, theirs = ([value for scores in per_batch for value in scores[place].nll] for place in (1, 2))
    paired, error = mean_and_error([a - b for a, b in zip(ours, theirs)])
    seconds = [first[1], second[1]]
    rows = [
        {"what": "search", "seconds": min(seconds), "most": max(seconds), "forwards": first[2]},
        {"what": "plain greedy", "seconds": plain_seconds, "most": plain_seconds, "forwards": forwards},
    ]
    rows = [row | {"delta_nll": quality.delta_nll, "se": quality.delta_nll_se} for row, quality in zip(rows, qualities)]
    about = machine(model.device)
    print(f"{about['cpu']}, {about['threads']} threads, {asked.dtype}, {about['versions']}")
    columns = [plain("what"), number("seconds", "CPU seconds", ".1f"), number("most", "most", ".1f"),
               number("forwards", "forward passes", ".1f"), number("delta_nll", "NLL added, held-out", ".3f"),
               number("se", "±", ".3f")]  # fmt: skip
    show(
        rows,
        columns,
        title=f"{asked.count} of {len(space.names)} sublayers, on {asked.sequences} x {asked.length} tokens",
    )
    least, most = (plain_seconds / taken for taken in (max(seconds), min(seconds)))
    print(
        f"1/{least:.1f} to 1/{most:.1f} of its CPU seconds, 1/{forwards / first[2]:.1f} of its forward passes; "
        f"held-out, paired: {paired:+.3f} ± {error:.3f} nats"
    )


if __name__ == "__main__":
    main()
