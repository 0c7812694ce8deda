"""What the weights of a module are, and how a model is run that has none.

A quantised matrix, of several tensors, counts as the matrix that it stands for, and
weighs what all of them do.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .undoing import Undo

STORED = (  # of a parameter without values: what it weighs in the files of its model
    "stored_bytes"
)


class WeightSize(NamedTuple):
    """A parameter, or all that a quantised matrix is made of."""

    elements: int
    bytes: int


def weights_of(module: nn.Module) -> dict[int, WeightSize]:
    """The weights at and below a module, each once, by keys that are the same wherever
    it is shared.
    """
    return dict(pair for inner in module.modules() for pair in _own_weights(inner))


def count_as_stored(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Have the parameters of a model without values weigh what its files hold: `sizes`
    are the bytes of each tensor.
    """
    parameters = dict(model.named_parameters())
    owned: dict[str, list[str]] = {}
    for name in parameters:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    stored = dict.fromkeys(parameters, 0)
    for name, size in sizes.items():
        if name not in stored:
            above = list(accumulate(name.split(".")[:-1], "{}.{}".format))
            own = next((owned[path] for path in reversed(above) if path in owned), None)
            if own is None:
                continue
            # that it is named after, or else the first
            name = max(
                own,
                key=lambda parameter: (
                    len(parameter) if name.startswith(parameter) else 0
                ),
            )
        stored[name] += size
    for name, parameter in parameters.items():
        setattr(parameter, STORED, stored[name])


def _own_weights(module: nn.Module) -> Iterator[tuple[int, WeightSize]]:
    own = dict(module.named_parameters(recurse=False))
    rows, columns = (
        getattr(module, "out_features", None),
        getattr(module, "in_features", None),
    )
    if isinstance(rows, int) and isinstance(columns, int):
        elements, held = (
            rows * columns,
            {
                **own,
                **dict(module.named_buffers(recurse=False)),
            },
        )
        is_plain = (
            "weight" in own
            and own["weight"].numel() == elements
            and not own.keys() - {"weight", "bias"}
        )
        is_empty = not held or (held.keys() == own.keys() == {"bias"})
        if (
            elements and not is_plain and not is_empty
        ):  # the matrix that it stands for is packed in all that it holds
            bias = held["bias"].numel() if "bias" in held else 0
            yield (
                id(module),
                WeightSize(elements + bias, sum(map(_bytes, held.values()))),
            )
            return
    yield from (
        (id(weight), WeightSize(weight.numel(), _bytes(weight)))
        for weight in own.values()
    )


def _bytes(tensor: Tensor) -> int:
    if (stored := getattr(tensor, STORED, None)) is not None:
        return int(stored)
    if hasattr(
        tensor, "__tensor_flatten__"
    ):  # torchao's, which claim the dtype that they stand for
        return sum(
            _bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]
        )
    # bitsandbytes holds scales and the table of its levels in addition to the numbers
    state = getattr(tensor, "quant_state", None)
    extra = [
        getattr(tensor, "SCB", None),
        *(state.as_dict(packed=True).values() if state is not None else ()),
    ]
    return tensor.nbytes + sum(
        part.nbytes for part in extra if isinstance(part, Tensor)
    )


def is_weightless(model: nn.Module) -> bool:
    """Whether the model is only a shape: on the meta device, and not because accelerate
    keeps its weights elsewhere.
    """
    on_meta = next(model.parameters()).device.type == "meta"
    return on_meta and not any(
        "_hf_hook" in module.__dict__ for module in model.modules()
    )


@contextmanager
def running_weightless(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Inside, tensors hold nothing, and what is yielded calls `model` with keyword
    arguments.

    Where a step needs values (how many tokens go to this expert?) it gets zeros: any
    show which module hands what on.
    """
    # the log of torch's fake tensors holds each step that needs values for an error
    log, fake = (
        logging.getLogger(torch._subclasses.fake_tensor.__name__),
        FakeTensorMode(allow_non_fake_inputs=True),
    )
    with (
        Undo() as undo,
        undo.put(vars(log), "disabled", True),
        fake,
        _ZerosForValues(fake),
    ):
        named = chain(model.named_parameters(), model.named_buffers())
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype)
            for name, tensor in named
        }
        yield lambda **inputs: functional_call(model, tensors, (), inputs)


class _ZerosForValues(TorchFunctionMode):
    """Functions that cannot run on tensors without values run on zeros, and their
    answers lose their values again.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if (
                func is Tensor.split
            ):  # among experts, by sizes that are zeros now: the first gets all
                whole, sizes, dim = args[0], args[1], kwargs.get("dim", 0)
                return func(whole, [whole.shape[dim] - sum(sizes[1:]), *sizes[1:]], dim)
            with unset_fake_temporarily():
                answer = func(*_with_values(args), **_with_values(kwargs))
            return tree_map_only(Tensor, self.fake.from_tensor, answer)


def _with_values(given: Any) -> Any:
    """`given` with zeros for its tensors; large ones are left untouched by the memory
    they were not given.
    """
    if isinstance(given, Tensor):
        make = torch.empty if given.is_floating_point() else torch.zeros
        return make(given.shape, dtype=given.dtype)
    if isinstance(given, slice):
        return slice(*map(_with_values, (given.start, given.stop, given.step)))
    if isinstance(given, tuple | list):
        return type(given)(_with_values(value) for value in given)
    return (
        {name: _with_values(value) for name, value in given.items()}
        if isinstance(given, dict)
        else given
    )
