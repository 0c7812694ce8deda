"""The paper's time tables for a shape with dummy weights, beside what FLOPs and bytes
promise.

    python benchmarks/shapes/paper_times.py --shape llama-2-7b --out results/times-7b    # a CUDA device
    python benchmarks/shapes/paper_times.py --shape llama-2-7b --out results/cpu-7b --device cpu --dtype bfloat16 \
        --prompt 128 512 --batch 1 --new 8 --minutes 60                                  # 2 cores, 14 GB

`--shape` takes a config.json too, so a tiny one makes a smoke test anywhere.
`--one-layer` gives all layers the weights of one, so that a model fits that would not:
none of them is small enough to stay in a cache. Compiled: each decoder layer by itself
(torch.compile), so that layers of one form are compiled once.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

import notall
from notall.choosing.criteria.data_free import paper_grid
from notall.experiments.paper.records import TimesRecord
from notall.experiments.paper.timing import TimingGrid, time_grid, time_in_turn
from notall.experiments.subject import Subject
from notall.measuring.speed import RoundTimes, compare_speeds, machine
from notall.models.loading import (
    build_empty,
    load_config,
    resolve_device,
    resolve_dtype,
)
from notall.models.weightless import build_random
from notall.options import PAPER_GRID, GridOptions, Workload
from notall.plan import Plan
from notall.progress import Progress
from notall.report.paper_tables import ENDINGS, half, time_figures
from notall.results.facts import CONFIGURED, SPEEDUPS, Configured, Times
from notall.results.provenance import Provenance
from notall.results.table import (
    Column,
    as_csv,
    as_latex,
    inherited,
    number,
    table,
    with_quartiles,
    within,
)
from notall.results.terminal import print_table, progress_bar
from notall.structure.model_structure import base_model

QUANTITIES: dict[Literal["prefill", "decode"], str] = {
    "prefill": "Milliseconds of the prefill",
    "decode": "Milliseconds a token of decoding",
}


def with_one_layer(config: PretrainedConfig, **how: Any) -> PreTrainedModel:
    """The model of `config` in which all layers hold the same weights; only for layers
    that are all alike.
    """
    alone = copy.deepcopy(config)
    alone.num_hidden_layers = 1
    model = build_random(alone, **how)
    layers = model.get_submodule(
        notall.locate(build_empty(config)).layers
    )  # `model` is not what is located yet
    shared = {id(each): each for each in (model.config, *layers[0].parameters())}
    for index in range(1, config.num_hidden_layers):
        twin = copy.deepcopy(layers[0], dict(shared))
        for module in twin.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(twin)
    model.config.num_hidden_layers = config.num_hidden_layers
    return model


def promised(
    model: PreTrainedModel, plan: Plan, prompt: int, new: int, batch: int
) -> tuple[float, float]:
    """Speedup of the prefill, by FLOPs, and of decoding, by bytes read, that leaving
    sublayers out allows at most.

    FLOPs: two a weight and token, and of the attention 2 * prompt^2 * width (it is
    causal); the head makes one token. Bytes: the weights that a token needs, once for
    the batch, and the KV cache as it is halfway. `model` may be empty, but its layers
    share nothing.
    """
    structure = notall.locate(model)
    head = model.get_output_embeddings().weight
    width = model.config.hidden_size

    def work(skipped: Plan) -> tuple[float, float]:
        flops, read = 2.0 * head.numel(), float(head.numel() * head.element_size())
        for part in structure.sublayers:
            if part.index not in getattr(skipped, part.kind):
                flops += 2 * prompt * part.parameters + (
                    2 * prompt**2 * width if part.kind == "attention" else 0
                )
                read += part.weight_bytes + batch * part.kv_bytes_per_token * (
                    prompt + new / 2
                )
        return flops, read

    (dense_flops, dense_read), (flops, read) = work(Plan()), work(plan)
    return dense_flops / flops, dense_read / read


def one_by_one_compiled(
    subject: Subject, rows: Sequence[Configured], progress: Progress, workload: Workload
) -> dict[str, Times]:
    """Not in turn: what is compiled, in the round that is thrown away, is gone when a
    plan is left.
    """
    found: dict[str, RoundTimes] = {}
    for row in rows:
        with notall.skip(subject.model, row.plan), compiled_layers(subject.model):
            found |= compare_speeds(
                subject.model,
                {row.name: nullcontext},
                workload,
                seed=subject.seed,
                progress=progress,
            )
    return {
        name: timing.compared_with(found["dense"]) for name, timing in found.items()
    }


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Layers of one form share what is compiled, whatever their number, as long as
    torch keeps that many variants.
    """
    inner = base_model(model)
    layers = list(inner.get_submodule(notall.locate(inner).layers).children())
    with torch._dynamo.config.patch(
        recompile_limit=1024, allow_unspec_int_on_nn_module=True
    ):
        for layer in layers:
            layer.compile(dynamic=True)
        try:
            yield
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


