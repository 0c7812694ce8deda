"""Watch one forward pass and write down what each decoder layer does with its hidden
states.

A layer's child modules are taken as wholes; between them, every torch function that
touches a hidden state is noted. `lines_of` reads each layer as lines h = h + ops(h), or
h = h + ops(h) + ... in a parallel block; in the end it may multiply h by one number of
its own (`LayerTrace.unscaled`).
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModel
from .undoing import Undo

Arguments = dict[str, Any]  # of a call, by their names
Place = tuple[
    int, str | None
]  # a layer, and its child module, or None: the layer itself
PROBE_BATCH, PROBE_TOKENS = (
    2,
    4,
)  # 8 tokens, one of them padding, so that masks are real tensors

ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
# Same numbers in another shape: what a layer's children compute does not depend on it.
RESHAPES = {"view", "reshape", "contiguous", "flatten", "view_as", "clone", "detach"}
CASTS = {"to", "float", "type_as"}
MULTIPLICATIONS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
# f(a + b) = f(a) + f(b), so a sum of branches may be scaled as a whole.
LINEAR = {*MULTIPLICATIONS, "div", "__truediv__", "dropout"}
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class Stream(Enum):
    """A hidden state that a branch hands on, (batch, tokens, hidden)."""

    VALUE = "its running value"
    RESIDUAL = "the residual stream as the branch found it"


@dataclass(frozen=True)
class Argument:
    """An argument of the layer's own call, under the layer's name for it."""

    name: str
    default: object = None


Slot = object  # a Stream, an Argument, or else a constant


@dataclass
class LayerCall:
    """What a layer was called with, by name, while its branches run; `attention` keeps
    the attention's whole answer.
    """

    arguments: Arguments
    extras: Arguments = field(default_factory=dict)
    attention: Any = None


def _fill(slot: Slot, value: Tensor, residual: Tensor, call: LayerCall) -> Any:
    if isinstance(slot, Argument):
        return call.arguments.get(slot.name, slot.default)
    return (
        value if slot is Stream.VALUE else residual if slot is Stream.RESIDUAL else slot
    )


@dataclass(frozen=True)
class Op:
    """A call of a child module, by its path, or of a torch function, with arguments
    traced to where they come from.
    """

    made_by: str | Callable[..., Tensor]
    positional: tuple[Slot, ...]
    keywords: tuple[tuple[str, Slot], ...]
    output: int | None = (
        # which element of a module's answer goes on; None when the answer is a tensor
        None
    )
    is_attention: bool = False
    takes_extras: bool = False

    @property
    def module(self) -> str:
        """The path of the module; empty for a function."""
        return self.made_by if isinstance(self.made_by, str) else ""

    @property
    def name(self) -> str:
        """Of the function; empty for a module."""
        return getattr(self.made_by, "__name__", "")

    def run(
        self, holder: nn.Module, value: Tensor, residual: Tensor, call: LayerCall
    ) -> Tensor:
        positional = [_fill(slot, value, residual, call) for slot in self.positional]
        keywords = {
            name: _fill(slot, value, residual, call) for name, slot in self.keywords
        }
        if not isinstance(self.made_by, str):
            if (
                self.name == "dropout"
            ):  # seen in eval mode, wanted as the layer's mode has it
                keywords["training"] = holder.training
            return self.made_by(*positional, **keywords)
        if self.takes_extras:
            keywords.update(call.extras)
        answer = child(holder, self.made_by)(*positional, **keywords)
        if self.is_attention:
            call.attention = answer
        return answer if self.output is None else answer[self.output]


@dataclass(frozen=True)
class Branch:
    """Operations from the residual stream to what is added to it."""

    ops: tuple[Op, ...]
    # the last module is given the residual, and answers the new stream (BLOOM, MPT)
    adds_itself: bool = False

    @property
    def is_attention(self) -> bool:
        return any(op.is_attention for op in self.ops)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(op.module for op in self.ops if op.module)

    def run(self, holder: nn.Module, residual: Tensor, call: LayerCall) -> Tensor:
        value = residual
        for op in self.ops:
            value = op.run(holder, value, residual, call)
        return value


def run_branches(
    branches: tuple[Branch, ...], holder: nn.Module, hidden: Tensor, call: LayerCall
) -> Tensor:
    """One line of the residual stream: `hidden` plus what each branch makes of it.
    (batch, tokens, hidden).
    """
    total = hidden
    for branch in branches:
        value = branch.run(holder, hidden, call)
        if value.shape != hidden.shape:  # a layer that flattens batch and tokens
            value = value.view(hidden.shape)
        total = value if branch.adds_itself else total + value
    return total


def scaled(hidden: Tensor, scale: float) -> Tensor:
    """`hidden` times `scale`: itself where that is 1."""
    return hidden if scale == 1 else scale * hidden


def child(holder: nn.Module, path: str) -> nn.Module:
    """The module at a dotted `path` below `holder`; the short way, as it runs for every
    call of every layer.
    """
    if "." in path or not path:
        return holder.get_submodule(path)
    return holder._modules[path]  # type: ignore[return-value]


@dataclass(eq=False)
class Node:
    """A hidden state at one point of a layer, and what made it."""

    made_by: str | Callable[..., Tensor] | None = (
        None  # a child's path, a torch function, or None: the layer's input
    )
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    output: int | None = None

    @property
    def inputs(self) -> "list[Node]":
        given = (*self.positional, *self.keywords.values())
        return list(dict.fromkeys(value for value in given if isinstance(value, Node)))

    @property
    def name(self) -> str:
        """Of the torch function that made it; empty where none did."""
        return getattr(self.made_by, "__name__", "")

    @property
    def is_sum(self) -> bool:
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
    calls: dict[str, list[tuple[Arguments, Any]]] = field(
        default_factory=dict
    )  # of its children, as they ended
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
        named = {
            name: self.nodes.get(id(value), value) for name, value in kwargs.items()
        }
        return tuple(self.nodes.get(id(value), value) for value in args), named

    def note(self, tensor: Tensor, node: Node, inputs: Iterable[object] = ()) -> Tensor:
        """A new view where an operation hands its input back (dropout in eval mode), so
        that ids tell values apart.
        """
        tensor = (
            tensor.view(tensor.shape)
            if any(tensor is value for value in inputs)
            else tensor
        )
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
    """A write to the cache by a child of the layer, or by itself (None): 0 bytes a
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
        self.pairs: set[tuple[Place, Place]] = set()
        self._makers: dict[int, Place | None] = {}
        self._alive: list[Tensor] = []  # so that no id is used twice

    def note(self, made: object, place: Place | None) -> None:
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

    def source_of(self, tensor: Tensor) -> Place | None:
        return self._makers.get(id(tensor))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(held)


