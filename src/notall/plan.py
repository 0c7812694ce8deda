"""What to leave out: a frozen record that people can read, write and carry from one
tool to another.
"""

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, SupportsIndex

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from .errors import UsageError, nearest, shortened
from .files import (
    DoubledKey,
    Settings,
    contents,
    read_json,
    refuse_others,
    write_whole,
    writing,
)

if TYPE_CHECKING:
    from .structure.model_structure import ModelStructure, Sublayer

Kind = Literal["attention", "mlp"]
Skippable = Literal["attention", "mlp", "block"]
Phase = Literal[
    "all", "prefill"
]  # for which tokens something is skipped: every one, or a prompt's alone
KIND_NAMES = {
    "dense": "dense",
    "attention": "attention",
    "mlp": "MLP",
    "block": "block",
    "plan": "plan",
}
SET_NAMES = KIND_NAMES | {
    "portable": "portable sublayer"
}  # of what a set is made of; a kind of mixer by its own

IN_BOTH = "a block is named in both"
FOR_THIS_MODEL = (
    "make a plan for this model, or copy this one without its fingerprint if you are"
    " sure"
)
MOST_LAYERS = 100_000  # a hundred times as deep as any model
MOST_TOKENS = 1 << 31  # of a prompt
MOST_BYTES = 1 << 20  # of a plan file
PUBLISHED = (
    Path(__file__).parent / "published"
)  # the plans of the documents, taken by `published:NAME`
PUBLISHED_AS = "published:"


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
            raise UsageError(f"{self._refused}{_first(error, type(self))}") from None

    @field_validator("attention", "mlp", mode="before")
    @classmethod
    def _each_once(cls, given: object) -> tuple[int, ...]:
        if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
            raise ValueError(
                "give a list of layer indices such as [3, 4], not"
                f" {shortened(repr(given))}"
            )
        indices = sorted(map(_index, given))
        if indices and indices[0] < 0:
            raise ValueError(
                f"layer indices start at 0, but {shortened(indices[0])} is named"
            )
        if indices and indices[-1] >= MOST_LAYERS:
            raise ValueError(f"no model has a layer {shortened(indices[-1])}")
        if twice := [
            index for index, after in zip(indices, indices[1:]) if index == after
        ]:
            raise ValueError(f"layer {twice[0]} is named twice")
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
        return (
            "; ".join(
                f"{kind} {in_ranges(layers)}"
                for kind, layers in parts.items()
                if layers
            )
            or "nothing"
        )

    def in_words(self, among: Mapping[str, int] | None = None) -> str:
        """Such as `3 blocks`, `1 attention and 4 MLPs`, or `nothing`; `among`, all of
        each kind: `3 of 24 blocks`.
        """
        skipped = {"attention": len(self.attention), "mlp": len(self.mlp)}
        if self.attention == self.mlp:
            skipped = {"block": len(self.blocks)}

        def counted(kind: str, count: int) -> str:
            return (
                f"{count} of {several_of(kind, among[kind])}"
                if among
                else several_of(kind, count)
            )

        parts = [counted(kind, count) for kind, count in skipped.items() if count]
        return " and ".join(parts) or "nothing"


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
        count = _index(given, "number of tokens")
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

    def check(self, structure: "ModelStructure") -> None:
        """Raise `UsageError` for what a prompt cannot skip while its keys and values
        are written.
        """
        for part in structure.sublayers:
            if part.index in getattr(self, part.kind) and (
                why := bound_to_prompt(structure, part)
            ):
                told = f"the prompt alone cannot skip {part.name}, as {why}"
                raise UsageError(f"{told}; skip it for every token, or keep it")


def bound_to_prompt(structure: "ModelStructure", part: "Sublayer") -> str:
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