def beside_bounds(
    model: PreTrainedModel, records: Sequence[TimesRecord], new: int
) -> None:
    bounds = {
        record.key: promised(
            model, record.plan, record.prompt_tokens, new, record.concurrency
        )
        for record in records
    }
    speedups: tuple[Column[TimesRecord], ...] = within(SPEEDUPS, lambda one: one.times)
    decode, prefill = speedups
    columns: list[Column[TimesRecord]] = [
        *inherited(TimesRecord, CONFIGURED),
        number("prompt", lambda one: one.prompt_tokens, "d"),
        number("batch", lambda one: one.concurrency, "d"),
        prefill,
        number("by FLOPs", lambda one: bounds[one.key][0], ".2f"),
        decode,
        number("by bytes", lambda one: bounds[one.key][1], ".2f"),
        with_quartiles(
            "decode ms/token", lambda one: one.times.decode_ms_per_token, ".0f"
        ),
        with_quartiles("prefill ms", lambda one: one.times.prefill_ms, ".0f"),
    ]
    print_table(
        table("Measured, median [quartiles], beside what is promised", columns, records)
    )


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--shape", default="llama-2-7b", help="a built-in shape, or a config.json"
    )
    options.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for times.jsonl, the tables and times.csv",
    )
    options.add_argument(
        "--prompt", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096]
    )
    options.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    options.add_argument(
        "--fractions",
        type=float,
        nargs="+",
        default=PAPER_GRID.fractions,
        help="shares of the layers skipped",
    )
    options.add_argument("--new", type=int, default=16)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--compile", action="store_true", help="compiled, instead of eager"
    )
    options.add_argument(
        "--one-layer", action="store_true", help="all layers hold the weights of one"
    )
    options.add_argument(
        "--minutes", type=float, default=8, help="begin no prompt length after that"
    )
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    arguments = options.parse_args()

    device = resolve_device(arguments.device)
    config = load_config(arguments.shape)
    config.max_position_embeddings = max(
        config.max_position_embeddings, max(arguments.prompt) + arguments.new
    )
    build = with_one_layer if arguments.one_layer else build_random
    model = build(config, dtype=resolve_dtype(arguments.dtype, device), device=device)
    about = machine(device)
    provenance = Provenance.of(
        {
            "model": Path(arguments.shape).name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": about["device_name"],
            "compiled": arguments.compile,
            "one_layer": arguments.one_layer,
            "versions": about["versions"],
            "machine": about,
        }
    )
    subject = Subject(model, None, [], arguments.out, provenance)
    rows = paper_grid(notall.locate(model), GridOptions(tuple(arguments.fractions)))
    records, start = [], time.monotonic()
    measure = one_by_one_compiled if arguments.compile else time_in_turn
    with progress_bar() as progress:
        for prompt in arguments.prompt:
            if time.monotonic() - start > 60 * arguments.minutes:
                print(
                    f"stopped before prompt {prompt}: the time is up; the same command"
                    " goes on"
                )
                break
            timing = TimingGrid(
                (prompt,), arguments.new, tuple(arguments.batch), arguments.rounds
            )
            records += time_grid(
                subject, rows, timing, measure=measure, progress=progress
            )
    shape = provenance.what["model"]
    tables = {
        f"{quantity}-{ENDINGS[keep]}": half(
            time_figures(records, quantity),
            keep,
            f"{told}, {shape} with dummy weights; the last layer"
            f" {'is kept' if keep else 'may be skipped'}.",
        )
        for keep in (False, True)
        for quantity, told in QUANTITIES.items()
    }
    for name, one in tables.items():
        (arguments.out / f"{name}.tex").write_text(
            as_latex(one, caption=one.title, label=name), encoding="utf-8"
        )
    (arguments.out / "times.csv").write_text(as_csv(records), encoding="utf-8")
    peak = (
        f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        if device.type == "cuda"
        else ""
    )
    print(f"{shape}, {provenance.what['dtype']}, {about['device_name']}{peak}, {about['versions']}, "
          f"{(time.monotonic() - start) / 60:.0f} minutes")  # fmt: skip
    for name, one in tables.items():
        print(f"\n{name}\n\n{one.markdown()}")
    beside_bounds(build_empty(config), records, arguments.new)


if __name__ == "__main__":
    main()
