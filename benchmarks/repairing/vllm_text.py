"""What each token of some windows costs an exported model in vLLM, in an environment that has it.

    python vllm_text.py FOLDER

It reads windows of token ids as JSON, a list each, and answers with a line of JSON: for each window the NLL of every
token but the first, in nats.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout; the answer goes out by a door of its own
    os.dup2(2, 1)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], dtype="float32", max_model_len=2048, max_num_seqs=1, trust_remote_code=True)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    found = []
    for window in json.load(sys.stdin):
        (answer,) = llm.generate([{"prompt_token_ids": window}], asked, use_tqdm=False)
        found.append([-told[token].logprob for told, token in zip(answer.prompt_logprobs[1:], window[1:])])
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
