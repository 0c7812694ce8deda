"""The shape of a model in a word: a plan knows by it which model it was made for."""

import re
from dataclasses import dataclass

FINGERPRINT_FORM = re.compile(r"(.+)-(\d{1,4})x(\d{1,9})(?:-([0-9a-f]+))?")


@dataclass(frozen=True)
class Fingerprint:
    """Written as `llama-30x576-1f0c2a9b`. Equal shapes have equal ones, whatever the
    weights.
    """

    model_type: str
    layers: int
    hidden_size: int
    digest: str = ""  # of the other sizes, where they are known

    def __str__(self) -> str:
        shape = f"{self.model_type}-{self.layers}x{self.hidden_size}"
        return f"{shape}-{self.digest}" if self.digest else shape

    @classmethod
    def parse(cls, text: object) -> "Fingerprint | None":
        """The fingerprint that is written there, if one is."""
        found = FINGERPRINT_FORM.fullmatch(str(text))
        if found is None:
            return None
        return cls(found[1], int(found[2]), int(found[3]), found[4] or "")
