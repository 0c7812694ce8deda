"""How long-running work reports progress: `progress(done, total, doing)`, in steps of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Progress = Callable[[float, float, str], None]
Item = TypeVar("Item")


def silent(done: float, total: float, doing: str) -> None:
    """Report nothing."""


class Stages:
    """Work of several stages, each a share of the steps of the whole, told as one count."""

    def __init__(self, progress: Progress, steps: float) -> None:
        self.progress, self.steps, self.given = progress, steps, 0.0

    def stage(self, steps: float) -> Progress:
        """What the next stage, of so many steps of the whole, tells in steps of its own."""
        start = self.given
        self.given += steps

        def tell(done: float, total: float, doing: str) -> None:
            self.progress(min(start + steps * (done / total if total else 1.0), self.steps), self.steps, doing)

        return tell


def tracked(items: Sequence[Item], doing: str, progress: Progress) -> Iterator[Item]:
    """`items`, with progress told as they are used up."""
    for number, item in enumerate(items):
        progress(number, len(items), doing)
        yield item
    progress(len(items), len(items), doing)
