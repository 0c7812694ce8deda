"""llama.cpp, through the server in the wheel `xllamacpp`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from gguf import GGMLQuantizationType

from ..errors import UnknownArchitecture, UsageError, shortened
from ..models.gguf_file import read_gguf
from ..models.names import named_gguf
from . import Engine, Timing, Tokens, gguf_types, resident_bytes
from .worker import EngineFailed, call

AT_ONCE = 8  # windows that are scored together
LIKELIEST = 10  # tokens that are compared
LOADING = "error loading model: "  # what llama.cpp prints before its reason

logger = logging.getLogger(__name__)


class LlamaCpp(Engine):
    """GGUF files on llama.cpp's own kernels."""

    name: ClassVar[str] = "llama.cpp"
    package: ClassVar[str] = "xllamacpp"
    install: ClassVar[str] = "pip install 'notall[export]'"
    target: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(gguf_types.FILE_TYPES)

    def check(self, spec: str | Path) -> None:
        self.need_package()
        source = _file(spec)
        kinds = {tensor.quantization for tensor in read_gguf(source).tensors.values()}
        if kinds := kinds - {*gguf_types.FLOATS, GGMLQuantizationType.BF16}:
            logger.warning(
                "%s is quantised already (%s): what its numbers lost then is not seen here, and quantising them again "
                "costs less than it would; give an F16 file",
                source.name,
                ", ".join(sorted(kind.name for kind in kinds)),
            )

    def source(self, spec: str | Path, folder: Path) -> Path:
        """With plain numbers, so that repaired weights are written as they are."""
        gguf_types.write_in_type(_file(spec), gguf_types.PLAIN, plain := folder / "plain.gguf")
        return plain

    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        gguf_types.write_in_type(plain, kind, out)

    def score(self, checkpoint: Path, windows: Sequence[Tokens]) -> list[list[float | None]]:
        together = min(AT_ONCE, len(windows))
        server = self._server(checkpoint, max(map(len, windows)), together)

        def read(slot: int) -> list[list[float | None]]:
            return [_nll(server, slot, tokens) for tokens in windows[slot::together]]

        with ThreadPoolExecutor(together) as pool:
            by_slot = list(pool.map(read, range(together)))
        return [by_slot[number % together][number // together] for number in range(len(windows))]

    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        before = resident_bytes()
        server = self._server(checkpoint, len(prompt) + new + 1, 1)
        request = {"prompt": list(prompt), "max_tokens": 1 + new, "temperature": 0, "ignore_eos": True}
        for _ in range(2):  # the first one to warm up
            timings = _complete(server, request | {"cache_prompt": False})["timings"]
        return Timing(timings["prompt_ms"], timings["predicted_per_token_ms"], resident_bytes() - before)

    def likeliest(self, checkpoint: Path, tokens: Tokens) -> list[tuple[int, float]]:
        """The most likely tokens after `tokens`, with their log-probabilities in nats."""
        new = 8
        server = self._server(checkpoint, len(tokens) + new, 1)
        request = {"prompt": list(tokens), "max_tokens": new, "temperature": 0, "n_probs": LIKELIEST}
        request |= {"ignore_eos": True, "grammar": "root ::= [a-z ]+"}  # texts that end within a character have none
        found = _complete(server, request)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(entry["id"], entry["logprob"]) for entry in found]

    @staticmethod
    def reason(stderr: str) -> str:
        return next((shortened(line.partition(LOADING)[2], 160) for line in stderr.splitlines() if LOADING in line), "")

    def _server(self, checkpoint: Path, tokens: int, together: int) -> Any:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(checkpoint)
        settings.n_parallel = together
        settings.n_ctx = together * 64 * math.ceil((tokens + 1) / 64)  # a sequence's cache is a multiple of 64 tokens
        settings.n_batch = settings.n_ctx
        settings.cache_ram_mib = settings.n_ctx_checkpoints = 0  # slots keep what is read again
        settings.warmup = False
        settings.verbosity = 1  # errors
        for cores in (settings.cpuparams, settings.cpuparams_batch):
            cores.n_threads = self.threads
            cores.poll = 0
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return xllamacpp.Server(settings)


def next_token_logprobs(path: Path, tokens: Tokens) -> dict[int, float]:
    """The likeliest tokens and their log-probabilities in nats. Raises `UnknownArchitecture`, `UsageError`."""
    from ..measuring.speed import cores

    try:
        found = dict(call(LlamaCpp(cores()), "likeliest", checkpoint=path, tokens=list(tokens)))
    except EngineFailed as error:
        kind = UnknownArchitecture if "unknown model architecture" in error.reason else UsageError
        raise kind(f"llama.cpp cannot run {path.name}: {error.reason}") from None
    if len(found) < LIKELIEST:
        raise UsageError(f"llama.cpp gives {len(found)} tokens for {path.name}, expected {LIKELIEST}")
    return found


def _file(spec: str | Path) -> Path:
    path = named_gguf(spec)
    if path is None:
        raise UsageError(f"llama.cpp needs a .gguf file of the dense model, and {shortened(spec)} is none: convert it")
    return path


def _nll(server: Any, slot: int, tokens: Tokens) -> list[float | None]:
    """The NLL of each token but the first; None for one that ends within a character.

    The server reports probabilities of what it generates alone, before a bias changes them: so it generates a token
    after each prefix, which it keeps in its slot, and a bias makes that the token of the text.
    """
    found: list[float | None] = []
    for place, token in enumerate(tokens[1:], 1):
        request = {
            "prompt": list(tokens[:place]),
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": 1,
            "logit_bias": [[token, 1e4]],  # more than any logit
            "cache_prompt": True,
            "id_slot": slot,
        }
        logprobs = (_complete(server, request)["choices"][0]["logprobs"] or {"content": ()})["content"]
        if logprobs and logprobs[0]["id"] != token:
            raise UsageError("llama.cpp generates another token than it is made to; please report the model")
        found.append(-logprobs[0]["logprob"] if logprobs else None)
    return found


def _complete(server: Any, request: dict[str, Any]) -> Any:
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "error" in answer:
        raise UsageError(f"llama.cpp refuses: {shortened(answer['error'].get('message', answer['error']), 160)}")
    return answer
