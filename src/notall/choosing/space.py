"""What may be skipped, and what may come next: the sets of sublayers that a criterion
or a search chooses from.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from ..errors import UsageError, expect, nearest, shortened
from ..plan import Phase, Plan, PromptSkips, bound_to_prompt
from ..running.regrouping import is_portable
from ..structure.model_structure import ModelStructure

UnitKind = Literal["attention", "mlp", "block", "period", "sublayer"]
Unit = tuple[
    str, ...
    # names of sublayers that are skipped together, such as ("attn.3",), in the model's
    # order
]
Skipped = frozenset[str]

UNIT_KINDS: tuple[UnitKind, ...] = get_args(UnitKind)
WHOLE_LAYERS = ("block", "period")  # layers as they are


@dataclass(frozen=True)
class Space:
    """The sets to choose from: of one `kind` ("sublayer": attentions and MLPs), first
    and last layers preserved.

    `kind` may also be that of some mixers of the model, such as linear_attention. A
    "period" is one turn of the pattern in which the kinds of mixers repeat, in layers:
    skipping one leaves the pattern intact, which some engines need.

    `portable` leaves only sets whose result is an ordinary checkpoint: every maximal
    run of skipped sublayers has even length, so they are skipped in pairs that follow
    each other (see `regrouping.is_portable`).

    With the `phase` prefill sets are skipped for a prompt's tokens alone, but for its
    `last_tokens`.
    """

    structure: ModelStructure = field(repr=False)
    kind: str = "sublayer"
    portable: bool = False
    keep_first: int = 0
    keep_last: int = 0
    phase: Phase = "all"
    last_tokens: int = 1

    def __post_init__(self) -> None:
        expect(
            self.structure,
            ModelStructure,
            "the structure of a model: notall.locate(model)",
        )
        known = (*UNIT_KINDS, *self.structure.mixers)
        if self.kind not in known:
            near = nearest(self.kind, known)
            raise UsageError(
                f"cannot choose among {shortened(repr(self.kind))}{near}: give one of"
                f" {', '.join(known)}"
            )
        if self.kind == "period" and self.structure.period < 2:
            alike = (
                "are all alike"
                if self.structure.period
                else "do not come again in a period"
            )
            raise UsageError(
                f"the layers of {self.structure.model_type} {alike}: choose among"
                " blocks"
            )
        if (
            self.portable
            and self.kind not in ("sublayer", *WHOLE_LAYERS)
            and self.structure.by_halves
        ):
            raise UsageError(
                f"no set of {self.kind} sublayers alone is portable: choose among"
                " sublayers or blocks"
            )
        if self.portable and self.structure.in_place:
            problem = (
                f"layers of {self.structure.model_type} depend on each other, and keep"
                " their places"
            )
            raise UsageError(
                f"no set is portable: {problem}; choose among attention, mlp or block"
            )
        if self.phase == "prefill":
            self._check_prefill()
        if not self.names:
            raise UsageError(
                "every layer is preserved: keep fewer of the first and last layers"
            )

    def _check_prefill(self) -> None:
        if self.portable or self.kind == "period":
            problem = f"a prompt that skips leaves the checkpoint whole, {self} or not"
            raise UsageError(
                f"{problem}: choose among attention, mlp, block or sublayer"
            )
        bound = [
            why
            for part in self.structure.sublayers
            if (why := bound_to_prompt(self.structure, part))
        ]
        if len(bound) == len(self.structure.sublayers):
            raise UsageError(
                f"the prompt alone can skip nothing, as {bound[0]}: choose for every"
                " token"
            )

    def __str__(self) -> str:
        return "portable" if self.portable and self.kind == "sublayer" else self.kind

    @property
    def by_pairs(self) -> bool:
        """Whether sublayers go two by two, so that an ordinary checkpoint is left."""
        return self.portable and self.kind == "sublayer" and self.structure.by_halves

    @cached_property
    def order(self) -> dict[str, int]:
        """Every sublayer of the model, by name, with its place."""
        return {part.name: place for place, part in enumerate(self.structure.sublayers)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sublayers that may be skipped, in the model's order."""
        inner = range(self.keep_first, len(self.structure.blocks) - self.keep_last)
        all_kinds = self.kind in ("sublayer", *WHOLE_LAYERS)
        return tuple(
            part.name
            for part in self.structure.sublayers
            if part.index in inner
            and (all_kinds or self.kind in (part.kind, part.mixer))
            if self.phase == "all" or not bound_to_prompt(self.structure, part)
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What scores are given to: a sublayer each, the two of a block, or those of
        the layers of a period.
        """
        if self.kind not in WHOLE_LAYERS:
            return tuple((name,) for name in self.names)
        whole = [
            tuple(part.name for part in block.sublayers)
            for block in self.structure.blocks
        ]
        runs = (
            whole[first : first + self.length]
            for first in range(len(whole) - self.length + 1)
        )
        return tuple(
            unit for run in runs if set(unit := sum(run, ())) <= set(self.names)
        )

    @property
    def length(self) -> int:
        """How many layers a unit of whole layers has. Units of several overlap."""
        return self.structure.period if self.kind == "period" else 1

    @property
    def most(self) -> int:
        """How many units there are that do not overlap."""
        return (len(self.units) + self.length - 1) // self.length

    def moves(self, skipped: Skipped) -> list[Unit]:
        """What may be skipped next, on top of `skipped`."""
        if self.by_pairs:
            live = [name for name in self.order if name not in skipped]
            free: Iterable[Unit] = (
                pair for pair in zip(live, live[1:]) if set(pair) <= set(self.names)
            )
        else:
            free = (unit for unit in self.units if not skipped.intersection(unit))
        return [unit for unit in free if self.allows(skipped.union(unit))]

    def neighbours(self, unit: Unit, skipped: Skipped) -> list[Unit]:
        """The moves that skip the nearest sublayer that is left before `unit`, or after
        it.
        """
        places = [self.order[name] for name in unit]
        left = [name for name in self.names if name not in skipped]
        before = [name for name in left if self.order[name] < min(places)][-1:]
        after = [name for name in left if self.order[name] > max(places)][:1]
        return [
            move for move in self.moves(skipped) if {*before, *after}.intersection(move)
        ]

    def returns(self, skipped: Skipped) -> list[Unit]:
        """The units of `skipped` that may be restored; of a portable set, pairs that
        follow each other.
        """
        if not self.by_pairs:
            whole = [unit for unit in self.units if skipped.issuperset(unit)]
            return (
                whole
                if self.length == 1
                else [unit for unit in whole if self.allows(skipped.difference(unit))]
            )
        inside = self.sorted(skipped)
        pairs = [
            pair
            for pair in zip(inside, inside[1:])
            if self.order[pair[1]] == self.order[pair[0]] + 1
        ]
        return [pair for pair in pairs if self.allows(skipped.difference(pair))]

    def allows(self, skipped: Skipped) -> bool:
        """Whether `skipped` leaves an attention and, where that is asked for, an
        ordinary model or whole periods.
        """
        if self.phase == "prefill":
            # keys and values of skipped attentions are written: all count
            attentions = {name for name in self.order if name.startswith("attn.")}
            return not skipped.issuperset(attentions)
        if skipped.issuperset(f"attn.{index}" for index in self.structure.counting):
            return False
        if self.kind == "period":
            whole = (
                one.index
                for one in self.structure.blocks
                if skipped.isdisjoint(p.name for p in one.sublayers)
            )
            if not self.structure.keeps_period([*whole]):
                return False
        return not self.portable or is_portable(self.structure, self.plan(skipped))

    def sorted(self, names: Iterable[str]) -> list[str]:
        """Names of sublayers in the model's order."""
        return sorted(names, key=self.order.__getitem__)

    def plan(self, skipped: Iterable[str], note: str | None = None) -> Plan:
        """The plan that skips the sublayers of these names."""
        plan = plan_of(skipped, self.structure.fingerprint, note)
        if self.phase == "all":
            return plan
        prefill = PromptSkips(plan.attention, plan.mlp, last_tokens=self.last_tokens)
        return Plan(prefill=prefill, fingerprint=plan.fingerprint, note=note)

    @property
    def prefill_in_words(self) -> str:
        """The sets of a prompt alone, for messages."""
        return f"sets that the prompt alone skips, but for its last {self.last_tokens}"

    def refuse_prefill(self, why: str) -> None:
        """Raise `UsageError`, and say `why`, where sets are for the prompt alone: their
        budget is another.
        """
        if self.phase == "prefill":
            raise UsageError(
                f"{why}: give how many to skip (--skip {self}:8), or most nats to lose"
                " (--max-kl)"
            )


@dataclass(frozen=True)
class Choice:
    """A set, and in which order it came to be: what was skipped first comes first, what
    was swapped in last.
    """

    skipped: Skipped
    order: tuple[Unit, ...]


def names_in(units: Iterable[Unit]) -> Skipped:
    """The names of the sublayers of some units."""
    return frozenset(name for unit in units for name in unit)


def plan_of(
    skipped: Iterable[str], fingerprint: str | None = None, note: str | None = None
) -> Plan:
    """The plan that skips the sublayers of these names, such as attn.3."""
    indices: dict[str, list[int]] = {"attn": [], "mlp": []}
    for name in skipped:
        kind, _, index = name.partition(".")
        indices[kind].append(int(index))
    return Plan(indices["attn"], indices["mlp"], fingerprint=fingerprint, note=note)
