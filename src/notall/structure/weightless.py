"""Run a model that has no weights, to see what it does, not what comes out.

A model on the meta device is handed fake tensors: they have a shape and a dtype, claim to be on the CPU, and hold
nothing. Where a step needs values (how many tokens go to this expert?) it gets zeros: any values will do to see which
module hands what to which.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def is_weightless(model: nn.Module) -> bool:
    """Whether the model is only a shape: on the meta device, and not because accelerate keeps its weights elsewhere."""
    on_meta = next(model.parameters()).device.type == "meta"
    return on_meta and not any("_hf_hook" in module.__dict__ for module in model.modules())


@contextmanager
def running_weightless(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Inside, tensors hold nothing, and what is yielded calls `model` with keyword arguments."""
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as fake, _ZerosForValues(fake):
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in named}
        yield lambda **inputs: functional_call(model, tensors, (), inputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of torch's fake tensors, which holds each step that needs values for an error."""
    log = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


class _ZerosForValues(TorchFunctionMode):
    """Functions that cannot run on tensors without values run on zeros, and their answers lose their values again."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if func is Tensor.split:  # among experts, by sizes that are zeros now: the first gets all
                whole, sizes, dim = args[0], args[1], kwargs.get("dim", 0)
                return func(whole, [whole.shape[dim] - sum(sizes[1:]), *sizes[1:]], dim)
            with unset_fake_temporarily():
                answer = func(*_with_values(args), **_with_values(kwargs))
            return tree_map_only(Tensor, self.fake.from_tensor, answer)


def _with_values(given: Any) -> Any:
    """`given` with zeros for its tensors; large ones are left untouched by the memory they were not given."""
    if isinstance(given, Tensor):
        make = torch.empty if given.is_floating_point() else torch.zeros
        return make(given.shape, dtype=given.dtype)
    if isinstance(given, slice):
        return slice(*(_with_values(bound) for bound in (given.start, given.stop, given.step)))
    if isinstance(given, tuple | list):
        return type(given)(_with_values(value) for value in given)
    return {name: _with_values(value) for name, value in given.items()} if isinstance(given, dict) else given
