"""What of an attention makes keys and values: found by gradients, and run without the
rest of it.

A cache that stands in for the model's own catches what an attention writes and ends its
call there, ahead of scores and output projection. A second one hands what was caught to
the real cache, ahead of what follows, in one write.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel
from .branches import Branch
from .calls import Arguments, LayerCall, child
from .slicing import LAYER_INDICES, shallow_clone

CACHE_NAMES = (
    "cache",
    "past_key_values",
    "past_key_value",
    "layer_past",
)  # of a layer's argument
KeysAndValues = tuple[
    Tensor, Tensor
]  # keys and values, (batch, heads, tokens, width) each


class _Caught(Exception):
    """The keys and values of a call are there: the rest of it would be for nothing."""


class _StandIn(Cache):
    """What an attention takes for the cache `held`, of which it is all but `update`."""

    def __init__(self, held: Cache | None) -> None:
        self.held = held  # no other state: what it is asked for is `held`'s

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        held = vars(self).get("held")
        return [] if held is None and name == "layers" else getattr(held, name)


class Catching(_StandIn):
    """Keeps what is written in `found`, and ends the call."""

    found: KeysAndValues
    how: tuple[tuple[Any, ...], dict[str, Any]]  # what `update` was called with besides

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> NoReturn:
        """Take the place of the cache's `update`, and go no further."""
        self.found = key_states, value_states
        self.how = args, kwargs
        raise _Caught


class Joining(_StandIn):
    """Writes what was caught and what follows it to `held` at once, so that it sees one
    write of all tokens.
    """

    def __init__(
        self, held: Cache | None, early: KeysAndValues, positions: Tensor | None
    ) -> None:
        super().__init__(held)
        self.early, self.positions = early, positions

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> KeysAndValues:
        """Take the place of the cache's `update`.

        Keys and values are (batch, heads, tokens, width), and so is what it returns.
        """
        early_keys, early_values = self.early
        keys = torch.cat([early_keys, key_states], dim=-2)
        values = torch.cat([early_values, value_states], dim=-2)
        if self.held is None:
            return keys, values
        args = tuple(map(self._of_all, args))
        kwargs = {name: self._of_all(value) for name, value in kwargs.items()}
        return self.held.update(keys, values, layer_idx, *args, **kwargs)

    def _of_all(self, given: Any) -> Any:
        """The places of all tokens, where transformers 4 tells a static cache those of
        a call.
        """
        if (
            self.positions is None
            or not isinstance(given, Mapping)
            or "cache_position" not in given
        ):
            return given
        return {**given, "cache_position": self.positions}


@dataclass(frozen=True)
class CacheSlot:
    """Where a layer's call has its cache: the argument's name, and the cache of its own
    keys and values, or None.
    """

    name: str
    held: Cache | None

    @classmethod
    def of(cls, arguments: Arguments) -> "CacheSlot":
        """Raises `UnsupportedModel` where a layer takes none."""
        name = next((name for name in CACHE_NAMES if name in arguments), None)
        if name is None:
            raise UnsupportedModel(
                "a layer takes no cache, so that its keys and values cannot be written"
                " alone"
            )
        held = arguments[name]
        return cls(name, getattr(held, "self_attention_cache", held))

    def keys(self, tokens: int, attention: nn.Module) -> int:
        """How many keys `attention` will see once so many tokens more are written; a
        static cache has free places.
        """
        if self.held is None:
            return tokens
        mask_sizes: Callable[..., tuple[int, int]] = self.held.get_mask_sizes
        # transformers 4 takes places, and 5 their number
        by_position = "cache_position" in inspect.signature(mask_sizes).parameters
        query = torch.arange(tokens) if by_position else tokens
        keys, _ = mask_sizes(query, index_of(attention))
        return int(keys)


def caught(
    branch: Branch, holder: nn.Module, hidden: Tensor, call: LayerCall
) -> Catching:
    """What the attention of `branch` writes of `hidden`, (batch, tokens, hidden), to a
    cache that keeps the real one.

    Raises `UnsupportedModel` where it writes nothing.
    """
    slot = CacheSlot.of(call.arguments)
    catching = Catching(slot.held)
    try:
        branch.run(
            holder,
            hidden,
            LayerCall(call.arguments | {slot.name: catching}, call.extras),
        )
    except _Caught:
        return catching
    raise UnsupportedModel(
        "an attention writes no keys and values, so that they cannot be written alone"
    )


def index_of(attention: nn.Module) -> int:
    """Its place in the cache."""
    return next(
        index
        for name in LAYER_INDICES
        if (index := vars(attention).get(name)) is not None
    )


def attention_of(branch: Branch) -> str:
    """The path of the attention's module below its layer."""
    return next(op.module for op in branch.ops if op.is_attention)


