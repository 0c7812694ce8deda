"""What scoring costs beside running: a search and `evaluate`, against what their parts
cost in a plain forward.

The bound of each is what it ran, sublayers and heads, at the rates of plain forward
passes of the same batches: a forward less its head, by the share of the sublayers that
ran, and bare heads, logits of the model's own dtype and no more. The slow twin scores
the same rows from whole rows of logits in float32. All in CPU seconds, measured in
turn.

python benchmarks/scoring.py --model GGUF --rounds 3 --slow
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from locating import peak_above
from torch import Tensor
from torch.nn.functional import cross_entropy

import notall
from notall.choosing.budget import by_count
from notall.choosing.criteria.search import search_sets
from notall.choosing.criteria.setting import Setting
from notall.choosing.evaluator import Evaluator
from notall.choosing.objective import kl
from notall.choosing.space import Space
from notall.measuring.quality import evaluate
from notall.measuring.speed import machine
from notall.measuring.token_scores import Dense, TokenScorer, TokenScores
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.plan import Plan
from notall.results.record import Quartiles
from notall.results.table import Column, table, with_quartiles, words
from notall.results.terminal import print_table
from notall.running.recording import record
from notall.running.replay import Replay

# rows of logits whose log-probabilities the slow twin makes at once: as fast as it gets
IN_CACHE = 16


@dataclass(frozen=True)
class Cost:
    """What scoring costs, in CPU seconds over others."""

    what: str
    value: Quartiles

    def line(self) -> dict[str, str | float]:
        value = self.value
        return {
            "what": self.what,
            "value": value.median,
            "value_low": value.low,
            "value_high": value.high,
        }


COSTS: tuple[Column[Cost], ...] = (
    words("what", lambda one: one.what),
    with_quartiles("CPU seconds, median [quartiles]", lambda one: one.value, ".2f"),
)


class SlowScorer(TokenScorer):
    """The slow twin: all logits at once, and float32 log-probabilities of whole
    rows.
    """

    def dense(
        self, hidden: Tensor, targets: Tensor | None = None, *, likeliest: bool = False
    ) -> tuple[TokenScores, Dense]:
        dense = Dense(self.head.logits(hidden), None)
        return self.score(hidden, targets, dense, likeliest=likeliest), dense

    def score(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        dense: Dense | None = None,
        *,
        likeliest: bool = False,
    ) -> TokenScores:
        logits = self.head.logits(hidden)
        nothing = logits[:0, 0]
        return TokenScores(
            (
                nothing
                if targets is None
                else cross_entropy(logits.float(), targets, reduction="none")
            ),
            (
                nothing
                if dense is None
                else torch.cat(
                    list(map(divergence, *map(in_cache, (dense.kept, logits))))
                )
            ),
            logits.argmax(-1) if likeliest else nothing.long(),
            nothing,
        )


def in_cache(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(IN_CACHE)


def divergence(dense: Tensor, skipped: Tensor) -> Tensor:
    log_p, log_q = dense.float().log_softmax(-1), skipped.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Counting:
    """Stands in for a scorer and counts the rows that go through a head; through a part
    of one, a part of each.
    """

    def __init__(
        self, scorer: TokenScorer, whole: Counting | None = None, share: float = 1.0
    ) -> None:
        self.scorer, self.whole, self.share, self.rows = (
            scorer,
            whole or self,
            share,
            0.0,
        )

    def dense(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.whole.rows += self.share * len(hidden)
        return self.scorer.dense(hidden, *args, **kwargs)

    def score(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.whole.rows += self.share * len(hidden)
        return self.scorer.score(hidden, *args, **kwargs)

    def on_likely_words(
        self, hidden: Iterable[Tensor], words: int, targets: Sequence[Tensor]
    ) -> Counting:
        looked_at = list(hidden)
        part = self.scorer.on_likely_words(looked_at, words, targets)
        if part is self.scorer:
            return self
        self.rows += sum(
            map(len, looked_at)
        )  # the whole head tells which words are likely
        weights: Any = (part, self.scorer)
        few, all_words = (len(way.weight) for way in weights)
        return Counting(part, self, few / all_words)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds.append(time.process_time() - start)


class Rates:
    """CPU seconds of a plain forward over all batches, and of the heads in it; measured
    anew each time.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor]) -> None:
        self.model, self.batches, self.head = model, batches, TokenScorer(model).head
        with torch.inference_mode():
            self.rows = [
                model.get_input_embeddings()(ids).flatten(0, 1) for ids in batches
            ]

    @property
    def tokens(self) -> int:
        return sum(ids.numel() for ids in self.batches)

    @torch.inference_mode()
    def measure(self) -> tuple[float, float]:
        forward: list[float] = []
        heads: list[float] = []
        for ids, rows in zip(self.batches, self.rows):
            with timed(forward):
                self.model(input_ids=ids, use_cache=False)
            with timed(heads):
                self.head.logits(rows)
        return sum(forward), sum(heads)


