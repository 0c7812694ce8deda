"""What is noted of a layer's call: the hidden states in it, what made them, and writes to
the cache.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .calls import Arguments, tensors_in

# A layer, and its child module, or None: the layer itself.
MadeBy = tuple[int, str | None]

ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
MULTIPLICATIONS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}


@dataclass(eq=False)
class Node:
    """A hidden state at one point of a layer, and what made it."""

    # a child's path, a torch function, or None: the layer's input
    made_by: str | Callable[..., Tensor] | None = None
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    output: int | None = None

    @property
    def inputs(self) -> "list[Node]":
        """The hidden states that it was made from, each once."""
        given = (*self.positional, *self.keywords.values())
        return list(dict.fromkeys(value for value in given if isinstance(value, Node)))

    @property
    def name(self) -> str:
        """Of the torch function that made it; empty where none did."""
        return getattr(self.made_by, "__name__", "")

    @property
    def is_sum(self) -> bool:
        """Whether it is two hidden states, added."""
        return self.name in ADDITIONS and len(self.inputs) == 2

    def __str__(self) -> str:
        return (
            self.made_by if isinstance(self.made_by, str) else self.name or "its input"
        )


@dataclass
class LayerTrace:
    """One layer's call, as it happened."""

    index: int
    layer: nn.Module
    arguments: Arguments  # by the layer's parameter names, without the hidden states
    given: Arguments  # the same, with what mappings held when the layer was called
    hidden: Tensor  # (batch, tokens, hidden), as it went in
    numbers: dict[int, str]  # the paths of its tensors of one element, by their ids
    answer: Any = None
    result: Node | None = None
    nodes: dict[int, Node] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no id is used twice
    cache_writes: "list[CacheWrite]" = field(default_factory=list)
    # of its children, by path: arguments and answers, as the calls ended
    calls: dict[str, list[tuple[Arguments, Any]]] = field(default_factory=dict)
    state_bytes: int = 0  # of its states of fixed size, one sequence
    attention_answer: object = None

    def __str__(self) -> str:
        return f"layer {self.index} ({type(self.layer).__name__})"

    def traced(
        self, args: tuple[Any, ...], kwargs: Arguments
    ) -> tuple[tuple[Any, ...], Arguments]:
        """The arguments of a call, with nodes in place of the hidden states among
        them.
        """

        def node_of(value: Any) -> Any:
            return self.nodes.get(id(value), value)

        named = {name: node_of(value) for name, value in kwargs.items()}
        return tuple(map(node_of, args)), named

    def note(self, tensor: Tensor, node: Node, inputs: Iterable[object] = ()) -> Tensor:
        """A new view where an operation hands its input back (dropout in eval mode), so
        that ids tell values apart.
        """
        if any(tensor is value for value in inputs):
            tensor = tensor.view(tensor.shape)
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)
        return tensor

    def unscaled(self, node: Node) -> tuple[Node, str | None]:
        """What it in the end multiplies by a number of its own, and the name of that,
        or None: `node` itself.
        """
        if node.name in MULTIPLICATIONS and len(node.inputs) == 1:
            for given in (*node.positional, *node.keywords.values()):
                if id(given) in self.numbers:
                    return node.inputs[0], self.numbers[id(given)]
        return node, None


@dataclass(frozen=True)
class CacheWrite:
    """A write to the cache by a child of the layer, or by itself (None): 0 bytes per
    token for a state of fixed size.
    """

    module: str | None
    layer_idx: int
    bytes_per_token: int


class Sharing:
    """Who hands what layers make beside their hidden states to a torch function:
    `pairs` of a source and a reader.
    """

    def __init__(self) -> None:
        self.pairs: set[tuple[MadeBy, MadeBy]] = set()
        self._makers: dict[int, MadeBy | None] = {}
        self._alive: list[Tensor] = []  # so that no id is used twice

    def note(self, made: object, place: MadeBy | None) -> None:
        """What is new in `made` comes from `place`, or from outside of the layers:
        None.
        """
        for tensor in tensors_in(made):
            if id(tensor) not in self._makers:
                self._makers[id(tensor)] = place
                self._alive.append(tensor)

    def hand_on(self, tensor: Tensor, copy: Tensor) -> None:
        """`copy` is `tensor` on another device or in another dtype: it comes from where
        that does.
        """
        if source := self.source_of(tensor):
            self.note(copy, source)

    def source_of(self, tensor: Tensor) -> MadeBy | None:
        """Where a tensor comes from; None from outside of the layers, or where unknown."""
        return self._makers.get(id(tensor))
