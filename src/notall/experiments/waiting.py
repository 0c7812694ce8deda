"""What a program shows while options load a model or read a text: nothing, unless it
says so.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from ..progress import Progress, silent


@contextmanager
def _unseen(doing: str) -> Iterator[Progress]:
    yield silent


# Given what is being done, a context that shows it; the command line sets a bar.
SHOWN_BY: ContextVar[Callable[[str], AbstractContextManager[Progress]]] = ContextVar(
    "SHOWN_BY", default=_unseen
)


def waiting(doing: str) -> AbstractContextManager[Progress]:
    """Inside, work that takes seconds is under way; the value takes its progress."""
    return SHOWN_BY.get()(doing)
