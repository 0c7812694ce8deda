"""Models in the engines that serve them: written plain, quantised, scored and timed, each in a process of its own."""

from __future__ import annotations

from ...errors import UsageError, nearest
from .engine import Engine
from .hf import Transformers
from .llamacpp import LlamaCpp
from .vllm import VLLM

ENGINES: dict[str, type[Engine]] = {engine.name: engine for engine in (LlamaCpp, Transformers, VLLM)}


def engine_named(name: str) -> type[Engine]:
    """The engine of this name. Raises `UsageError` for one that is not measured here."""
    if name in ENGINES:
        return ENGINES[name]
    raise UsageError(f"there is no engine {name!r}{nearest(name, [*ENGINES])}: give {', '.join(ENGINES)}")
