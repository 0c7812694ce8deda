"""Layers that stay in place, as they read what others make or do more than add to their
stream: stubs stand in them.

A sublayer is a module and what leads from it to its addition to the stream, and is left
out when that answers zeros. A layer without such an addition is one sublayer, which
answers what it is given when it is left out.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, cache_utils

from ..errors import UsageError
from ..plan import Kind
from .calls import Arguments, child, parameter_names
from .slicing import shallow_clone
from .traces import LayerTrace, Node

# Places of a cache that hold nothing; transformers 4 has none.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)

CutKey = str | Node  # a child module, which is called once, or one function's result


@dataclass(frozen=True)
class StubForm:
    """What a module answers when it is left out: the argument named `value`, or zeros
    of its shape and this `width`.
    """

    names: tuple[str, ...]
    value: str
    elements: (
        tuple[bool | str | None, ...] | None
    )  # of a tuple: True for that, or the argument that is handed on
    width: int | None = None

    def named(self, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
        """The arguments of a call of the module, by name."""
        return dict(zip(self.names, args)) | kwargs

    def answer(self, args: tuple[Any, ...], kwargs: Arguments, index: int) -> Any:
        """Raises `UsageError` where the cache keeps a place for what is left out, by
        which it would count tokens.
        """
        arguments = self.named(args, kwargs)
        for given in arguments.values():
            cache = getattr(given, "self_attention_cache", given)
            if not isinstance(cache, Cache):
                continue
            place = next(iter(cache.layers[index:]), None)
            if not isinstance(place, DummyLayer):
                fix = (
                    "make it inside the `with`, as DynamicCache(config=model.config),"
                    " or let the model make it"
                )
                raise UsageError(
                    f"this cache keeps a place for layer {index}, whose mixer is"
                    f" skipped; {fix}"
                )
        value: Tensor = arguments[self.value]
        if self.width is not None:
            value = value.new_zeros(*value.shape[:-1], self.width)
        if self.elements is None:
            return value
        return tuple(
            value if e is True else arguments.get(e) if isinstance(e, str) else None
            for e in self.elements
        )


@dataclass(frozen=True)
class Stub:
    """How a sublayer is left out: its modules, as they run, and what each answers then.
    "" is the whole layer.
    """

    forms: tuple[tuple[str, StubForm], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of the modules; ("",) where it is the whole layer."""
        return tuple(name for name, _ in self.forms)

    @property
    def is_layer(self) -> bool:
        """Whether the whole layer is the sublayer."""
        return self.modules == ("",)


Scale = Callable[[Tensor], Tensor]  # of what a sublayer adds


class StubModule(nn.Module):
    """Mixed into the class of a module: answers as its form says, or with a `scale`
    runs, and scales what it adds.
    """

    is_cut = True
    stub_form: StubForm
    stub_index: int
    stub_scale: Scale | None

    def forward(self, *args: object, **kwargs: object) -> object:
        """What the module answers, in its own form, where it is skipped or scaled."""
        form, scale = self.stub_form, self.stub_scale
        if scale is None:
            return form.answer(args, kwargs, self.stub_index)
        # a whole layer answers what it is given, and what it adds
        given = None if form.width else form.named(args, kwargs)[form.value].clone()
        answer = super().forward(*args, **kwargs)
        place = (form.elements or ()).index(True) if isinstance(answer, tuple) else 0
        value = answer[place] if isinstance(answer, tuple) else answer
        value = scale(value) if given is None else given + scale(value - given)
        return (
            (*answer[:place], value, *answer[place + 1 :])
            if isinstance(answer, tuple)
            else value
        )


@functools.cache
def _mixed(module_class: type[nn.Module]) -> type[StubModule]:
    """A subclass, so that whatever looks for the class of a module finds it."""
    return type(
        f"Stub{module_class.__name__}",
        (StubModule, module_class),
        {"__module__": __name__},
    )


def _stub_module(
    module: nn.Module, form: StubForm, index: int, scale: Scale | None, is_layer: bool
) -> nn.Module:
    """What stands in for `module`, with its attributes: layers ask for dtypes of
    weights, which it holds if it runs.
    """
    kind = _mixed(type(module))  # type: ignore[arg-type]
    if scale or is_layer:
        stub = shallow_clone(module, module._modules if scale else {}, kind)
    else:
        stub = object.__new__(kind)
        nn.Module.__init__(stub)
        own = {*vars(stub), "forward", "_hf_hook", "_old_forward"}
        stub.__dict__.update(
            {name: value for name, value in vars(module).items() if name not in own}
        )
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            stub.register_buffer(
                name,
                torch.empty(0, dtype=tensor.dtype, device=tensor.device),
                persistent=False,
            )
        stub.training = module.training
    stub.stub_form, stub.stub_index, stub.stub_scale = form, index, scale
    return stub


def stubbed_layer(
    layer: nn.Module, index: int, stubs: Mapping[Stub, Scale | None]
) -> nn.Module:
    """`layer` without what `stubs` hold; where one has a scale, all of it is run, and
    what it adds is scaled.
    """
    children = dict(layer.named_children())
    for stub, scale in stubs.items():
        if stub.is_layer:
            return _stub_module(layer, stub.forms[-1][1], index, scale, is_layer=True)
        for name, form in stub.forms[-1:] if scale else stub.forms:
            children[name] = _stub_module(
                children[name], form, index, scale, is_layer=False
            )
    return shallow_clone(layer, children, type(layer))


