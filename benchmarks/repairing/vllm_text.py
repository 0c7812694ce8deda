"""One engine with one exported model in a process of its own: what each token of some windows costs there.

    python text_worker.py transformers|vllm|llama.cpp FOLDER

It reads windows of token ids as JSON, a list each, and answers with a line of JSON: for each window the NLL of every
token but the first, in nats; null where the engine does not say it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

Nll = list[float | None]
Ask = Callable[[list[int]], Nll]


def transformers(folder: str) -> Ask:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()

    def ask(window: list[int]) -> Nll:
        ids = torch.tensor([window])
        with torch.inference_mode():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
        return [-float(score[token]) for score, token in zip(scores, window[1:])]

    return ask


def vllm(folder: str) -> Ask:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", max_model_len=2048, max_num_seqs=1, trust_remote_code=True)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def ask(window: list[int]) -> Nll:
        (answer,) = llm.generate([{"prompt_token_ids": window}], asked, use_tqdm=False)
        return [-told[token].logprob for told, token in zip(answer.prompt_logprobs[1:], window[1:])]

    return ask


def llamacpp(folder: str) -> Ask:
    """It tells of a token that it chooses what it thought of it before any choice: so each in turn is forced on it."""
    import xllamacpp as llama

    settings = llama.CommonParams()
    settings.model.path = str(next(Path(folder).glob("*.gguf")))
    settings.n_ctx = settings.n_batch = 2048
    settings.n_parallel = 1
    settings.verbosity = 1  # errors
    settings.warmup = False
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    for threads in (settings.cpuparams, settings.cpuparams_batch):
        threads.n_threads = len(os.sched_getaffinity(0))
        threads.poll = 0
    server = llama.Server(settings)

    def nll(before: list[int], token: int) -> float | None:
        asked = {"prompt": before, "max_tokens": 1, "temperature": 0, "n_probs": 1, "cache_prompt": True}
        answer = server.handle_completions(asked | {"logit_bias": [[token, 1e6]], "ignore_eos": False})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        told = ((answer["choices"][0].get("logprobs") or {}).get("content") or [None])[0]
        return -told["logprob"] if told and told["id"] == token else None  # none where a character is not at its end

    return lambda window: [nll(window[:place], window[place]) for place in range(1, len(window))]


ENGINES = {"transformers": transformers, "vllm": vllm, "llama.cpp": llamacpp}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # engines print to stdout; the answer goes out by a door of its own
    os.dup2(2, 1)
    ask = ENGINES[sys.argv[1]](sys.argv[2])
    print(json.dumps([ask(window) for window in json.load(sys.stdin)]), file=answers, flush=True)
    answers.close()
    os._exit(0)  # threads of llama.cpp outlive it


if __name__ == "__main__":
    main()
