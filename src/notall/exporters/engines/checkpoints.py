"""Engines that read Hugging Face checkpoints: what `notall export --to hf` writes, a folder each."""

from __future__ import annotations

from pathlib import Path

from ...records.plan import Plan
from .. import export
from .engine import Engine


class OnCheckpoints(Engine):
    """An engine of folders with weights in `dtype`."""

    def check(self, spec: str | Path) -> None:
        self.need_package()

    def place(self, folder: Path, name: str) -> Path:
        return folder / name

    def write(self, spec: str | Path, plan: Plan, out: Path) -> None:
        export(spec, plan, "hf", out, dtype=self.dtype, verify=False)
