"""How the search's work grows with depth: sublayers run to skip a third of tiny models, against plain greedy."""

from __future__ import annotations

import argparse
import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import notall
from notall.choosing.budget import by_count
from notall.choosing.choice import choose_plan
from notall.choosing.objective import nll
from notall.choosing.space import Space
from notall.records.columns import number
from notall.reporting.console import show


def tiny(blocks: int) -> LlamaForCausalLM:
    """A random Llama whose sublayers add little where it is deep, as those of trained ones do."""
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
            scale = 10 ** (2 * float(torch.rand((), generator=draw)) - 2)  # 0.01 to 1, whatever the depth
            weight.data.normal_(std=scale, generator=draw)
    return model


def plainly(units: int, steps: int) -> int:
    """Sublayers that plain greedy runs: each candidate in full at each step."""
    return sum((units - step) * (units - step - 1) for step in range(steps))


def exponent(sizes: list[int], work: list[float]) -> float:
    """The slope of log work over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in work]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


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
        found.append({
            "blocks": blocks,
            "skipped": len(chosen.plan),
            "executions": chosen.spent.executions,
            "plain": plain,
            "ratio": plain / chosen.spent.executions,
            "forwards": chosen.forwards,
            "evaluations": chosen.spent.evaluations,
        })  # fmt: skip
    columns = [
        number("blocks", "blocks", "d"),
        number("skipped", "skipped", "d"),
        number("evaluations", "evaluations", ",d"),
        number("executions", "sublayers run", ",.0f"),
        number("forwards", "forward passes", ",.1f"),
        number("plain", "plain greedy runs", ",d"),
        number("ratio", "times fewer", ".1f"),
    ]
    show(found, columns, title=f"To skip {arguments.fraction:.0%} of the sublayers of tiny random models")
    for name in ("executions", "plain"):
        told = {"executions": "the search", "plain": "plain greedy"}[name]
        print(f"sublayers run by {told} grow with depth to the power of "
              f"{exponent(arguments.blocks, [row[name] for row in found]):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
