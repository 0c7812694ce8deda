"""Layers that stay in place: in each a sublayer is left out by stubs, and all else runs as the model has it.

Where layers read what others make, are given an input of their own, or do more to their stream than add to it, none
can be moved or taken apart. There a sublayer is what adds to the stream: a module and what leads to the addition. It is
left out when that answers zeros. A layer in which no such addition is found is one sublayer, which answers what it is
given when it is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from ..errors import UsageError
from .observation import Arguments, LayerTrace, Node, child, first, hidden_name, parameter_names
from .slicing import shallow_clone

try:  # places of a cache that hold nothing
    from transformers.cache_utils import DummyLayer
except ImportError:  # transformers 4
    DummyLayer = None

Key = str | Node  # a child module, which is called once, or one function's result


# --- what a stub is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """What a module answers when it is left out: its value, and arguments that it only hands on.

    `value` names the argument that goes on. `elements` are of a tuple: True for the value, the name of an argument, or
    None; a module without them answers a tensor. `width` is that of the zeros that it answers, None where it answers
    its value.
    """

    names: tuple[str, ...]
    value: str
    elements: tuple[bool | str | None, ...] | None
    width: int | None = None

    def answer(self, args: tuple[Any, ...], kwargs: Arguments, index: int) -> Any:
        """Raises `UsageError` where the cache keeps a place for what is left out, by which it would count tokens."""
        arguments = dict(zip(self.names, args)) | kwargs
        _check_place(arguments, index)
        value: Tensor = arguments[self.value]
        if self.width is not None:
            value = value.new_zeros(*value.shape[:-1], self.width)
        return self.around(value, arguments)

    def around(self, value: Tensor, arguments: Arguments) -> Any:
        if self.elements is None:
            return value
        return tuple(value if e is True else arguments.get(e) if isinstance(e, str) else None for e in self.elements)


def _check_place(arguments: Arguments, index: int) -> None:
    for given in arguments.values():
        cache = getattr(given, "self_attention_cache", given)
        if isinstance(cache, Cache) and not (len(cache.layers) > index and isinstance(cache.layers[index], DummyLayer)):
            raise UsageError(
                f"this cache keeps a place for layer {index}, whose mixer is skipped; make it inside the `with`, as "
                "DynamicCache(config=model.config), or let the model make it"
            )


@dataclass(frozen=True)
class Stub:
    """How a sublayer is left out: its modules, as they run, and what each answers then; the last one ends it.

    The module "" is the whole layer.
    """

    forms: tuple[tuple[str, Form], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.forms)

    @property
    def end(self) -> tuple[str, Form]:
        return self.forms[-1]

    @property
    def is_layer(self) -> bool:
        return self.modules == ("",)


class StubModule(nn.Module):
    """Mixed into the class of a module: answers as its form says, and holds no weights."""

    is_cut = True
    form: Form
    index: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form.answer(args, kwargs, self.index)


def _stub_module(module: nn.Module, form: Form, index: int) -> nn.Module:
    """A stub for `module`, with its attributes: layers ask for dtypes of weights."""
    stub: Any = object.__new__(_mixed(StubModule, type(module)))  # type: ignore[arg-type]
    nn.Module.__init__(stub)
    own = {*vars(stub), "forward", "_hf_hook", "_old_forward"}
    stub.__dict__.update({name: value for name, value in vars(module).items() if name not in own})
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        stub.register_buffer(name, torch.empty(0, dtype=tensor.dtype, device=tensor.device), persistent=False)
    stub.training, stub.form, stub.index = module.training, form, index
    return cast(nn.Module, stub)


Scale = Callable[[Tensor], Tensor]  # of what a sublayer adds


class Scaled(nn.Module):
    """Runs the last module of a sublayer, and scales what it adds."""

    is_cut = True

    def __init__(self, module: nn.Module, form: Form, scale: Scale) -> None:
        super().__init__()
        self.module, self.form, self.scale = module, form, scale
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.module(*args, **kwargs)
        if not isinstance(answer, tuple):
            return self.scale(answer)
        place = (self.form.elements or ()).index(True)
        return (*answer[:place], self.scale(answer[place]), *answer[place + 1 :])


class StubLayer(nn.Module):
    """Mixed into the class of a layer: answers the hidden states that it is given, and what it adds, scaled.

    Without a `scale` it does not run.
    """

    is_cut = True
    form: Form
    index: int
    scale: Scale | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        form: Form = self.form
        if self.scale is None:
            return form.answer(args, kwargs, self.index)
        arguments = dict(zip(form.names, args)) | kwargs
        given = arguments[form.value].clone()
        answer = super().forward(*args, **kwargs)
        scaled = given + self.scale(first(answer) - given)
        return (scaled, *answer[1:]) if isinstance(answer, tuple) else scaled


@functools.cache
def _mixed(mixin: type, module_class: type) -> type:
    """A subclass, so that whatever looks for the class of a module finds it."""
    return type(f"{mixin.__name__}{module_class.__name__}", (mixin, module_class), {"__module__": __name__})


def stubbed_layer(
    layer: nn.Module, index: int, stubs: Iterable[Stub] = (), scaled: Mapping[Stub, Scale] | None = None
) -> nn.Module:
    """`layer` without what `stubs` hold; of what `scaled` holds all is run, and what it adds is scaled."""
    children = dict(layer.named_children())
    for stub, scale in [*((stub, None) for stub in stubs), *(scaled or {}).items()]:
        name, form = stub.end
        if stub.is_layer:
            held = children if scale else {}
            empty = shallow_clone(layer, held, _mixed(StubLayer, type(layer)))  # type: ignore[arg-type]
            empty.form, empty.index, empty.scale = form, index, scale  # type: ignore[assignment]
            return empty
        if scale:
            children[name] = Scaled(children[name], form, scale)
        else:
            children |= {name: _stub_module(children[name], form, index) for name, form in stub.forms}
    return shallow_clone(layer, children, type(layer))


# --- reading a layer --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halves:
    """What a layer is made of: its mixer, and its MLP, if it has one."""

    mixer: Stub
    mlp: Stub | None


def whole(trace: LayerTrace) -> Stub:
    """The stub of a whole layer, which answers what it is given."""
    names = parameter_names(trace.layer)
    arguments = {hidden_name(trace.layer): trace.hidden} | trace.arguments
    return Stub((("", Form(tuple(names), names[0], _elements(trace.answer, arguments, {0}))),))


def halves(trace: LayerTrace, mixers: frozenset[type]) -> Halves | None:
    """The sublayers of a layer, or None where they are not to be told apart. `mixers` are the classes of mixers.

    The MLP is the one of most weights of all other additions to the stream: the layer's input of its own, say, and
    what else belongs to the layer alone, is none.
    """
    if trace.result is None or any(len(calls) > 1 for calls in trace.calls.values()):
        return None
    mixing = [name for name in trace.calls if type(child(trace.layer, name)) in mixers]
    writers = {write.module for write in trace.cache_writes}
    flow = Flow(trace.result)
    if len(mixing) != 1 or writers - {*mixing} or not {*mixing} <= flow.readers.keys():
        return None
    (mixer,) = mixing
    end = flow.end(mixer, mixer)
    if end is None:
        return None
    modules = [name for name in trace.calls if name in flow.readers]
    own = [name for name in modules if flow.end(name, mixer) == end]
    others: dict[str, list[str]] = {}
    for name in modules:
        if name not in own and (last := flow.end(name, mixer, through=True)) and last != end:
            others.setdefault(last, []).append(name)
    largest = max(others.values(), key=lambda names: _weights(trace, names), default=None)
    attention, mlp = _stub(trace, flow, own), _stub(trace, flow, largest) if largest else None
    return Halves(attention, mlp) if attention and (mlp or not largest) else None


def _weights(trace: LayerTrace, names: list[str]) -> int:
    return sum(weight.numel() for name in names for weight in child(trace.layer, name).parameters())


def _stub(trace: LayerTrace, flow: Flow, names: list[str]) -> Stub | None:
    forms = []
    for name in names:
        (call,) = trace.calls[name]
        used = {node.output or 0 for node in flow.nodes[name]}
        value = next((n for n, given in call.arguments.items() if isinstance(given, Tensor)), None)
        if value is None or "." in name:
            return None
        elements = _elements(call.answer, call.arguments, used)
        answer = call.answer if isinstance(call.answer, Tensor) else call.answer[min(used)]
        width = answer.shape[-1] if name == names[-1] else None
        forms.append((name, Form(tuple(parameter_names(child(trace.layer, name))), value, elements, width)))
    return Stub(tuple(forms))


def _elements(answer: Any, arguments: Arguments, used: set[int]) -> tuple[bool | str | None, ...] | None:
    if not isinstance(answer, tuple):
        return None
    named = {id(value): name for name, value in arguments.items() if isinstance(value, Tensor)}
    return tuple(True if place in used else named.get(id(element)) for place, element in enumerate(answer))


class Flow:
    """The calls and functions that a layer's answer comes from, by what reads what."""

    def __init__(self, result: Node) -> None:
        self.reads: dict[Key, list[Key]] = {}
        self.readers: dict[Key, list[Key]] = {}
        self.nodes: dict[Key, list[Node]] = {}
        waiting, seen = [result], {result}
        while waiting:
            node = waiting.pop()
            self.nodes.setdefault(_key(node), []).append(node)
            self.readers.setdefault(_key(node), [])
            for given in node.inputs:
                self._join(_key(given), _key(node))
                if given not in seen:
                    seen.add(given)
                    waiting.append(given)

    def _join(self, given: Key, reader: Key) -> None:
        if reader not in self.readers.setdefault(given, []):
            self.readers[given].append(reader)
        if given not in self.reads.setdefault(reader, []):
            self.reads[reader].append(given)

    def above(self, key: Key) -> set[Key]:
        """What `key` comes from."""
        found: set[Key] = set()
        waiting = list(self.reads.get(key, []))
        while waiting:
            if (here := waiting.pop()) not in found:
                found.add(here)
                waiting.extend(self.reads.get(here, []))
        return found

    def end(self, start: str, mixer: str, through: bool = False) -> str | None:
        """The last module on the way from `start` to where it is added to its stream; None where it never is.

        `through`: the way leads on where several modules' answers come together before they are added.
        """
        above, last = self.above(start), start
        here: Key = start
        while len(following := self.readers[here]) == 1:
            reader = following[0]
            others = [key for key in self.reads[reader] if key != here]
            if any(not through or self._carries(key, above, mixer) for key in others):
                return last if any(self._carries(key, above, mixer) for key in others) else None
            here = reader
            last = reader if isinstance(reader, str) else last
        return None

    def _carries(self, key: Key, above: set[Key], mixer: str) -> bool:
        """Whether `key` is the stream that is added to, scaled or not, or comes from a mixer beside it."""
        if key in above or key == mixer:
            return True
        if mixer not in above and mixer in self.above(key):
            return True
        return not isinstance(key, str) and any(self._carries(given, above, mixer) for given in self.reads.get(key, []))


def _key(node: Node) -> Key:
    return node.made_by if isinstance(node.made_by, str) else node
