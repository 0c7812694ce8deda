"""What to leave out: a frozen record that people can read, write and carry from one tool to another."""

import json
import operator
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsIndex

from pydantic import BaseModel, Field, ValidationError, field_validator

from .errors import UsageError, nearest, shortened
from .files import DoubledKey, contents, read_json, refuse_others, write_whole, writing

if TYPE_CHECKING:
    from .structure.model_structure import ModelStructure

Kind = Literal["attention", "mlp"]
Skippable = Literal["attention", "mlp", "block"]
KIND_NAMES = {"dense": "dense", "attention": "attention", "mlp": "MLP", "block": "block", "plan": "plan"}

MOST_LAYERS = 100_000  # a hundred times as deep as any model
MOST_BYTES = 1 << 20  # of a plan file
PUBLISHED = Path(__file__).parent / "published"  # the plans of docs/results.md, taken by `published:NAME`
PUBLISHED_AS = "published:"


class Plan(BaseModel, frozen=True, extra="forbid"):
    """The sublayers to skip, by their layer index in the original model, from 0.

    A block is skipped by naming it in both lists. `fingerprint` is the shape of the model that the plan was made for
    (see `ModelStructure.fingerprint`); `note` is free text. Plans that run alike are equal, whatever these two say.
    Raises `UsageError` on an index that is no whole number, negative, named twice or deeper than any model.
    """

    attention: tuple[int, ...] = Field((), description="layers whose attention is skipped")
    mlp: tuple[int, ...] = Field((), description="layers whose MLP is skipped")
    fingerprint: str | None = Field(None, description="shape of the model that this plan was made for")
    note: str | None = Field(None, description="where this plan comes from")

    def __init__(self, /, attention: Iterable[int] = (), mlp: Iterable[int] = (), **fields: object) -> None:
        try:
            super().__init__(attention=attention, mlp=mlp, **fields)
        except ValidationError as error:
            raise UsageError(f"this is no plan: {_first(error, type(self))}") from None

    @field_validator("attention", "mlp", mode="before")
    @classmethod
    def _each_once(cls, given: object) -> tuple[int, ...]:
        if isinstance(given, str | bytes | dict) or not isinstance(given, Iterable):
            raise ValueError(f"give a list of layer indices such as [3, 4], not {shortened(repr(given))}")
        indices = sorted(map(_index, given))
        if indices and indices[0] < 0:
            raise ValueError(f"layer indices start at 0, but {shortened(indices[0])} is named")
        if indices and indices[-1] >= MOST_LAYERS:
            raise ValueError(f"no model has a layer {shortened(indices[-1])}")
        if twice := [index for index, after in zip(indices, indices[1:]) if index == after]:
            raise ValueError(f"layer {twice[0]} is named twice")
        return tuple(indices)

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers that are skipped whole."""
        return tuple(index for index in self.attention if index in self.mlp)

    @property
    def indices(self) -> dict[str, list[int]]:
        """What is skipped, as records hold it."""
        return {"attention": list(self.attention), "mlp": list(self.mlp)}

    @property
    def names(self) -> tuple[str, ...]:
        """The sublayers that are skipped, such as attn.3 and mlp.3: attentions first."""
        return (*(f"attn.{index}" for index in self.attention), *(f"mlp.{index}" for index in self.mlp))

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from plans that run otherwise: not where it comes from, nor the model that it was made for."""
        return self.attention, self.mlp

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
        """How many sublayers are skipped; a plan that skips none is false."""
        return len(self.attention) + len(self.mlp)

    def __or__(self, other: "Plan") -> "Plan":
        """The plan that skips what either skips."""
        if not isinstance(other, Plan):
            return NotImplemented
        fingerprint = self.fingerprint or other.fingerprint
        return Plan({*self.attention, *other.attention}, {*self.mlp, *other.mlp}, fingerprint=fingerprint)

    def __str__(self) -> str:
        """For people: `block 20-29; attention 5, 7`, or `nothing`."""
        whole = set(self.blocks)
        parts = {"block": whole, "attention": set(self.attention) - whole, "mlp": set(self.mlp) - whole}
        return "; ".join(f"{kind} {in_ranges(layers)}" for kind, layers in parts.items() if layers) or "nothing"

    def in_words(self, among: Mapping[str, int] | None = None) -> str:
        """Such as `3 blocks`, `1 attention and 4 MLPs`, or `nothing`; `among` what it has: `1 of 30 attentions`."""
        if self.attention and self.attention == self.mlp and not among:
            return several(len(self.mlp), "block")
        skipped = {"attention": len(self.attention), "mlp": len(self.mlp)}
        parts = [
            f"{count} of {several(among[kind], KIND_NAMES[kind])}" if among else several(count, KIND_NAMES[kind])
            for kind, count in skipped.items()
            if count
        ]
        return " and ".join(parts) or "nothing"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. Raises `UsageError` when it cannot be written, or would replace what is no plan."""
        refuse_others(Path(path), Plan.load, "plan")
        fields = {**self.indices, **{name: value for name in ("fingerprint", "note") if (value := getattr(self, name))}}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        with writing(f"the plan to {shortened(Path(path))}", "choose another path"):
            write_whole(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file, or `published:NAME`. Raises `UsageError` when it is missing, truncated or malformed."""
        path = Path(path)
        where = shortened(path)
        if (name := str(path).removeprefix(PUBLISHED_AS)) != str(path):
            path, known = PUBLISHED / f"{name}.json", [one.stem for one in PUBLISHED.glob("*.json")]
            if name not in known:
                raise UsageError(f"no published plan {shortened(name)}{nearest(name, known)}; see docs/plans.md")
        try:
            content = contents(path, MOST_BYTES)
        except IsADirectoryError:
            raise UsageError(f"{where} is a folder: notall.RepairedPlan.load reads a plan with weights") from None
        except OSError as error:
            raise UsageError(f"cannot read the plan {where}: {error.strerror}; `notall plan` writes one") from None
        try:
            fields = read_json(content.decode("utf-8-sig"))
        except DoubledKey as error:
            raise UsageError(f"{where} is no plan: it says {shortened(error)} twice; merge the two") from None
        except ValueError as error:
            raise UsageError(f"{where} is no plan: not valid JSON ({shortened(error)}); write it again") from None
        if not isinstance(fields, dict) or not {"attention", "mlp"} & fields.keys():
            raise UsageError(f'{where} is no plan: expected {{"attention": [...], "mlp": [...]}}')
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def check(self, structure: "ModelStructure") -> None:
        """Raise `UsageError` unless this plan fits the model and leaves it an attention that counts tokens."""
        if self.fingerprint and self.fingerprint != structure.fingerprint:
            told = f"this plan was made for {shortened(self.fingerprint)}, but the model is {structure.fingerprint}"
            fix = "make a plan for this model, or delete its fingerprint line if you are sure"
            raise UsageError(f"{told}; {fix}")
        self.check_depth(len(structure.blocks))
        for kind in ("attention", "mlp"):
            for layer in getattr(self, kind):
                if kind not in structure.kinds[layer]:
                    raise UsageError(f"the plan skips the {kind} of layer {layer}, which has none; see notall inspect")
        if structure.counting.issubset(self.attention):
            held = ", ".join(f"attn.{layer}" for layer in sorted(structure.counting))
            every = f"every attention that holds keys and values ({held})"
            raise UsageError(f"the plan skips {every}; keep at least one: it counts the tokens")

    def check_depth(self, layers: int) -> None:
        """Raise `UsageError` unless this plan fits a model of so many layers and leaves it at least one attention."""
        for index in (*self.attention, *self.mlp):
            if index >= layers:
                raise UsageError(f"the plan names layer {index}, but layers are 0 to {layers - 1}; make a plan for it")
        if len(self.attention) == layers:
            raise UsageError("the plan skips every attention; keep at least one, so that tokens can see each other")


