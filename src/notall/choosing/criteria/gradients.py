"""By the gradient of the loss to a gate on each sublayer, h + gate * f(h), at gate = 1: one backward pass."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...running.replay import record, run_head
from ...structure.anatomy import Anatomy, base_model
from ...structure.observation import LayerCall, run_branches
from .setting import Setting, UnitScores


def score_first_order(setting: Setting) -> UnitScores:
    """-dL/dgate: what the NLL rises by when the gate is closed, to first order.

    L is the NLL on the text whatever the objective is, because the gradient of the KL to the dense model is zero there.
    Source: Molchanov et al., arXiv 1611.06440, equation 7, with its sign.
    """
    return {unit: -float(gradients.mean()) for unit, gradients in _gradients(setting).items()}


def score_fisher(setting: Setting) -> UnitScores:
    """(dL/dgate)^2 / 2, the mean over sequences: to second order, by the empirical Fisher information.

    Source: Theis et al., arXiv 1801.05787, equation 7.
    """
    return {unit: float(gradients.square().mean()) / 2 for unit, gradients in _gradients(setting).items()}


def _gradients(setting: Setting) -> dict[tuple[str, ...], Tensor]:
    """dL/dgate of each unit, by sequence: a block's gate is the gate of both its sublayers. (sequences,) each."""
    start = time.process_time()
    space, model = setting.space, base_model(setting.model)
    space.anatomy.refuse_stubs("this criterion")
    found: dict[tuple[str, ...], list[Tensor]] = {unit: [] for unit in space.units}
    for ids in setting.batches:
        with torch.no_grad():
            recording = record(model, input_ids=ids)
        rows = len(recording.embedded)
        device = recording.embedded.device
        gates = {name: torch.ones(rows, 1, 1, device=device, requires_grad=True) for name in space.order}
        with torch.enable_grad():
            hidden = _gated(model, space.anatomy, recording.embedded, recording.arguments, gates)
            logits = run_head(model, recording, hidden)[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device)) * rows
        by_gate = dict(zip(gates, torch.autograd.grad(loss, list(gates.values()))))
        for unit, parts in found.items():
            parts.append(torch.stack([by_gate[name].double().flatten().cpu() for name in unit]).sum(0))
    setting.passed(3, start)  # a backward pass costs about two forward ones
    return {unit: torch.cat(parts) for unit, parts in found.items()}


def _gated(model, anatomy: Anatomy, hidden: Tensor, arguments, gates: dict[str, Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
    """The last layer's output, with a gate before each sublayer's contribution."""
    layers = model.get_submodule(anatomy.layers)
    for block, layer, given in zip(anatomy.blocks, layers.children(), arguments):
        total = hidden
        for part in block.sublayers:
            start = hidden if block.parallel else total
            added = run_branches(part.branches, layer, start, LayerCall(given)) - start
            gate = gates[part.name].to(added.device, added.dtype)
            total = total + gate * added
        hidden = total
    return hidden