class Plan(Layers, frozen=True, extra="forbid"):
    """The sublayers to skip, by their layer index in the original model, from 0.

    A block is skipped by naming it in both lists. `prefill` names, in the same way,
    what is skipped for a prompt's tokens alone; it may be given as a dict.
    `fingerprint` is the shape of the model that the plan was made for (see
    `ModelStructure.fingerprint`); `note` is free text. Plans that run alike are equal,
    whatever these two say. Raises `UsageError` on an index that is no whole number,
    negative, named twice or deeper than any model.
    """

    _refused: ClassVar[str] = "this is no plan: "

    prefill: PromptSkips = Field(
        default_factory=PromptSkips,
        description="what is skipped for a prompt's tokens alone",
    )
    fingerprint: str | None = Field(
        None, description="shape of the model that this plan was made for"
    )
    note: str | None = Field(None, description="where this plan comes from")

    def __init__(
        self,
        /,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        **fields: object,
    ) -> None:
        super().__init__(attention, mlp, **fields)

    @field_validator("prefill", mode="before")
    @classmethod
    def _prompt_skips(cls, given: object) -> PromptSkips:
        if isinstance(given, PromptSkips):
            return (
                given or PromptSkips()
            )  # how many tokens run whole says nothing where nothing is skipped
        if not isinstance(given, dict):
            example = '{"attention": [3], "mlp": [3]}'
            raise ValueError(
                f"give what the prompt skips, such as {example}, not"
                f" {shortened(repr(given))}"
            )
        return PromptSkips(**given) or PromptSkips()

    @model_validator(mode="after")
    def _in_one_part(self) -> Self:
        if both := [name for name in self.prefill.names if name in set(self.names)]:
            raise ValueError(
                f"{both[0]} is skipped for every token, so leave it out of prefill"
            )
        return self

    @property
    def indices(self) -> Settings:
        """What is skipped, as records hold it: what only the prompt skips as `prefill`,
        where there is any.
        """
        skipped = {"attention": list(self.attention), "mlp": list(self.mlp)}
        return skipped | ({"prefill": self.prefill.indices} if self.prefill else {})

    @property
    def skipped(self) -> str:
        """What is skipped as one text, by which records tell plans apart: `attn.3
        mlp.3`.

        What only the prompt skips follows as `prompt:attn.5`, and `last:32` where more
        than one token runs whole.
        """
        return " ".join(
            [*self.names, *(self.prefill.marked_names if self.prefill else ())]
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from plans that run otherwise: not where it comes from, nor the
        model that it was made for.
        """
        return (
            self.attention,
            self.mlp,
            *((self.prefill.identity,) if self.prefill else ()),
        )

    @property
    def state(self) -> Literal["skipped", "repaired"]:
        """Whether it brings weights that make up for what it skips."""
        return "skipped"

    @property
    def unrepaired(self) -> "Plan":
        """What it skips, without such weights."""
        return self

    @property
    def digest(self) -> str:
        """Of such weights; "none" without any."""
        return "none"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __len__(self) -> int:
        """How many sublayers are skipped for every token."""
        return super().__len__()

    def __bool__(self) -> bool:
        """Whether anything is skipped, if only in the prompt."""
        return bool(len(self) or self.prefill)

    def __or__(self, other: "Plan") -> "Plan":
        """The plan that skips what either skips: for every token what one of them skips
        so.
        """
        if not isinstance(other, Plan):
            return NotImplemented
        attention, mlp = {*self.attention, *other.attention}, {*self.mlp, *other.mlp}
        prefill = PromptSkips(
            {*self.prefill.attention, *other.prefill.attention} - attention,
            {*self.prefill.mlp, *other.prefill.mlp} - mlp,
            last_tokens=max(self.prefill.last_tokens, other.prefill.last_tokens),
        )
        fingerprint = self.fingerprint or other.fingerprint
        return Plan(attention, mlp, prefill=prefill, fingerprint=fingerprint)

    def __str__(self) -> str:
        """For people: `attention 5, 7; prefill-only block 20-29`, or `nothing`."""
        if not self.prefill:
            return super().__str__()
        return (
            f"{super().__str__()}; {self.prefill}" if len(self) else str(self.prefill)
        )

    def in_words(self, among: Mapping[str, int] | None = None) -> str:
        """As for `Layers`, and what the prompt skips: `2 MLPs, and 3 blocks in the
        prompt`.
        """
        if not self.prefill:
            return super().in_words(among)
        prompt = self.prefill.in_words(among)
        return f"{super().in_words(among)}, and {prompt}" if len(self) else prompt

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. Raises `UsageError` when it cannot be written, or
        would replace what is no plan.
        """
        refuse_others(Path(path), Plan.load, "plan")
        fields = {
            **self.indices,
            **{
                name: value
                for name in ("fingerprint", "note")
                if (value := getattr(self, name))
            },
        }
        lines = [
            f"  {json.dumps(name)}: {json.dumps(value)}"
            for name, value in fields.items()
        ]
        with writing(f"the plan to {shortened(Path(path))}", "choose another path"):
            write_whole(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file, or `published:NAME`. Raises `UsageError` when it is
        missing, truncated or malformed.
        """
        path = Path(path)
        where = shortened(path)
        if (name := str(path).removeprefix(PUBLISHED_AS)) != str(path):
            path, known = (
                PUBLISHED / f"{name}.json",
                [one.stem for one in PUBLISHED.glob("*.json")],
            )
            if name not in known:
                raise UsageError(
                    f"no published plan {shortened(name)}{nearest(name, known)}; see"
                    " docs/plans.md"
                )
        try:
            content = contents(path, MOST_BYTES)
        except UsageError as error:
            raise UsageError(f"{where} is no plan: {error}") from None
        except IsADirectoryError:
            raise UsageError(
                f"{where} is a folder: notall.RepairedPlan.load reads a plan with"
                " weights"
            ) from None
        except OSError as error:
            raise UsageError(
                f"cannot read the plan {where}: {error.strerror}; `notall plan`"
                " writes one"
            ) from None
        try:
            fields = read_json(content.decode("utf-8-sig"))
        except DoubledKey as error:
            raise UsageError(
                f"{where} is no plan: it says {shortened(error)} twice; merge the two"
            ) from None
        except ValueError as error:
            raise UsageError(
                f"{where} is no plan: not valid JSON ({shortened(error)}); write it"
                " again"
            ) from None
        if (
            not isinstance(fields, dict)
            or not {"attention", "mlp", "prefill"} & fields.keys()
        ):
            expected = '{"attention": [...], "mlp": [...]}'
            raise UsageError(f"{where} is no plan: expected {expected}; {IN_BOTH}")
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def check(self, structure: "ModelStructure") -> None:
        """Raise `UsageError` unless this plan fits the model and leaves it an attention
        that counts tokens.
        """
        if self.fingerprint and self.fingerprint != structure.fingerprint:
            told = (
                f"this plan was made for {shortened(self.fingerprint)}, but the model"
                f" is {structure.fingerprint}"
            )
            raise UsageError(f"{told}; {FOR_THIS_MODEL}")
        self.check_depth(len(structure.blocks))
        for part in (self, self.prefill):
            for kind in ("attention", "mlp"):
                for layer in getattr(part, kind):
                    if kind not in structure.kinds[layer]:
                        told = (
                            f"the plan skips the {kind} of layer {layer}, which has"
                            " none"
                        )
                        raise UsageError(f"{told}; see notall inspect")
        if structure.counting.issubset(self.attention):
            held = ", ".join(f"attn.{layer}" for layer in sorted(structure.counting))
            every = f"every attention that holds keys and values ({held})"
            raise UsageError(
                f"the plan skips {every}; keep at least one: it counts the tokens"
            )
        if self.prefill:
            self.prefill.check(structure)

    def check_depth(self, layers: int) -> None:
        """Raise `UsageError` unless this plan fits a model of so many layers and leaves
        it at least one attention.
        """
        prompt = self.prefill
        for index in (*self.attention, *self.mlp, *prompt.attention, *prompt.mlp):
            if index >= layers:
                raise UsageError(
                    f"the plan names layer {index}, but layers are 0 to {layers - 1};"
                    " make a plan for it"
                )
        if len(self.attention) == layers:
            raise UsageError(
                "the plan skips every attention; keep at least one, so that tokens can"
                " see each other"
            )
        if prompt and len(self.attention) + len(prompt.attention) == layers:
            fix = "keep at least one, so that its tokens can see each other"
            raise UsageError(f"the plan skips every attention in the prompt; {fix}")


def refuse_prefill(plan: Plan, what: str) -> None:
    """Raise `UsageError` where a plan skips something in the prompt alone, which `what`
    cannot do.
    """
    if plan.prefill:
        told = (
            f"{what} cannot skip sublayers in the prompt alone, as this plan does"
            f" ({plan.prefill})"
        )
        raise UsageError(f"{told}; give a plan that skips them for every token")


def _index(given: object, what: str = "layer index") -> int:
    """A whole number of any kind, NumPy's too; True, 1.0 and "1" are none."""
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        with suppress(TypeError):  # of an array
            return operator.index(given)
    raise ValueError(f"{shortened(repr(given))} is no {what}: give whole numbers")


def _first(error: ValidationError, kind: type[Layers]) -> str:
    problem = error.errors()[0]
    if problem["type"] == "extra_forbidden":
        has = [
            name for name in kind.model_fields if name not in ("fingerprint", "note")
        ]
        key = str(problem["loc"][0])
        hint = f"; {IN_BOTH}" if "block" in key else nearest(key, has)
        return f"it has {', '.join(has)}, and no {shortened(key)}{hint}"
    where = ".".join(shortened(part) for part in problem["loc"])
    said = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {said}" if where else said


def several(count: float, name: str) -> str:
    """`1 block`, `2 blocks`."""
    whole = int(count) if count == int(count) else count
    return f"{whole:,} {name}" + ("s" if count != 1 else "")


def several_of(kind: str, count: float) -> str:
    """`1 block`, `2 MLPs`, `8 portable sublayers`, of a kind of sublayers, sets or
    mixers.
    """
    return several(count, SET_NAMES.get(kind, kind))


def in_ranges(indices: Iterable[int]) -> str:
    """Whole numbers in ascending order, with runs of three and more as `0-3`: `0-3,
    7`.
    """
    grouped = groupby(
        enumerate(sorted(indices)), key=lambda placed: placed[1] - placed[0]
    )
    runs = [[index for _, index in run] for _, run in grouped]
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))
        for run in runs
    )


WRITTEN = re.compile(r"(.+)-(\d{1,4})x(\d{1,9})(?:-([0-9a-f]+))?")


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
        return f"{self.model_type}-{self.layers}x{self.hidden_size}-{self.digest}".removesuffix(
            "-"
        )

    @classmethod
    def parse(cls, text: object) -> "Fingerprint | None":
        """The fingerprint that is written there, if one is."""
        found = WRITTEN.fullmatch(str(text))
        return (
            cls(found[1], int(found[2]), int(found[3]), found[4] or "")
            if found
            else None
        )
