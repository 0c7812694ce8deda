"""Watch one forward pass and write down what each decoder layer does with its hidden states.

A layer's child modules are taken as wholes; between them, every torch function that touches a hidden state is noted.
What comes out is the layer's dataflow, read from what it really did, whatever its attributes are called. Each layer
must read as

    h = h + ops(h)          one branch,  or
    h = h + ops(h) + ...    several branches of the same h (a parallel block)

and that is what `lines_of` returns, or it raises `UnsupportedModel` with the reason. In the end it may multiply h by
one number of its own (`scale_of`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedModel
from .sharing import Sharing

Arguments = dict[str, Any]  # of a call, by their names
PROBE_BATCH, PROBE_TOKENS = 2, 4  # 8 tokens, one of them padding, so that masks are real tensors

ADDITIONS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
# Same numbers in another shape: what a layer's children compute does not depend on it.
RESHAPES = {"view", "reshape", "contiguous", "flatten", "view_as", "clone", "detach"}
CASTS = {"to", "float", "type_as"}
MULTIPLICATIONS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
# f(a + b) = f(a) + f(b), so a sum of branches may be scaled as a whole.
LINEAR = {*MULTIPLICATIONS, "div", "__truediv__", "dropout"}
CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


# --- what a branch is made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """The branch's running value, (batch, tokens, hidden)."""


@dataclass(frozen=True)
class Residual:
    """The residual stream as the branch found it, (batch, tokens, hidden)."""


@dataclass(frozen=True)
class Argument:
    """An argument of the layer's own call, under the layer's name for it."""

    name: str
    default: Any = None


@dataclass(frozen=True)
class Constant:
    value: Any


Slot = Value | Residual | Argument | Constant


@dataclass
class LayerCall:
    """What a layer was called with, by name, while its branches run; `attention` keeps the attention's whole answer."""

    arguments: Arguments
    extras: Arguments = field(default_factory=dict)
    attention: Any = None


def _fill(slot: Slot, value: Tensor, residual: Tensor, call: LayerCall) -> Any:
    if type(slot) is Value:
        return value
    if type(slot) is Argument:
        return call.arguments.get(slot.name, slot.default)
    return residual if type(slot) is Residual else slot.value  # type: ignore[union-attr]


@dataclass(frozen=True)
class ModuleOp:
    """One call of a child module of the layer, with its arguments traced to where they come from."""

    module: str
    positional: tuple[Slot, ...]
    keywords: tuple[tuple[str, Slot], ...]
    output: int | None  # which element of the answer goes on; None when the answer is a tensor
    is_attention: bool = False
    takes_extras: bool = False

    def run(self, holder: nn.Module, value: Tensor, residual: Tensor, call: LayerCall) -> Tensor:
        positional = [_fill(slot, value, residual, call) for slot in self.positional]
        keywords = {name: _fill(slot, value, residual, call) for name, slot in self.keywords}
        if self.takes_extras:
            keywords.update(call.extras)
        answer = child(holder, self.module)(*positional, **keywords)
        if self.is_attention:
            call.attention = answer
        return answer if self.output is None else answer[self.output]


@dataclass(frozen=True)
class FunctionOp:
    """One torch function with constant arguments, such as a residual multiplier."""

    function: Callable[..., Tensor]
    positional: tuple[Slot, ...]
    keywords: tuple[tuple[str, Slot], ...]

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", "")

    def run(self, holder: nn.Module, value: Tensor, residual: Tensor, call: LayerCall) -> Tensor:
        positional = [_fill(slot, value, residual, call) for slot in self.positional]
        keywords = {name: _fill(slot, value, residual, call) for name, slot in self.keywords}
        if self.name == "dropout":  # seen in eval mode, wanted as the layer's mode has it
            keywords["training"] = holder.training
        return self.function(*positional, **keywords)


Op = ModuleOp | FunctionOp


@dataclass(frozen=True)
class Branch:
    """Operations from the residual stream to what is added to it.

    `adds_itself` marks a last module that is given the residual and adds it (BLOOM, MPT): its answer is the new stream.
    """

    ops: tuple[Op, ...]
    adds_itself: bool = False

    @property
    def is_attention(self) -> bool:
        return any(isinstance(op, ModuleOp) and op.is_attention for op in self.ops)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(op.module for op in self.ops if isinstance(op, ModuleOp))

    def run(self, holder: nn.Module, residual: Tensor, call: LayerCall) -> Tensor:
        value = residual
        for op in self.ops:
            value = op.run(holder, value, residual, call)
        return value