def searched(
    model: Any, batches: Sequence[Tensor], scorer: TokenScorer, count: int
) -> dict[str, Any]:
    """Search for `count` attentions by KL: CPU seconds, forward passes of sublayers,
    and rows of heads.
    """
    evaluator = Evaluator(model, kl(batches))
    evaluator._scorer = counting = Counting(scorer)  # type: ignore[assignment]
    space = Space(evaluator.structure, "attention")
    seconds: list[float] = []
    with timed(seconds):
        found = search_sets(
            Setting(model, space, batches, evaluator), by_count(space, count), {}
        )
    spent = evaluator.spent
    return {"seconds": seconds[0], "evaluations": spent.evaluations, "passes": spent.executions / evaluator.forward,
            "rows": counting.rows, "skipped": sorted(found.skipped), "cost": evaluator.cost(found.skipped)}  # fmt: skip


@torch.inference_mode()
def scored(
    model: Any,
    plans: Sequence[Plan],
    batches: Sequence[Tensor],
    scorer: TokenScorer,
    likeliest: bool,
) -> float:
    """CPU seconds of NLL and KL of each of `plans` and of the original model, as
    `evaluate` takes them.
    """
    seconds: list[float] = []
    with timed(seconds):
        replay = Replay(model, [Plan(), *plans])
        for ids in batches:
            targets, dense = ids[:, 1:].flatten(), None
            for _, hidden in replay.hidden_states(record(model, input_ids=ids)):
                rows = hidden[:, :-1].flatten(0, 1)
                if dense is None:
                    _, dense = scorer.dense(rows, targets, likeliest=likeliest)
                else:
                    scorer.score(rows, targets, dense, likeliest=likeliest)
    return seconds[0]


def evaluated(model: Any, plans: Sequence[Plan], batches: Sequence[Tensor]) -> float:
    seconds: list[float] = []
    with timed(seconds):
        evaluate(model, plans, batches)
    return seconds[0]


def cost(what: str, samples: Sequence[float]) -> Cost:
    return Cost(what, Quartiles.of(samples))


def of_search(rates: Rates, rounds: int, count: int, slow: bool) -> list[Cost]:
    model, batches = rates.model, rates.batches
    fast, twin = TokenScorer(model), SlowScorer(model)
    taken, ratios, slow_taken, slow_ratios, heads = [], [], [], [], []
    for turn in range(rounds):
        before = rates.measure()
        run = searched(model, batches, fast, count)
        forward, head = (sum(pair) / 2 for pair in zip(before, rates.measure()))
        bound = run["passes"] * (forward - head) + run["rows"] / rates.tokens * head
        taken.append(run["seconds"] / forward)
        ratios.append(run["seconds"] / bound)
        heads.append(head / forward)
        if slow and not turn:  # once: it takes minutes
            other = searched(model, batches, twin, count)
            assert other["skipped"] == run["skipped"], (other, run)
            forward, head = rates.measure()
            bound = (
                other["passes"] * (forward - head) + other["rows"] / rates.tokens * head
            )
            slow_taken.append(other["seconds"] / forward)
            slow_ratios.append(other["seconds"] / bound)
    what = (
        f"search for {count} attentions: {run['evaluations']} evaluations,"
        f" {run['passes']:.1f} passes of sublayers"
    )
    rows = [cost(f"{what}, in forwards", taken), cost("... over its bound", ratios)]
    if slow:
        rows += [
            cost("... by the slow twin, in forwards", slow_taken),
            cost("... by the slow twin, over its bound", slow_ratios),
        ]
    return [*rows, cost("a head, in forwards", heads)]


