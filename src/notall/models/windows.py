"""Windows of texts: to fit weights to, to choose a plan by, and to measure on, so that
the last overlap none of these.

Windows of one text overlap where they hold the same place of it. A copy of a text, or
of a part of it, is known by runs of tokens; what many windows have, such as a heading,
or the prompt of every document, makes no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, shortened
from ..options import check_sizes
from ..plan import several
from ..structure.model_structure import inputs_device
from .texts import Text, start_tokens, token_ids

COPIED_TOKENS = (
    32  # tokens in a row that are taken for a copy, unless windows are shorter
)
FACTOR = (
    0x9E3779B97F4A7C15  # of the hash of a run; it is odd, so that it has an inverse
)
INVERSE = pow(FACTOR, -1, 1 << 64)


@dataclass(frozen=True)
class Drawn:
    """Windows of a text, (windows, length) token ids, and where in the tokens of the
    text each begins.
    """

    text: Text
    rows: (
        Tensor  # (windows, length), with BOS where the tokenizer puts it before a text
    )
    starts: Tensor  # (windows,)
    width: int  # tokens of the text in each window: its length, but for BOS

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice | Tensor) -> Drawn:
        return replace(self, rows=self.rows[some], starts=self.starts[some])

    def on(self, model: PreTrainedModel) -> Drawn:
        """The same, on the device that a model takes token ids on."""
        return replace(self, rows=self.rows.to(inputs_device(model)))

    def batches(self, size: int) -> list[Tensor]:
        """Token ids, (up to `size`, length) each; none of no windows."""
        return list(self.rows.split(size)) if len(self) else []


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    sequences: int = 8,
    length: int = 256,
    batch_size: int = 4,
    seed: int = 0,
) -> list[Tensor]:
    """Draw windows of a text, none overlapping another, with BOS: int64 batches of
    (batch_size, length).
    """
    check_sizes(sequences, length, batch_size)
    return draw(tokenizer, text, sequences=sequences, length=length, seed=seed).batches(
        batch_size
    )


def draw(
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    sequences: int,
    length: int,
    seed: int = 0,
    apart: Sequence[Drawn] = (),
    fewer: bool = False,
) -> Drawn:
    """Windows of a text in an order that `seed` decides; none overlaps another, or one
    of those in `apart`.

    Raises `UsageError` for numbers that make no windows, and where there are fewer than
    `sequences`, unless `fewer` do.
    """
    check_sizes(sequences, length)
    start, ids = (
        torch.tensor(start_tokens(tokenizer), dtype=torch.int64),
        token_ids(tokenizer, text),
    )
    width = length - len(start)
    cut = ids[: len(ids) // width * width].view(-1, width)  # (windows, width)

    def windows(places: Tensor) -> Drawn:
        rows = torch.cat([start.expand(len(places), -1), cut[places].long()], dim=1)
        return Drawn(text, rows, places * width, width)

    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
    if apart:
        taken = (
            _held(text, len(ids), apart)[: cut.numel()].view_as(cut).any(dim=1)
        )  # (windows,)
        order = _first(
            sequences,
            order[~taken[order]],
            lambda places: ~_shared(windows(places), apart),
        )
    if len(order) < sequences and not fewer:
        left = (
            f"only {len(order)} of them overlap none that is used already"
            if apart
            else ""
        )
        raise UsageError(
            _too_short(text, len(ids), sequences, length, len(start), left)
        )
    return windows(order[:sequences])


def _held(text: Text, tokens: int, windows: Sequence[Drawn]) -> Tensor:
    """Which of a text's tokens some of these windows hold, (tokens,)."""
    held = torch.zeros(tokens, dtype=torch.bool)
    for one in windows:
        if one.text.sha256 == text.sha256:
            held[(one.starts[:, None] + torch.arange(one.width)).flatten()] = True
    return held


def _first(count: int, places: Tensor, wanted: Callable[[Tensor], Tensor]) -> Tensor:
    """The first places that are wanted, at least `count` of them where there are: no
    more are looked at than needed.
    """
    found = [places[:0]]
    for some in places.split(count):
        found.append(some[wanted(some)])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)


