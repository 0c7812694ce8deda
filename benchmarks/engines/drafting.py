"""What an export of a plan brings as a draft model in an engine: decoding with it
beside decoding without.

A process for each number of drafted tokens, 0 for none; in every round all continue the
same prompts in turn, greedy. Speedups are over none, of decoding alone, by round:
median [quartiles]. The last line is JSON.

    python benchmarks/engines/drafting.py --plan plan.json [--model FILE.gguf] [--drafted 1,2,4,8] [--rounds 5]
    python benchmarks/engines/drafting.py --engine vllm --plan plan.json        # where vllm and notall are
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import notall
from notall.measuring.speed import speedup
from notall.models.loading import load
from notall.models.names import named_gguf
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.running.repaired import RepairedPlan

CONTEXT = 512
Answer = Callable[[list[int], int], dict[str, Any]]


def serve(engine: str, dense: str, draft: str, drafted: int, threads: int) -> None:
    """Answer each line of prompt tokens with what is said, the milliseconds of
    decoding, and what was drafted.
    """
    answers = os.fdopen(os.dup(1), "w")  # engines print to stdout
    os.dup2(2, 1)
    answer = SERVERS[engine](dense, draft, drafted, threads)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(
            json.dumps(answer(asked["prompt"], asked["new"])), file=answers, flush=True
        )
    answers.close()
    os._exit(0)  # threads of an engine outlive it


def llamacpp(dense: str, draft: str, drafted: int, threads: int) -> Answer:
    import xllamacpp as llama

    settings = llama.CommonParams()
    settings.model.path = dense
    settings.n_ctx = settings.n_batch = CONTEXT
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = 1
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    kinds = [settings.cpuparams, settings.cpuparams_batch]
    if drafted:
        speculative = settings.speculative
        speculative.types = [
            llama.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        ]
        speculative.draft.mparams.path = draft
        speculative.draft.n_max, speculative.draft.n_min, speculative.draft.p_min = (
            drafted,
            0,
            0.0,
        )
        kinds += [speculative.draft.cpuparams, speculative.draft.cpuparams_batch]
    for kind in kinds:
        kind.n_threads, kind.poll = (
            threads,
            0,
        )  # threads that wait must not take the cores from the other processes
    server = llama.Server(settings)

    def answer(prompt: list[int], new: int) -> dict[str, Any]:
        about = {
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        found = server.handle_completions(about)
        found = json.loads(found) if isinstance(found, str) else found
        return {"said": found["choices"][0]["text"], **found["timings"]}

    return answer


def vllm(dense: str, draft: str, drafted: int, threads: int) -> Answer:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    import torch
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    speculative = (
        {"method": "draft_model", "model": draft, "num_speculative_tokens": drafted}
        if drafted
        else None
    )
    llm = LLM(
        dense,
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**28,
        disable_log_stats=False,  # which count what is drafted
        speculative_config=speculative,
    )

    def counted() -> dict[str, int]:
        names = {
            "vllm:spec_decode_num_draft_tokens": "draft_n",
            "vllm:spec_decode_num_accepted_tokens": "draft_n_accepted",
        }
        return {
            names[metric.name]: int(metric.value)
            for metric in llm.get_metrics()
            if metric.name in names
        }

    def said(prompt: list[int], new: int) -> tuple[list[int], float]:
        begun = time.perf_counter()
        asked = SamplingParams(
            temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        (found,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        return list(found.outputs[0].token_ids), 1e3 * (time.perf_counter() - begun)

    def answer(prompt: list[int], new: int) -> dict[str, Any]:
        _, prefill = said(prompt, 1)
        before = counted()
        tokens, whole = said(prompt, new + 1)
        more = {name: count - before.get(name, 0) for name, count in counted().items()}
        return {
            "said": tokens,
            "predicted_ms": whole - prefill,
            "predicted_n": new,
            **more,
        }

    return answer


SERVERS: dict[str, Callable[[str, str, int, int], Answer]] = {
    "llama.cpp": llamacpp,
    "vllm": vllm,
}


def surroundings(engine: str) -> dict[str, str]:
    """For vLLM with Intel's OpenMP, if it is installed: without it vLLM warns that
    drafting on a CPU is slow.
    """
    intel = Path(sys.prefix, "lib", "libiomp5.so")
    return dict(os.environ) | (
        {"LD_PRELOAD": str(intel)} if engine == "vllm" and intel.exists() else {}
    )


class Running:
    """A process that continues prompts with so many drafted tokens."""

    def __init__(
        self, engine: str, dense: Path, draft: Path, drafted: int, threads: int
    ) -> None:
        command = [
            sys.executable,
            __file__,
            "--serve",
            engine,
            *map(str, (dense, draft, drafted, threads)),
        ]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
            env=surroundings(engine),
        )
        self.rounds: list[list[dict[str, Any]]] = []
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        return json.loads(
            self.process.stdout.readline() or sys.exit("the engine ended")
        )

    def ask(self, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
        assert self.process.stdin
        found = []
        for prompt in prompts:
            print(
                json.dumps({"prompt": prompt, "new": new}),
                file=self.process.stdin,
                flush=True,
            )
            found.append(self.answer())
        return found

    @property
    def decode_ms(self) -> list[float]:
        """Of each round."""
        return [sum(one["predicted_ms"] for one in found) for found in self.rounds]

    def share_accepted(self) -> float | None:
        drafted = sum(one.get("draft_n", 0) for one in self.rounds[-1])
        return (
            sum(one.get("draft_n_accepted", 0) for one in self.rounds[-1]) / drafted
            if drafted
            else None
        )

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def measure(
    dense: Path, draft: Path, prompts: list[list[int]], given: argparse.Namespace
) -> list[dict[str, Any]]:
    numbers = [0, *map(int, given.drafted.split(","))]
    running = {
        drafted: Running(given.engine, dense, draft, drafted, given.threads)
        for drafted in numbers
    }
    for index in range(given.rounds + 1):
        for one in list(running.values())[:: -1 if index % 2 else 1]:
            found = one.ask(prompts, given.new)
            one.rounds += [found] if index else []  # the first warms up
    for one in running.values():
        one.end()
    alone = running[0]
    rows = []
    for drafted, one in running.items():
        faster = speedup(alone.decode_ms, one.decode_ms)
        pairs = zip(one.rounds[-1], alone.rounds[-1])
        rows.append(
            {
                "drafted": drafted,
                "decode_ms": (
                    statistics.median(one.decode_ms)
                    / sum(n["predicted_n"] for n in one.rounds[-1])
                ),
                "speedup": [faster.low, faster.median, faster.high],
                "accepted": one.share_accepted(),
                "same_texts": sum(own["said"] == other["said"] for own, other in pairs),
            }
        )
    return rows


def exports(
    given: argparse.Namespace, plan: notall.Plan, folder: Path
) -> tuple[Path, Path]:
    """The original model and the draft, as the engine takes them."""
    if given.engine == "vllm":
        dense = notall.export(
            given.model, notall.Plan(), "hf", folder / "dense", verify=False
        )
        return dense, notall.export(
            given.model, plan, "hf", folder / "draft", verify=False
        )
    dense = named_gguf(given.model) or sys.exit(f"{given.model} is no .gguf file")
    return dense, next(
        notall.export(given.model, plan, "gguf", folder / "draft", verify=False).glob(
            "*.gguf"
        )
    )


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        engine, dense_model, draft_model, drafted, threads = sys.argv[2:]
        return serve(engine, dense_model, draft_model, int(drafted), int(threads))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan",
        type=Path,
        required=True,
        help="a plan file, or the folder of a repair",
    )
    parser.add_argument("--engine", choices=SERVERS, default="llama.cpp")
    parser.add_argument(
        "--model", default="smollm2", help="a model; for llama.cpp a .gguf file"
    )
    parser.add_argument("--drafted", default="1,2,4,8", help="tokens a round")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args()
    _, tokenizer = load(given.model)
    batches = token_batches(
        tokenizer,
        read_text(),
        sequences=given.prompts,
        length=given.prompt,
        batch_size=1,
    )
    prompts = [batch[0].tolist() for batch in batches]
    with tempfile.TemporaryDirectory() as scratch:
        plan = (
            RepairedPlan.load(given.plan)
            if given.plan.is_dir()
            else notall.Plan.load(given.plan)
        )
        dense, draft = exports(given, plan, Path(scratch))
        rows = measure(dense, draft, prompts, given)
    print("| drafted | decode ms/token | speedup | accepted | same texts |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        low, median, high = row["speedup"]
        share = "-" if row["accepted"] is None else f"{row['accepted']:.2f}"
        cells = (
            f"{row['decode_ms']:.2f}",
            f"{median:.2f} [{low:.2f}, {high:.2f}]",
            share,
            str(row["same_texts"]),
        )
        print(f"| {' | '.join((str(row['drafted']), *cells))} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
