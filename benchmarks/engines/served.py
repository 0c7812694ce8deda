"""Exports on vLLM's OpenAI server, asked by guidellm: time to a first token, between
tokens, and tokens a second.

    make .venv-vllm/.done .venv-guidellm/.done
    python benchmarks/engines/served.py --out DIR --vllm-python .venv-vllm/bin/python \
        --guidellm .venv-guidellm/bin/guidellm

The original, and what is left without a quarter of its attentions, and of its blocks:
the deepest but the last (which ones they are makes no difference to a time). All
servers run at once; in every round each is asked in turn, forwards and then backwards,
with prompts of its own, so that no prefix is cached. Prompts are drawn by guidellm. A
cell of a round is the median over requests, for tokens a second the mean; speedups are
over the original by round: median [quartiles] over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path

from load import NAME, serving
from workloads import DENSE, plans

import notall
from notall.measuring.speed import interleaved, machine, speedup
from notall.models.configs import load_config
from notall.results.record import Count, Fact, Quartiles
from notall.results.table import Column, number, table, with_quartiles, words
from notall.results.terminal import print_table

# What guidellm calls each, and which of its statistics is taken.
TAKEN = {
    "first_ms": ("time_to_first_token_ms", "median"),
    "between_ms": ("inter_token_latency_ms", "median"),
    "tokens_per_s": ("output_tokens_per_second", "mean"),
}


class Served(Fact):
    """One model at one load."""

    model: str
    at_once: Count
    first_ms: Quartiles
    between_ms: Quartiles
    tokens_per_s: Quartiles
    first_speedup: Quartiles
    between_speedup: Quartiles
    tokens_speedup: Quartiles


COLUMNS: tuple[Column[Served], ...] = (
    words("model", lambda one: one.model),
    number("at once", lambda one: one.at_once, "d"),
    with_quartiles("first token ms", lambda one: one.first_ms, ".0f"),
    with_quartiles("between tokens ms", lambda one: one.between_ms, ".1f"),
    with_quartiles("tokens/s", lambda one: one.tokens_per_s, ".0f"),
    with_quartiles("first token, dense / it", lambda one: one.first_speedup),
    with_quartiles("between tokens, dense / it", lambda one: one.between_speedup),
    with_quartiles("tokens/s, it / dense", lambda one: one.tokens_speedup),
)
Sample = dict[int, dict[str, float]]  # by requests at once


def asked_by_guidellm(
    asked: argparse.Namespace, tokenizer: Path, seeds: count[int], address: str
) -> Sample:
    """One run of guidellm against a server, which asks at each load in turn. Exits
    where a request failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        options = {
            "--backend": f"kind=openai_http,target={address},model={NAME}",
            "--profile": f"kind=concurrent,streams={asked.loads[0]}",
            "--constraint": f"kind=max_requests,count={asked.requests}",
            "--data": (
                f"kind=synthetic_text,prompt_tokens={asked.prompt},output_tokens={asked.new}"
            ),
            "--seed": f"kind=static,value={next(seeds)}",
            "--tokenizer": f"kind=hf_auto,model={tokenizer}",
            "--output": f"kind=json,path={found}",
        }
        command = [
            str(asked.guidellm),
            "run",
            "--disable-console",
            *(word for one in options.items() for word in one),
        ]
        command += ["--override", "profile.streams", ",".join(map(str, asked.loads))]
        offline = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        }
        ran = subprocess.run(command, env=offline, capture_output=True, text=True)
        if ran.returncode or not found.is_file():
            sys.exit(f"guidellm failed: {(ran.stdout + ran.stderr)[-2000:]}")
        runs = json.loads(found.read_text())["benchmarks"]
    sample: Sample = {}
    for load, run in zip(asked.loads, runs, strict=True):
        if (made := run["metrics"]["request_totals"])["successful"] != asked.requests:
            sys.exit(
                f"of {asked.requests} requests, {load} at once, guidellm counts {made}"
            )
        sample[load] = {
            name: run["metrics"][of]["successful"][how]
            for name, (of, how) in TAKEN.items()
        }
    return sample


def rows_of(taken: dict[str, list[Sample]], loads: list[int]) -> list[Served]:
    rows = []
    for load in loads:
        by_model = {
            model: {what: [sample[load][what] for sample in samples] for what in TAKEN}
            for model, samples in taken.items()
        }
        dense = by_model[DENSE]
        rows += [
            Served(
                model=model,
                at_once=load,
                **{what: Quartiles.of(times) for what, times in found.items()},
                first_speedup=speedup(dense["first_ms"], found["first_ms"]),
                between_speedup=speedup(dense["between_ms"], found["between_ms"]),
                tokens_speedup=speedup(found["tokens_per_s"], dense["tokens_per_s"]),
            )
            for model, found in by_model.items()
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--skipped", nargs="*", default=["attention", "block"])
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        help="the interpreter of vLLM's environment",
    )
    parser.add_argument(
        "--guidellm",
        type=Path,
        required=True,
        help="the command, in an environment of its own",
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument(
        "--loads", nargs="+", type=int, default=[1, 4, 16], help="requests at once"
    )
    parser.add_argument(
        "--requests", type=int, default=16, help="at each load, in each round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    by_name = plans(load_config(asked.model).num_hidden_layers)
    names, context = (
        [DENSE, *asked.skipped],
        64 * (2 + (asked.prompt + asked.new) // 64),
    )  # a chat template adds some
    options = ("--dtype=bfloat16", "--no-enable-prefix-caching")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        asks = {}
        for name in names:
            place = Path(scratch) / name
            folder = notall.export(
                notall.Source(asked.model, dtype="bfloat16"),
                by_name[name],
                "hf",
                place,
                verify=False,
            )
            log = asked.out / f"{name}.log"
            server = serving(
                asked.vllm_python, folder, log, max(asked.loads), context, *options
            )
            address = servers.enter_context(server)
            asks[name] = partial(
                asked_by_guidellm, asked, Path(scratch) / DENSE, count(1), address
            )
            print(f"serving: {name}", file=sys.stderr)
        taken = interleaved(
            asks, asked.rounds, lambda *told: print(*told, file=sys.stderr)
        )
    rows = rows_of(taken, asked.loads)
    told = [
        Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]
    ]
    about = {
        "command": shlex.join(["python", "benchmarks/engines/served.py", *told]),
        "date": str(date.today()),
    }
    about |= {
        "machine": machine("cpu"),
        "rounds": asked.rounds,
        "prompt": asked.prompt,
        "new": asked.new,
    }
    about |= {"requests": asked.requests}
    record = [json.dumps(about), *(one.model_dump_json() for one in rows)]
    (asked.out / "served.jsonl").write_text("\n".join(record) + "\n", encoding="utf-8")
    print_table(table(f"vLLM's server, {asked.rounds} rounds", COLUMNS, rows))


if __name__ == "__main__":
    main()
