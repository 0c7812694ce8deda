"""Changes that last as long as a `with`: whatever interrupts it, and wherever, all that
was there is put back.
"""

from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

ABSENT: Any = object()


class Undo(AbstractContextManager["Undo"]):
    """What places held ahead of each change: entries of mappings, such as a module's
    `__dict__`, else attributes.

    Used as `with Undo() as undo, undo:`, and so left twice: an exception may come ahead
    of the first line of leaving. What was can be put back as often as it takes: leaving
    goes on where an exception interrupts it, and then raises it.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[Any, Any, Any]] = []

    def __exit__(self, *_: object) -> None:
        try:
            while self.entries:
                _hold(*self.entries[-1])
                self.entries.pop()
        finally:
            if self.entries:
                Undo.__exit__(self)

    def put(self, place: Any, name: Any, value: object) -> "Undo":
        """Have `place` hold `value` as `name`, or nothing, which is `ABSENT`: `with
        Undo() as undo, undo.put(...):`.
        """
        held = (
            place.get(name, ABSENT)
            if isinstance(place, MutableMapping)
            else getattr(place, name)
        )
        self.entries.append((place, name, held))
        _hold(place, name, value)
        return self

    def put_fields(self, config: Any) -> None:
        """Have `config` hold a copy of its fields, which may be changed."""
        self.put(config, "__class__", type(config))
        self.put(config, "__dict__", dict(vars(config)))


def _hold(place: Any, name: Any, value: Any) -> None:
    if isinstance(place, type):
        setattr(place, name, value)
    elif not isinstance(place, MutableMapping):
        object.__setattr__(place, name, value)  # a config's own knows of no `__dict__`
    elif value is ABSENT:
        place.pop(name, None)
    else:
        place[name] = value
