"""Programs of ExecuTorch beside a stock one of as many layers: bytes, and times of prefill and decode.

    python benchmarks/engines/executorch_programs.py [--model smollm2] [--rounds 15] [--threads 2] [--out FILE.json]

In an environment with ExecuTorch (`make .venv-executorch/.done`). Of the dense model: all of it, 8 attentions left out,
4 blocks left out, and a stock model of as many layers as that has, which is built of the first ones with fewer
`num_hidden_layers`. Each is loaded once, in one process; in each round all are asked in turn, forwards and then
backwards. Ratios are the rounds' own: median [quartiles].
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn

from notall import Plan, export, load
from notall.exporters.executorch import PROGRAM, runner
from notall.measuring.speed import cores, interleaved, machine, speedup
from notall.results.record import Count, Fact, Quartiles
from notall.results.table import Column, size, table, with_quartiles, words
from notall.results.terminal import print_table

PROMPT = torch.tensor([3 + (7 * place) % 250 for place in range(128)])


class Row(Fact):
    """A program: its file, its times, and by how much it is faster than the dense one and than the stock one."""

    model: str
    file_bytes: Count
    prefill_ms: Quartiles
    decode_ms: Quartiles
    prefill_speedup: Quartiles
    decode_speedup: Quartiles
    prefill_to_stock: Quartiles
    decode_to_stock: Quartiles


COLUMNS: tuple[Column[Row], ...] = (
    words("model", lambda one: one.model),
    size("file", lambda one: one.file_bytes),
    with_quartiles("prefill ms", lambda one: one.prefill_ms),
    with_quartiles("decode ms/token", lambda one: one.decode_ms, ".2f"),
    with_quartiles("prefill, dense / it", lambda one: one.prefill_speedup, ".3f"),
    with_quartiles("decode, dense / it", lambda one: one.decode_speedup, ".3f"),
    with_quartiles("prefill, it / stock", lambda one: one.prefill_to_stock, ".3f"),
    with_quartiles("decode, it / stock", lambda one: one.decode_to_stock, ".3f"),
)


def written(spec: str, attentions: int, blocks: int, folder: Path) -> dict[str, Path]:
    """The programs, by name: without the last attentions but one, and without blocks in the middle."""
    model, _ = load(spec, dtype="float32", device="cpu")
    depth = model.config.num_hidden_layers
    last = range(depth - 1 - attentions, depth - 1)
    middle = range((depth - blocks) // 2, (depth - blocks) // 2 + blocks)
    plans = {"dense": Plan(), f"-{attentions} attentions": Plan(last), f"-{blocks} blocks": Plan(middle, middle)}
    found = {name: export(model, plan, "executorch", folder / name) / PROGRAM for name, plan in plans.items()}
    model.model.layers = nn.ModuleList(model.model.layers[: depth - blocks])
    model.config.num_hidden_layers = depth - blocks
    if layer_types := getattr(model.config, "layer_types", None):
        model.config.layer_types = layer_types[: depth - blocks]
    model.save_pretrained(folder / "fewer")
    return found | {"stock": export(folder / "fewer", Plan(), "executorch", folder / "stock") / PROGRAM}


def timed(run: Callable[[Tensor, int], Tensor], new: int) -> tuple[float, float]:
    """Milliseconds of a prompt, and of each token behind it."""
    start = time.perf_counter()
    token = run(PROMPT, 0).argmax()[None]
    between = time.perf_counter()
    for place in range(new):
        token = run(token, len(PROMPT) + place).argmax()[None]
    return 1e3 * (between - start), 1e3 * (time.perf_counter() - between) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--attentions", type=int, default=8, help="how many to leave out")
    parser.add_argument("--blocks", type=int, default=4, help="how many to leave out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, help="keep the figures in this file, too")
    given = parser.parse_args()
    portable_lib._unsafe_reset_threadpool(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = written(given.model, given.attentions, given.blocks, Path(scratch))
        runners = {name: runner(file) for name, file in files.items()}
        taken = interleaved({name: partial(timed, run, given.new) for name, run in runners.items()}, given.rounds)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    times = {name: tuple(zip(*pairs)) for name, pairs in taken.items()}
    rows = [row(name, sizes[name], times) for name in files]
    about = machine("cpu") | {"executorch": version("executorch"), "date": str(date.today())}
    about |= {"model": given.model, "threads": given.threads, "rounds": given.rounds}
    about |= {"prompt": len(PROMPT), "new": given.new}
    title = f"ExecuTorch {about['executorch']}, {about['cpu']}, {given.threads} threads, {given.rounds} rounds"
    print_table(table(title, COLUMNS, rows))
    if given.out:
        kept = {"about": about, "programs": [one.model_dump() for one in rows]}
        given.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def row(name: str, file_bytes: int, times: dict[str, tuple[tuple[float, ...], ...]]) -> Row:
    own, dense, stock = times[name], times["dense"], times["stock"]
    return Row(
        model=name,
        file_bytes=file_bytes,
        prefill_ms=Quartiles.of(own[0]),
        decode_ms=Quartiles.of(own[1]),
        prefill_speedup=speedup(dense[0], own[0]),
        decode_speedup=speedup(dense[1], own[1]),
        prefill_to_stock=speedup(own[0], stock[0]),
        decode_to_stock=speedup(own[1], stock[1]),
    )


if __name__ == "__main__":
    main()