class Watch(TorchFunctionMode):
    """Notes the dataflow of the layers it is attached to, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[LayerTrace] = []
        self.now: LayerTrace | None = None
        self.inside: list[
            str
        ] = []  # the children of the layer that are running, outermost first
        self.sharing = Sharing()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            getattr(func, "__name__", "") == "to"
        ):  # as accelerate's hooks do: who reads it comes after
            result = self._noted(func, args, kwargs)
            self.sharing.hand_on(args[0], result)
            return result
        if self.now is not None:
            place = self.now.index, self.inside[0] if self.inside else None
            sources = map(self.sharing.source_of, tensors_in((args, kwargs)))
            read = {source for source in sources if source and source[0] != place[0]}
            self.sharing.pairs.update((source, place) for source in read)
        return self._noted(func, args, kwargs)

    def _noted(self, func: Any, args: Any, kwargs: Arguments) -> Any:
        """What `func` answers; noted where the layer itself makes it from its hidden
        states.
        """
        if self.now is None or self.inside:
            return func(*args, **kwargs)
        positional, keywords = self.now.traced(args, kwargs)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not any(
            isinstance(v, Node) for v in (*positional, *keywords.values())
        ):
            return result
        name = getattr(func, "__name__", "")
        if name in RESHAPES:
            return self.now.note(result, positional[0])
        # in place: whoever holds this tensor holds the new value
        in_place = name.startswith("__i") or (
            name.endswith("_") and not name.endswith("__")
        )
        return self.now.note(
            result, Node(func, positional, keywords), () if in_place else args
        )

    def run_layer(
        self,
        index: int,
        layer: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        arguments, hidden = called_with(layer, args, kwargs)
        self.sharing.note((hidden, arguments), None)
        own = (
            *layer.named_parameters(recurse=False),
            *layer.named_buffers(recurse=False),
        )
        numbers = {id(tensor): name for name, tensor in own if tensor.numel() == 1}
        trace = self.now = LayerTrace(
            index, layer, arguments, as_given(arguments), hidden.clone(), numbers
        )
        trace.note(hidden, Node())
        self.traces.append(trace)
        trace.answer = answer = forward(*args, **kwargs)
        for made in answer[1:] if isinstance(answer, tuple) else ():
            maker = trace.nodes.get(id(made))
            self.sharing.note(
                made,
                (
                    index,
                    maker.made_by if maker and isinstance(maker.made_by, str) else None,
                ),
            )
        trace.result = trace.nodes.get(id(first(answer)))
        self.now = None
        return answer

    def leave_child(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Arguments,
        answer: Any,
    ) -> Any:
        self.inside.pop()
        if self.now is None or self.inside:
            return answer
        mappings = [
            value
            for value in self.now.arguments.values()
            if isinstance(value, MutableMapping)
        ]
        self.sharing.note(mappings, (self.now.index, name))
        self.now.calls.setdefault(name, []).append(
            (by_name(module, args, kwargs), answer)
        )
        given = self.now.traced(args, kwargs)
        if any(write.module == name for write in self.now.cache_writes):
            self.now.attention_answer = answer
        if isinstance(answer, Tensor):
            return self.now.note(answer, Node(name, *given), (*args, *kwargs.values()))
        for position, value in enumerate(answer if isinstance(answer, tuple) else ()):
            if isinstance(value, Tensor):
                self.now.note(value, Node(name, *given, output=position))
        return answer

    def write_cache(
        self,
        write: Callable[..., Any],
        signature: inspect.Signature,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self.now:
            given = signature.bind(*args, **kwargs).arguments
            tokens = self.now.hidden.shape[0] * self.now.hidden.shape[1]
            grows = not write.__name__.endswith("_state")
            size = (
                sum(
                    value.nbytes
                    for value in given.values()
                    if isinstance(value, Tensor)
                )
                if grows
                else 0
            )
            module = self.inside[0] if self.inside else None
            self.now.cache_writes.append(
                CacheWrite(module, given["layer_idx"], size // tokens)
            )
        return write(*args, **kwargs)


def as_given(arguments: Mapping[str, object]) -> Arguments:
    """`arguments` with copies of the mappings among them, which layers write to."""
    return {
        name: copy.copy(value) if isinstance(value, MutableMapping) else value
        for name, value in arguments.items()
    }


@functools.cache
def _signature(forward: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(
        forward
    ).parameters  # which takes long enough to do it once


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's own `forward`, in order."""
    return tuple(_signature(type(module).forward))[1:]


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """The arguments of a call of `module`, by the names that its own `forward` has for
    them.
    """
    return dict(zip(parameter_names(module), args)) | kwargs


