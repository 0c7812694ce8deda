"""Programs of ExecuTorch: what they answer, weigh and take, beside the dense one and a
stock one of as many layers.

    python benchmarks/engines/executorch_programs.py --out DIR [--rounds 15] [--threads 2]   # an hour of one core
    python benchmarks/engines/executorch_programs.py --out /tmp/look --sets b4 --windows 8 --rounds 3   # a look

In an environment with ExecuTorch (`make .venv-executorch/.done`). Of the original, of
each set as it is and repaired on the mix, and of a stock model of as many layers as
blocks leave: the first ones, with fewer `num_hidden_layers`. Each program is held
against the skipped model in float32, by logits of a prompt and of a token and by 64
greedy tokens. Then they are timed in one process: in each round all are asked in turn,
forwards and then backwards. Ratios are the rounds' own: median [quartiles]. Programs
that are in DIR are taken as they are; `--rounds 0` times none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from notall import Plan, RepairedPlan, export, load, repair, skip
from notall.exporters.executorch import PROGRAM, runner
from notall.measuring.speed import cores, interleaved, machine, speedup
from notall.repairing.fit_texts import FitTexts
from notall.repairing.texts import RepairTexts
from notall.results.provenance import this_run
from notall.results.record import Count, Fact, Quartiles
from notall.results.table import Column, number, size, table, with_quartiles, words
from notall.results.terminal import print_table
from notall.running.skipping import footprint

PROMPT = torch.tensor([3 + (7 * place) % 250 for place in range(128)])
GREEDY = 64
DENSE, REPAIRED, STOCK = "dense", ", repaired", "stock, {} layers"
# Of the default model: what `mix.py` beside this folder chose by the mix, and the
# portable set of `methods.py`.
SETS = {
    "a8": Plan(attention=(4, 6, 7, 9, 22, 25, 26, 29)),
    "p8": Plan(attention=(6, 14, 18, 26), mlp=(5, 13, 17, 25)),
    "b4": Plan(attention=(3, 4, 5, 17), mlp=(3, 4, 5, 17)),
}


class Row(Fact):
    """A program: what was counted and what it has, what it answers, and its times
    beside the dense and stock ones.
    """

    model: str
    weight_bytes: Count  # in float32, counted by notall
    file_bytes: Count
    kv_bytes: Count  # of all tokens that the program reads, counted by notall
    cache_bytes: Count  # in the program's plan of its memory
    error: float  # of the largest logit
    same_greedy: Count
    prefill_ms: Quartiles | None = None
    decode_ms: Quartiles | None = None
    prefill_speedup: Quartiles | None = None
    decode_speedup: Quartiles | None = None
    prefill_to_stock: Quartiles | None = None
    decode_to_stock: Quartiles | None = None


COLUMNS: tuple[Column[Row], ...] = (
    words("model", lambda one: one.model),
    size("weights", lambda one: one.weight_bytes),
    size("file", lambda one: one.file_bytes),
    size("KV", lambda one: one.kv_bytes),
    size("cache", lambda one: one.cache_bytes),
    number("error", lambda one: one.error, ".1e"),
    number(f"greedy, of {GREEDY}", lambda one: one.same_greedy, "d"),
    with_quartiles("prefill ms", lambda one: one.prefill_ms),
    with_quartiles("decode ms/token", lambda one: one.decode_ms, ".2f"),
    with_quartiles("prefill, dense / it", lambda one: one.prefill_speedup, ".3f"),
    with_quartiles("decode, dense / it", lambda one: one.decode_speedup, ".3f"),
    with_quartiles("prefill, it / stock", lambda one: one.prefill_to_stock, ".3f"),
    with_quartiles("decode, it / stock", lambda one: one.decode_to_stock, ".3f"),
)


def plans_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    windows: int,
    out: Path,
) -> dict[str, Plan]:
    """The dense plan, and each set as it is and repaired; a repair is kept in `out`."""
    plans = {DENSE: Plan()}
    for name in names:
        folder = out / f"{name}-repair"
        if not (folder / "plan.json").is_file():
            texts = RepairTexts.draw(model, tokenizer, FitTexts(sequences=windows))
            repair(model, SETS[name], texts.together(8), out=folder)
        plans |= {name: SETS[name], name + REPAIRED: RepairedPlan.load(folder)}
    return plans


def program(model: PreTrainedModel | Path, plan: Plan, folder: Path) -> Path:
    """Exported, unless it is there."""
    if not (folder / PROGRAM).is_file():
        export(model, plan, "executorch", folder)
        print(f"exported {folder.name}", file=sys.stderr)
    return folder / PROGRAM


def fewer_layers(spec: str, count: int, folder: Path) -> Path:
    """A checkpoint of the first layers alone."""
    if not folder.is_dir():
        model, tokenizer = load(spec, dtype="float32", device="cpu")
        model.model.layers = nn.ModuleList(model.model.layers[:count])
        model.config.num_hidden_layers = count
        if layer_types := getattr(model.config, "layer_types", None):
            model.config.layer_types = layer_types[:count]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def cache_bytes(file: Path, most: int, heads: int, head_dim: int) -> int:
    """Of the tensors shaped as keys or values: each is there as it was, and as it is
    updated in the same place.
    """
    plan = deserialize_pte_binary(file.read_bytes()).program.execution_plan[0]
    shapes = [
        tuple(value.val.sizes) for value in plan.values if hasattr(value.val, "sizes")
    ]
    return shapes.count((1, most, heads, head_dim)) // 2 * most * heads * head_dim * 4


def checked(model: PreTrainedModel, name: str, plan: Plan, file: Path) -> Row:
    """What the program has and answers, beside what is counted of the model, and what
    it answers with the plan.
    """
    counted, config = footprint(model, plan), model.config
    told = json.loads((file.parent / "notall.json").read_text(encoding="utf-8"))
    most = min(config.max_position_embeddings, 2048)
    with skip(model, plan), torch.no_grad():
        mine = model.generate(
            PROMPT[None], max_new_tokens=GREEDY, do_sample=False, eos_token_id=None
        )
    run, found, tokens = runner(file), list[int](), PROMPT
    for place in range(GREEDY):
        found.append(
            int(run(tokens, 0 if not place else len(PROMPT) + place - 1).argmax())
        )
        tokens = torch.tensor(found[-1:])
    return Row(
        model=name,
        weight_bytes=counted.weight_bytes,
        file_bytes=file.stat().st_size,
        kv_bytes=most * counted.kv_bytes_per_token,
        cache_bytes=cache_bytes(
            file, most, config.num_key_value_heads, config.head_dim
        ),
        error=told["verified"]["difference"],
        same_greedy=sum(
            one == other for one, other in zip(found, mine[0, len(PROMPT) :].tolist())
        ),
    )


def timed(run: Callable[[Tensor, int], Tensor], new: int) -> tuple[float, float]:
    """Milliseconds of a prompt, and of each token behind it."""
    start = time.perf_counter()
    token = run(PROMPT, 0).argmax()[None]
    between = time.perf_counter()
    for place in range(new):
        token = run(token, len(PROMPT) + place).argmax()[None]
    return 1e3 * (between - start), 1e3 * (time.perf_counter() - between) / new


def with_times(
    rows: list[Row], files: list[Path], stock: int, rounds: int, new: int
) -> list[Row]:
    """The rows with times; `stock` is the place of the stock one."""
    runs = [runner(file) for file in files]
    taken = interleaved(
        {str(place): partial(timed, run, new) for place, run in enumerate(runs)}, rounds
    )
    times = [tuple(zip(*taken[str(place)])) for place in range(len(runs))]
    dense, other = times[0], times[stock]
    return [
        row.model_copy(
            update={
                "prefill_ms": Quartiles.of(own[0]),
                "decode_ms": Quartiles.of(own[1]),
                "prefill_speedup": speedup(dense[0], own[0]),
                "decode_speedup": speedup(dense[1], own[1]),
                "prefill_to_stock": speedup(own[0], other[0]),
                "decode_to_stock": speedup(own[1], other[1]),
            }
        )
        for row, own in zip(rows, times)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=SETS)
    parser.add_argument(
        "--windows",
        type=int,
        default=64,
        help="of 512 tokens that a repair is fitted to",
    )
    parser.add_argument("--layers", type=int, default=26, help="of the stock model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores())
    given = parser.parse_args()
    portable_lib._unsafe_reset_threadpool(given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    plans = plans_of(
        *load(given.model, device="cpu"), given.sets, given.windows, given.out
    )
    files = [
        program(given.model, plan, given.out / name.replace(", ", "-"))
        for name, plan in plans.items()
    ]
    model, _ = load(given.model, dtype="float32", device="cpu")
    rows = [
        checked(model, name, plan, file)
        for (name, plan), file in zip(plans.items(), files)
    ]
    fewer = fewer_layers(given.model, given.layers, given.out / "fewer")
    files.append(program(fewer, Plan(), given.out / "stock"))
    other, _ = load(fewer, dtype="float32", device="cpu")
    rows.append(checked(other, STOCK.format(given.layers), Plan(), files[-1]))
    del model, other
    if given.rounds:
        rows = with_times(rows, files, len(rows) - 1, given.rounds, given.new)
    about: dict[str, object] = {
        "machine": machine("cpu"),
        "executorch": version("executorch"),
    }
    about["date"] = str(date.today())
    about |= {
        "model": given.model,
        "threads": given.threads,
        "rounds": given.rounds,
        "windows": given.windows,
    }
    about |= {
        "prompt": len(PROMPT),
        "new": given.new,
        "sets": {name: str(SETS[name]) for name in given.sets},
    }
    about |= this_run("python", "benchmarks/engines/executorch_programs.py")
    lines = [json.dumps(about), *(one.model_dump_json() for one in rows)]
    (given.out / "programs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    title = (
        f"ExecuTorch {version('executorch')}, {given.threads} threads, {given.rounds}"
        " rounds"
    )
    print_table(table(title, COLUMNS, rows))


if __name__ == "__main__":
    main()
