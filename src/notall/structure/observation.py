"""Watch one forward pass and write down what each decoder layer does with its hidden
states.

A layer's child modules are taken as wholes; between them, every torch function that
touches a hidden state is noted. `lines_of` reads each layer as lines h = h + ops(h), or
h = h + ops(h) + ... in a parallel block; in the end it may multiply h by one number of
its own (`LayerTrace.unscaled`).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .branches import Branch as Branch  # by its public path
from .calls import (
    Arguments,
    as_given,
    by_name,
    callable_children,
    called_with,
    first,
    forward_of,
    tensors_in,
)
from .traces import CacheWrite, LayerTrace, Node, Sharing
from .undoing import Undo

# 8 tokens, one of them padding, so that masks are real tensors.
PROBE_BATCH, PROBE_TOKENS = 2, 4
# Same numbers in another shape: what a layer's children compute does not depend on it.
RESHAPES = {"view", "reshape", "contiguous", "flatten", "view_as", "clone", "detach"}


class Watch(TorchFunctionMode):
    """Notes the dataflow of the layers it is attached to, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.traces: list[LayerTrace] = []
        self.now: LayerTrace | None = None
        # the children of the layer that are running, outermost first
        self.inside: list[str] = []
        self.sharing = Sharing()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # as accelerate's hooks do: who reads it comes after
        if getattr(func, "__name__", "") == "to":
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
        given = (*positional, *keywords.values())
        reads_hidden = any(isinstance(value, Node) for value in given)
        if not isinstance(result, Tensor) or not reads_hidden:
            return result
        name = getattr(func, "__name__", "")
        if name in RESHAPES:
            return self.now.note(result, positional[0])
        # in place: whoever holds this tensor holds the new value
        has_mark = name.endswith("_") and not name.endswith("__")
        in_place = has_mark or name.startswith("__i")
        inputs = () if in_place else args
        return self.now.note(result, Node(func, positional, keywords), inputs)

    def run_layer(
        self,
        index: int,
        layer: nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run a layer's own `forward`, and note what it is given, makes and answers."""
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
            made_by = maker.made_by if maker else None
            child = made_by if isinstance(made_by, str) else None
            self.sharing.note(made, (index, child))
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
        """Note what a child of the layer was called with and answers, as its hook."""
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
        """Note a write to the cache, and have it done."""
        if self.now:
            given = signature.bind(*args, **kwargs).arguments
            tokens = self.now.hidden.shape[0] * self.now.hidden.shape[1]
            size = 0
            if not write.__name__.endswith("_state"):  # it grows by token
                tensors = [one for one in given.values() if isinstance(one, Tensor)]
                size = sum(tensor.nbytes for tensor in tensors)
            module = self.inside[0] if self.inside else None
            self.now.cache_writes.append(
                CacheWrite(module, given["layer_idx"], size // tokens)
            )
        return write(*args, **kwargs)


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