def called_with(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Arguments
) -> tuple[Arguments, Tensor]:
    """The arguments of a call of a layer by their names, and apart from them its hidden
    states, which come first.
    """
    arguments = by_name(layer, args, kwargs)
    return arguments, arguments.pop(parameter_names(layer)[0])


def first(answer: Any) -> Tensor:
    """The hidden states of what a layer answers."""
    return answer[0] if isinstance(answer, tuple) else answer


def callable_children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layer's children that are called as wholes: containers are looked into."""
    for name, module in layer.named_children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield from (
                (f"{name}.{path}", inner) for path, inner in callable_children(module)
            )
        else:
            yield name, module


@contextmanager
def watching(layers: nn.ModuleList, cache: Any) -> Iterator[Watch]:
    """Attach a watch to `layers` and to `cache` for the time of the `with`."""
    watch = Watch()
    with Undo() as undo, undo:
        for index, layer in enumerate(layers):
            fields, forward = forward_of(layer)
            undo.put(
                fields,
                forward,
                partial(watch.run_layer, index, layer, getattr(layer, forward)),
            )
            for name, module in callable_children(layer):
                for hooks in (
                    "_forward_pre_hooks",
                    "_forward_hooks",
                    "_forward_hooks_with_kwargs",
                ):
                    undo.put(module.__dict__, hooks, copy.copy(getattr(module, hooks)))
                module.register_forward_pre_hook(
                    lambda *_, name=name: watch.inside.append(name)
                )
                module.register_forward_hook(
                    partial(watch.leave_child, name), with_kwargs=True
                )
        for name in dir(
            type(cache)
        ):  # by which a layer writes keys and values, and states of fixed size
            write = getattr(cache, name) if name.startswith("update") else None
            if (
                write
                and "layer_idx" in (signature := inspect.signature(write)).parameters
            ):
                undo.put(
                    cache.__dict__, name, partial(watch.write_cache, write, signature)
                )
        with watch:
            yield watch
    for trace in watch.traces:
        written = [
            vars(cache.layers[index])
            for index in {write.layer_idx for write in trace.cache_writes}
        ]
        states = tree_leaves(
            [
                value
                for held in written
                for name, value in held.items()
                if name.endswith("_states")
            ]
        )
        trace.state_bytes = sum(
            state[0].nbytes for state in states if isinstance(state, Tensor)
        )


