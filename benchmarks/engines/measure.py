"""What exports of the default model save in transformers, vLLM and llama.cpp, beside
what bytes and FLOPs promise.

Four models: dense; 33 % of the attentions left out; 33 % of the blocks; a portable plan
of as many sublayers as the blocks. `stock` is a checkpoint of transformers' own with as
many layers as the last two: they should be as fast. Each runs in a process of its own;
in every round all are asked in turn, so that what disturbs one disturbs the others.
Speedups are over the original model: median [quartiles] (ideal). The last line is JSON.

    python benchmarks/engines/measure.py [--engines transformers,llama.cpp] [--rounds 7] [--prompt 128] [--new 16]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import notall
from notall.models.configs import load_config

WORKER = Path(__file__).with_name("worker.py")


def plans(depth: int) -> dict[str, notall.Plan]:
    """The deepest third but the last; and as many sublayers as a third of the blocks,
    an MLP and the next attention.
    """
    third = round(depth / 3)
    deepest = range(depth - 1 - third, depth - 1)
    pairs = range(depth - 2 - 2 * third + 1, depth - 1, 2)
    return {
        "dense": notall.Plan(),
        "attention": notall.Plan(attention=deepest),
        "block": notall.Plan(attention=deepest, mlp=deepest),
        "portable": notall.Plan(attention=[index + 1 for index in pairs], mlp=pairs),
    }


@dataclass
class Running:
    """A model in an engine, and its timings."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    timings: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(
        cls, python: str, engine: str, folder: Path, context: int, *more: str
    ) -> Running:
        command = [python, str(WORKER), engine, str(folder), str(context), *more]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        return cls(process, cls._answer(process))

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit(f"this worker ended: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, prompt: int, new: int, at_once: int = 1) -> dict[str, float]:
        assert self.process.stdin is not None
        print(
            json.dumps({"prompt": prompt, "new": new, "at_once": at_once}),
            file=self.process.stdin,
            flush=True,
        )
        return self._answer(self.process)

    def stop(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def write(model: str, target: str, folder: Path) -> dict[str, Path]:
    """The exports of every plan for one target, and the stock checkpoint."""
    depth = load_config(model).num_hidden_layers
    folders = {
        name: notall.export(model, plan, target, folder / name, verify=False)
        for name, plan in plans(depth).items()
    }
    if target == "hf":
        folders["stock"] = write_stock(folders["block"], folder / "stock")
    return folders


def write_stock(like: Path, folder: Path) -> Path:
    """A checkpoint that `save_pretrained` writes, with random weights, of the shape of
    another one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def weight_file_bytes(folder: Path) -> int:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def ideal(
    config: Any, prompt: int, new: int, held: dict[str, dict[str, Any]], variant: str
) -> dict[str, float]:
    """Speedups that FLOPs promise of the prefill, and bytes of the decode: weights and
    cache are read once a token.
    """
    chosen = plans(config.num_hidden_layers)["block" if variant == "stock" else variant]

    def flops(plan: notall.Plan) -> float:
        width, head = (
            config.hidden_size,
            config.hidden_size // config.num_attention_heads,
        )
        live = config.num_hidden_layers - len(plan.attention)
        projections = 2 * width * width + 2 * width * config.num_key_value_heads * head
        scores = width * (prompt + 1)  # two products, over half of the square
        mlps = (
            (config.num_hidden_layers - len(plan.mlp))
            * 3
            * width
            * config.intermediate_size
        )
        return (
            prompt * (live * (projections + scores) + mlps) + width * config.vocab_size
        )  # the head, for one token

    def read(facts: dict[str, Any]) -> float:
        return facts["weight_bytes"] + facts["kv_bytes_per_token"] * (prompt + new / 2)

    return {
        "prefill": flops(notall.Plan()) / flops(chosen),
        "decode": read(held["dense"]) / read(held[variant]),
    }


def measure(
    engine: str,
    python: str,
    folders: dict[str, Path],
    config: Any,
    prompt: int,
    new: int,
    rounds: int,
) -> list[Any]:
    context = 64 * math.ceil((prompt + new + 2) / 64)
    running = {
        name: Running.start(python, engine, folder, context)
        for name, folder in folders.items()
    }
    for model in running.values():  # warm up
        model.ask(prompt, new)
    for _ in range(rounds):
        for model in running.values():
            model.timings.append(model.ask(prompt, new))
    for model in running.values():
        model.stop()
    held = {name: model.facts for name, model in running.items()}
    return [
        {
            "engine": engine,
            "model": name,
            "file_bytes": weight_file_bytes(folders[name]),
            **model.facts,
            **{
                f"ideal_{what}": value
                for what, value in ideal(config, prompt, new, held, name).items()
            },
            **{
                what: paired(running["dense"], model, f"{what}_ms")
                for what in ("prefill", "decode")
            },
            **{
                what: statistics.median(t[what] for t in model.timings)
                for what in ("prefill_ms", "decode_ms")
            },
        }
        for name, model in running.items()
    ]


def paired(dense: Running, model: Running, what: str) -> list[float]:
    """The speedup over the original model, by round: lower quartile, median, upper
    quartile.
    """
    ratios = [
        before[what] / after[what]
        for before, after in zip(dense.timings, model.timings)
    ]
    return statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3


def show(rows: list[Any]) -> None:
    print(
        "| engine | model | file MB | weights MB | KV bytes/token | prefill ms | decode"
        " ms | prefill | decode |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    for row in rows:
        speedups = [
            "{1:.2f} [{0:.2f}, {2:.2f}] ({3:.2f})".format(
                *row[what], row[f"ideal_{what}"]
            )
            for what in ("prefill", "decode")
        ]
        sizes = (
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['kv_bytes_per_token']:,}",
        )
        times = (f"{row['prefill_ms']:.1f}", f"{row['decode_ms']:.2f}")
        print(
            f"| {' | '.join((row['engine'], row['model'], *sizes, *times, *speedups))} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="smollm2", help="a .gguf file, which llama.cpp needs"
    )
    parser.add_argument("--engines", default="transformers,vllm,llama.cpp")
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        help="the interpreter of vLLM's environment",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=16)
    given = parser.parse_args()
    rows, config = [], load_config(given.model)
    with tempfile.TemporaryDirectory() as scratch:
        targets = {
            engine: "gguf" if engine == "llama.cpp" else "hf"
            for engine in given.engines.split(",")
        }
        folders = {
            target: write(given.model, target, Path(scratch) / target)
            for target in sorted(set(targets.values()))
        }
        for engine, target in targets.items():
            python = given.vllm_python if engine == "vllm" else sys.executable
            rows += measure(
                engine,
                python,
                folders[target],
                config,
                given.prompt,
                given.new,
                given.rounds,
            )
    show(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
