"""The paper's grid in one pass against one plan at a time, and how time grows with plans that share a prefix.

Both sides take the NLL of the same tokens, one pass in tiles of the head; what is compared is checked to be the same.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import notall
from notall.evaluation.paper.grid import paper_grid
from notall.measuring.speed import Spread, machine
from notall.measuring.token_scores import TokenScorer
from notall.models.texts import read_text, token_batches
from notall.records.columns import number, plain, with_spread
from notall.records.plan import Plan
from notall.reporting.console import show
from notall.reporting.plots import save
from notall.running.replay import Replay, record

FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "shared-prefixes"


def nll(logits: Tensor, tokens: Tensor) -> float:
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()))


@torch.inference_mode()
def together(model: Any, plans: Sequence[Plan], tokens: Tensor) -> list[float]:
    scorer, targets = TokenScorer(model), tokens[:, 1:].flatten()
    found: dict[int, float] = {}
    for numbers, hidden in Replay(model, plans).hidden_states(record(model, input_ids=tokens)):
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
def heads_alone(model: Any, plans: Sequence[Plan], tokens: Tensor, last: Tensor) -> list[float]:
    """What is paid for each plan however much is shared: the head and the NLL, in tiles, of `last`, (rows, hidden)."""
    scorer, targets = TokenScorer(model), tokens[:, 1:].flatten()
    return [float(scorer.score(last, targets).nll.mean()) for _ in plans]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each run, a sample a round, the order turned each round, after a round that is thrown away."""
    samples: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        order = list(range(len(runs)))[:: 1 if turn % 2 else -1]
        for number_ in order:
            samples[number_].append(seconds(runs[number_]))
    return [sample[1:] for sample in samples]


def grid(model: Any, tokens: Tensor, rounds: int) -> None:
    plans = [row.plan for row in paper_grid(notall.locate(model))]
    replay = Replay(model, plans)
    off = max(abs(a - b) for a, b in zip(together(model, plans, tokens), one_by_one(model, plans, tokens)))
    rounding = (
        1e-4 if model.dtype == torch.float32 else 1e-2
    )  # of whole logits in few bits; tiles are summed in float32
    assert off < rounding, f"one pass gives other figures, by {off} nats"
    with torch.inference_mode():
        (_, hidden) = next(Replay(model, [Plan()]).hidden_states(record(model, input_ids=tokens)))
    last = hidden[:, :-1].flatten(0, 1)
    sides = [lambda run=run: run(model, plans, tokens) for run in (together, one_by_one)]
    sides.append(lambda: heads_alone(model, plans, tokens, last))
    shared, single, heads = in_turn(sides, rounds)
    ratio = Spread.of([a / b for a, b in zip(shared, single)])
    # The layers' share of one-by-one time shrinks by the tree's own ratio; the heads' stays.
    bound = Spread.of([(h + (b - h) * replay.executions / replay.one_by_one) / b for h, b in zip(heads, single)])
    rows = [
        {"what": "sublayer executions, in one pass / one by one", **spread(replay.executions / replay.one_by_one)},
        {"what": "seconds, in one pass / one by one", **spread(ratio)},
        {"what": "seconds, what sharing layers alone allows", **spread(bound)},
        {"what": "seconds, heads and NLL / one by one", **spread(Spread.of([h / b for h, b in zip(heads, single)]))},
        {"what": "seconds, in one pass", **spread(Spread.of(shared))},
        {"what": "seconds, one by one", **spread(Spread.of(single))},
    ]
    title = f"{len(plans)} plans: {replay.executions} of {replay.one_by_one} executions, {tokens.numel()} tokens"
    show(rows, [plain("what"), with_spread("value", "median [quartiles]", ".3f")], title=title)


def spread(value: Spread | float) -> dict[str, float]:
    value = value if isinstance(value, Spread) else Spread(value, value, value, 1)
    return {"value": value.median, "value_low": value.low, "value_high": value.high}


def tails(blocks: int, count: int, shared: int, seed: int = 0) -> list[Plan]:
    """`count` plans that keep the first `shared` blocks whole and skip different attentions behind them."""
    draw = random.Random(seed)
    found: dict[tuple[int, ...], Plan] = {}
    while len(found) < count:
        chosen = sorted(draw.sample(range(shared, blocks), 3))
        found[tuple(chosen)] = Plan(attention=chosen)
    return list(found.values())


def curve(model: Any, tokens: Tensor, rounds: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    blocks = len(notall.locate(model).blocks)
    distinct = tails(blocks, max(counts), shared=2 * blocks // 3)
    series = {
        "each tail another": lambda n: distinct[:n],
        "10 tails, repeated": lambda n: [distinct[i % 10] for i in range(n)],
    }
    rows = []
    for count in counts:
        for name, choose in series.items():
            plans = choose(count)
            (samples,) = in_turn([lambda plans=plans: together(model, plans, tokens)], rounds)
            replay = Replay(model, plans)
            rows.append({"plans": count, "series": name, "executions": replay.executions, **spread(Spread.of(samples))})
        plans = distinct[:count]
        if count <= 10:  # one by one is plain: ten are enough to see its slope
            (samples,) = in_turn([lambda plans=plans: one_by_one(model, plans, tokens)], rounds)
            executions = Replay(model, plans).one_by_one
            rows.append(
                {"plans": count, "series": "one by one", "executions": executions, **spread(Spread.of(samples))}
            )
    return rows


def draw(rows: Sequence[dict[str, Any]], title: str) -> alt.LayerChart:
    base = alt.Chart(alt.Data(values=list(rows))).encode(
        x=alt.X("plans:Q", title="plans that share their first two thirds"),
        color=alt.Color("series:N", title=None, scale=alt.Scale(range=["#D55E00", "#0072B2", "#009E73"])),
    )
    lines = base.mark_line(point=True).encode(y=alt.Y("value:Q", title="seconds"))
    bars = base.mark_rule().encode(y="value_low:Q", y2="value_high:Q")
    return (lines + bars).properties(title=title, width=460, height=300)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--sequences", type=int, default=2)
    options.add_argument("--figure", type=Path, default=FIGURE, help="where to draw the curve, without a suffix")
    arguments = options.parse_args()
    model, tokenizer = notall.load()
    about = machine(model.device)
    where = f"{about['cpu']}, {about['threads']} threads, {str(model.dtype).removeprefix('torch.')}"
    print(f"{where}, {about['versions']}")
    size = {"sequences": arguments.sequences, "length": arguments.length, "batch_size": arguments.sequences}
    (tokens,) = token_batches(tokenizer, read_text(), **size)
    grid(model, tokens, arguments.rounds)
    rows = curve(model, tokens[:1, :64], max(1, arguments.rounds // 2), (1, 5, 10, 25, 50, 100))
    columns = [number("plans", "plans", "d"), plain("series"), number("executions", "sublayer executions", ","),
               with_spread("value", "seconds", ".2f")]  # fmt: skip
    show(rows, columns, title="Plans that share their first two thirds, on 64 tokens")
    save(draw(rows, f"Time grows with distinct tails ({where})"), arguments.figure)


if __name__ == "__main__":
    main()
