"""How long-running work reports progress: `progress(done, total, doing)`, in steps of
its own; and what a step is.

Work of several kinds is reported as one count: its steps are tokens that one model reads
in a batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

Progress = Callable[[float, float, str], None]
Item = TypeVar("Item")
DECODED_TOKEN = 20  # what a token takes that is generated, in tokens that are read
DECODED_ALONE = 2  # what a token of one sequence takes, in tokens of a batch
# Plans that read a text in about the time of one: they share their first sublayers.
SHARING = 5


def reading(tokens: float, plans: int = 1) -> float:
    """What a text of so many tokens takes that `plans` read together."""
    return tokens * max(1.0, plans / SHARING)


def generation_work(tokens: float, plans: int = 1) -> float:
    """What so many tokens take that each of `plans` generates on its own."""
    return tokens * plans * DECODED_TOKEN


class Clock:
    """The time since a command began, for all parts of its work, and when a line last
    reported it.
    """

    def __init__(self) -> None:
        self.doing: list[object] = []  # the parts under way: the last one reports
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self.begun = self.reported = time.monotonic()

    def __str__(self) -> str:
        return str(timedelta(seconds=int(time.monotonic() - self.begun)))


CLOCK = Clock()


def silent(done: float, total: float, doing: str) -> None:
    """Report nothing."""


class Stages:
    """Work of several stages, each a share of the steps of the whole, reported as one
    count.
    """

    def __init__(self, progress: Progress, steps: float) -> None:
        self.progress = progress
        self.steps = steps
        self.given = 0.0  # to stages so far

    def stage(self, steps: float) -> Progress:
        """The progress of the next stage, of so many steps of the whole, which counts
        in steps of its own.
        """
        start = self.given
        self.given += steps

        def report(done: float, total: float, doing: str) -> None:
            share = done / total if total else 1.0
            self.progress(min(start + steps * share, self.steps), self.steps, doing)

        return report


def by_the_clock(progress: Progress, deadline: float) -> Progress:
    """The progress of work that ends at `deadline`, on the clock of `time.monotonic`:
    at least as far as the time is.
    """
    begun = time.monotonic()
    if not begun < deadline < math.inf:
        return progress

    def report(done: float, total: float, doing: str) -> None:
        passed = min(1.0, (time.monotonic() - begun) / (deadline - begun))
        progress(max(done, passed * total), total, doing)

    return report


def tracked(items: Sequence[Item], doing: str, progress: Progress) -> Iterator[Item]:
    """`items`, with progress reported as they are used up."""
    for number, item in enumerate(items):
        progress(number, len(items), doing)
        yield item
    progress(len(items), len(items), doing)
