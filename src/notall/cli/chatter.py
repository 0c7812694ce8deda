"""What libraries log over their own installation as they are imported: no news to who runs a command."""

from __future__ import annotations

import logging
from dataclasses import dataclass

# Loggers, and words of the lines of each that are dropped. transformers imports torchao wherever it is installed.
DROPPED = {
    "torchao": ("Failed to load", "Skipping import of cpp extensions"),  # kernels for another Python or another torch
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU",),  # kernels that it would fetch; transformers imports it
    "torch.utils._pytree": ("register_constant() on Enum subclasses",),  # torchao calls it
}


def drop_chatter() -> None:
    """Drop those lines, and no others, from now on."""
    for name, words in DROPPED.items():
        logging.getLogger(name).addFilter(Without(words))


@dataclass(frozen=True)
class Without:
    """Lets pass what holds none of some words. The same one twice is one filter."""

    words: tuple[str, ...]

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(word in said for word in self.words)
