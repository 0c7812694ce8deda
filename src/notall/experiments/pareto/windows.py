"""Held-out text in the tokens of each model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Windows:
    """The text as a model's own token ids, window by window, and the bytes in UTF-8 of
    all tokens but the first.
    """

    tokens: tuple[tuple[int, ...], ...]
    text_bytes: tuple[int, ...]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]
    ) -> Windows:
        """Of rows of token ids."""
        tokens = tuple(tuple(row) for row in rows)
        texts = (_text_of(tokenizer, row[1:]) for row in tokens)
        return cls(tokens, tuple(len(text.encode()) for text in texts))


def by_another(
    other: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, windows: Windows
) -> Windows:
    """The same text, in tokens of `own`, in those of another model. Raises `UsageError`
    where a window has fewer than two.
    """
    rows = [
        list(other(_text_of(own, row), verbose=False)["input_ids"])
        for row in windows.tokens
    ]
    if any(len(row) < 2 for row in rows):
        raise UsageError(
            "a window of the held-out text is a single token of another model: give a"
            " greater --length"
        )
    return Windows.of(other, rows)


def _text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = str(
        tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )
    return text.strip("\ufffd")  # of a character that a window cuts through