def _too_short(
    text: Text, tokens: int, sequences: int, length: int, start: int, left: str
) -> str:
    """That a text has too few windows, and how many or how long ones it has."""
    problem = f"the text {shortened(text.name)} has {several(tokens, 'token')}"
    if left:
        problem += (
            f", which are {several(tokens // (length - start), 'window')} of {length},"
            f" and {left}"
        )
        return (
            f"{problem}, where {sequences} are needed: lower --sequences, or give another"
            " text to measure on"
        )
    windows, fitting = tokens // (length - start), tokens // sequences + start
    fits = [f"lower sequences to {windows} or "] if windows else []
    fits += [f"lower length to {fitting} or "] if fitting >= 2 else []
    asked = (
        f"{several(sequences, 'sequence')} of {length}"
        f" ({sequences * (length - start):,})"
    )
    return f"{problem}, too few for {asked}: {''.join(fits)}give a longer text"


def _shared(windows: Drawn, apart: Sequence[Drawn]) -> Tensor:
    """Which windows overlap some of others by their tokens, or are copies of parts of
    another text, (windows,).
    """
    found = overlapping(windows.rows, [one.rows for one in apart])
    for one in apart:
        if one.text.sha256 != windows.text.sha256:
            found |= _sharing(windows.rows, one.rows, COPIED_TOKENS, once=True)
    return found


def overlapping(rows: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Which of `rows`, (windows, tokens), share a run of tokens with any of `others`,
    likewise: (windows,).

    The run is half of the shorter window, but at least `COPIED_TOKENS` tokens, or else all of
    that window.
    """
    found, by_length = (
        torch.zeros(len(rows), dtype=torch.bool),
        dict[int, list[Tensor]](),
    )
    for other in others:
        by_length.setdefault(other.shape[1], []).append(other.cpu())
    for length, some in by_length.items():
        half = -(-min(length, rows.shape[1]) // 2)
        found |= _sharing(rows, torch.cat(some), max(COPIED_TOKENS, half))
    return found


def refuse_overlap(
    held_out: Sequence[Tensor], others: Sequence[Tensor], use: str
) -> None:
    """Raise `UsageError` where a window that is held out overlaps one of `others`, of
    which `use` says what they do.

    Both are batches of token ids, (batch, tokens) each.
    """
    windows = [row for batch in held_out for row in batch]
    for length in {len(row) for row in windows}:
        alike = [number for number, row in enumerate(windows) if len(row) == length]
        found = overlapping(torch.stack([windows[number] for number in alike]), others)
        if found.any():
            problem = (
                f"window {alike[int(found.nonzero()[0])]} of held_out overlaps one that"
                f" {use}"
            )
            raise UsageError(
                f"{problem}, by half of its tokens or more: hold out windows of other text"
            )


def _sharing(rows: Tensor, others: Tensor, size: int, *, once: bool = False) -> Tensor:
    """Which of `rows` share a run of `size` tokens with any of `others`; `once`: a run
    that these have only once.
    """
    size = min(size, rows.shape[1], others.shape[1])
    known, counts = np.unique(_runs(others, size), return_counts=True)
    return torch.from_numpy(
        np.isin(_runs(rows, size), known[counts == 1] if once else known).any(axis=1)
    )


def _runs(rows: Tensor, size: int) -> NDArray[np.uint64]:
    """A hash of each run of `size` tokens, (windows, runs): a polynomial in `FACTOR`,
    modulo 2 to the 64th.
    """
    ids = rows.cpu().numpy().astype(np.uint64) + np.uint64(1)  # (windows, tokens)
    up, down = (_powers(of, ids.shape[1]) for of in (FACTOR, INVERSE))
    sums = np.pad(np.cumsum(ids * up, axis=1), ((0, 0), (1, 0)))
    runs = sums[:, size:] - sums[:, :-size]
    return runs * down[: runs.shape[1]]  # as if each run began at the first token


def _powers(of: int, count: int) -> NDArray[np.uint64]:
    return np.cumprod(
        np.array([1, *[of] * (count - 1)], dtype=np.uint64), dtype=np.uint64
    )
