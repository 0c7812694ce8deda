"""What a plan keeps, as the steps of a tree that plans share, and states of one plan that
others can go on from.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..plan import Plan
from ..structure.model_structure import (
    Block,
    ModelStructure,
    Sublayer,
)
from .prefill import InPrompt
from .repaired import LinearMap


@dataclass
class Step:
    """A node of the tree: a sublayer, or a whole parallel block, and what may come
    after it.
    """

    name: str
    block: Block
    # none where a `map` stands in for something skipped: no sublayer is counted
    parts: tuple[Sublayer, ...]
    # a repaired plan's own, by their paths below the layer, and part of the name
    weights: Mapping[str, Tensor]
    map: LinearMap | None = None
    # what of its parts the prompt skips, and part of the name
    in_prompt: InPrompt | None = None
    # what the layers between the step before it and its own multiply the stream by
    scale: float = 1.0
    after: "dict[str, Step]" = field(default_factory=dict)
    plans: list[int] = field(default_factory=list)  # the plans that end here


@dataclass
class PrefixCache:
    """States of one plan on one batch, kept where plans that begin alike can go on from
    them.
    """

    names: tuple[str, ...]  # of its steps, in order
    every: int = 1  # of so many steps one is kept
    # streams behind steps, by place, (batch, tokens, hidden) each
    states: dict[int, Tensor] = field(default_factory=dict)

    def moved(self, names: tuple[str, ...]) -> "PrefixCache":
        """The prefix of another plan, with the states that both share."""
        shared = len(names)
        for place, (ours, theirs) in enumerate(zip(self.names, names)):
            if ours != theirs:
                shared = place
                break
        states = {place: one for place, one in self.states.items() if place < shared}
        return PrefixCache(names, self.every, states)

    def has(self, step: Step, place: int) -> bool:
        """Whether `step` is its step at `place`, where all before it are its own
        too.
        """
        return place < len(self.names) and self.names[place] == step.name

    def wants(self, step: Step, place: int) -> bool:
        """Whether this step of its own must be run: it isn't kept, and a plan ends here
        or what follows needs it.
        """
        if place in self.states:
            return False
        return bool(step.plans) or any(
            not self.has(following, place + 1) or self.wants(following, place + 1)
            for following in step.after.values()
        )


def step_name(parts: Sequence[Sublayer]) -> str:
    """Such as `attn.3`, or `attn.3+mlp.3` of a parallel block."""
    return "+".join(part.name for part in parts)


def live_steps(
    structure: ModelStructure, plan: Plan, mapped: Container[str] = ()
) -> Iterator[tuple[Block, tuple[Sublayer, ...]]]:
    """What `plan` keeps, in order, and `mapped` ones that it skips: each alone, a
    parallel block kept whole as one.
    """
    for block in structure.blocks:
        kept = [
            part
            for part in block.sublayers
            if block.index not in getattr(plan, part.kind)
        ]
        live = [part for part in block.sublayers if part in kept or part.name in mapped]
        if block.parallel and len(kept) == 2:
            yield block, tuple(live)
        else:
            yield from ((block, (part,)) for part in live)
