"""The shape of a model in a word: what a plan was made for, and what records are about."""

from __future__ import annotations

import re
from dataclasses import dataclass

WRITTEN = re.compile(r"(.+)-(\d{1,4})x(\d{1,9})(?:-([0-9a-f]+))?")


@dataclass(frozen=True)
class Fingerprint:
    """Written as `llama-30x576-1f0c2a9b`. Equal shapes have equal ones, whatever the weights."""

    model_type: str
    layers: int
    hidden_size: int
    digest: str = ""  # of the other sizes, where they are known

    def __str__(self) -> str:
        return f"{self.model_type}-{self.layers}x{self.hidden_size}-{self.digest}".removesuffix("-")

    @classmethod
    def parse(cls, text: object) -> Fingerprint | None:
        """The fingerprint that is written there, if one is."""
        found = WRITTEN.fullmatch(str(text))
        return cls(found[1], int(found[2]), int(found[3]), found[4] or "") if found else None
