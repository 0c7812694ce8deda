"""Whether a shape takes as long where all layers hold the weights of one: beside one
with its own, in turn.

    python benchmarks/shapes/one_layer.py --shape llama-2-7b --dtype bfloat16 --rounds 7   # 2 cores, 15 GB, 5 minutes

If so, `paper_times.py --one-layer` may stand for a model that memory does not hold.
Weights that stayed in a cache would be read faster; a layer of 7B is hundreds of
megabytes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from paper_times import with_one_layer

import notall
from notall.choosing.criteria.data_free import deepest
from notall.measuring.speed import interleaved, machine, speedup, time_once
from notall.models.configs import load_config
from notall.models.devices import resolve_device, resolve_dtype
from notall.models.weightless import build_random
from notall.results.record import Quartiles
from notall.results.table import Column, table, with_quartiles, words
from notall.results.terminal import print_table, progress_bar

SHARE = 1 / 3  # of the sublayers of a kind that are skipped


@dataclass(frozen=True)
class Beside:
    """What a model takes, in milliseconds, and how many times as fast it is as one with
    weights of its own.
    """

    skipped: str
    weights: str
    prefill_ms: Quartiles
    prefill_ratio: Quartiles
    decode_ms: Quartiles
    decode_ratio: Quartiles


COLUMNS: tuple[Column[Beside], ...] = (
    words("skipped", lambda one: one.skipped),
    words("weights", lambda one: one.weights),
    with_quartiles("prefill ms", lambda one: one.prefill_ms, ".0f"),
    with_quartiles("times as fast", lambda one: one.prefill_ratio, ".3f"),
    with_quartiles("decode ms/token", lambda one: one.decode_ms, ".0f"),
    with_quartiles("times as fast", lambda one: one.decode_ratio, ".3f"),
)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--shape", default="llama-2-7b", help="a built-in shape, or a config.json"
    )
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--new", type=int, default=8)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    asked = options.parse_args()
    device = resolve_device(asked.device)
    dtype = resolve_dtype(asked.dtype, device)
    models = {
        "its own": build_random(load_config(asked.shape), dtype=dtype, device=device),
        "one layer's": with_one_layer(
            load_config(asked.shape), dtype=dtype, device=device
        ),
    }
    prompt = torch.arange(3, 3 + asked.prompt, device=device)[None]
    structure = notall.locate(models["its own"])
    plans = {
        "nothing": notall.Plan(),
        "attention": deepest(structure, "attention", SHARE),
        "block": deepest(structure, "block", SHARE),
    }

    def timed(weights: str, skipped: str) -> tuple[float, float]:
        with notall.skip(models[weights], plans[skipped]):
            return time_once(models[weights], prompt, asked.new)

    cases = [(skipped, weights) for skipped in plans for weights in models]
    with progress_bar() as progress:
        found = interleaved(
            {
                f"{skipped}, {weights}": partial(timed, weights, skipped)
                for skipped, weights in cases
            },
            asked.rounds,
            progress=progress,
        )
    rows = []
    for skipped, weights in cases:
        ours, own = (zip(*found[f"{skipped}, {name}"]) for name in (weights, "its own"))
        (prefill, decode), (own_prefill, own_decode) = ours, own
        rows.append(
            Beside(
                skipped,
                weights,
                Quartiles.of(prefill),
                speedup(own_prefill, prefill),
                Quartiles.of(decode),
                speedup(own_decode, decode),
            )
        )
    about = machine(device)
    print(
        f"{about['device_name']}, {about['threads']} threads, {dtype},"
        f" {about['versions']}"
    )
    title = (
        f"{asked.shape}, prompt {asked.prompt}: weights of their own, and one layer's"
    )
    print_table(table(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