def _index(given: object) -> int:
    """A whole number of any kind, NumPy's too; True, 1.0 and "1" are none."""
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        with suppress(TypeError):  # of an array
            return operator.index(given)
    raise ValueError(f"{shortened(repr(given))} is no layer index: give whole numbers")


def _first(error: ValidationError, kind: type[Plan]) -> str:
    problem = error.errors()[0]
    if problem["type"] == "extra_forbidden":
        has = ["attention", "mlp", *(name for name in kind.model_fields if name not in Plan.model_fields)]
        told = f"it has {', '.join(has)}, and no {shortened(problem['loc'][0])}"
        return told + ("; a block is named in both" if kind is Plan else nearest(problem["loc"][0], has))
    where = ".".join(shortened(part) for part in problem["loc"])
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}"


def several(count: int, name: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {name}" + ("s" if count != 1 else "")


def in_ranges(indices: Iterable[int]) -> str:
    """Whole numbers in ascending order, with runs of three and more as `0-3`: `0-3, 7`."""
    grouped = groupby(enumerate(sorted(indices)), key=lambda placed: placed[1] - placed[0])
    runs = [[index for _, index in run] for _, run in grouped]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


WRITTEN = re.compile(r"(.+)-(\d{1,4})x(\d{1,9})(?:-([0-9a-f]+))?")


@dataclass(frozen=True)
class Fingerprint:
    """Written as `llama-30x576-1f0c2a9b`. Equal shapes have equal ones, whatever the weights."""

    model_type: str
    layers: int
    hidden_size: int
    digest: str = ""  # of the other sizes, where they are known

    def __str__(self) -> str:
        return f"{self.model_type}-{self.layers}x{self.hidden_size}-{self.digest}".removesuffix("-")

    @classmethod
    def parse(cls, text: object) -> "Fingerprint | None":
        """The fingerprint that is written there, if one is."""
        found = WRITTEN.fullmatch(str(text))
        return cls(found[1], int(found[2]), int(found[3]), found[4] or "") if found else None
