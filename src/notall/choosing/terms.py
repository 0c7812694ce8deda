"""What an objective is: losses at places of some inputs, in batches, as the weighted
sum of terms.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from ..digests import digest_of


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, as for the model's forward, and at which places of
    them there is a loss, in nats.
    """

    inputs: dict[str, Tensor]  # (batch, tokens) each
    rows: Tensor  # (places,), the sequence of each place
    columns: Tensor  # (places,), its token
    # the losses of the items, (items,), from those of the places, (places,)
    items: Callable[[Tensor], Tensor]
    # token ids whose NLL it is, (places,); without them it is KL(dense || skipped)
    targets: Tensor | None = None
    # how many first tokens of each sequence are a prompt, where that is known
    prompt_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """How many the forward pass reads, padding too."""
        return self.inputs["input_ids"].numel()

    def judged(self, hidden: Tensor) -> Tensor:
        """The states at its places, (places, hidden), of all: (batch, tokens, hidden)."""
        return hidden[self.rows.to(hidden.device), self.columns.to(hidden.device)]


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
        """Such as `kl + 0.5*task:NAME`."""
        return " + ".join(
            term.name if term.weight == 1 else f"{term.weight:g}*{term.name}"
            for term in self.terms
        )

    @property
    def prompt_tokens(self) -> int | None:
        """The most of a batch; None where there is no prompt."""
        counts = [batch.prompt_tokens for batch in self.batches if batch.prompt_tokens]
        return max(counts, default=None)

    @property
    def batches(self) -> tuple[Batch, ...]:
        """Those of all terms, in order; their places here are their numbers."""
        return tuple(batch for term in self.terms for batch in term.batches)

    @property
    def windows(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each, of the text that it is a loss on."""
        terms = (term for term in self.terms if term.name in ("nll", "kl"))
        return [batch.inputs["input_ids"] for term in terms for batch in term.batches]

    def _numbered(self) -> Iterator[tuple[Term, range]]:
        """Each term, with the numbers of its batches."""
        start = 0
        for term in self.terms:
            yield term, range(start, start + len(term.batches))
            start += len(term.batches)

    def part(self, share: float) -> frozenset[int]:
        """The numbers of the first batches of each term: `share` of them, at least one
        a term.
        """
        chosen = set[int]()
        for _, numbers in self._numbered():
            count = math.ceil(share * len(numbers) - 1e-9) or 1
            chosen.update(numbers[:count])
        return frozenset(chosen)

    def total(self, losses: dict[int, list[float]]) -> float:
        """The objective, from the losses of the items of some batches, by the number of
        the batch.
        """
        total = 0.0
        for term, numbers in self._numbered():
            items = [value for number in numbers for value in losses.get(number, ())]
            total += term.weight * math.fsum(items) / len(items)
        return total

    def digest(self) -> str:
        """A hash of what is measured: the terms, their weights and their inputs."""
        parts: list[str | Tensor] = [self.name]
        for batch in self.batches:
            for name, tensor in sorted(batch.inputs.items()):
                parts += [name, tensor]
        for batch in self.batches:
            if batch.prompt_tokens:
                parts.append(f"prompt {batch.prompt_tokens}")
        return digest_of(parts)[:16]
