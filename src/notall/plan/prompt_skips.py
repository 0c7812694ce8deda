"""Sublayers that are skipped for a prompt's tokens alone."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from pydantic import Field, field_validator

from ..errors import UsageError, shortened
from ..strict_json import Settings
from .layers import Layers, whole_number
from .model_shape import ModelShape, SublayerShape

MOST_TOKENS = 1 << 31  # of a prompt


class PromptSkips(Layers, frozen=True, extra="forbid"):
    """The sublayers to skip for a prompt's tokens alone, but for the `last_tokens` of
    them, which run whole.

    A skipped attention still writes the keys and values of the prompt's tokens, so that
    what follows can read them. Raises `UsageError` as `Plan` does, and where no token
    is left to run whole.
    """

    _refused: ClassVar[str] = "these are no sublayers to skip in the prompt: "

    last_tokens: int = Field(
        1, description="how many of a prompt's last tokens run whole, at least 1"
    )

    def __init__(
        self,
        /,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        **fields: object,
    ) -> None:
        super().__init__(attention, mlp, **fields)

    @field_validator("last_tokens", mode="before")
    @classmethod
    def _at_least_one(cls, given: object) -> int:
        count = whole_number(given, "number of tokens")
        if not 1 <= count < MOST_TOKENS:
            raise ValueError(
                f"{shortened(count)} is no number of tokens: the last one runs whole,"
                " so give 1 or more"
            )
        return count

    @property
    def indices(self) -> Settings:
        """As records hold it."""
        return {
            "attention": list(self.attention),
            "mlp": list(self.mlp),
            "last_tokens": self.last_tokens,
        }

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from others that skip otherwise."""
        return self.attention, self.mlp, self.last_tokens

    @property
    def marked_names(self) -> tuple[str, ...]:
        """The sublayers as `prompt:attn.5`, and `last:32` where more than one token
        runs whole.
        """
        whole = (f"last:{self.last_tokens}",) if self.last_tokens > 1 else ()
        return (*(f"prompt:{name}" for name in self.names), *whole)

    def __str__(self) -> str:
        """For people: `prefill-only block 20-29`, and how many last tokens run whole
        where that is not one.
        """
        whole = (
            f" (last {self.last_tokens} tokens whole)" if self.last_tokens > 1 else ""
        )
        return f"prefill-only {super().__str__()}{whole}"

    def in_words(self, among: Mapping[str, int] | None = None) -> str:
        """As for `Layers`, such as `3 blocks in the prompt`."""
        return f"{super().in_words(among)} in the prompt"

    def check(self, structure: ModelShape) -> None:
        """Raise `UsageError` for what a prompt cannot skip while its keys and values
        are written.
        """
        for part in structure.sublayers:
            if part.index not in getattr(self, part.kind):
                continue
            if reason := bound_to_prompt(structure, part):
                raise UsageError(
                    f"the prompt alone cannot skip {part.name}, as {reason}; skip it"
                    " for every token, or keep it"
                )


def bound_to_prompt(structure: ModelShape, part: SublayerShape) -> str:
    """Why a prompt's tokens cannot skip a sublayer while their keys and values are
    written; "" where they can.
    """
    if structure.in_place or structure.stubbed:
        return f"sublayers of {structure.model_type} run only inside of their layers"
    if part.read_by:
        return f"{', '.join(part.read_by)} reads what it makes"
    if part.kind == "attention" and (part.state_bytes or not part.kv_bytes_per_token):
        return (
            f"a {part.mixer or 'mixer'} keeps other things than keys and values of each"
            " token"
        )
    return ""
