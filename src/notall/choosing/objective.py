"""What a set of skipped sublayers is judged by: a loss on a calibration text, and mixes of losses.

An `Objective` is a weighted sum of terms, a term a list of batches, each with the places at which the next token is
judged and a function from what is found there to one loss an item (a sequence, or a question). So a new objective is a
new list of batches.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..structure.token_ids import all_checked


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, as for the model's forward, and what is asked of it.

    At each place, `rows` and `columns` of the inputs, (places,) each, the loss in nats is the NLL of its target, the
    token id in `targets`, or, without targets, KL(dense || skipped) of the next token. `items` makes the losses of the
    items, (items,), of those of the places, (places,).
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    items: Callable[[Tensor], Tensor]
    targets: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].numel()


@dataclass(frozen=True)
class Term:
    """The mean of a loss over all items of its batches, times `weight`."""

    name: str
    batches: tuple[Batch, ...] = field(repr=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The sum of its terms: lower is better."""

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        return " + ".join(t.name if t.weight == 1 else f"{t.weight:g}*{t.name}" for t in self.terms)

    @property
    def batches(self) -> tuple[Batch, ...]:
        return tuple(batch for term in self.terms for batch in term.batches)

    def part(self, share: float) -> frozenset[int]:
        """The numbers of the first batches of each term: `share` of them, at least one a term."""
        chosen: list[int] = []
        start = 0
        for term in self.terms:
            chosen += range(start, start + math.ceil(share * len(term.batches) - 1e-9) or 1)
            start += len(term.batches)
        return frozenset(chosen)

    def total(self, losses: dict[int, list[float]]) -> float:
        """The objective, from the losses of each batch's items by the batch's number; batches may be lacking."""
        total, start = 0.0, 0
        for term in self.terms:
            numbers = range(start, start + len(term.batches))
            items = [value for number in numbers for value in losses.get(number, ())]
            total += term.weight * math.fsum(items) / len(items)
            start += len(term.batches)
        return total

    def digest(self) -> str:
        """A hash of what is measured: the terms, their weights and their inputs."""
        digest = hashlib.sha256(self.name.encode())
        for batch in self.batches:
            for name, value in sorted(batch.inputs.items()):
                digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def nll(batches: Sequence[Tensor], weight: float = 1.0) -> Objective:
    """Mean negative log-likelihood a token, by sequence; `batches` are token ids, (batch, tokens) each."""
    batches = all_checked(batches)
    return Objective((Term("nll", tuple(_text(ids, ids[:, 1:].flatten()) for ids in batches), weight),))


def kl(batches: Sequence[Tensor], weight: float = 1.0) -> Objective:
    """Mean KL(dense || skipped) of the next token, by sequence; `batches` are token ids, (batch, tokens) each."""
    batches = all_checked(batches)
    return Objective((Term("kl", tuple(_text(ids, None) for ids in batches), weight),))


def mix(objectives: Sequence[Objective]) -> Objective:
    """The sum of several objectives, each with its weight."""
    return Objective(tuple(term for objective in objectives for term in objective.terms))


def _text(ids: Tensor, targets: Tensor | None) -> Batch:
    """Judged by the mean over each sequence, (batch, tokens) token ids, at all places but its last."""
    rows, columns = torch.ones_like(ids[:, 1:]).nonzero(as_tuple=True)
    return Batch({"input_ids": ids}, rows, columns, lambda values: values.view(len(ids), -1).mean(1), targets)
