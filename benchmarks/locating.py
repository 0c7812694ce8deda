"""What finding and proving the sublayers costs, once per load: time against a forward
of 8 tokens, and extra memory.

python benchmarks/locating.py --shape llama-2-7b --dtype bfloat16    # random weights;
14 GB of memory
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import notall
from notall.measuring.speed import machine
from notall.models.configs import load_config
from notall.models.weightless import build_random
from notall.structure.locating import LOCATED
from notall.structure.model_structure import base_model

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_above(run: Callable[[], Any]) -> int:
    """Bytes of memory that `run` takes at its peak above what the process holds before
    (Linux).
    """
    REFERENCES.write_text("5")  # sets the high-water mark back to what is held now
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", STATUS.read_text())
    assert found is not None
    return int(found.group(1))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--shape", help="a built-in shape or a config.json, with random weights"
    )
    options.add_argument("--dtype", default="float32")
    options.add_argument("--repeats", type=int, default=5)
    arguments = options.parse_args()
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        model = build_random(
            load_config(arguments.shape), dtype=dtype, device=torch.device("cpu")
        )
    else:
        model, _ = notall.load(dtype=arguments.dtype)
    weights = sum(weight.nbytes for weight in model.parameters())
    tokens = torch.ones(1, 8, dtype=torch.int64)

    def forward() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)

    def locate() -> None:
        LOCATED.pop(base_model(model), None)
        notall.locate(model)

    forward()
    locate()
    ratios, times = [], []
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        forward()
        middle = time.perf_counter()
        locate()
        end = time.perf_counter()
        times.append((middle - start, end - middle))
        ratios.append((end - middle) / (middle - start))
    plain, ours = (statistics.median(samples) for samples in zip(*times))
    extra, base = peak_above(locate), peak_above(forward)
    about = machine(model.device)
    print(
        f"{arguments.shape or 'default model'}, {arguments.dtype}, {about['cpu']},"
        f" {about['threads']} threads"
    )
    print(
        f"locate {1e3 * ours:.0f} ms, a forward of 8 tokens {1e3 * plain:.0f} ms:"
        f" {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        " forwards (target: 4)"
    )
    print(
        f"extra memory at the peak: {extra / weights:.2%} of the weights (target: 5 %)"
    )
    print(f"a forward's: {base / weights:.2%}")


if __name__ == "__main__":
    main()
