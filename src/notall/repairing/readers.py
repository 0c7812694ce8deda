"""How much each channel of the stream counts for what reads it next: by the gains of the norms that stand before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..running.head import Head
from ..structure.anatomy import Sublayer, text_config
from ..structure.observation import ModuleOp, child

READERS = 4  # sublayers that follow: what is further away reads other streams


def reading_gains(model: PreTrainedModel, layers: nn.ModuleList, steps: Sequence[tuple[Sublayer, ...]]) -> list[Tensor]:
    """For the stream behind each step, (hidden,): the mean of its readers' squared gains, about 1.

    Its readers are the next few steps and the head. Where norms have no gains, or there are none, all channels are 1.
    """
    width = text_config(model).hidden_size
    ones = torch.ones(1, 1, width, device=layers[0].parameters().__next__().device, dtype=model.dtype)
    gains = [_gain(layers[parts[0].index], parts[0], ones) for parts in steps]
    head = Head(model)
    plain = head.projection is not None and head.projection.weight.shape[1] == width
    last = _scaled(gain_of(lambda rows: head.states(rows[0])[None], ones)) if plain else torch.ones(width)
    found = []
    for place in range(len(steps)):
        readers = torch.stack([*gains[place + 1 : place + 1 + READERS], last.to(ones.device)])
        metric = readers.square().mean(0)
        found.append(metric / metric.mean())
    return found


def _gain(layer: nn.Module, part: Sublayer, ones: Tensor) -> Tensor:
    """Of the norm that a sublayer begins with, scaled to a mean square of 1; 1 where it begins with something else."""
    first = part.branches[0].ops[0]
    norm = child(layer, first.module) if isinstance(first, ModuleOp) else None
    if norm is None or not is_norm(norm):
        return torch.ones_like(ones[0, 0], dtype=torch.float32)
    return _scaled(gain_of(norm, ones))


def _scaled(gain: Tensor) -> Tensor:
    return gain / gain.square().mean().sqrt().clamp_min(1e-6)


def gain_of(norm: Callable[[Tensor], Tensor], ones: Tensor) -> Tensor:
    """By how much a norm multiplies each channel once it was scaled, with its sign; `ones` is (1, 1, hidden).

    (hidden,) in float32.
    """
    signs = 1 - 2 * (torch.arange(ones.shape[-1], device=ones.device) % 2).to(ones)  # of mean 0, which some take away
    gain = (norm(ones * signs).float() - norm(-ones * signs).float())[0, 0] / 2
    return gain * signs.float()


def is_norm(module: nn.Module) -> bool:
    """Whether all its weights are one a channel."""
    return all(parameter.ndim == 1 for parameter in module.parameters())
