"""llama.cpp, through the server in the wheel `xllamacpp`."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from ...errors import UsageError, shortened
from ...models.names import named_gguf
from ...records.plan import Plan
from .. import export
from . import gguf_types
from .engine import Engine, Timing, Tokens
from .memory import resident_bytes

AT_ONCE = 8  # windows that are scored together
CERTAIN = 1e4  # more than any logit
CELLS = 64  # a sequence's cache is a multiple of so many tokens

logger = logging.getLogger(__name__)


class LlamaCpp(Engine):
    """GGUF files on llama.cpp's own kernels."""

    name: ClassVar[str] = "llama.cpp"
    package: ClassVar[str] = "xllamacpp"
    install: ClassVar[str] = "pip install 'notall[export]'"

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(gguf_types.FILE_TYPES)

    @property
    def usual(self) -> tuple[str, ...]:
        return self.types

    def check(self, spec: str | Path) -> None:
        self.need_package()
        source = _file(spec)
        if kinds := gguf_types.is_quantised(source):
            logger.warning(
                "%s is quantised already (%s): what its numbers lost then is not seen here, and quantising them again "
                "costs less than it would; give an F16 file",
                source.name,
                ", ".join(sorted(kinds)),
            )

    def place(self, folder: Path, name: str) -> Path:
        return folder / f"{name}.gguf"

    def write(self, spec: str | Path, plan: Plan, out: Path) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.stem}.", dir=out.parent) as scratch:
            plain = Path(scratch) / "model.gguf"
            gguf_types.write_plain(_file(spec), plain)
            if plan:  # after its numbers are plain, so that repaired weights are written as they are
                plain = next(export(plain, plan, "gguf", Path(scratch) / "cut", verify=False).glob("*.gguf"))
            shutil.move(plain, out)

    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        gguf_types.write_quantised(plain, kind, out)

    def score(self, checkpoint: Path, windows: Sequence[Tokens]) -> list[list[float | None]]:
        together = min(AT_ONCE, len(windows))
        server = self._server(checkpoint, max(map(len, windows)), together)
        found: dict[int, list[float | None]] = {}

        def fill(slot: int) -> None:
            for number in range(slot, len(windows), together):
                found[number] = _scored(server, slot, windows[number])

        with ThreadPoolExecutor(together) as pool:
            list(pool.map(fill, range(together)))
        return [found[number] for number in range(len(windows))]

    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        before = resident_bytes()
        server = self._server(checkpoint, len(prompt) + new + 1, 1)
        asked = {"prompt": list(prompt), "max_tokens": 1 + new, "temperature": 0, "ignore_eos": True}
        for _ in range(2):  # the first one to warm up
            timings = _answer(server, asked | {"cache_prompt": False})["timings"]
        return Timing(timings["prompt_ms"], timings["predicted_per_token_ms"], resident_bytes() - before)

    def _server(self, checkpoint: Path, tokens: int, together: int) -> Any:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(checkpoint)
        settings.n_parallel = together
        settings.n_ctx = together * CELLS * math.ceil((tokens + 1) / CELLS)
        settings.n_batch = settings.n_ctx
        settings.cache_ram_mib = settings.n_ctx_checkpoints = 0  # slots keep what is asked for again
        settings.warmup = False
        settings.verbosity = 1  # errors
        for cores in (settings.cpuparams, settings.cpuparams_batch):
            cores.n_threads = self.threads
            cores.poll = 0
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        return xllamacpp.Server(settings)


def _file(spec: str | Path) -> Path:
    path = named_gguf(spec)
    if path is None:
        raise UsageError(f"llama.cpp needs a .gguf file of the dense model, and {shortened(spec)} is none: convert it")
    return path


def _scored(server: Any, slot: int, tokens: Tokens) -> list[float | None]:
    """The NLL of each token but the first.

    The server tells no probabilities of a prompt, but those of what it generates, as they are before a bias changes
    them: so it is asked for a token after each prefix, and a bias makes that the token of the text. What it has read
    of the prefix it keeps in its slot. Of a token that ends within a character it tells nothing.
    """
    found: list[float | None] = []
    for place, token in enumerate(tokens[1:], 1):
        asked = {
            "prompt": list(tokens[:place]),
            "max_tokens": 1,
            "temperature": 0,
            "n_probs": 1,
            "logit_bias": [[token, CERTAIN]],
            "cache_prompt": True,
            "id_slot": slot,
        }
        told = (_answer(server, asked)["choices"][0]["logprobs"] or {"content": ()})["content"]
        if told and told[0]["id"] != token:
            raise UsageError("llama.cpp generates another token than it is made to; please report the model")
        found.append(-told[0]["logprob"] if told else None)
    return found


def _answer(server: Any, asked: dict[str, Any]) -> Any:
    answer = server.handle_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "error" in answer:
        raise UsageError(f"llama.cpp refuses: {shortened(answer['error'].get('message', answer['error']), 160)}")
    return answer
