"""A plan that brings weights along: what it keeps was refit to make up for what it
skips.

Its folder holds the plan, weights, what made them, and at last `finished.json`, a seal
with the digest of each file.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..digests import digest_of
from ..errors import UsageError, shortened
from ..integrity import check_files
from ..plan import ModelShape, Plan
from ..results.ledger import Ledger, read_records
from ..results.provenance import Provenance
from ..results.repairs import RefitRecord, RepairStep
from ..structure.model_structure import ModelStructure, Sublayer
from .repair_folder import (
    ALL_WEIGHTS,
    BEFORE,
    FIX,
    IN_PROMPT,
    MADE_BY,
    PLAN,
    file_in,
    history_in,
    keep_whole,
    seal_of,
    sealed_weights,
)
from .weight_swaps import placed_at, placed_in_prompt, samples

ROUNDING = 2.0**-8  # between dtypes, of a number


@dataclass(frozen=True)
class LinearMap:
    """What stands in for something skipped: it adds M h + b to the stream h, for each
    token on its own.
    """

    matrix: Tensor  # (hidden, hidden)
    bias: Tensor | None = None  # (hidden,)

    @property
    def tensors(self) -> list[Tensor]:
        """The matrix, and the bias where there is one."""
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    def like(self, hidden: Tensor) -> "LinearMap":
        """The same on the device and in the dtype of `hidden`: itself, where it is
        there.
        """
        bias = None if self.bias is None else self.bias.to(hidden)
        return LinearMap(self.matrix.to(hidden), bias)

    def run(self, hidden: Tensor) -> Tensor:
        """The stream behind it; both are (batch, tokens, hidden), see `like`."""
        return hidden + nn.functional.linear(hidden, self.matrix, self.bias)


class RepairedPlan(Plan, arbitrary_types_allowed=True):
    """A plan, and for some parameters of what it keeps the values that go with it.

    `weights` maps the path of a parameter in the original model to its value, of the
    same shape. Wherever a plan is run or exported, this one runs and is exported with
    them; the original keeps its own. `replaced` are a few numbers of those that they
    replace, and another model's are refused.

    `prompt_weights` are used for those tokens of a prompt alone that skip what
    `prefill` names. They map the path of a projection's weight, (rows, inputs), or
    bias, (rows,), to the rows that keys and values need of it; a projection without a
    bias may get one there. Behind a path in a skipped MLP, `stand_in.weight`, (hidden,
    hidden), and `stand_in.bias`, (hidden,), are of the linear map in its place.

    `maps` are matrices that stay at run time, by the names of skipped sublayers, in
    whose places they run. They are there to be measured against: `evaluate` runs them;
    `skip`, `remove` and `export` refuse them.
    """

    def __init__(
        self,
        /,
        attention: Iterable[int] = (),
        mlp: Iterable[int] = (),
        **fields: object,
    ) -> None:
        super().__init__(attention, mlp, **fields)

    weights: Mapping[str, Tensor] = Field({}, exclude=True, repr=False)
    prompt_weights: Mapping[str, Tensor] = Field({}, exclude=True, repr=False)
    replaced: Mapping[str, Tensor] = Field(
        {}, exclude=True, repr=False, description="samples, by path"
    )
    refits: tuple[RefitRecord, ...] = Field(
        (), exclude=True, repr=False, description="how well, step by step"
    )
    history: tuple[RepairStep, ...] = Field(
        (), exclude=True, repr=False, description="what made the weights, in order"
    )
    maps: Mapping[str, LinearMap] = Field({}, exclude=True, repr=False)

    @classmethod
    def of(cls, plan: Plan, **fields: object) -> "RepairedPlan":
        """`plan` with these weights or maps."""
        about = {
            "prefill": plan.prefill,
            "fingerprint": plan.fingerprint,
            "note": plan.note,
        }
        return cls(plan.attention, plan.mlp, **about, **fields)

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and the maps, which tells repairs of one plan apart."""
        named = list(self.weights.items())
        for path, weight in self.prompt_weights.items():
            named.append((IN_PROMPT + path, weight))
        for name, linear in self.maps.items():
            named += [(name, tensor) for tensor in linear.tensors]
        pairs = sorted(named, key=itemgetter(0))
        return digest_of(part for pair in pairs for part in pair)[:16]

    @property
    def added_bytes(self) -> int:
        """What stays in memory in addition to the model's own weights: maps, and
        weights of the prompt.
        """
        added = list(self.prompt_weights.values())
        for linear in self.maps.values():
            added += linear.tensors
        return sum(tensor.nbytes for tensor in added)

    @property
    def state(self) -> Literal["repaired"]:
        """Repaired, also without weights of its own."""
        return "repaired"

    @property
    def unrepaired(self) -> Plan:
        """What it skips, without weights, maps and history."""
        about = {"fingerprint": self.fingerprint, "note": self.note}
        return Plan(self.attention, self.mlp, prefill=self.prefill, **about)

    def __str__(self) -> str:
        has_own = self.weights or self.prompt_weights or self.maps
        return f"{super().__str__()} (repaired)" if has_own else super().__str__()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, its weights and its history to a new folder, which commands
        take as `--plan`.

        Raises `UsageError` where the folder holds something or cannot be written, and
        where the plan has `maps`.
        """
        refuse_run_time_maps(self)
        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{shortened(folder)} holds something already: choose a new folder for"
                " plan and weights"
            )
        if self.history:
            *before, last = self.history
            what = last.model_dump(mode="json", exclude={"by"}, exclude_unset=True)
            what[BEFORE] = [step.model_dump(mode="json") for step in before]
            ledger = Ledger(folder, MADE_BY[last.by], Provenance(what=what))
            ledger.add(*(self.refits if last.by == "repair" else ()))
        keep_whole(folder, self, ALL_WEIGHTS)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RepairedPlan":
        """Read the folder that `save`, `notall repair` or `notall heal` wrote.

        Raises `UsageError` for a folder of something else, one that is damaged, and a
        repair that was not finished.
        """
        folder = Path(path)
        if not folder.exists():
            raise UsageError(
                f"there is no folder {shortened(folder)}: give one that `notall repair`"
                " wrote"
            )
        if folder.is_file():
            raise UsageError(
                f"{shortened(folder)} is a file: notall.Plan.load reads a plan without"
                " weights"
            )
        if (seal := seal_of(folder)) is None:
            if any((folder / kind.file).is_file() for kind in MADE_BY.values()):
                raise UsageError(
                    f"{shortened(folder)} was not finished: run the command that began"
                    " it again"
                )
            raise UsageError(
                f"{shortened(folder)} is no repaired plan: give a plan file, or one"
                " that was repaired"
            )
        records = {
            name: digest
            for name, digest in seal.files.items()
            if not name.endswith(".safetensors")
        }
        check_files(folder, records, FIX)
        tensors = sealed_weights(folder, seal)
        plan = Plan.load(file_in(folder, PLAN))
        if plan.indices != seal.plan:
            raise UsageError(
                f"{PLAN} of {shortened(folder)} is another plan than the one that was"
                f" repaired: {FIX}"
            )
        refits = tuple(read_records(folder / RefitRecord.file, RefitRecord))
        history = history_in(folder)
        return cls.of(plan, **tensors._asdict(), refits=refits, history=history)

    @property
    def identity(self) -> tuple[object, ...]:
        """What it skips, and its weights."""
        skipped = self.unrepaired.identity
        return (*skipped[:2], self.digest, *skipped[2:])

    def __or__(self, other: Plan) -> "RepairedPlan":
        both = super().__or__(other)
        theirs = other if isinstance(other, RepairedPlan) else RepairedPlan()
        fields = ("weights", "prompt_weights", "replaced", "maps")
        merged = {
            name: {**getattr(self, name), **getattr(theirs, name)} for name in fields
        }
        return RepairedPlan.of(both, **merged)

    __ror__ = __or__

    def check(self, structure: ModelShape) -> None:
        """As for any plan, and raise `UsageError` where a weight is of no sublayer."""
        super().check(structure)
        known = tuple(
            f"{structure.layers}.{part.index}.{name}."
            for part in structure.sublayers
            for name in part.modules
        )
        for path in (*self.weights, *self.prompt_weights):
            if not path.startswith(known):
                raise UsageError(
                    f"no sublayer of the model has {shortened(path)}, as the plan has;"
                    " repair this model"
                )

    def knowing(self, model: nn.Module) -> "RepairedPlan":
        """The same, with samples of `model`'s own weights, which these replace."""
        paths = [*self.weights, *self.prompt_weights]
        return self.model_copy(update={"replaced": dict(samples(model, paths))})

    def check_replaced(self, own: nn.Module | Mapping[str, Tensor]) -> None:
        """Raise `UsageError` where a model's own weights are not those that were
        replaced, in whatever dtype.
        """
        for path, found in samples(own, self.replaced):
            expected = self.replaced[path]
            rounding = ROUNDING if found.dtype != expected.dtype else 0
            alike = torch.allclose(
                found.double(), expected.double(), rtol=rounding, atol=rounding / 1000
            )
            if not alike:
                raise UsageError(
                    f"the repaired {path} belongs to another model of the same"
                    " shape; give that model, or repair this one"
                )

    def placed(self, model: nn.Module) -> "RepairedPlan":
        """With weights of `model`'s dtypes, on its devices. Raises as `placed_at` and
        `check_replaced` do.
        """
        weights = {
            path: placed_at(model, path, weight)[2].data
            for path, weight in self.weights.items()
        }
        prompt = {
            path: placed_in_prompt(model, path, weight)
            for path, weight in self.prompt_weights.items()
        }
        self.check_replaced(model)
        update = {"weights": weights, "prompt_weights": prompt}
        found = self.model_copy(update=update)
        found.__dict__["digest"] = self.digest  # it stays the same plan
        return found

    def weights_of(
        self, structure: ModelStructure, parts: Sequence[Sublayer]
    ) -> dict[str, Tensor]:
        """Those of sublayers of one layer, by their paths below it."""
        return _below(self.weights, structure, parts)

    def prompt_weights_of(
        self, structure: ModelStructure, part: Sublayer
    ) -> dict[str, Tensor]:
        """Those of a sublayer that the prompt skips, by their paths below its layer."""
        return _below(self.prompt_weights, structure, [part])


def _below(
    weights: Mapping[str, Tensor], structure: ModelStructure, parts: Sequence[Sublayer]
) -> dict[str, Tensor]:
    layer = f"{structure.layers}.{parts[0].index}."
    modules = tuple(f"{layer}{module}." for part in parts for module in part.modules)
    return {
        path.removeprefix(layer): one
        for path, one in weights.items()
        if path.startswith(modules)
    }


def refuse_run_time_maps(plan: Plan) -> None:
    """Raise `UsageError` for a plan that keeps matrices at run time: only `Replay` runs
    them.
    """
    if isinstance(plan, RepairedPlan) and plan.maps:
        raise UsageError(
            "this plan's repair keeps matrices at run time (LinearMaps), and can"
            " neither generate nor be exported; repair the plan with notall.repair, or"
            " give back weights: docs/add-repair.md"
        )
