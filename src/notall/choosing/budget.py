"""How much a plan must save, or how much it may cost."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal, get_args

from transformers import PreTrainedModel

from ..errors import UsageError, expect, nearest, shortened
from ..plan import Plan, several_of
from ..running.skipping import footprint
from .space import Skipped, Space, Unit, names_in

Resource = Literal["params", "weight_bytes", "kv_bytes_per_token"]


@dataclass(frozen=True)
class Budget:
    """`saves` says what skipping a sublayer saves, by name; the plan is to save
    `target` in all.

    With a `limit` the objective may rise by at most that; where `target` is infinite,
    it is to save as much as it can. `description` is for people. What `read_by` saves
    only when those that read it, by name, are skipped as well.
    """

    saves: Mapping[str, float] = field(repr=False)
    target: float
    description: str
    limit: float = math.inf
    read_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def saved(self, skipped: Iterable[str]) -> float:
        """How much is saved without these sublayers, in the unit of the budget."""
        gone = frozenset(skipped)
        return math.fsum(
            self.saves[name] for name in gone if self._is_freed(name, gone)
        )

    def _is_freed(self, name: str, gone: Skipped) -> bool:
        return name in gone and all(
            self._is_freed(reader, gone) for reader in self.read_by.get(name, ())
        )

    def counted(self, skipped: Skipped) -> float:
        """What is saved, as far as it is asked for."""
        return min(self.saved(skipped), self.target * (1 - 1e-9))

    def met(self, skipped: Skipped) -> bool:
        """Whether these sublayers save the target, up to rounding."""
        return self.saved(skipped) >= self.target * (1 - 1e-9)

    def rate(self, unit: Unit, rise: float, skipped: Skipped) -> float:
        """What `unit`, by which the objective rises, costs for what it saves of what is
        still to be saved.
        """
        more = (
            self.saved(skipped.union(unit)) - self.saved(skipped)
            if self.read_by
            else self.saved(unit)
        )
        missing = max(self.target - self.saved(skipped), 0.0)
        worth = min(more, missing) or 1e-12  # it is divided by
        # where the objective falls, saving more makes it better still
        return rise / worth if rise > 0 else rise * worth


def by_count(space: Space, count: float) -> Budget:
    """A budget: skip `count` units of this space or, below 1, that share of them,
    rounded to the nearest whole number.

    Blocks and periods count as one each, and portable sets by their sublayers. Raises
    `UsageError` when there are fewer, and for an odd number of sublayers of a portable
    set.
    """
    expect(space, Space, "first the space, and then how many of it")
    expect(count, Real, "how many to skip, a number")
    if not 0 <= count < math.inf or (count >= 1 and count != int(count)):
        raise UsageError(
            f"cannot skip {count} of them: give a whole number, or a fraction below 1"
        )
    whole = round(count * space.most) if count < 1 else int(count)
    if space.by_pairs and whole % 2:
        raise UsageError(
            f"a portable set has an even number of sublayers: give {whole - 1} or"
            f" {whole + 1}"
        )
    saves = {name: 1 / len(unit) for unit in space.units for name in unit}
    return _possible(
        space, Budget(saves, whole, shortened(several_of(str(space), whole)))
    )


def by_footprint(
    model: PreTrainedModel, space: Space, resource: Resource, amount: float
) -> Budget:
    """A budget: save this many parameters, bytes of weights or bytes of KV cache a
    token; below 1, that share of them.

    Raises `UsageError` for another resource, and for more than there is to save.
    """
    if resource not in (known := get_args(Resource)):
        near = nearest(resource, known)
        raise UsageError(
            f"cannot save {shortened(repr(resource))}{near}: give one of"
            f" {', '.join(known)}"
        )
    space.refuse_prefill(f"what the prompt alone skips saves no {resource}")
    sizes = {part.name: part for part in space.structure.sublayers}
    size = "parameters" if resource == "params" else resource
    saves = {name: float(getattr(sizes[name], size)) for name in space.names}
    read_by = {
        part.name: part.read_by for part in space.structure.sublayers if part.read_by
    }
    dense = getattr(footprint(model, Plan()), resource)
    expect(amount, Real, "how much to save, a number")
    if not 0 <= amount < math.inf:
        raise UsageError(
            f"cannot save {amount} {resource}: give a number from 0, or a fraction"
            " below 1"
        )
    target = amount * dense if amount < 1 else amount
    described = f"{shortened(f'{target:,.0f}')} {resource} less"
    return _possible(space, Budget(saves, target, described, read_by=read_by))


def by_limit(space: Space, limit: float, of_what: str = "of the objective") -> Budget:
    """A budget: skip as many sublayers as possible while the objective rises by at most
    `limit` nats.
    """
    check_nats(limit)
    return Budget(
        dict.fromkeys(space.names, 1.0),
        math.inf,
        f"at most {limit:g} more {of_what}",
        limit,
    )


def check_nats(limit: float) -> None:
    """Raise `UsageError` for what the objective cannot be held to."""
    expect(limit, Real, "a number of nats")
    if not 0 <= limit < math.inf:
        raise UsageError(
            f"nothing can be lost but from 0 nats on, not {limit}: give a limit such"
            " as 0.1"
        )


def within_limit(budget: Budget, limit: Budget) -> Budget:
    """A joint budget: what `budget` asks for, while the objective rises by at most
    `limit` (see `by_limit`).
    """
    return replace(
        budget,
        limit=limit.limit,
        description=f"{budget.description}, {limit.description}",
    )


def contiguous_runs(space: Space, budget: Budget) -> dict[int, tuple[Unit, ...]]:
    """By the number of its first unit, the shortest run of units from there on that
    meets the budget.
    """
    found = {}
    for first in range(len(space.units)):
        for behind in range(first, len(space.units) + 1):
            run = space.units[first:behind]
            if budget.met(names_in(run)) and space.allows(names_in(run)):
                found[first] = run
                break
    return found


def deepest_run(space: Space, budget: Budget, kind: str = "") -> tuple[Unit, ...]:
    """The shortest run of units, or of those of one `kind` alone, up to the last one
    that meets the budget; none where no run does.
    """
    units = [
        unit for unit in space.units if all(name.startswith(kind) for name in unit)
    ]
    tails = (tuple(units[first:]) for first in reversed(range(len(units))))
    return next(
        (
            run
            for run in tails
            if budget.met(names_in(run)) and space.allows(names_in(run))
        ),
        (),
    )


def _possible(space: Space, budget: Budget) -> Budget:
    """`budget`, unless all that may be skipped, but one attention, saves less than it
    asks for.
    """
    most = budget.saved(space.names)
    counting = {f"attn.{index}" for index in space.structure.counting}
    if counting.issubset(space.names):
        stay = [unit for unit in space.units if counting.intersection(unit)]
        # one attention stays
        most = max(budget.saved(set(space.names).difference(unit)) for unit in stay)
    if not 0 <= budget.target <= most * (1 + 1e-9):
        problem = f"a budget of {budget.description} is out of reach"
        raise UsageError(
            f"{problem}: ask for at most {most:,.0f}, all that may be skipped"
        )
    return budget
