"""By the gradient of the loss to a gate on each sublayer, h + gate * f(h), at gate = 1: one backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ...running.replay import answering
from ...structure.in_place import Scale, stubbed_layer
from ...structure.model_structure import Block, ModelStructure, base_model
from ...structure.observation import Arguments, LayerCall, forward_replaced, run_branches, scaled
from .setting import Setting, UnitScores


def score_first_order(setting: Setting) -> UnitScores:
    """-dL/dgate: what the NLL rises by when the gate is closed, to first order; the gradient of the KL is zero there.

    Source: Molchanov et al., arXiv 1611.06440, equation 7, with its sign.
    """
    return {unit: -float(gradients.mean()) for unit, gradients in _gradients(setting).items()}


def score_fisher(setting: Setting) -> UnitScores:
    """(dL/dgate)^2 / 2, the mean over sequences: the empirical Fisher information; arXiv 1801.05787, equation 7."""
    return {unit: float(gradients.square().mean()) / 2 for unit, gradients in _gradients(setting).items()}


def _gradients(setting: Setting) -> dict[tuple[str, ...], Tensor]:
    """dL/dgate of each unit, by sequence: a block's gate is the gate of both its sublayers. (sequences,) each."""
    start = time.process_time()
    space, model = setting.space, base_model(setting.model)
    found: dict[tuple[str, ...], list[Tensor]] = {unit: [] for unit in space.units}
    for ids in setting.batches:
        rows = len(ids)
        gates = {name: torch.ones(rows, device=ids.device, requires_grad=True) for name in space.order}
        with torch.enable_grad():
            with gated(model, space.structure, gates, ids.shape):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device)) * rows
        by_gate = dict(zip(gates, torch.autograd.grad(loss, list(gates.values()))))
        for unit, parts in found.items():
            parts.append(torch.stack([by_gate[name].double().cpu() for name in unit]).sum(0))
    setting.passed(3, start)  # a backward pass costs about two forward ones
    return {unit: torch.cat(parts) for unit, parts in found.items()}


@contextmanager
def gated(
    model: PreTrainedModel, structure: ModelStructure, gates: Mapping[str, Tensor], shape: Sequence[int]
) -> Iterator[None]:
    """Have each sublayer add what it does times its gate, (batch,), inside the `with`; `shape`: (batch, tokens)."""
    with ExitStack() as replaced:
        for block, layer in zip(structure.blocks, model.get_submodule(structure.layers).children()):
            scales = {part.stub: times(gates[part.name], shape) for part in block.sublayers if part.stub}
            forward = stubbed_layer(layer, block.index, scaled=scales) if scales else _added(block, layer, gates, shape)
            replaced.enter_context(forward_replaced(layer, forward))
        yield


def _added(block: Block, layer: nn.Module, gates: Mapping[str, Tensor], shape: Sequence[int]) -> Callable[..., object]:
    """A forward for a layer whose sublayers can be run one at a time."""

    def answer(arguments: Arguments, given: Tensor) -> Tensor:
        total = given
        for part in block.sublayers:
            start = given if block.parallel else total
            added = run_branches(part.branches, layer, start, LayerCall(arguments)) - start
            total = total + times(gates[part.name], shape)(added)
        return scaled(total, block.scale)

    return answering(layer, block, answer)


def times(gate: Tensor, shape: Sequence[int]) -> Scale:
    """Times each sequence's gate: of (batch, tokens, ...), (streams, batch, tokens, ...), (batch x tokens, ...)."""
    batch, tokens = shape

    def scale(added: Tensor) -> Tensor:
        factors = gate.to(added.device, added.dtype)
        if added.dim() > 3 and added.shape[:2] != (batch, tokens):
            return added * factors.view(1, batch, *[1] * (added.dim() - 2))
        return (added.reshape(batch, -1) * factors.view(batch, 1)).view(added.shape)

    return scale
