"""The paper's grid in one pass against one plan at a time, and how time grows with
plans that share a prefix.

Both sides take the NLL of the same tokens, one pass in tiles of the head; what is
compared is checked to be the same.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import notall
from notall.charts.style import save
from notall.choosing.criteria.data_free import paper_grid
from notall.measuring.speed import machine
from notall.measuring.token_scores import TokenScorer
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.plan import Plan
from notall.results.record import Quartiles
from notall.results.table import Column, number, table, with_quartiles, words
from notall.results.terminal import print_table
from notall.running.recording import record
from notall.running.replay import Replay

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "shared-prefixes"


@dataclass(frozen=True)
class Told:
    """A figure of the grid."""

    what: str
    value: Quartiles


@dataclass(frozen=True)
class Growth:
    """Seconds of so many plans, taken in one way, and the sublayers that are run."""

    plans: int
    series: str
    executions: int
    seconds: Quartiles


TOLD: tuple[Column[Told], ...] = (
    words("what", lambda one: one.what),
    with_quartiles("median [quartiles]", lambda one: one.value, ".3f"),
)
GROWTH: tuple[Column[Growth], ...] = (
    number("plans", lambda one: one.plans, "d"),
    words("series", lambda one: one.series),
    number("sublayer executions", lambda one: one.executions, ","),
    with_quartiles("seconds", lambda one: one.seconds, ".2f"),
)


def nll(logits: Tensor, tokens: Tensor) -> float:
    return float(
        cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    )


@torch.inference_mode()
def together(model: Any, plans: Sequence[Plan], tokens: Tensor) -> list[float]:
    scorer, targets = TokenScorer(model), tokens[:, 1:].flatten()
    found: dict[int, float] = {}
    for numbers, hidden in Replay(model, plans).hidden_states(
        record(model, input_ids=tokens)
    ):
        scores = scorer.score(hidden[:, :-1].flatten(0, 1), targets)
        found |= dict.fromkeys(numbers, float(scores.nll.mean()))
    return [found[n] for n in range(len(plans))]


@torch.inference_mode()
def one_by_one(model: Any, plans: Sequence[Plan], tokens: Tensor) -> list[float]:
    found = []
    for plan in plans:
        with notall.skip(model, plan):
            found.append(nll(model(input_ids=tokens, use_cache=False).logits, tokens))
    return found


@torch.inference_mode()
def heads_alone(
    model: Any, plans: Sequence[Plan], tokens: Tensor, last: Tensor
) -> list[float]:
    """What is paid for each plan however much is shared: the head and the NLL, in
    tiles, of `last`, (rows, hidden).
    """
    scorer, targets = TokenScorer(model), tokens[:, 1:].flatten()
    return [float(scorer.score(last, targets).nll.mean()) for _ in plans]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each run, a sample a round, the order turned each round, after a round
    that is thrown away.
    """
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for place in list(range(len(runs)))[:: 1 if turn % 2 else -1]:
            samples[place].append(seconds(runs[place]))
    return [sample[1:] for sample in samples]


def grid(model: Any, tokens: Tensor, rounds: int) -> None:
    plans = [row.plan for row in paper_grid(notall.locate(model))]
    replay = Replay(model, plans)
    off = max(
        abs(a - b)
        for a, b in zip(
            together(model, plans, tokens), one_by_one(model, plans, tokens)
        )
    )
    rounding = (
        1e-4 if model.dtype == torch.float32 else 1e-2
    )  # of whole logits in few bits; tiles are summed in float32
    assert off < rounding, f"one pass gives other figures, by {off} nats"
    with torch.inference_mode():
        _, hidden = next(
            Replay(model, [Plan()]).hidden_states(record(model, input_ids=tokens))
        )
    last = hidden[:, :-1].flatten(0, 1)
    sides = [partial(run, model, plans, tokens) for run in (together, one_by_one)]
    sides.append(partial(heads_alone, model, plans, tokens, last))
    shared, single, heads = in_turn(sides, rounds)
    executed = replay.executions / replay.one_by_one
    ratio = Quartiles.of([a / b for a, b in zip(shared, single)])
    # The layers' share of one-by-one time shrinks by the tree's own ratio; the heads'
    # stays.
    bound = Quartiles.of(
        [
            (h + (b - h) * replay.executions / replay.one_by_one) / b
            for h, b in zip(heads, single)
        ]
    )
    rows = [
        Told("sublayer executions, in one pass / one by one", Quartiles.of([executed])),
        Told("seconds, in one pass / one by one", ratio),
        Told("seconds, what sharing layers alone allows", bound),
        Told(
            "seconds, heads and NLL / one by one",
            Quartiles.of([h / b for h, b in zip(heads, single)]),
        ),
        Told("seconds, in one pass", Quartiles.of(shared)),
        Told("seconds, one by one", Quartiles.of(single)),
    ]
    title = (
        f"{len(plans)} plans: {replay.executions} of {replay.one_by_one} executions,"
        f" {tokens.numel()} tokens"
    )
    print_table(table(title, TOLD, rows))


