"""Sublayers by their layer index, as users name them."""

import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import ClassVar, SupportsIndex

from pydantic import BaseModel, Field, ValidationError, field_validator

from ..errors import UsageError, nearest, shortened
from .words import in_ranges, several_of

IN_BOTH = "a block is named in both"
MOST_LAYERS = 100_000  # a hundred times as deep as any model


class Layers(BaseModel, frozen=True, extra="forbid"):
    """Sublayers by their layer index, from 0. Raises `UsageError` on an index that is
    none, or is named twice.
    """

    _refused: ClassVar[str] = ""  # what a refusal begins with

    attention: tuple[int, ...] = Field(
        (), description="layers whose attention is skipped"
    )
    mlp: tuple[int, ...] = Field((), description="layers whose MLP is skipped")

    def __init__(
        self,
        /,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        **fields: object,
    ) -> None:
        try:
            super().__init__(attention=attention, mlp=mlp, **fields)
        except ValidationError as error:
            raise UsageError(
                f"{self._refused}{first_problem(error, type(self))}"
            ) from None

    @field_validator("attention", "mlp", mode="before")
    @classmethod
    def _each_once(cls, given: object) -> tuple[int, ...]:
        if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
            raise ValueError(
                "give a list of layer indices such as [3, 4], not"
                f" {shortened(repr(given))}"
            )
        indices = sorted(map(whole_number, given))
        if indices and indices[0] < 0:
            raise ValueError(
                f"layer indices start at 0, but {shortened(indices[0])} is named"
            )
        if indices and indices[-1] >= MOST_LAYERS:
            raise ValueError(f"no model has a layer {shortened(indices[-1])}")
        for index, following in zip(indices, indices[1:]):
            if index == following:
                raise ValueError(f"layer {index} is named twice")
        return tuple(indices)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers that are skipped whole."""
        return tuple(index for index in self.attention if index in self.mlp)

    @property
    def names(self) -> tuple[str, ...]:
        """The sublayers that are skipped, such as attn.3 and mlp.3: attentions
        first.
        """
        return (
            *(f"attn.{index}" for index in self.attention),
            *(f"mlp.{index}" for index in self.mlp),
        )

    def __len__(self) -> int:
        """How many sublayers are skipped."""
        return len(self.attention) + len(self.mlp)

    def __str__(self) -> str:
        """For people: `block 20-29; attention 5, 7`, or `nothing`."""
        whole = set(self.blocks)
        parts = {
            "block": whole,
            "attention": set(self.attention) - whole,
            "mlp": set(self.mlp) - whole,
        }
        named = [f"{kind} {in_ranges(held)}" for kind, held in parts.items() if held]
        return "; ".join(named) or "nothing"

    def in_words(self, among: Mapping[str, int] | None = None) -> str:
        """Such as `3 blocks`, `1 attention and 4 MLPs`, or `nothing`; `among`, all of
        each kind: `3 of 24 blocks`.
        """
        skipped = {"attention": len(self.attention), "mlp": len(self.mlp)}
        if self.attention == self.mlp:
            skipped = {"block": len(self.blocks)}

        def counted(kind: str, count: int) -> str:
            if among:
                return f"{count} of {several_of(kind, among[kind])}"
            return several_of(kind, count)

        parts = [counted(kind, count) for kind, count in skipped.items() if count]
        return " and ".join(parts) or "nothing"


def whole_number(given: object, what: str = "layer index") -> int:
    """A whole number of any kind, NumPy's too. Raises `ValueError` for anything else,
    such as True, 1.0 and "1".
    """
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        with suppress(TypeError):  # of an array
            return operator.index(given)
    raise ValueError(f"{shortened(repr(given))} is no {what}: give whole numbers")


def first_problem(error: ValidationError, kind: type[Layers]) -> str:
    """What pydantic refuses of the fields of a `kind`, in one line."""
    problem = error.errors()[0]
    if problem["type"] == "extra_forbidden":
        known = [one for one in kind.model_fields if one not in ("fingerprint", "note")]
        key = str(problem["loc"][0])
        hint = f"; {IN_BOTH}" if "block" in key else nearest(key, known)
        return f"it has {', '.join(known)}, and no {shortened(key)}{hint}"
    where = ".".join(shortened(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
