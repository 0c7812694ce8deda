"""Exports on vLLM's OpenAI server, asked by guidellm: time to a first token, between
tokens, and tokens a second.

    make .venv-vllm/.done .venv-guidellm/.done
    python benchmarks/engines/served.py --out DIR --vllm-python .venv-vllm/bin/python \
        --guidellm .venv-guidellm/bin/guidellm [--served attention block prompt]
        [--model MODEL.gguf --served dense:int8 REPAIRED REPAIRED:int8]

The original, and each word of --served: `attention`, `mlp` and `block` are a quarter of
them out of every token, the deepest but the last (which ones they are makes no
difference to a time), `prompt` the deepest quarter of the blocks out of the prompt
alone; or it is a saved plan. `:int8` holds weights and activations in 8 bits, `:eager`
compiles nothing. All servers run at once; in every round each is asked in turn,
forwards and then backwards, with prompts of its own, so that no prefix is cached.
Prompts are drawn by guidellm. A cell of a round is the median over requests, for tokens
a second the mean; speedups are over the original by round: median [quartiles] over
rounds. Called again with the same --out and other --prompts, the record grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from load import NAME, serving
from workloads import DENSE, plans

import notall
from notall.engines import engine_named
from notall.experiments.options.plan import read_plan
from notall.measuring.speed import cores, interleaved, machine, speedup
from notall.models.configs import load_config
from notall.results.provenance import this_run
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
    prompt: Count
    at_once: Count
    first_ms: Quartiles
    between_ms: Quartiles
    tokens_per_s: Quartiles
    first_speedup: Quartiles
    between_speedup: Quartiles
    tokens_speedup: Quartiles


COLUMNS: tuple[Column[Served], ...] = (
    words("model", lambda one: one.model),
    number("prompt", lambda one: one.prompt, "d"),
    number("at once", lambda one: one.at_once, "d"),
    with_quartiles("first token ms", lambda one: one.first_ms, ".0f"),
    with_quartiles("between tokens ms", lambda one: one.between_ms, ".1f"),
    with_quartiles("tokens/s", lambda one: one.tokens_per_s, ".0f"),
    with_quartiles("first token, dense / it", lambda one: one.first_speedup),
    with_quartiles("between tokens, dense / it", lambda one: one.between_speedup),
    with_quartiles("tokens/s, it / dense", lambda one: one.tokens_speedup),
)
Sample = dict[int, dict[str, float]]  # by requests at once
INT8, EAGER = "int8", "eager"


def asked_by_guidellm(
    asked: argparse.Namespace,
    prompt: int,
    tokenizer: Path,
    seeds: count[int],
    address: str,
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
                f"kind=synthetic_text,prompt_tokens={prompt},output_tokens={asked.new}"
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


@dataclass(frozen=True)
class Model:
    """One word of `--served`."""

    name: str  # the word, of a saved plan without its folder
    plan: notall.Plan
    how: str = ""  # INT8 or EAGER

    @classmethod
    def of(cls, word: str, depth: int) -> Model:
        """Raises `UsageError` for what is no saved plan."""
        named, _, how = word.partition(":")
        by_name = plans(depth)
        plan = by_name[named] if named in by_name else read_plan(Path(named))
        return cls(Path(word).name, plan, how)

    @property
    def options(self) -> tuple[str, ...]:
        """Of the server."""
        return ("--enforce-eager",) if self.how == EAGER else ()

    def written(self, spec: str, folder: Path) -> Path:
        """The checkpoint that vLLM reads, in a folder within `folder`."""
        place = folder / self.name.replace(":", "-")
        source = notall.Source(spec, dtype="bfloat16")
        if self.how != INT8:
            return notall.export(source, self.plan, "hf", place, verify=False)
        plain = notall.export(source, self.plan, "hf", folder / "plain", verify=False)
        engine_named("vllm")(cores(), "bfloat16").quantise(plain, INT8, place)
        shutil.rmtree(plain)
        return place


def rows_of(
    taken: dict[str, list[Sample]], prompt: int, loads: list[int]
) -> list[Served]:
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
                prompt=prompt,
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
    parser.add_argument("--served", nargs="*", default=["attention", "block", "prompt"])
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
    parser.add_argument("--prompts", nargs="+", type=int, default=[512])
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
    depth = load_config(asked.model).num_hidden_layers
    models = [Model(DENSE, notall.Plan())]
    models += [Model.of(word, depth) for word in asked.served]
    # A chat template adds some tokens.
    context = 64 * (2 + (max(asked.prompts) + asked.new) // 64)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as servers:
        addresses = {}
        for one in models:
            folder = one.written(asked.model, Path(scratch))
            server = serving(
                asked.vllm_python,
                folder,
                asked.out / f"{folder.name}.log",
                max(asked.loads),
                context,
                "--dtype=bfloat16",
                "--no-enable-prefix-caching",
                *one.options,
            )
            addresses[one.name] = servers.enter_context(server)
            print(f"serving: {one.name}", file=sys.stderr)
        for prompt in asked.prompts:
            asks = {
                name: partial(
                    asked_by_guidellm,
                    asked,
                    prompt,
                    Path(scratch) / DENSE,
                    count(1),
                    address,
                )
                for name, address in addresses.items()
            }
            taken = interleaved(
                asks, asked.rounds, lambda *told: print(*told, file=sys.stderr)
            )
            rows = rows_of(taken, prompt, asked.loads)
            written(asked, rows)
            print_table(table(f"vLLM's server, {asked.rounds} rounds", COLUMNS, rows))


def written(asked: argparse.Namespace, rows: list[Served]) -> None:
    """Add the rows to the record, below a line about the run."""
    about = {
        **this_run("python", "benchmarks/engines/served.py"),
        "machine": machine("cpu"),
        "rounds": asked.rounds,
        "new": asked.new,
        "requests": asked.requests,
    }
    record = [json.dumps(about), *(one.model_dump_json() for one in rows)]
    with (asked.out / "served.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(record) + "\n")


if __name__ == "__main__":
    main()
