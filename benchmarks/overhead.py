"""What skipping itself costs: decoding against a model that never had the sublayers,
entering and leaving, similarity.

The native models are plain transformers: for attention and MLP, the same layers with a
forward written by hand that has no such line; for blocks, fewer layers.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

import notall
from notall.measuring.speed import compare_speeds, machine, speedup
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.options import Workload
from notall.results.record import Quartiles
from notall.results.table import Column, table, with_quartiles, words
from notall.results.terminal import print_table
from notall.structure.locating import LOCATED
from notall.structure.model_structure import base_model


@dataclass(frozen=True)
class Decoding:
    """Milliseconds a token without a third of a kind, skipped and natively built, and
    the rounds' own ratios.
    """

    kind: str
    skipped: Quartiles
    native: Quartiles
    ratio: Quartiles


DECODING: tuple[Column[Decoding], ...] = (
    words("skip", lambda one: f"{one.kind} 33 %"),
    with_quartiles("skipped ms/token", lambda one: one.skipped),
    with_quartiles("native ms/token", lambda one: one.native),
    with_quartiles("skipped / native", lambda one: one.ratio, ".3f"),
)


def attention_only(
    self: Any, hidden_states: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), **kwargs
    )
    return hidden_states + attended


def block_then_mlp(
    self: Any, hidden_states: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """A whole block, then the MLPs of the blocks behind it that have no attention."""
    attended, _ = self.self_attn(
        hidden_states=self.input_layernorm(hidden_states), **kwargs
    )
    hidden_states = hidden_states + attended
    for norm, mlp in self.mlps:
        hidden_states = hidden_states + mlp(norm(hidden_states))
    return hidden_states


def native(model: Any, plan: notall.Plan) -> Any:
    """`model` (a Llama, shared weights) built without the sublayers of `plan`, by
    hand.
    """
    built = copy.copy(model)
    built._modules = dict(model._modules)
    built.model = copy.copy(model.model)
    built.model._modules = dict(model.model._modules)
    built.config = built.model.config = copy.deepcopy(model.config)
    layers: list[Any] = []
    for index, source in enumerate(model.model.layers):
        if index in plan.attention:
            if index not in plan.mlp:
                layers[-1].mlps.append((source.post_attention_layernorm, source.mlp))
            continue
        layer = copy.copy(source)
        layer._modules = dict(source._modules)
        layer.self_attn = copy.copy(source.self_attn)
        layer.self_attn.layer_idx = len(layers)
        layer.mlps = (
            [] if index in plan.mlp else [(source.post_attention_layernorm, source.mlp)]
        )
        if index in plan.mlp or index + 1 in plan.attention:
            forward = (
                attention_only
                if index in plan.mlp and index + 1 not in plan.attention
                else block_then_mlp
            )
            layer.forward = forward.__get__(layer)
        layers.append(layer)
    built.model.layers = nn.ModuleList(layers)
    built.config.num_hidden_layers = len(layers)
    return built


class Either(nn.Module):
    """Two models behind one name, so that they can be timed in turn."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.now = [model]
        self.config, self.device = model.config, model.device
        self.forward = model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.now[0](*args, **kwargs)

    @contextmanager
    def being(self, model: Any) -> Iterator[None]:
        before, self.now = self.now, [model]
        yield
        self.now = before


def decode_overhead(model: Any, rounds: int, new_tokens: int) -> list[Decoding]:
    rows = []
    kinds: tuple[Literal["attention", "mlp", "block"], ...] = (
        "attention",
        "mlp",
        "block",
    )
    structure = notall.locate(model)
    for kind in kinds:
        plan = notall.deepest(structure, kind, 0.33, keep_last=True)
        either, twin = Either(model), native(model, plan)
        check_equal(model, twin, plan)

        @contextmanager
        def skipped(
            plan: notall.Plan = plan, either: Either = either
        ) -> Iterator[None]:
            with notall.skip(model, plan), either.being(model):
                yield

        stand_in: Any = either
        timings = compare_speeds(
            stand_in,
            {"skipped": skipped, "native": partial(either.being, twin)},
            Workload(32, new_tokens, rounds=rounds),
        )
        ratio = speedup(
            timings["skipped"].decode_samples_ms, timings["native"].decode_samples_ms
        )
        skipped_ms, native_ms = (
            Quartiles.of(timings[name].decode_samples_ms)
            for name in ("skipped", "native")
        )
        rows.append(Decoding(kind, skipped_ms, native_ms, ratio))
    return rows


@torch.no_grad()
def check_equal(model: Any, twin: Any, plan: notall.Plan) -> None:
    tokens = torch.arange(100, 120)[None]
    with notall.skip(model, plan):
        expected = model(tokens).logits
    assert torch.equal(twin(tokens).logits, expected), (
        "the native twin is another model"
    )


def milliseconds(run: Callable[[], Any], repeats: int) -> list[float]:
    run()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(1e3 * (time.perf_counter() - start))
    return samples


def enter_and_leave(model: Any, plan: notall.Plan) -> None:
    with notall.skip(model, plan):
        pass


def locate_anew(model: Any) -> None:
    LOCATED.pop(base_model(model), None)
    notall.locate(model)


def similarity_ratio(model: Any, tokenizer: Any, rounds: int) -> list[float]:
    (batch,) = token_batches(
        tokenizer, read_text(), sequences=2, length=256, batch_size=2
    )

    def forward() -> None:
        with torch.no_grad():
            model(batch)

    ratios = []
    notall.measure_similarity(model, [batch])
    forward()
    for _ in range(rounds):
        plain_ms, ours_ms = (
            milliseconds_once(forward),
            milliseconds_once(lambda: notall.measure_similarity(model, [batch])),
        )
        ratios.append(ours_ms / plain_ms)
    return ratios


def milliseconds_once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--new", type=int, default=24)
    arguments = options.parse_args()
    model, tokenizer = notall.load()
    about = machine(model.device)
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads,"
        f" {model.dtype}, {about['versions']}"
    )
    rows = decode_overhead(model, arguments.rounds, arguments.new)
    print_table(
        table(
            "Decoding, skipped against natively built (target: at most 1.02)",
            DECODING,
            rows,
        )
    )
    plan = notall.deepest(notall.locate(model), "attention", 0.33)
    samples = milliseconds(lambda: enter_and_leave(model, plan), 50)
    print(
        f"Entering and leaving skip on 30 blocks: {statistics.median(samples):.2f} ms"
        " (target: under 20)"
    )
    located = milliseconds(lambda: locate_anew(model), 5)
    forward = milliseconds(lambda: model(torch.ones(2, 4, dtype=torch.int64)), 5)
    print(
        f"locate: {statistics.median(located):.0f} ms, a forward of 8 tokens:"
        f" {statistics.median(forward):.0f} ms"
    )
    ratios = similarity_ratio(model, tokenizer, arguments.rounds)
    print(
        f"similarity / plain forward: {statistics.median(ratios):.2f} "
        f"[{min(ratios):.2f}, {max(ratios):.2f}] (target: 1.3)"
    )


if __name__ == "__main__":
    main()