def run_branches(branches: tuple[Branch, ...], holder: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """One line of the residual stream: `hidden` plus what each branch makes of it. (batch, tokens, hidden)."""
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
    """The module at a dotted `path` below `holder`; the short way, as it runs for every call of every layer."""
    if "." in path or not path:
        return holder.get_submodule(path)
    return holder._modules[path]  # type: ignore[return-value]


# --- watching ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A hidden state at one point of a layer, and what made it."""

    made_by: str | Callable[..., Any] | None = None  # a child's path, a torch function, or None: the layer's input
    positional: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    output: int | None = None

    @property
    def inputs(self) -> list[Node]:
        found: list[Node] = []
        for value in (*self.positional, *self.keywords.values()):
            if isinstance(value, Node) and value not in found:
                found.append(value)
        return found

    @property
    def is_sum(self) -> bool:
        return getattr(self.made_by, "__name__", "") in ADDITIONS and len(self.inputs) == 2

    def __str__(self) -> str:
        return self.made_by if isinstance(self.made_by, str) else getattr(self.made_by, "__name__", "its input")


@dataclass(frozen=True)
class ChildCall:
    """One call of a child module: its arguments by their names, and its answer."""

    arguments: Arguments
    answer: Any


@dataclass
class LayerTrace:
    """One layer's call, as it happened. `state_bytes` is what its states of fixed size take, one sequence.

    `arguments` are by the layer's parameter names, without the hidden states. `given` are the same, with what mappings
    held when the layer was called. `calls` are those of its children, in the order in which they ended. `numbers` are
    the paths of its tensors of one element, by their ids.
    """

    index: int
    layer: nn.Module
    arguments: Arguments
    given: Arguments
    hidden: Tensor  # (batch, tokens, hidden), as it went in
    numbers: dict[int, str]
    answer: Any = None
    result: Node | None = None
    nodes: dict[int, Node] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # so that no id is used twice
    cache_writes: list[CacheWrite] = field(default_factory=list)
    calls: dict[str, list[ChildCall]] = field(default_factory=dict)
    state_bytes: int = 0
    attention_answer: Any = None


@dataclass(frozen=True)
class CacheWrite:
    """A write to the cache by a child of the layer, or by the layer itself (None).

    `bytes_per_token` is 0 where a state of fixed size was written.
    """

    module: str | None
    layer_idx: int
    bytes_per_token: int


class Watch(TorchFunctionMode):
    """Notes the dataflow of the layers it is attached to, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[LayerTrace] = []
        self.now: LayerTrace | None = None
        self.inside: list[str] = []  # the children of the layer that are running, outermost first
        self.sharing = Sharing()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.now is None:
            return func(*args, **kwargs)
        self.sharing.read((self.now.index, self.inside[0] if self.inside else None), (args, kwargs))
        if self.inside:
            return func(*args, **kwargs)
        positional, keywords = self._traced(args), {k: self._traced([v])[0] for k, v in kwargs.items()}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not any(isinstance(v, Node) for v in (*positional, *keywords.values())):
            return result
        name = getattr(func, "__name__", "")
        if name in RESHAPES:
            return self._note(result, positional[0])
        node = Node(func, tuple(positional), keywords)
        if name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
            return self._note(result, node)  # in place: whoever holds this tensor holds the new value
        return self._note(self._fresh(result, args), node)

    def _traced(self, values: Any) -> list[Any]:
        assert self.now is not None
        nodes = self.now.nodes
        return [nodes.get(id(v), v) if isinstance(v, Tensor) else v for v in values]

    def _note(self, tensor: Tensor, node: Node) -> Tensor:
        assert self.now is not None
        self.now.nodes[id(tensor)] = node
        self.now.kept.append(tensor)
        return tensor

    @staticmethod
    def _fresh(result: Tensor, inputs: Any) -> Tensor:
        """A new view where an operation hands its input back (dropout in eval mode), so that ids tell values apart."""
        return result.view(result.shape) if any(result is v for v in inputs) else result

    def enter_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        arguments = dict(zip(parameter_names(layer), args)) | kwargs
        hidden = arguments.pop(hidden_name(layer))
        self.sharing.know((hidden, arguments))
        self.now = LayerTrace(index, layer, arguments, as_given(arguments), hidden.clone(), _numbers_of(layer))
        self._note(hidden, Node())
        self.traces.append(self.now)

    def leave_layer(self, answer: Any) -> None:
        assert self.now is not None
        self.now.answer = answer
        hidden = answer[0] if isinstance(answer, tuple) else answer
        for made in answer[1:] if isinstance(answer, tuple) else ():
            maker = self.now.nodes.get(id(made))
            module = maker.made_by if maker and isinstance(maker.made_by, str) else None
            self.sharing.share((self.now.index, module), made)
        self.now.result = self.now.nodes.get(id(hidden))
        self.now = None

    def enter_child(self, name: str) -> None:
        self.inside.append(name)

    def leave_child(self, name: str, args: Any, kwargs: Any, answer: Any) -> Any:
        self.inside.pop()
        if self.now is None or self.inside:
            return answer
        self.sharing.share((self.now.index, name), list(_mappings(self.now.arguments)))
        names = parameter_names(child(self.now.layer, name))
        self.now.calls.setdefault(name, []).append(ChildCall(dict(zip(names, args)) | kwargs, answer))
        given = tuple(self._traced(args)), {k: self._traced([v])[0] for k, v in kwargs.items()}
        inputs = (*args, *kwargs.values())
        if any(write.module == name for write in self.now.cache_writes):
            self.now.attention_answer = answer
        if isinstance(answer, Tensor):
            return self._note(self._fresh(answer, inputs), Node(name, *given))
        for position, value in enumerate(answer if isinstance(answer, tuple) else ()):
            if isinstance(value, Tensor):
                self._note(value, Node(name, *given, output=position))
        return answer

    def wrote_cache(self, method: str, written: Iterable[Any], layer_idx: int) -> None:
        if self.now is None:
            return
        tokens = self.now.hidden.shape[0] * self.now.hidden.shape[1]
        size = sum(value.numel() * value.element_size() for value in written if isinstance(value, Tensor))
        module = self.inside[0] if self.inside else None
        grows = not method.endswith("_state")
        self.now.cache_writes.append(CacheWrite(module, layer_idx, size // tokens if grows else 0))


def _numbers_of(layer: nn.Module) -> dict[int, str]:
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return {id(tensor): name for name, tensor in own if tensor.numel() == 1}


def as_given(arguments: Mapping[str, Any]) -> Arguments:
    """`arguments` with copies of the mappings among them, which layers write to."""
    return {name: copy.copy(value) if isinstance(value, MutableMapping) else value for name, value in arguments.items()}


def _mappings(arguments: Mapping[str, Any]) -> Iterator[Any]:
    return (value for value in arguments.values() if isinstance(value, MutableMapping))


@functools.cache
def _parameters(module_class: type) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module class's own `forward`; reading a signature takes long enough to do it once."""
    return inspect.signature(module_class.forward).parameters  # type: ignore[attr-defined]


def parameter_names(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's own `forward`, in order."""
    return list(_parameters(type(module)))[1:]  # type: ignore[arg-type]


def hidden_name(module: nn.Module) -> str:
    """A layer's name for the hidden states: its first argument."""
    return parameter_names(module)[0]


def callable_children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layer's children that are called as wholes: containers are looked into."""
    for name, module in layer.named_children():
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{path}", inner) for path, inner in callable_children(module))
        else:
            yield name, module


@contextmanager
def watching(layers: nn.ModuleList, cache: Any) -> Iterator[Watch]:
    """Attach a watch to `layers` and to `cache` for the time of the `with`."""
    watch = Watch()
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            _attach(watch, index, layer, undo)
        for method in _writes(type(cache)):
            setattr(cache, method, _watched_write(watch, method, getattr(cache, method)))
            undo.callback(cache.__dict__.pop, method, None)
        undo.enter_context(watch)
        yield watch
    for trace in watch.traces:
        trace.state_bytes = sum(_state_bytes(cache, index) for index in {w.layer_idx for w in trace.cache_writes})


def _writes(cache_class: type) -> list[str]:
    """The methods by which a layer writes to its place in a cache: keys and values, and states of fixed size."""
    updates = [name for name in dir(cache_class) if name.startswith("update")]
    return [name for name in updates if "layer_idx" in inspect.signature(getattr(cache_class, name)).parameters]


def _watched_write(watch: Watch, method: str, write: Callable[..., Any]) -> Callable[..., Any]:
    parameters = inspect.signature(write)

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs).arguments
        watch.wrote_cache(method, given.values(), given["layer_idx"])
        return write(*args, **kwargs)

    return watched


def _state_bytes(cache: Any, layer_idx: int) -> int:
    """What the states of fixed size that a layer left in the cache take, for one sequence."""
    held = vars(cache.layers[layer_idx])
    states = tree_leaves([value for name, value in held.items() if name.endswith("_states")])
    return sum(state[0].numel() * state.element_size() for state in states if isinstance(state, Tensor))


def _attach(watch: Watch, index: int, layer: nn.Module, undo: ExitStack) -> None:
    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.enter_layer(index, layer, args, kwargs)
        answer = forward(*args, **kwargs)
        watch.leave_layer(answer)
        return answer

    forward = getattr(layer, _forward_name(layer))
    undo.enter_context(forward_replaced(layer, watched))
    for name, module in callable_children(layer):

        def before_child(_: nn.Module, args: Any, name: str = name) -> None:
            watch.enter_child(name)

        def after_child(_: nn.Module, args: Any, kwargs: Any, answer: Any, name: str = name) -> Any:
            return watch.leave_child(name, args, kwargs, answer)

        undo.callback(module.register_forward_pre_hook(before_child).remove)
        undo.callback(module.register_forward_hook(after_child, with_kwargs=True).remove)


def first(answer: Any) -> Tensor:
    """The hidden states of what a layer answers."""
    return answer[0] if isinstance(answer, tuple) else answer


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have `forward` run in place of the module's own, for the time of the `with`.

    Below an accelerate hook, which moves what the module is given to its own device.
    """
    name = _forward_name(module)
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def _forward_name(module: nn.Module) -> str:
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


# --- reading what was watched -----------------------------------------------------------------------------------------


def lines_of(trace: LayerTrace) -> list[tuple[Branch, ...]]:
    """The lines of the residual stream that a watched layer is made of, in order.

    Raises `UnsupportedModel` when the layer is not a residual stream of sublayers.
    """
    if trace.result is None:
        raise _unsupported(trace, "its answer does not come from its hidden states", "a stream of hidden states")
    return _stream(trace, _unscaled(trace, trace.result)[0])


def scale_of(trace: LayerTrace) -> str | None:
    """The name of the layer's own number that it multiplies its stream by in the end; None where it does not."""
    return _unscaled(trace, trace.result)[1] if trace.result else None


def _unscaled(trace: LayerTrace, node: Node) -> tuple[Node, str | None]:
    """A node before it was multiplied by a number of the layer's, and the name of that."""
    if getattr(node.made_by, "__name__", "") in MULTIPLICATIONS and len(node.inputs) == 1:
        for given in (*node.positional, *node.keywords.values()):
            if id(given) in trace.numbers:
                return node.inputs[0], trace.numbers[id(given)]
    return node, None


def _stream(trace: LayerTrace, node: Node) -> list[tuple[Branch, ...]]:
    if node.made_by is None:
        return []
    if node.is_sum:
        return _sum(trace, node)
    if len(node.inputs) == 2 and isinstance(node.made_by, str):
        return _self_adding(trace, node)
    raise _unsupported(
        trace, f"it applies {node} after its last residual addition (post-norm)", "h + sublayer(h) as its last step"
    )


def _sum(trace: LayerTrace, node: Node) -> list[tuple[Branch, ...]]:
    left, right = node.inputs
    for base, term in ((_uncast(left), right), (_uncast(right), left)):
        branches = _branches(trace, term, base)
        if branches:
            return [*_stream(trace, base), tuple(branches)]
    leaves = list(_leaves(node))
    for base in leaves:  # parallel branches added one after the other
        groups = [_branches(trace, leaf, base) for leaf in leaves if leaf is not base]
        if all(groups):
            return [*_stream(trace, base), tuple(branch for group in groups for branch in group)]
    raise _unsupported(trace, "it adds what does not come from its residual stream", "h + sublayer(h)")


def _uncast(node: Node) -> Node:
    """What was cast to another dtype, as some layers do with the residual stream before they add to it."""
    while getattr(node.made_by, "__name__", "") in CASTS and len(node.inputs) == 1:
        node = node.inputs[0]
    return node


def _leaves(node: Node) -> Iterator[Node]:
    if node.is_sum:
        for term in node.inputs:
            yield from _leaves(term)
    else:
        yield node


def _branches(trace: LayerTrace, term: Node, base: Node) -> list[Branch]:
    """The branches from `base` whose sum is `term`; empty when `term` is not such a sum."""
    if term is base:
        return []
    ops, source = _chain(trace, term, base)
    if source is base:
        return [Branch(ops)] if ops else []
    linear = all(isinstance(op, FunctionOp) and op.name in LINEAR for op in ops)
    if source.is_sum and linear:
        groups = [_branches(trace, inner, base) for inner in source.inputs]
        if all(groups):
            return [Branch((*branch.ops, *ops)) for group in groups for branch in group]
    return []


def _chain(trace: LayerTrace, node: Node, base: Node) -> tuple[tuple[Op, ...], Node]:
    """The operations that lead to `node`, back to the first sum, two-input module or the layer's input."""
    ops: list[Op] = []
    while node is not base and node.made_by is not None and len(node.inputs) == 1:
        source = node.inputs[0]
        ops.insert(0, _op(trace, node, source, None))
        node = source
    return tuple(ops), node


def _self_adding(trace: LayerTrace, node: Node) -> list[tuple[Branch, ...]]:
    for residual, value in (node.inputs, node.inputs[::-1]):
        ops, source = _chain(trace, value, residual)
        if source is residual and ops:
            last = _op(trace, node, value, residual)
            return [*_stream(trace, residual), (Branch((*ops, last), adds_itself=True),)]
    raise _unsupported(trace, f"{node} mixes two hidden states", "h + sublayer(h)")


def _op(trace: LayerTrace, node: Node, value: Node, residual: Node | None) -> Op:
    slot = _Slots(trace, node, value, residual)
    if isinstance(node.made_by, str):
        module = child(trace.layer, node.made_by)
        names = parameter_names(module)
        is_attention = any(write.module == node.made_by for write in trace.cache_writes)
        return ModuleOp(
            node.made_by,
            tuple(slot(names[i] if i < len(names) else "", v) for i, v in enumerate(node.positional)),
            tuple((name, slot(name, v)) for name, v in node.keywords.items()),
            node.output,
            is_attention,
            takes_extras=is_attention and _has_keywords(module) and _has_keywords(trace.layer),
        )
    assert callable(node.made_by)
    return FunctionOp(
        node.made_by,
        tuple(slot("", v) for v in node.positional),
        tuple((name, slot(name, v)) for name, v in node.keywords.items()),
    )


class _Slots:
    """Traces an argument of a child's call to where it comes from."""

    def __init__(self, trace: LayerTrace, node: Node, value: Node, residual: Node | None) -> None:
        self.trace, self.node, self.value, self.residual = trace, node, value, residual
        self.defaults = {
            name: parameter.default if parameter.default is not parameter.empty else None
            for name, parameter in _parameters(type(trace.layer)).items()  # type: ignore[arg-type]
        }

    def __call__(self, name: str, given: Any) -> Slot:
        if given is self.value:
            return Value()
        if given is self.residual and given is not None:
            return Residual()
        arguments = self.trace.arguments
        if name in self.defaults and _same(given, arguments.get(name, self.defaults[name])):
            return Argument(name, self.defaults[name])
        for other, held in arguments.items():
            if held is given and not isinstance(given, CONSTANTS):
                return Argument(other, self.defaults.get(other))
        if name in arguments and _same(given, arguments[name]):
            return Argument(name)
        if isinstance(given, CONSTANTS):
            return Constant(given)
        found = f"{self.node} is given {name or 'a tensor'} that the layer itself computes"
        raise _unsupported(self.trace, found, "the layer's own arguments")


def _same(given: Any, held: Any) -> bool:
    return given is held or (isinstance(given, CONSTANTS) and type(given) is type(held) and given == held)


def _has_keywords(module: nn.Module) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(type(module)).values())  # type: ignore[arg-type]


def _unsupported(trace: LayerTrace, found: str, expected: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"layer {trace.index} ({type(trace.layer).__name__}): {found}; expected {expected}. "
        "notall leaves this model alone: choose another model, or describe the layer in an issue."
    )
