"""The paper's time tables for a shape with dummy weights, beside what FLOPs and bytes promise.

    python benchmarks/shapes/paper_times.py --shape llama-2-7b --out results/times-7b    # a CUDA device
    python benchmarks/shapes/paper_times.py --shape llama-2-7b --out results/cpu-7b --device cpu --dtype bfloat16 \
        --prompt 128 512 --batch 1 --new 8 --minutes 60                                  # 2 cores, 14 GB

`--shape` takes a config.json too, so a tiny one makes a smoke test anywhere. `--one-layer` gives all layers the weights
of one, so that a model fits that would not: none of them is small enough to stay in a cache. Compiled: each decoder
layer by itself (torch.compile), so that layers of one form are compiled once.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

import notall
from notall.evaluation.paper.grid import FRACTIONS, paper_grid
from notall.evaluation.paper.scoreboard import PaperTable, time_table, write_csv, write_tables
from notall.evaluation.paper.times import time_grid
from notall.measuring.speed import machine
from notall.models.loading import build_empty, build_random, load_config, resolve_device, resolve_dtype
from notall.records.benchmarks import TimesRecord
from notall.records.columns import number, with_spread
from notall.records.plan import Plan
from notall.records.record import CONFIGURED
from notall.reporting.console import show
from notall.reporting.progress_bars import progress_bar


def with_one_layer(config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """The model of `config` in which all layers hold the same weights; only for layers that are all alike."""
    alone = copy.deepcopy(config)
    alone.num_hidden_layers = 1
    model = build_random(alone, **how)
    layers = model.get_submodule(notall.locate(build_empty(config)).layers)  # `model` is not what is located yet
    shared = {id(each): each for each in (model.config, *layers[0].parameters())}
    for index in range(1, config.num_hidden_layers):
        twin = copy.deepcopy(layers[0], dict(shared))
        for module in twin.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(twin)
    model.config.num_hidden_layers = config.num_hidden_layers
    return model


def promised(model: PreTrainedModel, plan: Plan, prompt: int, new: int, batch: int) -> tuple[float, float]:
    """Speedup of the prefill, by FLOPs, and of decoding, by bytes read, that leaving sublayers out allows at most.

    FLOPs: two a weight and token, and of the attention 2 * prompt^2 * width (it is causal); the head makes one token.
    Bytes: the weights that a token needs, once for the batch, and the KV cache as it is halfway. `model` may be empty,
    but its layers share nothing.
    """
    anatomy = notall.locate(model)
    head = model.get_output_embeddings().weight
    width = model.config.hidden_size

    def work(skipped: Plan) -> tuple[float, float]:
        flops, read = 2.0 * head.numel(), float(head.numel() * head.element_size())
        for part in anatomy.sublayers:
            if part.index not in getattr(skipped, part.kind):
                flops += 2 * prompt * part.parameters + (2 * prompt**2 * width if part.kind == "attention" else 0)
                read += part.weight_bytes + batch * part.kv_bytes_per_token * (prompt + new / 2)
        return flops, read

    (dense_flops, dense_read), (flops, read) = work(Plan()), work(plan)
    return dense_flops / flops, dense_read / read


def beside_bounds(model: PreTrainedModel, records: Sequence[TimesRecord], new: int) -> None:
    rows = []
    for record in records:
        prefill, decode = promised(model, record.plan, record.prompt_tokens, new, record.batch_size)
        rows.append(record.row() | {"promised_prefill": prefill, "promised_decode": decode})
    columns = [*CONFIGURED, number("prompt_tokens", "prompt", "d"), number("batch_size", "batch", "d"),
               with_spread("speedup_prefill", "prefill speedup", ".2f"), number("promised_prefill", "by FLOPs", ".2f"),
               with_spread("speedup_decode", "decode speedup", ".2f"), number("promised_decode", "by bytes", ".2f"),
               with_spread("decode_ms_per_token", "decode ms/token", ".0f"),
               with_spread("prefill_ms", "prefill ms", ".0f")]  # fmt: skip
    show(rows, columns, title="Measured, median [quartiles], beside what is promised")


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
    options.add_argument("--one-layer", action="store_true", help="all layers hold the weights of one")
    options.add_argument("--minutes", type=float, default=8, help="begin no prompt length after that")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    arguments = options.parse_args()

    device = resolve_device(arguments.device)
    config = load_config(arguments.shape)
    config.max_position_embeddings = max(config.max_position_embeddings, max(arguments.prompt) + arguments.new)
    build = with_one_layer if arguments.one_layer else build_random
    model = build(config, dtype=resolve_dtype(arguments.dtype, device), device=device)
    about = machine(device)
    provenance = {
        "model": Path(arguments.shape).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": about["device_name"],
        "compiled": arguments.compile,
        "one_layer": arguments.one_layer,
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
    shape = provenance["model"]
    tables = [
        PaperTable(
            f"{name}-{'last-kept' if keep else 'last-skipped'}",
            f"{told}, {shape} with dummy weights; the last layer {'is kept' if keep else 'may be skipped'}.",
            time_table(records, keep, quantity),
        )
        for keep in (False, True)
        for quantity, name, told in (
            ("prefill_ms", "prefill", "Milliseconds of the prefill"),
            ("decode_ms_per_token", "decode", "Milliseconds a token of decoding"),
        )
    ]
    write_tables(tables, arguments.out)
    write_csv(records, arguments.out / "times.csv")
    peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(f"{provenance['model']}, {provenance['dtype']}, {about['device_name']}{peak}, {about['versions']}, "
          f"{(time.monotonic() - start) / 60:.0f} minutes")  # fmt: skip
    for table in tables:
        print(f"\n{table.name}\n\n{table.markdown()}")
    beside_bounds(build_empty(config), records, arguments.new)


if __name__ == "__main__":
    main()
