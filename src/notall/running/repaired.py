"""A plan that brings weights along: what it keeps was refit to make up for what it skips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from ..digests import digest_of
from ..errors import UsageError, shortened
from ..plan import Plan
from ..results.repairs import RefitRecord, RepairStep
from ..structure.model_structure import ModelStructure, Sublayer


@dataclass(frozen=True)
class LinearMap:
    """What stands in for something skipped: it adds M h + b to the stream h, for each token on its own."""

    matrix: Tensor  # (hidden, hidden)
    bias: Tensor | None = None  # (hidden,)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.matrix] if self.bias is None else [self.matrix, self.bias]

    def run(self, hidden: Tensor) -> Tensor:
        """The stream behind it, (batch, tokens, hidden)."""
        bias = None if self.bias is None else self.bias.to(hidden)
        return hidden + nn.functional.linear(hidden, self.matrix.to(hidden), bias)


class RepairedPlan(Plan):
    """A plan, and for some parameters of what it keeps the values that go with it.

    `weights` maps the path of a parameter in the dense model to its value, of the same shape. Wherever a plan is run
    or exported, this one runs and is exported with them; the dense model keeps its own.

    `maps` are matrices that stay at run time, by the names of skipped sublayers, in whose places they run. They are
    there to be measured against: `evaluate` runs them; `skip`, `remove` and `export` refuse them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, attention: Iterable[int] = (), mlp: Iterable[int] = (), **fields: object) -> None:
        super().__init__(attention, mlp, **fields)

    weights: Mapping[str, Tensor] = Field({}, exclude=True, repr=False)
    refits: tuple[RefitRecord, ...] = Field((), exclude=True, repr=False, description="how well, step by step")
    history: tuple[RepairStep, ...] = Field((), exclude=True, repr=False, description="what made the weights, in order")
    maps: Mapping[str, LinearMap] = Field({}, exclude=True, repr=False)

    @classmethod
    def of(cls, plan: Plan, **fields: object) -> RepairedPlan:
        """`plan` with these weights or maps."""
        return cls(plan.attention, plan.mlp, fingerprint=plan.fingerprint, note=plan.note, **fields)

    @cached_property
    def digest(self) -> str:
        """A hash of the weights and the maps, which tells repairs of one plan apart."""
        named = [*self.weights.items(), *((name, part) for name, one in self.maps.items() for part in one.tensors)]
        return digest_of(part for pair in sorted(named, key=itemgetter(0)) for part in pair)[:16]

    @property
    def added_bytes(self) -> int:
        """Of the matrices that stay at run time."""
        return sum(tensor.nbytes for one in self.maps.values() for tensor in one.tensors)

    @property
    def state(self) -> Literal["repaired"]:
        return "repaired"

    @property
    def unrepaired(self) -> Plan:
        """What it skips, without the weights."""
        return Plan(self.attention, self.mlp, fingerprint=self.fingerprint, note=self.note)

    def __str__(self) -> str:
        return f"{super().__str__()} (repaired)" if self.weights or self.maps else super().__str__()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan and its weights to a new folder, which commands take as `--plan`.

        Raises `UsageError` where the folder holds something or cannot be written, and where the plan has `maps`.
        """
        from .repaired_folders import save_repaired

        save_repaired(Path(path), self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RepairedPlan:
        """Read the folder that `save`, `notall repair` or `notall heal` wrote.

        Raises `UsageError` for a folder of something else, one that is damaged, and a repair that was not finished.
        """
        from .repaired_folders import load_repaired

        return load_repaired(Path(path))

    @property
    def identity(self) -> tuple[Any, ...]:
        """What it skips, and its weights."""
        return self.attention, self.mlp, self.digest

    def __or__(self, other: Plan) -> RepairedPlan:
        both = super().__or__(other)
        theirs = other if isinstance(other, RepairedPlan) else RepairedPlan()
        merged = {"weights": {**self.weights, **theirs.weights}, "maps": {**self.maps, **theirs.maps}}
        return RepairedPlan(both.attention, both.mlp, fingerprint=both.fingerprint, **merged)

    __ror__ = __or__

    def check(self, structure: ModelStructure) -> None:
        """As for any plan, and raise `UsageError` where a weight is of no sublayer."""
        super().check(structure)
        known = tuple(
            f"{structure.layers}.{part.index}.{module}."
            for block in structure.blocks
            for part in block.sublayers
            for module in part.modules
        )
        for path in self.weights:
            if not path.startswith(known):
                raise UsageError(
                    f"no sublayer of the model has {shortened(path)}, which the plan has weights for; repair this model"
                )

    def placed(self, model: nn.Module) -> RepairedPlan:
        """The same, with weights of the dtypes and on the devices of `model`'s own: they cross once, not at each use.

        Raises `UsageError` where `model` has no such parameters.
        """
        weights = {path: _like(model, path, weight) for path, weight in self.weights.items()}
        found = RepairedPlan.of(self, weights=weights, maps=self.maps, refits=self.refits, history=self.history)
        found.__dict__["digest"] = self.digest  # it stays the same plan
        return found

    def weights_of(self, structure: ModelStructure, parts: Sequence[Sublayer]) -> dict[str, Tensor]:
        """Those of sublayers of one layer, by their paths below it."""
        layer = f"{structure.layers}.{parts[0].index}."
        modules = tuple(f"{layer}{module}." for part in parts for module in part.modules)
        return {path.removeprefix(layer): weight for path, weight in self.weights.items() if path.startswith(modules)}


def refuse_maps(plan: Plan) -> None:
    """Raise `UsageError` where a plan keeps matrices at run time, which only `Replay` runs."""
    if isinstance(plan, RepairedPlan) and plan.maps:
        raise UsageError(
            "this plan's repair keeps matrices at run time, which are there to be measured against and cannot be "
            "generated with or exported; repair the plan with notall.repair instead"
        )


@contextmanager
def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have `module` run with these values of parameters, by their paths below it; then with its very own again."""
    own: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for path, weight in weights.items():
            holder, name = holder_of(module, path, weight)
            own.append((holder, name, holder._parameters[name]))  # type: ignore[arg-type]
            set_weight(module, path, weight)
        yield
    finally:
        for holder, name, parameter in own:
            holder._parameters[name] = parameter