def forward_of(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where a module's forward is held, below an accelerate hook: another put there
    runs in its place.
    """
    return module.__dict__, (
        "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    )


def lines_of(trace: LayerTrace) -> list[tuple[Branch, ...]]:
    """The lines of the residual stream that a layer is, in order. Raises
    `UnsupportedModel` where it is none.
    """
    if trace.result is None:
        raise _unsupported(
            trace,
            "its answer does not come from its hidden states",
            "a stream of hidden states",
        )
    return _stream(trace, trace.unscaled(trace.result)[0])


def _stream(trace: LayerTrace, node: Node) -> list[tuple[Branch, ...]]:
    if node.made_by is None:
        return []
    if node.is_sum:
        leaves = list(_leaves(node))  # of parallel branches added one after the other
        for base, terms in [
            *((one, node.inputs) for one in node.inputs),
            *((one, leaves) for one in leaves),
        ]:
            stream = base
            while (
                stream.name in CASTS and len(stream.inputs) == 1
            ):  # some layers cast the stream before they add to it
                stream = stream.inputs[0]
            groups = [
                _branches(trace, term, stream) for term in terms if term is not base
            ]
            if all(groups):
                return [
                    *_stream(trace, stream),
                    tuple(branch for group in groups for branch in group),
                ]
        raise _unsupported(
            trace,
            "it adds what does not come from its residual stream",
            "h + sublayer(h)",
        )
    if len(node.inputs) != 2 or not isinstance(node.made_by, str):
        found = f"it applies {node} after its last residual addition (post-norm)"
        raise _unsupported(trace, found, "h + sublayer(h) as its last step")
    for residual, value in (
        node.inputs,
        node.inputs[::-1],
    ):  # a module that adds itself
        ops, source = _chain(trace, value, residual)
        if source is residual and ops:
            last = _op(trace, node, value, residual)
            return [
                *_stream(trace, residual),
                (Branch((*ops, last), adds_itself=True),),
            ]
    raise _unsupported(trace, f"{node} mixes two hidden states", "h + sublayer(h)")


def _leaves(node: Node) -> Iterator[Node]:
    if node.is_sum:
        for term in node.inputs:
            yield from _leaves(term)
    else:
        yield node


def _branches(trace: LayerTrace, term: Node, base: Node) -> list[Branch]:
    """The branches from `base` whose sum is `term`; empty when `term` is not such a
    sum.
    """
    if term is base:
        return []
    ops, source = _chain(trace, term, base)
    if source is base:
        return [Branch(ops)] if ops else []
    if source.is_sum and all(op.name in LINEAR for op in ops):
        groups = [_branches(trace, inner, base) for inner in source.inputs]
        if all(groups):
            return [Branch((*branch.ops, *ops)) for group in groups for branch in group]
    return []


def _chain(trace: LayerTrace, node: Node, base: Node) -> tuple[tuple[Op, ...], Node]:
    """The operations that lead to `node`, back to the first sum, two-input module or
    the layer's input.
    """
    ops: list[Op] = []
    while node is not base and node.made_by is not None and len(node.inputs) == 1:
        source = node.inputs[0]
        ops.insert(0, _op(trace, node, source, None))
        node = source
    return tuple(ops), node


def _op(trace: LayerTrace, node: Node, value: Node, residual: Node | None) -> Op:
    module = child(trace.layer, node.made_by) if isinstance(node.made_by, str) else None
    names = parameter_names(module) if module else ()

    def slot(name: str, given: object) -> Slot:
        if given is value:
            return Stream.VALUE
        is_residual = given is residual and given is not None
        return (
            Stream.RESIDUAL if is_residual else _from_outside(trace, node, name, given)
        )

    positional = tuple(
        slot(names[i] if i < len(names) else "", v)
        for i, v in enumerate(node.positional)
    )
    keywords = tuple((name, slot(name, v)) for name, v in node.keywords.items())
    assert node.made_by is not None
    if module is None:
        return Op(node.made_by, positional, keywords)
    is_attention = any(write.module == node.made_by for write in trace.cache_writes)
    forwards = type(module).forward, type(trace.layer).forward
    extras = is_attention and all(
        any(one.kind is one.VAR_KEYWORD for one in _signature(forward).values())
        for forward in forwards
    )
    return Op(node.made_by, positional, keywords, node.output, is_attention, extras)


def _from_outside(trace: LayerTrace, node: Node, name: str, given: object) -> Slot:
    """Where an argument `name` of a child's call comes from that is no hidden state."""
    declared = _signature(type(trace.layer).forward).items()
    defaults = {
        name: None if one.default is one.empty else one.default
        for name, one in declared
    }
    held = defaults | trace.arguments
    same = (
        isinstance(given, CONSTANTS)
        and name in held
        and type(given) is type(held[name])
        and given == held[name]
    )
    if same or (name in held and given is held[name]):
        return Argument(name, defaults.get(name))
    if isinstance(given, CONSTANTS):
        return given
    for other, value in trace.arguments.items():
        if value is given:
            return Argument(other, defaults.get(other))
    found = f"{node} is given {name or 'a tensor'} that the layer itself computes"
    raise _unsupported(trace, found, "the layer's own arguments")


def _unsupported(trace: LayerTrace, found: str, expected: str) -> UnsupportedModel:
    fix = "choose another model, or describe the layer in an issue"
    return UnsupportedModel(
        f"{trace}: {found}; expected {expected}. notall leaves this model alone: {fix}."
    )
