"""Which texts a repair is fitted to and measured on, and how much of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..models.names import USAGE_MIX

SEQUENCES, LENGTH = 128, 512  # windows that a repair is fitted to, and their tokens


@dataclass(frozen=True)
class FitTexts:
    """The `texts` to fit to, by names or files, and those `held_out` to measure on.

    `sequences` windows of all texts together are fitted to, else what there is, up to
    `most` (128). A window has `length` tokens, else as many as the model reads, up to
    512. Without a `held_out` text, other windows of the same ones are measured on.
    """

    texts: Sequence[str] = (USAGE_MIX,)
    held_out: Sequence[str] = ()
    sequences: int | None = None
    most: int | None = None
    length: int | None = None
    seed: int = 0
