"""Who reads what: tensors beside the hidden states that one layer makes and a later one uses.

Shared keys and values, the choices of an indexer or the states of a router go from layer to layer in what layers
answer, or in a mapping that all of them are given. A source makes such a tensor, and a reader hands it to a torch
function; passing it on is not reading it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

Place = tuple[int, str | None]  # a layer, and its child module, or None: the layer itself


class Sharing:
    """Notes, while layers run, who makes what others read: `pairs` of a source and a reader."""

    def __init__(self) -> None:
        self.pairs: set[tuple[Place, Place]] = set()
        self._makers: dict[int, Place | None] = {}  # None: made outside of the layers
        self._any = False  # source so far
        self._alive: list[Tensor] = []  # so that no id is used twice

    def know(self, given: Any) -> None:
        """What a layer is given and no layer made."""
        self._note(given, None)

    def share(self, place: Place, made: Any) -> None:
        """What is new in `made` comes from `place`."""
        self._note(made, place)

    def read(self, place: Place, given: Any) -> None:
        """A torch function at `place` was handed `given`."""
        if not self._any:
            return
        for tensor in tensors_in(given):
            source = self.source_of(tensor)
            if source and source[0] != place[0]:
                self.pairs.add((source, place))

    def source_of(self, tensor: Tensor) -> Place | None:
        return self._makers.get(id(tensor))

    def is_read(self, tensor: Tensor, layer: int) -> bool:
        """Whether `layer` reads what the source of `tensor` makes."""
        return any(source == self.source_of(tensor) and place[0] == layer for source, place in self.pairs)

    def reads_others(self, layer: int) -> bool:
        """Whether `layer` reads what another one makes."""
        return any(place[0] == layer for _, place in self.pairs)

    def _note(self, given: Any, place: Place | None) -> None:
        for tensor in tensors_in(given):
            self._any |= place is not None
            if id(tensor) not in self._makers:
                self._makers[id(tensor)] = place
                self._alive.append(tensor)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(held)
