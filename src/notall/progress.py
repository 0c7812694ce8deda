"""How long-running work reports progress: `progress(done, total, doing)`, in steps of
its own; and what a step is.

Work of several kinds is told as one count: its steps are tokens that one model reads in
a batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

Progress = Callable[[float, float, str], None]
Item = TypeVar("Item")
DECODED_TOKEN = 20  # what a token takes that is generated, in tokens that are read
ALONE = 2  # what a token of one sequence takes, in tokens of a batch
# plans that read a text in the time of one, about: they have their first sublayers in
# common
SHARING = 5


def reading(tokens: float, plans: int = 1) -> float:
    """What a text of so many tokens takes that `plans` read together."""
    return tokens * max(1.0, plans / SHARING)


def writing(tokens: float, plans: int = 1) -> float:
    """What so many tokens take that each of `plans` generates on its own."""
    return tokens * plans * DECODED_TOKEN


class Clock:
    """The time since a command began, for all parts of its work, and when a line last
    told of it.
    """

    def __init__(self) -> None:
        self.doing: list[object] = []  # the parts under way: the last one tells
        self.begin()

    def begin(self) -> None:
        self.begun = self.told = time.monotonic()

    def __str__(self) -> str:
        return str(timedelta(seconds=int(time.monotonic() - self.begun)))


CLOCK = Clock()


def silent(done: float, total: float, doing: str) -> None:
    """Report nothing."""


class Stages:
    """Work of several stages, each a share of the steps of the whole, told as one
    count.
    """

    def __init__(self, progress: Progress, steps: float) -> None:
        self.progress, self.steps, self.given = progress, steps, 0.0

    def stage(self, steps: float) -> Progress:
        """What the next stage, of so many steps of the whole, tells in steps of its
        own.
        """
        start = self.given
        self.given += steps

        def tell(done: float, total: float, doing: str) -> None:
            self.progress(
                min(start + steps * (done / total if total else 1.0), self.steps),
                self.steps,
                doing,
            )

        return tell


def by_the_clock(progress: Progress, deadline: float) -> Progress:
    """What tells of work that ends at `deadline`, on the clock of `time.monotonic`: so
    far as the time is, at least.
    """
    begun = time.monotonic()
    if not begun < deadline < math.inf:
        return progress

    def tell(done: float, total: float, doing: str) -> None:
        passed = min(1.0, (time.monotonic() - begun) / (deadline - begun))
        progress(max(done, passed * total), total, doing)

    return tell


def tracked(items: Sequence[Item], doing: str, progress: Progress) -> Iterator[Item]:
    """`items`, with progress told as they are used up."""
    for number, item in enumerate(items):
        progress(number, len(items), doing)
        yield item
    progress(len(items), len(items), doing)
