"""How the search's work grows with depth: sublayers run to skip a third of tiny models,
against plain greedy.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import nll
from notall.choosing.space import Space
from notall.results.facts import SearchCost
from notall.results.table import Column, number, table
from notall.results.terminal import print_table


@dataclass(frozen=True)
class Work:
    """What a search in a model of so many blocks took, and the sublayers that plain
    greedy would run.
    """

    blocks: int
    skipped: int
    spent: SearchCost
    forwards: float
    plain: int


COLUMNS: tuple[Column[Work], ...] = (
    number("blocks", lambda one: one.blocks, "d"),
    number("skipped", lambda one: one.skipped, "d"),
    number("evaluations", lambda one: one.spent.evaluations, ",d"),
    number("sublayers run", lambda one: one.spent.executions, ",.0f"),
    number("forward passes", lambda one: one.forwards, ",.1f"),
    number("plain greedy runs", lambda one: one.plain, ",d"),
    number("times fewer", lambda one: one.plain / one.spent.executions, ".1f"),
)


def tiny(blocks: int) -> LlamaForCausalLM:
    """A random Llama whose sublayers add little where it is deep, as those of trained
    ones do.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            scale = 10 ** (
                2 * float(torch.rand((), generator=draw)) - 2
            )  # 0.01 to 1, whatever the depth
            weight.data.normal_(std=scale, generator=draw)
    return model


def plainly(units: int, steps: int) -> int:
    """Sublayers that plain greedy runs: each candidate in full at each step."""
    return sum((units - step) * (units - step - 1) for step in range(steps))


def exponent(sizes: list[int], work: list[float]) -> float:
    """The slope of log work over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in work]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--blocks", type=int, nargs="+", default=[12, 24, 48, 96])
    options.add_argument("--fraction", type=float, default=1 / 3)
    arguments = options.parse_args()
    batches = list((torch.arange(8 * 16).view(8, 16) * 7 % 90 + 3).split(2))
    found = []
    for blocks in arguments.blocks:
        model = tiny(blocks)
        space = Space(notall.locate(model))
        budget = by_count(space, arguments.fraction)
        chosen = choose_plan(model, "search", space, budget, batches, nll(batches))
        plain = plainly(2 * blocks, len(chosen.plan))
        found.append(
            Work(blocks, len(chosen.plan), chosen.spent, chosen.forwards, plain)
        )
    title = f"To skip {arguments.fraction:.0%} of the sublayers of tiny random models"
    print_table(table(title, COLUMNS, found))
    ran = {
        "the search": [one.spent.executions for one in found],
        "plain greedy": [float(one.plain) for one in found],
    }
    for name, work in ran.items():
        power = exponent(arguments.blocks, work)
        print(f"sublayers run by {name} grow with depth to the power of {power:.2f}")


if __name__ == "__main__":
    main()
