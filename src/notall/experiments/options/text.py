"""Windows of texts to calibrate on and to measure on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from ...errors import UsageError
from ...models.names import DEFAULT_TEXT, USAGE_MIX
from ...options import Option, check_sizes, option
from ...strict_json import Settings
from ..waiting import waiting

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ...models.texts import Text
    from ...models.windows import Drawn


TEXT = (
    "a UTF-8 file, a .jsonl with a `text` column, prose, which ships with Python, mix:"
    " the model's own answers and completions, and retrieval; or answers:FILE, its"
    " answers to your prompts"
)


@dataclass(frozen=True)
class PromptOptions:
    """A text, and how many windows of it are read."""

    PANEL: ClassVar[str] = "Text"

    text: str = option(DEFAULT_TEXT, TEXT)
    sequences: int = option(8, "number of windows")

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        check_sizes(self.sequences)
        check_texts(self.text)

    def for_diagnostics(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        apart: Sequence[Drawn] = (),
    ) -> list[Tensor]:
        """The windows of the text that the diagnostics read, or all that it has, drawn
        apart from others.
        """
        from ...evaluation.diagnostics import WINDOW_TOKENS, WINDOWS
        from ...models.windows import draw
        from ...structure.model_structure import positions_of

        length = int(min(WINDOW_TOKENS, positions_of(model)))
        text = _read(model, tokenizer, self.text, WINDOWS * length)
        take = partial(draw, tokenizer, text, length=length, seed=seed, apart=apart)
        found = take(sequences=WINDOWS, fewer=True)
        if not len(found):
            found = take(sequences=1)  # which says what is wrong
        return found.on(model).batches(1)


@dataclass(frozen=True)
class TextOptions(PromptOptions):
    """Windows of a text: how many, of how many tokens, and how many run at a time."""

    length: int = option(256, "tokens in each window")
    batch_size: int = option(4, "windows to run at a time")

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        check_sizes(self.sequences, self.length, self.batch_size)
        check_texts(self.text)

    def windows(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        apart: Sequence[Drawn] = (),
    ) -> tuple[list[Tensor], Settings]:
        """Token batches on the model's device, drawn apart from others, and what they
        are, for the record.
        """
        from ...models.windows import draw

        self.check_size(model)
        text = _read(model, tokenizer, self.text, self.sequences * self.length)
        size: Settings = {"sequences": self.sequences, "length": self.length}
        found = draw(tokenizer, text, **size, seed=seed, apart=apart).on(model)
        about = {"text": text.name, "text_sha256": text.sha256, **size}
        return found.batches(self.batch_size), about

    def check_size(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` for windows that the model cannot read."""
        from ...structure.model_structure import positions_of

        if self.length > (most := positions_of(model)):
            raise UsageError(
                f"windows of {self.length} tokens exceed the model's {most} positions:"
                " lower --length"
            )


@dataclass(frozen=True)
class HeldOutOptions(TextOptions):
    """Windows of a text, and others to measure on: of another text, or of the same."""

    text: str = option(USAGE_MIX, TEXT)
    held_out: str | None = option(
        None,
        "text to measure on (default: other windows of --text; they are of a copy of"
        " it, too)",
    )
    held_out_sequences: int | None = option(
        None, "windows to measure on (default: as --sequences)"
    )

    def check(self) -> None:
        """Raise `UsageError` for numbers that make no windows, and for a text that
        cannot be read.
        """
        for count in (self.sequences, self.held_out_sequences or self.sequences):
            check_sizes(count, self.length, self.batch_size)
        check_texts(self.text, self.held_out)

    def split(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        apart: Sequence[Drawn] = (),
        fewer: bool = False,
        calibrates: bool = True,
    ) -> Split:
        """Windows to calibrate on, and others to measure on, drawn `apart` from more; a
        short text may have `fewer`.

        A held-out text of the same content as the other is that text: others of its
        windows are measured on. Where nothing `calibrates`, the text for that, which
        may have to be written first, is not read if there is another.
        """
        from ...models.windows import draw

        self.check_size(model)
        count = self.held_out_sequences or self.sequences
        is_same = self.held_out in (None, self.text)
        window = partial(draw, tokenizer, length=self.length, seed=seed)
        if calibrates or is_same:
            sequences = self.sequences + (count if is_same else 0)
            text = _read(model, tokenizer, self.text, sequences * self.length)
            judged = text
            if not is_same:
                judged = self._held_out_text(model, tokenizer, count)
            is_same |= judged.sha256 == text.sha256
            own = window(text, sequences=self.sequences)
        else:
            judged = self._held_out_text(model, tokenizer, count)
            own = window(judged, sequences=1)[:0]
        others = partial(
            window, judged, sequences=count, fewer=fewer and not self.held_out
        )
        apart = [own, *apart]
        held_out = others(apart=apart).on(model)
        return Split(own.on(model), held_out, is_same, self.batch_size, others, apart)

    def _held_out_text(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
    ) -> Text:
        return _read(model, tokenizer, str(self.held_out), count * self.length)


@dataclass(frozen=True)
class Split:
    """Windows to choose by and to fit to, `own`, and `held_out` ones to measure on,
    maybe of the same text.
    """

    own: Drawn
    held_out: Drawn
    is_same: bool
    batch_size: int
    others: Callable[..., Drawn]  # draws what is held out
    apart: Sequence[Drawn]  # what that overlaps nothing of

    @property
    def calibration(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each."""
        return self.own.batches(self.batch_size)

    @property
    def evaluation(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each."""
        return self.held_out.batches(self.batch_size)

    @property
    def described(self) -> Settings:
        """What both are, for the record."""
        text, judged = self.own.text, self.held_out.text
        size = {"sequences": len(self.own), "length": self.own.rows.shape[1]}
        held_out = {"held_out": judged.name, "held_out_sha256": judged.sha256}
        if not len(self.own):
            return {"length": size["length"], **held_out}
        if self.is_same:
            held_out = {"held_out": "other windows"} if len(self.held_out) else {}
        return {"text": text.name, "text_sha256": text.sha256, **size, **held_out}

    @property
    def measured_on(self) -> str:
        """The text that is measured on, in words."""
        name = self.held_out.text.name
        return f"other windows of {name}" if self.is_same else name

    def apart_from(self, windows: Sequence[Drawn]) -> Split:
        """The same, with windows to measure on that overlap none of these either."""
        others = self.others(apart=[*self.apart, *windows])
        return replace(
            self,
            held_out=replace(others, rows=others.rows.to(self.held_out.rows.device)),
        )


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tokens: float,
) -> Text:
    from ...models.mix import text_of

    with waiting("reading the text") as progress:
        return text_of(model, tokenizer, source, progress, tokens)


def check_texts(*sources: str | None) -> None:
    """Raise `UsageError` for a text that cannot be read."""
    from ...models.texts import ANSWERS_TO, is_made, read_prompts, read_text

    for source in filter(None, sources):
        if source.startswith(ANSWERS_TO):
            read_prompts(Path(source.removeprefix(ANSWERS_TO)))
        elif not is_made(source):
            read_text(source)


PromptTokens = Annotated[
    int | None,
    Option(
        "score what follows the first N tokens of each window, its prompt (default:"
        " half, if only a prompt skips)",
        least=1,
        panel="Text",
    ),
]
