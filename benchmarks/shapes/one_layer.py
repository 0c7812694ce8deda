"""Whether a shape takes as long where all layers hold the weights of one: beside one with its own, in turn.

    python benchmarks/shapes/one_layer.py --shape llama-2-7b --dtype bfloat16 --rounds 7   # 2 cores, 15 GB, 5 minutes

If so, `paper_times.py --one-layer` may stand for a model that memory does not hold. Weights that stayed in a cache
would be read faster; a layer of 7B is hundreds of megabytes.
"""

from __future__ import annotations

import argparse

import torch
from paper_times import with_one_layer

import notall
from notall.evaluation.paper.grid import deepest
from notall.measuring.speed import Spread, in_turn, machine, speedup, time_once
from notall.models.loading import build_random, load_config, resolve_device, resolve_dtype
from notall.records.columns import plain, with_spread
from notall.reporting.console import show
from notall.reporting.progress_bars import progress_bar

SHARE = 1 / 3  # of the sublayers of a kind that are skipped


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", default="llama-2-7b", help="a built-in shape, or a config.json")
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--new", type=int, default=8)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    asked = options.parse_args()
    device = resolve_device(asked.device)
    how = {"dtype": resolve_dtype(asked.dtype, device), "device": device}
    models = {name: build(load_config(asked.shape), **how) for name, build in
              (("its own", build_random), ("one layer's", with_one_layer))}  # fmt: skip
    prompt = torch.arange(3, 3 + asked.prompt, device=device)[None]
    plans = {"nothing": notall.Plan()} | {
        kind: deepest(notall.locate(models["its own"]), kind, SHARE, keep_last=False) for kind in ("attention", "block")
    }

    def timed(weights: str, skipped: str) -> tuple[float, float]:
        with notall.skip(models[weights], plans[skipped]):
            return time_once(models[weights], prompt, asked.new)

    cases = [(skipped, weights) for skipped in plans for weights in models]
    with progress_bar() as progress:
        found = in_turn(
            {f"{skipped}, {weights}": lambda s=skipped, w=weights: timed(w, s) for skipped, weights in cases},
            asked.rounds,
            progress=progress,
        )
    rows = []
    for skipped, weights in cases:
        row: dict[str, object] = {"skipped": skipped, "weights": weights}
        own = zip(*found[f"{skipped}, its own"])
        for name, ours, theirs in zip(("prefill", "decode"), zip(*found[f"{skipped}, {weights}"]), own):
            for what, spread in ((f"{name}_ms", Spread.of(ours)), (f"{name}_ratio", speedup(theirs, ours))):
                row |= {what: spread.median, f"{what}_low": spread.low, f"{what}_high": spread.high}
        rows.append(row)
    about = machine(device)
    print(f"{about['device_name']}, {about['threads']} threads, {how['dtype']}, {about['versions']}")
    columns = [plain("skipped"), plain("weights")]
    for name, told in (("prefill", "prefill ms"), ("decode", "decode ms/token")):
        columns += [with_spread(f"{name}_ms", told, ".0f"), with_spread(f"{name}_ratio", "times as fast", ".3f")]
    show(rows, columns, title=f"{asked.shape}, prompt {asked.prompt}: weights of their own, and one layer's")


if __name__ == "__main__":
    main()
