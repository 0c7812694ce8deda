"""Token sequences that begin alike, laid out as one tree, so that what they share is computed once.

The answers to a question share the question, and questions may share their examples. Each sequence is a path through
the tree; a mask lets a token see its own path only, and its position is its depth. So a model whose attention knows
nothing but mask and positions computes for each path what it computes for the sequence alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# A token attends over its whole pack, seen or not, so a pack stays within reach of its longest path.
MOST_TIMES_LONGEST, MOST_BESIDE = 2, 256


@dataclass
class Pack:
    """A tree of tokens in the order in which they are run, every parent before its children."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    paths: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # a sequence: where its tokens are
    forks: list[int] = field(default_factory=list)  # for each path, how many of its tokens were there before it

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: tuple[int, ...], after: tuple[int, ...] = ()) -> None:
        """Add a sequence behind what it shares with `after`, which is in the pack."""
        shared = common(after, sequence)
        new = range(len(self), len(self) + len(sequence) - shared)
        self.tokens += sequence[shared:]
        self.positions += range(shared, len(sequence))
        self.paths[sequence] = [*self.paths[after][:shared], *new] if after else list(new)
        self.forks.append(shared)

    def sight(self, width: int) -> Tensor:
        """Which tokens each token sees, bool (width, width); padding sees itself, as a softmax needs something."""
        seen = torch.eye(width, dtype=torch.bool)
        for path, fork in zip(self.paths.values(), self.forks):
            index = torch.tensor(path)
            seen[index[fork:, None], index] = torch.ones(len(path), len(path), dtype=torch.bool).tril()[fork:]
        return seen


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How much two sequences share from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


def packed(sequences: Iterable[tuple[int, ...]], most: float = math.inf) -> Iterator[Pack]:
    """Distinct sequences in as few tokens as packs of sensible size, `most` tokens, allow: each beside its like."""
    pack = Pack()
    before: tuple[int, ...] = ()
    for sequence in sorted(sequences):
        shared = common(before, sequence)
        size = len(pack) + len(sequence) - shared
        longest = max(len(before), len(sequence))
        room = min(most, MOST_TIMES_LONGEST * longest + MOST_BESIDE)
        if before and (4 * shared < len(sequence) or size > room):
            yield pack
            pack, before = Pack(), ()
        pack.add(sequence, before)
        before = sequence
    if before:
        yield pack


def plain(sequences: Iterable[tuple[int, ...]]) -> Iterator[Pack]:
    """Each sequence in a pack of its own."""
    for sequence in sequences:
        pack = Pack()
        pack.add(sequence)
        yield pack


def inputs_of(packs: Sequence[Pack], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model is called with: token ids (packs, tokens), padded on the right with 0, which no token sees.

    Where a pack holds several paths, also position ids, and an additive mask (packs, 1, tokens, tokens) of `dtype`.
    """
    width = max(map(len, packs))
    inputs = {"input_ids": _padded([pack.tokens for pack in packs], width)}
    if any(len(pack.paths) > 1 for pack in packs):
        hidden = torch.stack([~pack.sight(width) for pack in packs])
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        inputs |= {"position_ids": _padded([pack.positions for pack in packs], width), "attention_mask": mask[:, None]}
    return inputs


def _padded(rows: Sequence[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])
