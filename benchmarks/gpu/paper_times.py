"""The paper's time tables for a shape with random weights: prefill and decode of the whole grid, eager and compiled.

    python benchmarks/gpu/paper_times.py --shape llama-2-7b --out results/times-7b

Meant for one CUDA device (see gpu.sh); `--shape` takes a config.json too, so a tiny one makes a smoke test anywhere.
Compiled: each decoder layer by itself (torch.compile), so that layers of one form are compiled once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import notall
from notall.evaluation.paper.grid import FRACTIONS, paper_grid
from notall.evaluation.paper.scoreboard import time_table, write_csv, write_tables
from notall.evaluation.paper.times import time_grid
from notall.measuring.speed import machine
from notall.models.loading import build_random, load_config, resolve_device, resolve_dtype
from notall.reporting.progress_bars import progress_bar


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shape", default="llama-2-7b", help="a built-in shape, or a config.json")
    options.add_argument("--out", type=Path, required=True, help="folder for times.jsonl, the tables and times.csv")
    options.add_argument("--prompt", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="shares of the layers skipped")
    options.add_argument("--new", type=int, default=16)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--compile", action="store_true", help="compiled, instead of eager")
    options.add_argument("--minutes", type=float, default=8, help="begin no prompt length after that")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    arguments = options.parse_args()

    device = resolve_device(arguments.device)
    config = load_config(arguments.shape)
    config.max_position_embeddings = max(config.max_position_embeddings, max(arguments.prompt) + arguments.new)
    model = build_random(config, dtype=resolve_dtype(arguments.dtype, device), device=device)
    about = machine(device)
    provenance = {
        "model": Path(arguments.shape).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": about["device_name"],
        "compiled": arguments.compile,
        "versions": about["versions"],
        "machine": about,
    }
    rows = paper_grid(notall.locate(model), arguments.fractions)
    records, start = [], time.monotonic()
    with progress_bar() as progress:
        for prompt in arguments.prompt:
            if time.monotonic() - start > 60 * arguments.minutes:
                print(f"stopped before prompt {prompt}: the time is up; the same command goes on")
                break
            records += time_grid(
                model,
                rows,
                arguments.out,
                provenance,
                prompts=[prompt],
                batch_sizes=arguments.batch,
                new_tokens=arguments.new,
                rounds=arguments.rounds,
                compiled=arguments.compile,
                progress=progress,
            )
    tables = {
        f"{name}-{'last-kept' if keep else 'last-skipped'}": time_table(records, keep, quantity)
        for keep in (False, True)
        for quantity, name in (("prefill_ms", "prefill"), ("decode_ms_per_token", "decode"))
    }
    write_tables(tables, arguments.out)
    write_csv(records, arguments.out / "times.csv")
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"{provenance['model']}, {provenance['dtype']}, {about['device_name']}{peak}, {about['versions']}")
    for name, table in tables.items():
        print(f"\n{name}\n\n{table.reset_index().to_markdown(index=False)}")


if __name__ == "__main__":
    main()
