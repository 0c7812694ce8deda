"""The names of what can be skipped, and counts and ranges of them for people."""

from collections.abc import Iterable
from itertools import groupby
from typing import Literal

Kind = Literal["attention", "mlp"]
Skippable = Literal["attention", "mlp", "block"]
# For which tokens something is skipped: every one, or a prompt's alone.
Phase = Literal["all", "prefill"]
KIND_NAMES = {
    "dense": "dense",
    "attention": "attention",
    "mlp": "MLP",
    "block": "block",
    "plan": "plan",
}
# What a set is made of; a kind of mixer has a name of its own.
SET_NAMES = KIND_NAMES | {"portable": "portable sublayer"}


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
    numbered = enumerate(sorted(indices))
    # in a run of consecutive indices each is as far from its place as the first
    grouped = groupby(numbered, key=lambda placed: placed[1] - placed[0])
    parts: list[str] = []
    for _, placed in grouped:
        run = [index for _, index in placed]
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(parts)
