"""llama.cpp as a check of GGUF exports, through the wheel `xllamacpp`; each question runs in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ..errors import UnknownArchitecture, UsageError, shortened

LIKELIEST = 10  # tokens compared
LOADING = "error loading model: "  # what llama.cpp says before its reason


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def release() -> str:
    return version("xllamacpp")


def next_token_logprobs(path: Path, tokens: Sequence[int]) -> dict[int, float]:
    """The most likely tokens after `tokens`, with their log-probabilities in nats, as llama.cpp computes them.

    Raises `UnknownArchitecture` when llama.cpp has no such architecture, `UsageError` when it cannot run the file.
    """
    command = [sys.executable, "-c", _PROGRAM, str(path), json.dumps(list(tokens)), str(LIKELIEST)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.strip()] or [f"it ended with {run.returncode}"]
        reason = next((line.partition(LOADING)[2] for line in said if LOADING in line), said[-1])
        kind = UnknownArchitecture if "unknown model architecture" in reason else UsageError
        raise kind(f"llama.cpp cannot run {path.name}: {shortened(reason, 160)}")
    found = {int(token): float(value) for token, value in json.loads(run.stdout.splitlines()[-1]).items()}
    if len(found) < LIKELIEST:
        raise UsageError(f"llama.cpp gives {len(found)} tokens for {path.name}, expected {LIKELIEST}")
    return found


_PROGRAM = """
import json, os, sys
import xllamacpp as llama

path, tokens, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
settings = llama.CommonParams()
settings.model.path = path
settings.n_ctx = settings.n_batch = 256
settings.n_parallel = 1
settings.verbosity = 1  # errors
settings.warmup = False
settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
server = llama.Server(settings)
asked = {"prompt": tokens, "max_tokens": 8, "temperature": 0, "n_probs": count, "ignore_eos": True}
asked["grammar"] = "root ::= [a-z ]+"  # it drops the probabilities of texts that end within a character
answer = server.handle_completions(asked)
answer = json.loads(answer) if isinstance(answer, str) else answer
likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print(json.dumps({entry["id"]: entry["logprob"] for entry in likeliest}), flush=True)
os._exit(0)  # its threads outlive it
"""