Stubs = dict[Kind, Stub]  # of the sublayers of one layer


def whole(trace: LayerTrace) -> Stubs:
    """The stub of a whole layer, which answers what it is given."""
    names = parameter_names(trace.layer)
    arguments = {names[0]: trace.hidden} | trace.arguments
    return {
        "attention": Stub(
            (("", StubForm(names, names[0], _elements(trace.answer, arguments, {0}))),)
        )
    }


def halves(trace: LayerTrace, mixers: frozenset[type]) -> Stubs | None:
    """The stubs of a mixer, of the classes `mixers`, and of the heaviest other
    addition, an MLP; None where unclear.
    """
    if trace.result is None or any(len(calls) > 1 for calls in trace.calls.values()):
        return None
    mixing = [name for name in trace.calls if type(child(trace.layer, name)) in mixers]
    writers = {write.module for write in trace.cache_writes}
    flow = Flow(trace.result)
    if len(mixing) != 1 or writers - {*mixing} or mixing[0] not in flow.readers:
        return None
    (mixer,) = mixing
    if (end := flow.end(mixer, mixer)) is None:
        return None
    modules = [name for name in trace.calls if name in flow.readers]
    own = [name for name in modules if flow.end(name, mixer) == end]
    others: dict[str, list[str]] = {}

    def weights(names: list[str]) -> int:
        return sum(
            weight.numel()
            for name in names
            for weight in child(trace.layer, name).parameters()
        )

    for name in modules:
        if (
            name not in own
            and (last := flow.end(name, mixer, through=True))
            and last != end
        ):
            others.setdefault(last, []).append(name)
    largest = max(others.values(), key=weights, default=None)
    parts: dict[Kind, list[str]] = {
        "attention": own,
        **({"mlp": largest} if largest else {}),
    }
    stubs = {
        kind: stub
        for kind, names in parts.items()
        if (stub := _stub(trace, flow, names))
    }
    return stubs if len(stubs) == len(parts) else None


def _stub(trace: LayerTrace, flow: "Flow", names: list[str]) -> Stub | None:
    forms = []
    for name in names:
        ((arguments, answer),) = trace.calls[name]
        used = {node.output or 0 for node in flow.nodes[name]}
        value = next(
            (n for n, given in arguments.items() if isinstance(given, Tensor)), None
        )
        if value is None or "." in name:
            return None
        elements = _elements(answer, arguments, used)
        added = answer if isinstance(answer, Tensor) else answer[min(used)]
        width = added.shape[-1] if name == names[-1] else None
        forms.append(
            (
                name,
                StubForm(
                    parameter_names(child(trace.layer, name)), value, elements, width
                ),
            )
        )
    return Stub(tuple(forms))


def _elements(
    answer: Any, arguments: Arguments, used: set[int]
) -> tuple[bool | str | None, ...] | None:
    if not isinstance(answer, tuple):
        return None
    named = {
        id(value): name
        for name, value in arguments.items()
        if isinstance(value, Tensor)
    }
    return tuple(
        True if place in used else named.get(id(element))
        for place, element in enumerate(answer)
    )


class Flow:
    """The calls and functions that a layer's answer comes from, by what reads what."""

    def __init__(self, result: Node) -> None:
        self.reads: dict[CutKey, list[CutKey]] = {}
        self.readers: dict[CutKey, list[CutKey]] = {}
        self.nodes: dict[CutKey, list[Node]] = {}
        waiting, seen = [result], {result}
        while waiting:
            node = waiting.pop()
            reader = _key(node)
            self.nodes.setdefault(reader, []).append(node)
            reads = self.reads.setdefault(reader, [])
            self.readers.setdefault(reader, [])
            for given in node.inputs:
                if _key(given) not in reads:
                    reads.append(_key(given))
                    self.readers.setdefault(_key(given), []).append(reader)
                if given not in seen:
                    seen.add(given)
                    waiting.append(given)

    def above(self, key: CutKey) -> set[CutKey]:
        """What `key` comes from."""
        found: set[CutKey] = set()
        waiting = [*self.reads[key]]
        while waiting:
            if (here := waiting.pop()) not in found:
                found.add(here)
                waiting += self.reads[here]
        return found

    def end(self, start: str, mixer: str, through: bool = False) -> str | None:
        """The last module from `start` to where it is added to its stream, if any;
        `through`: past where ways meet.
        """
        above, last = self.above(start), start
        here: CutKey = start
        while len(following := self.readers[here]) == 1:
            reader = following[0]
            others = [key for key in self.reads[reader] if key != here]
            carried = any(self._carries(key, above, mixer) for key in others)
            if carried or (others and not through):
                return last if carried else None
            here = reader
            last = reader if isinstance(reader, str) else last
        return None

    def _carries(self, key: CutKey, above: set[CutKey], mixer: str) -> bool:
        """Whether `key` is the stream that is added to, scaled or not, or comes from a
        mixer beside it.
        """
        if key in above or key == mixer:
            return True
        if mixer not in above and mixer in self.above(key):
            return True
        return not isinstance(key, str) and any(
            self._carries(given, above, mixer) for given in self.reads[key]
        )


def _key(node: Node) -> CutKey:
    return node.made_by if isinstance(node.made_by, str) else node