def set_weight(module: nn.Module, path: str, weight: Tensor) -> None:
    """Give the parameter at `path` a value for good. Raises as `holder_of` does."""
    holder, name = holder_of(module, path, weight)
    needs_grad = holder._parameters[name].requires_grad  # type: ignore[union-attr]
    holder._parameters[name] = nn.Parameter(_like(module, path, weight), requires_grad=needs_grad)


def _like(module: nn.Module, path: str, weight: Tensor) -> Tensor:
    """`weight` in the dtype and on the device of the parameter at `path`; itself where it is so already."""
    holder, name = holder_of(module, path, weight)
    own = holder._parameters[name]
    return weight.to(own.device, own.dtype)  # type: ignore[union-attr]


def holder_of(module: nn.Module, path: str, weight: Tensor) -> tuple[nn.Module, str]:
    """The module that holds the parameter at `path`, and its name there.

    Raises `UsageError` where there is none, or one of another shape than `weight` or offloaded.
    """
    above, _, name = path.rpartition(".")
    holder: nn.Module | None = None
    with suppress(AttributeError):
        holder = module.get_submodule(above)
    old = None if holder is None else holder._parameters.get(name)
    if holder is None or old is None:
        raise UsageError(f"the model has no {path}, which the plan has weights for; repair this model")
    if old.shape != weight.shape:
        raise UsageError(
            f"the repaired {path} is {tuple(weight.shape)}, but the model's is {tuple(old.shape)}; repair this model"
        )
    if old.device.type == "meta":
        raise UsageError(f"{path} is offloaded, and repaired weights cannot take its place there; load the model whole")
    return holder, name
