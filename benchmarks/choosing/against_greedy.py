"""The search against plain greedy, which runs every candidate in full at every step:
CPU seconds, and held-out loss.

    python benchmarks/choosing/against_greedy.py --data DATA   # plain greedy alone takes some ten minutes of one core

DATA holds `wikitext2/wiki.train.first1MB.txt` and `wikitext2/wiki.test.raw`. Both
choose on the same tokens by NLL; the searches, with all their swaps and with few, run
before plain greedy and after it, with nothing kept in between.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from inputs import load_asked, options_of
from torch import Tensor
from torch.nn.functional import cross_entropy

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import nll
from notall.choosing.search_config import SearchConfig
from notall.choosing.space import Skipped, Space
from notall.measuring.quality import gather, score
from notall.measuring.speed import machine
from notall.measuring.statistics import mean_and_error
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.results.facts import Quality
from notall.results.table import Column, number, table, with_error, words
from notall.results.terminal import print_table, progress_bar

SEARCHES = {"search": SearchConfig.patience, "search --patience 0": 0}


@dataclass(frozen=True)
class Way:
    """What choosing in one way took, CPU seconds at least and at most, and what its
    plan loses, also less greedy's.
    """

    name: str
    seconds: float
    most: float
    part: str
    forwards: float
    quality: Quality
    paired: tuple[float, float]


COLUMNS: tuple[Column[Way], ...] = (
    words("what", lambda way: way.name),
    number("CPU seconds", lambda way: way.seconds, ".1f"),
    number("most", lambda way: way.most, ".1f"),
    words("of plain greedy's", lambda way: way.part),
    number("forward passes", lambda way: way.forwards, ".1f"),
    with_error(
        "NLL added, held-out",
        lambda way: (way.quality.delta_nll, way.quality.delta_nll_se),
    ),
    with_error("less plain greedy's", lambda way: way.paired),
)


@torch.inference_mode()
def plainly(
    model: Any, space: Space, skipped: Skipped, batches: Sequence[Tensor]
) -> float:
    losses = []
    with notall.skip(model, space.plan(skipped)):
        for tokens in batches:
            logits = (
                model(input_ids=tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
            )
            losses.append(float(cross_entropy(logits.float(), tokens[:, 1:].flatten())))
    return sum(losses) / len(losses)


def greedy(
    model: Any, space: Space, count: int, batches: Sequence[Tensor]
) -> tuple[Skipped, int]:
    """What plain greedy skips, and how many forward passes of all batches, in sublayers
    that ran, that takes.
    """
    skipped: Skipped = frozenset()
    ran = 0
    with progress_bar() as progress:
        for step in range(count):
            candidates = [skipped.union(unit) for unit in space.moves(skipped)]
            progress(step, count, f"plain greedy, {len(candidates)} candidates")
            skipped = min(
                candidates, key=lambda each: plainly(model, space, each, batches)
            )
            ran += len(candidates) * (len(space.names) - len(skipped))
    return skipped, ran // len(space.names)


def main() -> None:
    options = options_of(__doc__)
    options.set_defaults(threads=1)
    options.add_argument(
        "--count", type=int, default=20, help="sublayers that are skipped"
    )
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument(
        "--held-out", type=int, default=32, help="sequences of 512 tokens"
    )
    asked = options.parse_args()
    model, tokenizer = load_asked(asked)
    train, test = (
        read_text(asked.data / "wikitext2" / name)
        for name in ("wiki.train.first1MB.txt", "wiki.test.raw")
    )
    batches = token_batches(
        tokenizer, train, sequences=asked.sequences, length=asked.length, batch_size=1
    )
    held_out = token_batches(
        tokenizer, test, sequences=asked.held_out, length=512, batch_size=2
    )
    space = Space(notall.locate(model))
    budget = by_count(space, asked.count)
    plainly(model, space, frozenset(), batches)  # warm

    def search(patience: int) -> tuple[Skipped, float, float]:
        start = time.process_time()
        chosen = choose_plan(
            model,
            "search",
            space,
            budget,
            batches,
            nll(batches),
            SearchConfig(patience=patience),
        )
        return (
            frozenset(chosen.plan.names),
            time.process_time() - start,
            chosen.forwards,
        )

    first = [search(patience) for patience in SEARCHES.values()]
    start = time.process_time()
    skipped, forwards = greedy(model, space, asked.count, batches)
    plain_seconds = time.process_time() - start
    second = [search(patience) for patience in SEARCHES.values()]
    assert [each[0] for each in first] == [each[0] for each in second]
    plans = [*(space.plan(found) for found, _, _ in first), space.plan(skipped)]
    per_batch = [score(model, plans, tokens) for tokens in held_out]
    losses = [
        torch.tensor([value for scores in per_batch for value in scores[place + 1].nll])
        for place in range(len(plans))
    ]
    took: list[tuple[str, float, float, str, float]] = []
    for name, (_, seconds, passes), (_, again, _) in zip(SEARCHES, first, second):
        least, most = sorted((plain_seconds / seconds, plain_seconds / again))
        part = f"1/{least:.1f} to 1/{most:.1f}"
        took.append((name, min(seconds, again), max(seconds, again), part, passes))
    took.append(("plain greedy", plain_seconds, plain_seconds, "", forwards))
    rows = [
        Way(*one, quality, mean_and_error((own - losses[-1]).tolist()))
        for one, quality, own in zip(took, gather(per_batch), losses)
    ]
    about = machine(model.device)
    print(
        f"{about['cpu']}, {about['threads']} threads, {asked.dtype},"
        f" {about['versions']}"
    )
    title = (
        f"{asked.count} of {len(space.names)} sublayers, on {asked.sequences} x"
        f" {asked.length} tokens"
    )
    print_table(table(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
