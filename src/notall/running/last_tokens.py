"""Run a branch for the last of some tokens alone. An attention still writes the keys and
values of all of them.

Shapes: a stream of hidden states is (batch, tokens, hidden); `early` are all tokens but
the `last` ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..structure.branches import Branch
from ..structure.calls import Arguments, LayerCall, child
from ..structure.key_values import (
    CacheSlot,
    Catching,
    Joining,
    attention_of,
    caught,
    index_of,
)


def added(
    branch: Branch, holder: nn.Module, hidden: Tensor, total: Tensor, call: LayerCall
) -> Tensor:
    """`total` and what `branch` makes of `hidden`, (batch, tokens, hidden) each."""
    value = branch.run(holder, hidden, call)
    value = value.view(hidden.shape)  # of a layer that flattens batch and tokens
    return value if branch.adds_itself else total + value


def run_last(
    branch: Branch,
    holder: nn.Module,
    hidden: Tensor,
    total: Tensor,
    call: LayerCall,
    last: int,
    writer: nn.Module | None = None,
) -> Tensor:
    """`total` and, for the `last` tokens alone, what `branch` makes of `hidden`,
    (batch, tokens, hidden) each.

    An attention writes keys and values of all tokens, those of earlier ones as
    `writer`, a layer, makes them.
    """
    tokens = hidden.shape[1]
    early, rows = slice(0, tokens - last), slice(tokens - last, tokens)
    ending = call_for(call, rows, hidden)
    if branch.is_attention:
        ahead = hidden[:, early].contiguous()  # (batch, tokens - last, hidden)
        written = caught(branch, writer or holder, ahead, call_for(call, early, hidden))
        slot = CacheSlot.of(call.arguments)
        attention = child(holder, attention_of(branch))
        if not last:
            _write(written, slot, attention)
        joined = Joining(slot.held, written.found, _positions(call))
        ending.arguments[slot.name] = joined
        _unmask(ending, holder, last, tokens, slot.keys(tokens, attention))
    if not last:
        return total
    end = hidden[:, rows].contiguous()  # (batch, last, hidden)
    ended = added(branch, holder, end, total[:, rows], ending)  # (batch, last, hidden)
    call.attention = ending.attention
    return torch.cat([total[:, early], ended], dim=1)  # (batch, tokens, hidden)


def _write(written: Catching, slot: CacheSlot, attention: nn.Module) -> None:
    """Write what was caught where `attention` has its place in the cache, which a
    writer may not know.
    """
    if slot.held is not None:
        args, kwargs = written.how
        slot.held.update(*written.found, index_of(attention), *args, **kwargs)


def _positions(call: LayerCall) -> Tensor | None:
    return (call.arguments | call.extras).get("cache_position")


def _unmask(
    call: LayerCall, holder: nn.Module, last: int, tokens: int, keys: int
) -> None:
    """Give the last of some tokens a mask where none says that each sees those before
    it: torch would count from the first key, of which a static cache has more than
    there are tokens.
    """
    is_sdpa = _attention_implementation(holder) == "sdpa"
    is_unmasked = call.arguments.get("attention_mask", ...) is None  # given as None
    if is_sdpa and is_unmasked and (last > 1 or keys > tokens):
        device = next(holder.parameters()).device
        seen = torch.ones(last, keys, dtype=torch.bool, device=device)
        seen = seen.tril(tokens - last)
        call.arguments["attention_mask"] = seen[None, None]  # (1, 1, last, keys)


def _attention_implementation(holder: nn.Module) -> str | None:
    for module in holder.modules():
        config = getattr(module, "config", None)
        if config is not None:
            return config._attn_implementation
    return None


def call_for(call: LayerCall, rows: slice, hidden: Tensor) -> LayerCall:
    """The call of a layer for these `rows` of its tokens alone."""

    def of(arguments: Arguments) -> Arguments:
        return {
            name: _rows(name, value, rows, hidden.shape[:2])
            for name, value in arguments.items()
        }

    return LayerCall(of(call.arguments), of(call.extras))


def _rows(name: str, value: Any, rows: slice, shape: torch.Size) -> Any:
    if isinstance(value, Tensor):
        axis = _token_axis(name, value, shape)
        if axis is None:
            return value
        return value.narrow(axis, rows.start, rows.stop - rows.start)
    if type(value) in (tuple, list):
        return type(value)(_rows(name, one, rows, shape) for one in value)
    if type(value) is dict:
        return {key: _rows(name, one, rows, shape) for key, one in value.items()}
    return value


def _token_axis(name: str, value: Tensor, shape: torch.Size) -> int | None:
    """Along which axis an argument holds a layer's tokens, where it does; masks hold
    those that look in rows.
    """
    batch, tokens = shape
    if "mask" in name:  # (batch, heads, tokens, keys)
        axis = -2 if value.dim() > 2 else None
    elif "position_embeddings" in name:  # (batch, tokens, width)
        axis = -2 if value.dim() > 1 else None
    elif "position" in name:  # (batch, tokens), or (tokens,)
        axis = -1
    else:
        axis = 1 if value.dim() > 1 and value.shape[0] in (1, batch) else None
    return axis if axis is not None and value.shape[axis] == tokens else None
