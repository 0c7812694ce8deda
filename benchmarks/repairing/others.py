"""Repairs of other papers, which commands take by `module:function`
(docs/add-repair.md), as `others:linear_patch`.

All but `turns` put a matrix at every gap of a plan, fitted to the original model's
stream before the gap and behind it. The matrix stays at run time. `methods.py` measures
them beside notall's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from notall import Plan, RepairedPlan, locate
from notall.progress import Progress, silent, tracked
from notall.repairing.methods.published import gaps_of
from notall.repairing.refitting import Refitting
from notall.repairing.streams import DenseStream
from notall.running.repaired import LinearMap
from notall.running.weight_swaps import with_weights
from notall.structure.model_structure import base_model

Batches = Sequence[Tensor]
Fit = Callable[
    [Batches, Batches], LinearMap
]  # of the stream before a gap and behind it, (batch, tokens, hidden) each


@torch.no_grad()
def linear_patch(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """LinearPatch without its training, arXiv 2505.24680: P = H D H', and the mean
    magnitudes D of behind over before.

    H is a Hadamard matrix over the root of its size, and D has a channel of H'x each.
    """

    def fit(before: Batches, behind: Batches) -> LinearMap:
        turn = hadamard(before[0].shape[-1])
        scale = magnitudes(behind, turn) / magnitudes(before, turn)
        return beside_the_stream(turn * scale @ turn.T)

    return _at_gaps(fit, model, plan, batches, progress)


@torch.no_grad()
def rotation(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """The rotation of RCPU, arXiv 2510.07782, at a gap: the orthogonal R least |Y - X
    R|, from the SVD of X'Y = U S V'.

    RCPU turns the output of a projection that lost inputs; here nothing is left of what
    is skipped, and the stream is turned.
    """

    def fit(before: Batches, behind: Batches) -> LinearMap:
        left, _, right = torch.linalg.svd(crossed(before, behind))
        return beside_the_stream((left @ right).T)

    return _at_gaps(fit, model, plan, batches, progress)


@torch.no_grad()
def streamline(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """LLM-Streamline, arXiv 2403.19135, with a linear layer in place of a gap: its
    squared error in closed form.
    """

    def fit(before: Batches, behind: Batches) -> LinearMap:
        biased = [torch.cat([at, at.new_ones(*at.shape[:-1], 1)], -1) for at in before]
        added = [to - at for at, to in zip(before, behind)]
        found = torch.linalg.lstsq(
            crossed(biased, biased), crossed(biased, added)
        ).solution.T
        return LinearMap(found[:, :-1].contiguous(), found[:, -1].contiguous())

    return _at_gaps(fit, model, plan, batches, progress)


@torch.no_grad()
def turns(
    model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress = silent
) -> RepairedPlan:
    """The turns of IteRABRe, arXiv 2503.06291: one layer's sublayers go, all that is
    kept is recovered, and so on.

    The paper chooses a block in each turn and distils what is kept. Here the plan is
    given, its layers go from the last one on, and `refit` recovers, from the weights of
    the turn before towards the original model's stream.
    """
    inner = base_model(model)
    plan.check(locate(inner))
    text, layers = (
        DenseStream(inner, batches, keep_all=True),
        sorted({*plan.attention, *plan.mlp}, reverse=True),
    )
    weights: dict[str, Tensor] = {}
    for first in tracked(layers, "refitting after each layer", progress):
        last = Plan(
            *(
                [layer for layer in kind if layer >= first]
                for kind in (plan.attention, plan.mlp)
            )
        )
        with with_weights(inner, weights):
            weights |= Refitting(text, last).run().weights
    parts = [part for part in text.structure.sublayers if part.name in plan.names]
    gone = tuple(
        f"{text.structure.layers}.{part.index}.{module}."
        for part in parts
        for module in part.modules
    )
    return RepairedPlan.of(
        plan,
        weights={
            path: one for path, one in weights.items() if not path.startswith(gone)
        },
    )


def hadamard(size: int) -> Tensor:
    """An orthogonal matrix of entries of one magnitude, (size, size), in float64.

    Raises `ValueError` for a size that is no product of 2 and of q + 1, for primes q of
    the form 4k + 3 (Paley).
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    for order in (44, 32, 24, 20, 12, 2):
        if size % order == 0:
            try:
                rest = hadamard(size // order)
            except ValueError:
                continue
            return torch.kron(paley(order - 1), rest)
    raise ValueError(f"no Hadamard matrix of size {size} is known here")


def paley(prime: int) -> Tensor:
    """Paley's first construction, for a prime q of the form 4k + 3: I + S, of size q +
    1; that of 1 is its own.
    """
    squares = {place * place % prime for place in range(1, prime)}
    signs = [0, *(1 if place in squares else -1 for place in range(1, prime))]
    skew = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    for row in range(prime):
        for column in range(prime):
            skew[1 + row, 1 + column] = signs[(column - row) % prime]
    return (torch.eye(prime + 1, dtype=torch.float64) + skew) / math.sqrt(prime + 1)


def magnitudes(states: Batches, turn: Tensor) -> Tensor:
    """The mean magnitude of each channel of the turned states, (hidden,)."""
    total = sum((state.double() @ turn).abs().flatten(0, 1).sum(0) for state in states)
    return torch.as_tensor(total) / sum(state.shape[:-1].numel() for state in states)


def crossed(left: Batches, right: Batches) -> Tensor:
    """X'Y in float64, (channels of x, channels of y)."""
    pairs = (
        (one.flatten(0, 1).double(), other.flatten(0, 1).double())
        for one, other in zip(left, right)
    )
    return torch.as_tensor(sum(one.T @ other for one, other in pairs))


def beside_the_stream(matrix: Tensor) -> LinearMap:
    """A map that the stream is multiplied by, (hidden, hidden), as what is added to
    it.
    """
    return LinearMap(matrix - torch.eye(len(matrix), dtype=matrix.dtype))


def _at_gaps(
    fit: Fit, model: PreTrainedModel, plan: Plan, batches: Batches, progress: Progress
) -> RepairedPlan:
    """A map at each gap, in the model's dtype."""
    inner = base_model(model)
    plan.check(locate(inner))
    stream, maps = DenseStream(inner, batches), {}
    for gap in tracked(
        gaps_of(stream.structure, plan), "fitting maps over the gaps", progress
    ):
        found = fit(*stream.before(gap.start, gap.end))
        bias = None if found.bias is None else found.bias.to(model.dtype)
        maps[gap.name] = LinearMap(found.matrix.to(model.dtype), bias)
    return RepairedPlan.of(plan, maps=maps)
