"""Windows that a plan was chosen by, or that its weights were fitted to, drawn again
from what records say of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import shortened
from ..models.names import USE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.texts import Text
    from ..models.windows import Drawn


@dataclass(frozen=True)
class Use:
    """A use of so many windows of a text, drawn by a seed; None is what a record does
    not say.
    """

    how: str  # such as `chosen by`
    text: str
    text_sha256: str
    sequences: int | None = None
    length: int | None = None
    seed: int = 0

    def windows(self, tokenizer: PreTrainedTokenizerBase, text: Text) -> list[Drawn]:
        """The windows of `text`, which is this one, drawn again; none, with a note,
        where the record lacks numbers.
        """
        from ..models.windows import draw

        if not (self.sequences and self.length):
            note = (
                f"note: the plan was {self.how} {shortened(text.name)}, where it looks"
                " better than it is"
            )
            print(f"{note}; measure on another --text", file=sys.stderr)
            return []
        return [
            draw(
                tokenizer,
                text,
                sequences=self.sequences,
                length=self.length,
                seed=self.seed,
                fewer=True,
            )
        ]


def windows_of(
    used: Sequence[Use],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
) -> list[Drawn]:
    """The windows of what is `used` that these texts may hold: of the same text, or
    where the model made both.
    """
    from ..models.texts import is_made, read_text

    files = [read_text(source) for source in sources if not is_made(source)]
    made = [source for source in sources if is_made(source)]
    found: list[Drawn] = []
    for use in used:
        texts = (
            _versions(use, model, tokenizer, made)
            if made and is_made(use.text)
            else iter(files)
        )
        if text := next((one for one in texts if one.sha256 == use.text_sha256), None):
            found += use.windows(tokenizer, text)
    return found


def _versions(
    use: Use,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
) -> Iterator[Text]:
    """What the model made under the name of a record: the beginning that short windows
    are of, and all of it.
    """
    from ..models.mix import kept_texts, name_of
    from ..models.texts import MIX

    source = next((one for one in sources if name_of(one) == use.text), use.text)
    if source in sources or source in (*MIX, USE):
        yield from kept_texts(model, tokenizer, source)
