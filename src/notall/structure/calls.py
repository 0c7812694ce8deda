"""How a layer and its child modules are called: arguments by name, hidden states apart,
and where a forward is held.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Arguments = dict[str, Any]  # of a call, by their names


@dataclass
class LayerCall:
    """What a layer was called with, by name, while its branches run; `attention` keeps
    the attention's whole answer.
    """

    arguments: Arguments
    extras: Arguments = field(default_factory=dict)
    attention: Any = None


def child(holder: nn.Module, path: str) -> nn.Module:
    """The module at a dotted `path` below `holder`; the short way, as it runs for every
    call of every layer.
    """
    if "." in path or not path:
        return holder.get_submodule(path)
    return holder._modules[path]  # type: ignore[return-value]


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors of nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for held in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(held)


def as_given(arguments: Mapping[str, object]) -> Arguments:
    """`arguments` with copies of the mappings among them, which layers write to."""
    return {
        name: copy.copy(value) if isinstance(value, MutableMapping) else value
        for name, value in arguments.items()
    }


@functools.cache
def parameters_of(forward: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a forward, by name; looked up once."""
    return inspect.signature(
        forward
    ).parameters  # which takes long enough to do it once


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's own `forward`, in order."""
    return tuple(parameters_of(type(module).forward))[1:]


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


def forward_of(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where a module's forward is held, below an accelerate hook: another put there
    runs in its place.
    """
    return module.__dict__, (
        "_old_forward" if "_hf_hook" in module.__dict__ else "forward"
    )