def of_evaluate(
    rates: Rates, rounds: int, plans: Sequence[Plan], slow: bool
) -> list[Cost]:
    model, batches = rates.model, rates.batches
    fast, twin = TokenScorer(model), SlowScorer(model)
    passes = Replay(model, [Plan(), *plans]).executions / len(
        notall.locate(model).sublayers
    )
    sides: dict[str, Callable[[], float]] = {
        "NLL and KL": lambda: scored(model, plans, batches, fast, False),
        "NLL, KL and agreement": lambda: scored(model, plans, batches, fast, True),
        "evaluate": lambda: evaluated(model, plans, batches),
    }
    if slow:
        sides["NLL, KL and agreement, slow twin"] = lambda: scored(
            model, plans, batches, twin, True
        )
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            before = rates.measure()
            seconds = sides[name]()
            forward, head = (sum(pair) / 2 for pair in zip(before, rates.measure()))
            samples[name].append(
                seconds / (passes * (forward - head) + (len(plans) + 1) * head)
            )
    return [
        cost(f"{name} of {len(plans)} plans over their bound", some)
        for name, some in samples.items()
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default="smollm2")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=2)
    options.add_argument(
        "--count", type=int, default=8, help="attentions that the search is for"
    )
    options.add_argument(
        "--part", choices=("all", "search", "evaluate", "memory"), default="all"
    )
    options.add_argument("--slow", action="store_true", help="the slow twin, too")
    options.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = notall.load(arguments.model, dtype=arguments.dtype)
    size = {
        "sequences": arguments.sequences,
        "length": arguments.length,
        "batch_size": arguments.batch_size,
    }
    batches = list(token_batches(tokenizer, read_text(), **size))
    blocks = len(notall.locate(model).blocks)
    plans = [Plan([blocks * step // 11]) for step in range(1, 11)]
    rates = Rates(model, batches)
    rates.measure()
    rows: list[Cost] = []
    if arguments.part in (
        "all",
        "memory",
    ):  # first, while nothing is held that may be used again
        wide = list(
            token_batches(tokenizer, read_text(), sequences=8, length=512, batch_size=8)
        )
        weights = sum(weight.nbytes for weight in model.parameters())
        peak = 1 + peak_above(lambda: evaluate(model, plans[:1], wide)) / weights
        rows.append(
            cost("peak memory of evaluate at 8 x 512 tokens, in weights", [peak])
        )
    if arguments.part in ("all", "search"):
        rows += of_search(rates, arguments.rounds, arguments.count, arguments.slow)
    if arguments.part in ("all", "evaluate"):
        rows += of_evaluate(rates, arguments.rounds, plans, arguments.slow)
    about = machine(model.device) | {
        "dtype": arguments.dtype,
        "model": arguments.model,
        **size,
    }
    if arguments.json:
        print(
            json.dumps({"about": about, "rows": [row.line() for row in rows]}, indent=1)
        )
        return
    print(
        f"{about['cpu']}, {about['threads']} threads, {arguments.dtype},"
        f" {about['versions']}"
    )
    title = (
        f"{arguments.model}, {rates.tokens:,} tokens in batches of"
        f" {arguments.batch_size} x {arguments.length}"
    )
    print_table(table(title, COSTS, rows))


if __name__ == "__main__":
    main()
