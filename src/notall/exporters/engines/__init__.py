"""Models in the engines that serve them: written plain, quantised, scored and timed, each in a process of its own."""

from __future__ import annotations

from ...errors import UsageError, nearest
from .engine import Engine
from .hf import Transformers
from .llamacpp import LlamaCpp

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (LlamaCpp, Transformers)}


def engine_named(name: str) -> type[Engine]:
    """The engine of this name. Raises `UsageError` for one that is not measured here."""
    if name in ENGINES:
        return ENGINES[name]
    known = " or ".join(ENGINES)
    if name == "vllm":
        raise UsageError(f"vLLM is not measured this way: give {known}; an export runs there (notall export --to hf)")
    raise UsageError(f"there is no engine {name!r}{nearest(name, [*ENGINES])}: give {known}")
