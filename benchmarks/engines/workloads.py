"""Where skipping is faster, and where quantising: prompts of several lengths, one
sequence and several at once.

    python benchmarks/engines/workloads.py --engine llama.cpp --out DIR [--model smollm2] [--lengths 128 2048 8064]
    python benchmarks/engines/workloads.py --engine vllm --vllm-python .venv-vllm/bin/python --out DIR

The original, and what is left without a quarter of its attentions, of its MLPs, and of
its blocks: the deepest but the last (which ones they are makes no difference to a
time). `--skipped prompt` is a quarter of the blocks out of the prompt alone. Quantised
ones are added by `--also dense:Q8_0`. Each runs in a process of its
own; in every round all are asked in turn, forwards and then backwards. `first` is the
time until all sequences have their first token, `step` that of a token of all of them.
Speedups are over the original by round: median [quartiles]. A cell that is in DIR is
taken as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import Running

import notall
from notall.engines import Engine, engine_named
from notall.measuring.speed import cores, interleaved, machine, speedup
from notall.models.configs import load_config
from notall.models.names import named_gguf
from notall.results.provenance import this_run
from notall.results.record import Count, Fact, Quartiles
from notall.results.table import Column, number, size, table, with_quartiles, words
from notall.results.terminal import print_table

Name = tuple[str, str]  # of a plan, and how the weights are represented
DENSE, AS_IT_IS = "dense", "as it is"
LAST_TOKENS = 64  # of a prompt that run whole


class Row(Fact):
    """One model of one engine with one workload."""

    engine: str
    model: str
    type: str
    prompt: Count
    at_once: Count
    weight_bytes: Count
    kv_bytes: Count  # of all prompts
    first_ms: Quartiles
    step_ms: Quartiles
    first_speedup: Quartiles
    step_speedup: Quartiles


COLUMNS: tuple[Column[Row], ...] = (
    words("model", lambda one: one.model),
    words("type", lambda one: one.type),
    number("prompt", lambda one: one.prompt, "d"),
    number("at once", lambda one: one.at_once, "d"),
    size("weights", lambda one: one.weight_bytes),
    size("KV", lambda one: one.kv_bytes),
    with_quartiles("first token ms", lambda one: one.first_ms, ".0f"),
    with_quartiles("step ms", lambda one: one.step_ms, ".1f"),
    with_quartiles("first token, dense / it", lambda one: one.first_speedup),
    with_quartiles("step, dense / it", lambda one: one.step_speedup),
)


def plans(depth: int) -> dict[str, notall.Plan]:
    """By name; `prompt` skips the deepest quarter of the blocks in the prompt alone."""
    quarter = range(depth - 1 - round(depth / 4), depth - 1)
    deepest = range(depth - round(depth / 4), depth)
    in_prompt = {"attention": deepest, "mlp": deepest, "last_tokens": LAST_TOKENS}
    return {
        DENSE: notall.Plan(),
        "attention": notall.Plan(attention=quarter),
        "mlp": notall.Plan(mlp=quarter),
        "block": notall.Plan(attention=quarter, mlp=quarter),
        "prompt": notall.Plan(prefill=in_prompt),
    }


def checkpoint(
    reader: Engine, spec: str, plan: notall.Plan, kind: str, place: Path
) -> None:
    """Write to the folder `place` what the engine reads."""
    if kind == AS_IT_IS:
        notall.export(spec, plan, reader.target, place, verify=False)
        return
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        source = reader.source(spec, Path(scratch))
        plain = notall.export(
            source, plan, reader.target, Path(scratch) / "plain", verify=False
        )
        made = place
        if reader.suffix:  # a file is what it reads
            plain, made = (
                next(plain.glob(f"*{reader.suffix}")),
                place / f"model{reader.suffix}",
            )
            place.mkdir()
        if kind == reader.plain:
            shutil.move(plain, made)
        else:
            reader.quantise(plain, kind, made)


def checkpoints(
    spec: str, engine: str, dtype: str, names: list[Name], folder: Path
) -> dict[Name, Path]:
    """What the engine reads of each; one that is there is taken as it is."""
    reader, by_name = (
        engine_named(engine)(cores(), dtype),
        plans(load_config(spec).num_hidden_layers),
    )
    found = {name: folder / "-".join(name).replace(" ", "-") for name in names}
    for (plan, kind), place in found.items():
        if not place.exists():
            checkpoint(reader, spec, by_name[plan], kind, place)
            print(f"written: {place.name}", file=sys.stderr)
    return found


def cell(
    engine: str,
    running: dict[Name, Running],
    prompt: int,
    new: int,
    at_once: int,
    rounds: int,
) -> list[Row]:
    """All models with one workload; each is warmed up with it."""
    asks = {
        name: partial(model.ask, prompt, new, at_once)
        for name, model in running.items()
    }
    taken = interleaved({" ".join(name): ask for name, ask in asks.items()}, rounds)
    times = {
        name: [
            [one[what] for one in taken[" ".join(name)]]
            for what in ("prefill_ms", "decode_ms")
        ]
        for name in running
    }
    dense = next(iter(times.values()))
    return [
        Row(
            engine=engine,
            model=name[0],
            type=name[1],
            prompt=prompt,
            at_once=at_once,
            weight_bytes=running[name].facts["weight_bytes"],
            kv_bytes=running[name].facts["kv_bytes_per_token"] * prompt * at_once,
            first_ms=Quartiles.of(first),
            step_ms=Quartiles.of(step),
            first_speedup=speedup(dense[0], first),
            step_speedup=speedup(dense[1], step),
        )
        for name, (first, step) in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--engine", choices=("transformers", "vllm", "llama.cpp"), required=True
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--kind",
        default=None,
        help="of the skipped models' weights; by default the source's own",
    )
    parser.add_argument("--skipped", nargs="*", default=["attention", "mlp", "block"])
    parser.add_argument("--also", nargs="*", default=[], metavar="PLAN:TYPE")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of weights that are not quantised"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 2048, 8064])
    parser.add_argument(
        "--loads", nargs="+", type=int, default=[1, 4], help="sequences at once"
    )
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        help="the interpreter of vLLM's environment",
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kind = given.kind or AS_IT_IS
    names: list[Name] = [(DENSE, kind), *((one, kind) for one in given.skipped)]
    names += [(plan, of) for plan, _, of in (one.partition(":") for one in given.also)]
    record = given.out / f"{given.engine}.jsonl"
    header, *lines = (
        record.read_text(encoding="utf-8").splitlines() if record.is_file() else ["{}"]
    )
    rows = [Row.model_validate_json(line) for line in lines]
    done = {(one.prompt, one.at_once) for one in rows}
    left = [
        (prompt, load)
        for load in given.loads
        for prompt in given.lengths
        if (prompt, load) not in done
    ]
    about: dict[str, object] = {
        "machine": machine("cpu"),
        **this_run("python", "benchmarks/engines/workloads.py"),
        "model": Path(given.model).name,
    }
    about |= {
        "rounds": given.rounds,
        "new": given.new,
        "dtype": given.dtype,
        "threads": cores(),
    }
    before = json.loads(header).get("command")
    commands = dict.fromkeys(filter(None, [before, about["command"]]))
    about["command"] = "; ".join(commands)
    folder = given.out / "checkpoints" / given.engine
    folder.mkdir(parents=True, exist_ok=True)
    files = checkpoints(
        str(named_gguf(given.model) or given.model),
        given.engine,
        given.dtype,
        names,
        folder,
    )
    python = given.vllm_python if given.engine == "vllm" else sys.executable
    if left:
        context = 64 * (1 + (max(given.lengths) + given.new + 1) // 64)
        more = "--at-once", str(max(given.loads)), "--dtype", given.dtype
        running = {
            name: Running.start(python, given.engine, file, context, *more)
            for name, file in files.items()
        }
        for prompt, load in left:
            rows += cell(given.engine, running, prompt, given.new, load, given.rounds)
            record.write_text(
                "\n".join([json.dumps(about), *(one.model_dump_json() for one in rows)])
                + "\n"
            )
            print(f"done: {prompt} tokens, {load} at once", file=sys.stderr)
        for one in running.values():
            one.stop()
    print_table(table(f"{given.engine}, {given.rounds} rounds", COLUMNS, rows))


if __name__ == "__main__":
    main()
