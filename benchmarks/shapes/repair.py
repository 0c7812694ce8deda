"""What a repair takes of a model of a shape, with dummy weights: time, and memory at
the peak.

    python benchmarks/shapes/repair.py                                       # 8 of 32 attentions of a 7B, 4,096 tokens
    python benchmarks/shapes/repair.py --shape config.json --attention 1 3   # any config, anywhere
    python benchmarks/shapes/repair.py --offload DIR                         # the text's streams in files

New weights go to files as they are made, as with `notall repair`. At the peak there are
the model, the streams of the text and the sums of one sublayer: four matrices of its
features by its features in float32, or of fewer tokens than it has features the tokens'
own. Dummy weights cannot be repaired well; they take the time and the memory of right
ones.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

import notall
from notall.measuring.speed import machine
from notall.models.configs import load_config
from notall.models.devices import resolve_device, resolve_dtype
from notall.models.weightless import build_random
from notall.results.terminal import progress_bar

EVENLY = [4, 8, 11, 15, 18, 22, 25, 29]  # of 32 layers


def peak_bytes(device: torch.device) -> int:
    """Most memory of this process so far, or of the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--shape", default="llama-2-7b", help="a built-in shape, or a config.json"
    )
    options.add_argument(
        "--attention",
        type=int,
        nargs="*",
        default=EVENLY,
        help="layers whose attention is skipped",
    )
    options.add_argument(
        "--mlp", type=int, nargs="*", default=[], help="layers whose MLP is skipped"
    )
    options.add_argument("--sequences", type=int, default=8)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--device", default="auto")
    options.add_argument(
        "--offload", type=Path, help="a folder for the streams, where memory is short"
    )
    asked = options.parse_args()
    device = resolve_device(asked.device)
    config = load_config(asked.shape)
    model = build_random(
        config, dtype=resolve_dtype(asked.dtype, device), device=device
    )
    weights = sum(weight.nbytes for weight in model.parameters())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(
        config.vocab_size, (asked.sequences, asked.length), generator=draw
    ).to(device)
    loaded, start, cpu = peak_bytes(device), time.monotonic(), time.process_time()
    plan = notall.Plan(asked.attention, asked.mlp)
    with progress_bar() as progress, tempfile.TemporaryDirectory() as out:
        repaired = notall.repair(
            model,
            plan,
            list(ids.split(1)),
            out=out,
            offload=asked.offload,
            progress=progress,
        )
    seconds, peak, about = time.monotonic() - start, peak_bytes(device), machine(device)
    print(
        f"{asked.shape}, {asked.dtype}, {about['device_name']}, {about['threads']}"
        f" threads, {about['versions']}"
    )
    print(
        f"skip {repaired.unrepaired};"
        f" {sum(refit.ridge is not None for refit in repaired.refits)} of"
        f" {len(repaired.refits)} steps refit to {ids.numel():,} tokens"
    )
    sizes = (f"{what} {size / 2**30:.1f} GiB" for what, size in
             (("weights", weights), ("peak", peak), ("once the model was loaded", loaded)))  # fmt: skip
    print(
        f"{seconds / 60:.1f} minutes, {(time.process_time() - cpu) / 60:.1f} of CPU;"
        f" {', '.join(sizes)}"
    )


if __name__ == "__main__":
    main()
