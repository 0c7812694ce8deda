"""One engine with one model in a process of its own, which is asked for timings in turn with others.

    python worker.py transformers|vllm|llama.cpp MODEL CONTEXT

The first line it prints says what the engine holds: bytes of weights and of KV cache a token. Then each line it reads,
`{"prompt": tokens, "new": tokens}`, is answered by a line with `prefill_ms` and `decode_ms` (a token).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Timing = dict[str, float]
Ask = Callable[[int, int], Timing]


def tokens(count: int) -> list[int]:
    return [3 + (7 * index) % 250 for index in range(count)]


def transformers(model: str, context: int) -> tuple[dict[str, Any], Ask]:
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True).eval()
    name = "cache" if "cache" in net.forward.__code__.co_varnames else "past_key_values"

    def ask(prompt: int, new: int) -> Timing:
        with torch.inference_mode():
            start = time.perf_counter()
            answer = net(torch.tensor([tokens(prompt)]), use_cache=True, logits_to_keep=1)
            token = answer.logits[:, -1:].argmax(-1)
            middle = time.perf_counter()
            for _ in range(new):
                answer = net(token, use_cache=True, **{name: answer[name]})
                token = answer.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
        return {"prefill_ms": 1e3 * (middle - start), "decode_ms": 1e3 * (end - middle) / new}

    with torch.inference_mode():
        cache = net(torch.tensor([tokens(8)]), use_cache=True)[name]
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return {"weight_bytes": sum(weight.nbytes for weight in net.parameters()), "kv_bytes_per_token": held // 8}, ask


def vllm(model: str, context: int) -> tuple[dict[str, Any], Ask]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    loaded: list[int] = []
    pack = base_loader.process_weights_after_loading

    def counted(net: Any, *rest: Any) -> None:
        loaded.append(sum(weight.nbytes for weight in net.parameters()))
        pack(net, *rest)  # on a CPU it packs most of them away, where they can't be counted

    base_loader.process_weights_after_loading = counted
    llm = LLM(
        model, dtype="float32", max_model_len=context, max_num_seqs=1, enable_prefix_caching=False,
        disable_log_stats=True,
    )  # fmt: skip

    def generate(prompt: int, new: int) -> float:
        start = time.perf_counter()
        asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": tokens(prompt)}], asked, use_tqdm=False)
        return 1e3 * (time.perf_counter() - start)

    def ask(prompt: int, new: int) -> Timing:
        prefill = generate(prompt, 1)
        return {"prefill_ms": prefill, "decode_ms": (generate(prompt, 1 + new) - prefill) / new}

    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    pages = [
        (len(group.layer_names), group.kv_cache_spec.page_size_bytes, group.kv_cache_spec.block_size)
        for group in groups
    ]
    return {
        "weight_bytes": loaded[0],
        "kv_bytes_per_token": sum(layers * size // block for layers, size, block in pages),
    }, ask


def llamacpp(model: str, context: int) -> tuple[dict[str, Any], Ask]:
    import xllamacpp as llama
    from gguf import GGUFReader

    path = next(Path(model).glob("*.gguf"))
    settings = llama.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = settings.n_batch = context
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = 5  # to read the size of the cache from its log
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads = len(os.sched_getaffinity(0))
        threads.poll = 0  # threads that wait must not take the cores from the other models
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    with tempfile.TemporaryDirectory() as folder:
        with logged(Path(folder) / "log"):
            server = llama.Server(settings)
        log = (Path(folder) / "log").read_text(errors="replace")
    kv_mebibytes = sum(map(float, re.findall(r"KV buffer size = +([\d.]+) MiB", log)))
    cells = int(re.findall(r"\( *(\d+) cells", log)[-1])
    file = GGUFReader(path)
    kv_bytes_per_token = kv_bytes(file)
    assert abs(kv_mebibytes * 2**20 / cells / kv_bytes_per_token - 1) < 0.005, "its log rounds to a hundredth of a MiB"

    def ask(prompt: int, new: int) -> Timing:
        asked = {"prompt": tokens(prompt), "max_tokens": 1 + new, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions(asked | {"cache_prompt": False})
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        return {"prefill_ms": timings["prompt_ms"], "decode_ms": timings["predicted_per_token_ms"]}

    return {
        "weight_bytes": sum(int(tensor.n_bytes) for tensor in file.tensors),
        "kv_bytes_per_token": kv_bytes_per_token,
    }, ask


def kv_bytes(file: Any) -> int:
    """Of a token, in float16, by the header of a GGUF file whose heads are as wide as most."""

    def setting(name: str) -> Any:
        return file.get_field(f"{file.get_field('general.architecture').contents()}.{name}").contents()

    heads, kv_heads = setting("attention.head_count"), setting("attention.head_count_kv")
    width = setting("embedding_length") // (max(heads) if isinstance(heads, list) else heads)
    return 2 * 2 * width * (sum(kv_heads) if isinstance(kv_heads, list) else kv_heads * setting("block_count"))


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


ENGINES: dict[str, Any] = {"transformers": transformers, "vllm": vllm, "llama.cpp": llamacpp}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # engines print to stdout; answers go out by a door of their own
    os.dup2(2, 1)
    engine, model, context = sys.argv[1:]
    facts, ask = ENGINES[engine](model, int(context))
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(ask(**json.loads(line))), file=answers, flush=True)
    answers.close()
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
