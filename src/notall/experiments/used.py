"""Windows that a plan was chosen by, or that its weights were fitted to, drawn again
from what records say of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, shortened
from ..models.names import USAGE_MIX
from ..plan import Plan
from ..results.ledger import read_records
from ..results.repairs import RepairStep
from .search.records import SearchRecord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..models.texts import Text
    from ..models.windows import Drawn


logger = logging.getLogger(__name__)


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
            logger.info(
                "note: the plan was %s %s, where it looks better than it is; measure on"
                " another --text",
                self.how,
                shortened(text.name),
            )
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
    from ..models.mix import kept_texts, text_name
    from ..models.texts import MIX

    source = next((one for one in sources if text_name(one) == use.text), use.text)
    if source in sources or source in (*MIX, USAGE_MIX):
        yield from kept_texts(model, tokenizer, source)


def uses_of(plan: Plan, path: Path | None = None) -> list[Use]:
    """What a plan, maybe read from `path`, was chosen by, and what its weights were
    fitted to.
    """
    found = [use for step in getattr(plan, "history", ()) for use in _uses_in(step)]
    chosen = path.with_suffix(".search") / SearchRecord.file if path else None
    if chosen and chosen.is_file():
        with suppress(UsageError):  # a damaged file is nothing to stop for
            records = [
                record
                for record in read_records(chosen, SearchRecord)
                if record.plan.indices == plan.indices
            ]
            found += [_use("chosen by", record.what, record.what) for record in records]
    return found


def _uses_in(step: RepairStep) -> Iterator[Use]:
    """The texts of a repair, or of a training, each of which has as many windows."""
    about = step.model_dump()
    texts = about["texts"] or [about]
    size = {"sequences": -(-step.sequences // len(texts))} if step.sequences else {}
    return (
        _use("repaired with", text, about | size)
        for text in texts
        if "text_sha256" in text
    )


def _use(how: str, text: Mapping[str, Any], about: Mapping[str, Any]) -> Use:
    numbers = {
        name: about[name] for name in ("sequences", "length", "seed") if name in about
    }
    return Use(how, text["text"], text["text_sha256"], **numbers)
