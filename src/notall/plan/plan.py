"""What to skip: a frozen record that people can read, write and carry from one tool to
another.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from ..errors import UsageError, shortened
from ..files import refuse_others
from ..strict_json import Settings
from .layers import Layers
from .model_shape import ModelShape
from .plan_file import read_fields, write_fields
from .prompt_skips import PromptSkips

FOR_THIS_MODEL = (
    "make a plan for this model, or copy this one without its fingerprint if you are"
    " sure"
)


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
        # where nothing is skipped, how many tokens run whole says nothing
        if isinstance(given, PromptSkips):
            return given or PromptSkips()
        if not isinstance(given, dict):
            example = '{"attention": [3], "mlp": [3]}'
            raise ValueError(
                f"give what the prompt skips, such as {example}, not"
                f" {shortened(repr(given))}"
            )
        return PromptSkips(**given) or PromptSkips()

    @model_validator(mode="after")
    def _in_one_part(self) -> Self:
        everywhere = set(self.names)
        for name in self.prefill.names:
            if name in everywhere:
                raise ValueError(
                    f"{name} is skipped for every token, so leave it out of prefill"
                )
        return self

    @property
    def indices(self) -> Settings:
        """What is skipped, as records hold it: what only the prompt skips as `prefill`,
        where there is any.
        """
        skipped: Settings = {"attention": list(self.attention), "mlp": list(self.mlp)}
        if self.prefill:
            skipped["prefill"] = self.prefill.indices
        return skipped

    @property
    def skipped(self) -> str:
        """What is skipped as one text, by which records tell plans apart: `attn.3
        mlp.3`.

        What only the prompt skips follows as `prompt:attn.5`, and `last:32` where more
        than one token runs whole.
        """
        in_prompt = self.prefill.marked_names if self.prefill else ()
        return " ".join([*self.names, *in_prompt])

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells it from plans that run otherwise: not where it comes from, nor the
        model that it was made for.
        """
        in_prompt = (self.prefill.identity,) if self.prefill else ()
        return (self.attention, self.mlp, *in_prompt)

    @property
    def state(self) -> Literal["skipped", "repaired"]:
        """Whether it brings weights that repair what skipping costs."""
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
        attention = {*self.attention, *other.attention}
        mlp = {*self.mlp, *other.mlp}
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
        if not len(self):
            return str(self.prefill)
        return f"{super().__str__()}; {self.prefill}"

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
        fields = dict(self.indices)
        if self.fingerprint:
            fields["fingerprint"] = self.fingerprint
        if self.note:
            fields["note"] = self.note
        write_fields(Path(path), fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file, or `published:NAME`. Raises `UsageError` when it is
        missing, truncated or malformed.
        """
        fields = read_fields(Path(path))
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{shortened(Path(path))}: {error}") from None

    def check(self, structure: ModelShape) -> None:
        """Raise `UsageError` unless this plan fits the model and leaves it an attention
        that counts tokens.
        """
        if self.fingerprint and self.fingerprint != structure.fingerprint:
            raise UsageError(
                f"this plan was made for {shortened(self.fingerprint)}, but the model"
                f" is {structure.fingerprint}; {FOR_THIS_MODEL}"
            )
        self.check_depth(len(structure.blocks))
        self._check_kinds(structure)
        if structure.counting.issubset(self.attention):
            held = ", ".join(f"attn.{layer}" for layer in sorted(structure.counting))
            raise UsageError(
                "the plan skips every attention that holds keys and values"
                f" ({held}); keep at least one: it counts the tokens"
            )
        if self.prefill:
            self.prefill.check(structure)

    def _check_kinds(self, structure: ModelShape) -> None:
        """Raise `UsageError` where a layer has no sublayer of a kind to skip in it."""
        named = [
            (kind, layer)
            for skips in (self, self.prefill)
            for kind, layers in (("attention", skips.attention), ("mlp", skips.mlp))
            for layer in layers
        ]
        for kind, layer in named:
            if kind not in structure.kinds[layer]:
                raise UsageError(
                    f"the plan skips the {kind} of layer {layer}, which has none; see"
                    " notall inspect"
                )

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
            raise UsageError(
                "the plan skips every attention in the prompt; keep at least one, so"
                " that its tokens can see each other"
            )


def refuse_nothing_to_train(plan: Plan) -> None:
    """Raise `UsageError` for a plan that skips nothing but MLPs in the prompt and has no
    weights of the prompt's own: there is nothing of it to train.
    """
    has_own = plan.prefill.attention or getattr(plan, "prompt_weights", None)
    if plan.prefill and not has_own and not len(plan):
        raise UsageError(
            "heal trains the prompt's own weights, and this plan has none"
            f" ({plan.prefill}): repair it first"
        )


def refuse_prefill(plan: Plan, what: str) -> None:
    """Raise `UsageError` where a plan skips something in the prompt alone, which `what`
    cannot do.
    """
    if plan.prefill:
        raise UsageError(
            f"{what} cannot skip sublayers in the prompt alone, as this plan does"
            f" ({plan.prefill}); give a plan that skips them for every token"
        )