def key_value_rows(
    branch: Branch, holder: nn.Module, hidden: Tensor, call: LayerCall
) -> dict[str, Tensor]:
    """For each projection below the attention of `branch`, by its path below the layer,
    which of its outputs keys and values depend on: (outputs,) of bool. They are the
    gradients that are not 0, on `hidden`, (batch, tokens, hidden).
    """
    path = attention_of(branch)
    outputs: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            if not torch.allclose(output, module_linear(module, args[0])):
                return None  # adapted, or quantised
            outputs[name] = (
                output if output.requires_grad else output.detach().requires_grad_()
            )
            return outputs[name]

        return note

    projections = {
        f"{path}.{name}": one
        for name, one in child(holder, path).named_modules()
        if is_projection(one)
    }
    hooks = [
        one.register_forward_hook(noting(name)) for name, one in projections.items()
    ]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            written = caught(branch, holder, hidden.detach().clone(), call).found
            some = torch.stack([(each * _uneven(each)).sum() for each in written]).sum()
            made = list(outputs.values())
            found: Sequence[Tensor | None] = (
                torch.autograd.grad(some, made, allow_unused=True) if made else ()
            )
    finally:
        for hook in hooks:
            hook.remove()
    rows: dict[str, Tensor] = {}
    for (name, output), grad in zip(outputs.items(), found):
        if grad is None:
            rows[name] = torch.zeros(output.shape[-1], dtype=torch.bool)
        else:
            rows[name] = grad.flatten(0, -2).abs().amax(0).bool().cpu()  # (outputs,)
    return rows


def is_projection(module: nn.Module) -> bool:
    """Whether it holds a matrix, (outputs, inputs), or as GPT-2 does (inputs, outputs),
    of which each row is plain.
    """
    return (
        isinstance(module, nn.Linear | Conv1D)
        and module.weight.dim() == 2
        and module.weight.is_floating_point()
    )


def module_linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a projection of this matrix and bias makes, (..., outputs)."""
    return linear(inputs, matrix_of(module).to(inputs.dtype), bias_of(module))


def matrix_of(module: nn.Module) -> Tensor:
    """The matrix of a projection, (outputs, inputs)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a projection, (outputs,), where it has one."""
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    return bias


def _uneven(like: Tensor) -> Tensor:
    """Numbers of which no two sums are alike, so that no gradient is 0 by chance."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(like.shape, generator=generator).to(like) + 0.5


class SomeOutputs(nn.Module):
    """A projection of which only some outputs are computed; the others are 0."""

    def __init__(self, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.rows, self.matrix, self.bias = rows, matrix, bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if not self.rows.any():
            return inputs.new_zeros(*inputs.shape[:-1], len(self.rows))
        made = linear(inputs, self.matrix, self.bias)
        if self.rows.all():
            return made
        outputs = made.new_zeros(*made.shape[:-1], len(self.rows))
        outputs[..., self.rows.to(made.device)] = made
        return outputs


class EarlyOutputs(SomeOutputs):
    """A projection of which some outputs have a matrix and a bias of their own for all
    but the last tokens: as many as `last` says while it runs.
    """

    def __init__(
        self,
        source: nn.Module,
        rows: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        last: Callable[[], int],
    ) -> None:
        super().__init__(rows, matrix, bias)
        self.source, self.last = source, last

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, tokens, inputs) to (batch, tokens, outputs)."""
        early = inputs.shape[1] - self.last()
        own = linear(inputs[:, :early], self.matrix, self.bias)
        if self.rows.all():
            return torch.cat([own, self.source(inputs[:, early:])], 1)
        outputs: Tensor = self.source(inputs).clone()
        outputs[:, :early, self.rows.to(own.device)] = own
        return outputs


def early_outputs(
    holder: nn.Module,
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    last: Callable[[], int],
) -> dict[str, EarlyOutputs]:
    """The projections below `holder` that have weights of their own, by their paths;
    `rows` and `weights` are those of `writer_of`.
    """
    found = {}
    for name, needed in rows.items():
        matrix = weights.get(f"{name}.weight")
        if matrix is None:
            continue
        source = child(holder, name)
        own = bias_of(source)
        bias = weights.get(f"{name}.bias", None if own is None else own[needed])
        found[name] = EarlyOutputs(source, needed, matrix, bias, last)
    return found


def writer_of(
    holder: nn.Module,
    branch: Branch,
    rows: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> nn.Module:
    """Like `holder`, with an attention that computes of its projections what keys and
    values need alone.

    `rows` are those of `key_value_rows`. `weights` are a repair's own, by their paths
    below the layer, of these rows alone: NAME.weight (rows, inputs), and NAME.bias
    (rows,), also where the original has none.
    """
    path = attention_of(branch)
    made: dict[str, nn.Module] = {}
    for name, needed in rows.items():
        source = child(holder, name)
        own = matrix_of(source)
        if own.device.type == "meta":  # offloaded: it is read while it runs
            continue
        matrix, bias = (
            weights.get(f"{name}.weight"),
            weights.get(f"{name}.bias", bias_of(source)),
        )
        if matrix is None:
            matrix = own if needed.all() else own[needed]
        if bias is not None and f"{name}.bias" not in weights:
            bias = bias[needed]
        made[name.removeprefix(f"{path}.")] = SomeOutputs(needed, matrix, bias)
    children = dict(holder.named_children())
    top, _, below = path.partition(".")
    inside = {f"{below}.{name}" if below else name: one for name, one in made.items()}
    children[top] = _replaced(child(holder, top), inside)
    return shallow_clone(holder, children, type(holder))


def _replaced(module: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A clone of `module` with other modules at the paths of `new`, all above them
    cloned.
    """
    if "" in new:
        return new[""]
    children = dict(module.named_children())
    for name in {path.partition(".")[0] for path in new}:
        below = {
            path.partition(".")[2]: one
            for path, one in new.items()
            if path.partition(".")[0] == name
        }
        children[name] = _replaced(children[name], below)
    return shallow_clone(module, children, type(module))
