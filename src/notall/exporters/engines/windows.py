"""The held-out text as each model's own tokens, window by window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import UsageError

TORN = "\ufffd"  # of a character that a window cuts through


@dataclass(frozen=True)
class Windows:
    """Token ids, and the bytes in UTF-8 of all tokens but the first, which are what is predicted."""

    tokens: tuple[tuple[int, ...], ...]
    text_bytes: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]) -> Windows:
        tokens = tuple(tuple(row) for row in rows)
        return cls(tokens, tuple(len(text_of(tokenizer, row[1:]).encode()) for row in tokens))


def as_windows(tokenizer: PreTrainedTokenizerBase, batches: Iterable[Tensor]) -> Windows:
    """Of batches of token ids, (batch, tokens)."""
    return Windows.of(tokenizer, (row for batch in batches for row in batch.tolist()))


def by_another(theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, windows: Windows) -> Windows:
    """The same text in the tokens of another model. Raises `UsageError` where a window comes to fewer than two."""
    rows = [list(theirs(text_of(ours, row), verbose=False)["input_ids"]) for row in windows.tokens]
    if any(len(row) < 2 for row in rows):
        raise UsageError("a window of the held-out text is a single token of another model: give a greater --length")
    return Windows.of(theirs, rows)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text.strip(TORN)