def tails(blocks: int, count: int, shared: int, seed: int = 0) -> list[Plan]:
    """`count` plans that keep the first `shared` blocks whole and skip different
    attentions behind them.
    """
    draw = random.Random(seed)
    found: dict[tuple[int, ...], Plan] = {}
    while len(found) < count:
        chosen = sorted(draw.sample(range(shared, blocks), 3))
        found[tuple(chosen)] = Plan(attention=chosen)
    return list(found.values())


def curve(
    model: Any, tokens: Tensor, rounds: int, counts: Sequence[int]
) -> list[Growth]:
    blocks = len(notall.locate(model).blocks)
    distinct = tails(blocks, max(counts), shared=2 * blocks // 3)
    series: dict[str, Callable[[int], list[Plan]]] = {
        "each tail another": lambda n: distinct[:n],
        "10 tails, repeated": lambda n: [distinct[i % 10] for i in range(n)],
    }
    rows = []
    for count in counts:
        for name, choose in series.items():
            plans = choose(count)
            (samples,) = in_turn([partial(together, model, plans, tokens)], rounds)
            rows.append(
                Growth(
                    count, name, Replay(model, plans).executions, Quartiles.of(samples)
                )
            )
        plans = distinct[:count]
        if count <= 10:  # one by one is plain: ten are enough to see its slope
            (samples,) = in_turn([partial(one_by_one, model, plans, tokens)], rounds)
            rows.append(
                Growth(
                    count,
                    "one by one",
                    Replay(model, plans).one_by_one,
                    Quartiles.of(samples),
                )
            )
    return rows


def draw(rows: Sequence[Growth], title: str) -> alt.LayerChart:
    values = [
        {"plans": row.plans, "series": row.series, "value": row.seconds.median}
        | {"value_low": row.seconds.low, "value_high": row.seconds.high}
        for row in rows
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("plans:Q", title="plans that share their first two thirds"),
        color=alt.Color(
            "series:N",
            title=None,
            scale=alt.Scale(range=["#D55E00", "#0072B2", "#009E73"]),
        ),
    )
    lines = base.mark_line(point=True).encode(y=alt.Y("value:Q", title="seconds"))
    bars = base.mark_rule().encode(y="value_low:Q", y2="value_high:Q")
    return (lines + bars).properties(title=title, width=460, height=300)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--sequences", type=int, default=2)
    options.add_argument(
        "--figure",
        type=Path,
        default=FIGURE,
        help="where to draw the curve, without a suffix",
    )
    arguments = options.parse_args()
    model, tokenizer = notall.load()
    about = machine(model.device)
    where = (
        f"{about['cpu']}, {about['threads']} threads,"
        f" {str(model.dtype).removeprefix('torch.')}"
    )
    print(f"{where}, {about['versions']}")
    size = {
        "sequences": arguments.sequences,
        "length": arguments.length,
        "batch_size": arguments.sequences,
    }
    (tokens,) = token_batches(tokenizer, read_text(), **size)
    grid(model, tokens, arguments.rounds)
    rows = curve(
        model, tokens[:1, :64], max(1, arguments.rounds // 2), (1, 5, 10, 25, 50, 100)
    )
    print_table(
        table("Plans that share their first two thirds, on 64 tokens", GROWTH, rows)
    )
    save(draw(rows, f"Time grows with distinct tails ({where})"), arguments.figure)


if __name__ == "__main__":
    main()
