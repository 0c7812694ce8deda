"""What the next token's distribution says, for rows of the last layer's output, at the
cost of one logsumexp.

With a head that is a matrix, log p(v) = w_v . h - lse(h). So NLL is lse(h) - w_target .
h, and KL(dense || plan) is lse(h) less E_p[w] . h, up to what only depends on the
original model p: its mean row of the head, E_p[w], is as wide as the model and is
computed once. No logits are kept: the matrix is taken a tile at a time, which stays in
the cache. Each tile is taken less a logit near the row's largest ones, inside the
matrix product, so that a dtype of few bits rounds what counts least of all. Heads that
are no matrix are run as they are, some rows at a time, by the model.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..structure.model_structure import text_config
from .heads import Head, Projection

# Rows and columns of a tile, by device: small enough for a cache, or large enough to
# keep a GPU busy.
TILES = {"cpu": (1024, 1024), "cuda": (4096, 16384), "mps": (2048, 8192)}
LOGITS = {
    True: 2**23,
    False: 2**27,
}  # of a head that is no matrix, at once: on a CPU, and elsewhere
NOTHING = (
    -80.0
)  # exp() of less is as good as none, and takes a CPU up to 150 times as long
# of their rows, whose log-probabilities are made at once on a CPU: they stay in a cache
CACHED = 16


@dataclass(frozen=True)
class TokenScores:
    """One value a row, in nats and at least float32, or none; `confidence` is the
    probability of `likeliest`, int64.
    """

    nll: Tensor
    kl: Tensor
    likeliest: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Dense:
    """The original model's distributions, a row each, as plans are held against
    them.
    """

    # the head's mean row, (rows, width); if it is no matrix, the last layer's output,
    # (rows, hidden)
    kept: Tensor
    anchor: (
        Tensor | None
        # (rows,): what its product with a plan's states lacks to their logsumexp
        # without any KL
    )


@dataclass(frozen=True)
class _Sums:
    """Of all exp(logit - about), a row each: the logarithm of their sum, and what was
    asked for besides.
    """

    about: Tensor
    log_sums: Tensor
    largest: Tensor  # logit less `about`
    likeliest: Tensor  # the token of that
    mean: Tensor  # row of the head, (rows, width)


class TokenScorer:
    """Scores of rows of the last layer's output of `model`, (rows, hidden) each; see
    `TokenScores`, `Dense`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = Head(model)
        self.is_matrix = self.head.projection is not None
        projection = self.head.projection or Projection(torch.empty(0), None, 1.0)
        self.weight, self.bias, self.scale = (
            projection.weight,
            projection.bias,
            projection.scale,
        )
        self.exact = torch.promote_types(self.weight.dtype, torch.float32)
        self.words: Tensor | None = None

    @torch.no_grad()
    def on_likely_words(
        self, hidden: Iterable[Tensor], words: int, targets: Sequence[Tensor]
    ) -> "TokenScorer":
        """As if the vocabulary were the `words` likeliest in rows of the original
        model, and the `targets`.
        """
        if not self.is_matrix or 2 * words > len(
            self.weight
        ):  # that would save less than half
            return self
        likely = (
            torch.stack([self._mass(rows) for rows in hidden])
            .sum(0)
            .topk(words)
            .indices
        )
        part, here = copy(self), self.weight.device
        part.words = torch.cat([one.to(here) for one in (likely, *targets)]).unique()
        part.weight, part.bias = (
            self.weight[part.words],
            (None if self.bias is None else self.bias[part.words]),
        )
        return part

    @torch.no_grad()
    def dense(
        self, hidden: Tensor, targets: Tensor | None = None, *, likeliest: bool = False
    ) -> tuple[TokenScores, Dense]:
        """Of the original model's rows: its own scores, with a KL of 0, and what plans
        are held against.
        """
        if not self.is_matrix:
            zeros = hidden.new_zeros(
                len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32)
            )
            return replace(
                self._by_logits(hidden, targets, None, likeliest), kl=zeros
            ), Dense(hidden, None)
        states, wanted = self._read(hidden, targets)
        sums, dense = self._dense(states, wanted, likeliest)
        return _scores(sums, wanted, torch.zeros_like(sums.about), likeliest), dense

    @torch.no_grad()
    def score(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        dense: Dense | None = None,
        *,
        likeliest: bool = False,
    ) -> TokenScores:
        """NLL of `targets`, (rows,) token ids, and KL(`dense` || these), where they are
        given: at least one of them.
        """
        if not self.is_matrix:
            return self._by_logits(hidden, targets, dense, likeliest)
        states, wanted = self._read(hidden, targets)
        alike = None if dense is None else self._alike(states, dense)
        about = wanted if alike is None else alike
        assert about is not None, (
            "give targets, the original model's distributions, or both"
        )
        sums = self._sums(states, about, likeliest)
        return _scores(
            sums,
            wanted,
            None if alike is None else sums.log_sums + (sums.about - alike),
            likeliest,
        )

    @torch.no_grad()
    def distance(self, states: Tensor, dense_states: Tensor) -> tuple[Tensor, Tensor]:
        """KL(dense || these), (rows,), and its derivative by `states`, the difference
        of both mean rows of the head.

        Both states are given as the head's matrix is, (rows, width); the results are
        where `states` are. Raises `UnsupportedModel` where it is no matrix.
        """
        if not self.is_matrix:
            raise UnsupportedModel(
                f"the head of {type(self.head.model).__name__} is no matrix, and cannot"
                " be aimed at"
            )
        _, dense = self._dense(dense_states.to(self.weight), None, False)
        given = states.to(self.weight)
        alike = self._alike(given, dense)
        sums = self._sums(given, alike, mean=True)
        nats, slope = (
            sums.log_sums + (sums.about - alike),
            sums.mean * self.scale - dense.kept,
        )
        return nats.to(states.device), slope.to(states.device)

    def _mass(self, hidden: Tensor) -> Tensor:
        """The probability of each token, (vocabulary,), summed over the rows."""
        rows = hidden.split(
            max(1, LOGITS[hidden.device.type == "cpu"] // len(self.weight))
        )
        return torch.stack(
            [self.head.logits(few).to(self.exact).softmax(-1).sum(0) for few in rows]
        ).sum(0)

    def _dense(
        self, states: Tensor, wanted: Tensor | None, likeliest: bool
    ) -> tuple[_Sums, Dense]:
        near = self._sums(
            states, states.new_zeros(len(states)) if wanted is None else wanted
        )
        sums = self._sums(states, near.about + near.log_sums, likeliest, mean=True)
        kept = sums.mean * self.scale
        return sums, Dense(
            kept, sums.about + sums.log_sums - self._products(states, kept)
        )

    def _read(
        self, hidden: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the matrix is given, (rows, width), and the logits of the targets,
        (rows,).
        """
        states = self.head.states(hidden).to(self.weight.device)
        if targets is None:
            return states, None
        targets = targets.to(states.device)
        if self.words is not None:
            targets = torch.searchsorted(self.words, targets)
        wanted = self._products(states, self.weight[targets]) * self.scale
        return states, wanted if self.bias is None else wanted + self.bias[targets]

    def _products(self, states: Tensor, rows: Tensor) -> Tensor:
        return (states.to(self.exact) * rows).sum(-1)

    def _alike(self, states: Tensor, dense: Dense) -> Tensor:
        """The logsumexp that states would have without any KL, (rows,)."""
        assert dense.anchor is not None
        return self._products(states, dense.kept) + dense.anchor

    def _sums(
        self, states: Tensor, about: Tensor, largest: bool = False, mean: bool = False
    ) -> _Sums:
        sums = self._summed(states, about, largest, mean)
        if not (
            sums.log_sums.isfinite() & (sums.log_sums > NOTHING / 2)
        ).all():  # `about` is far from the largest
            about = about + self._summed(states, about, True, False).largest
            sums = self._summed(states, about, largest, mean)
        return sums

    def _summed(
        self, states: Tensor, about: Tensor, largest: bool, mean: bool
    ) -> _Sums:
        about = about.to(states.dtype)
        totals, shares = states.new_zeros(2, len(states), dtype=self.exact)
        top, place = (
            torch.full_like(totals, -torch.inf),
            torch.zeros_like(totals, dtype=torch.long),
        )
        rows_of_head = states.new_zeros(
            states.shape if mean else (0,), dtype=self.exact
        )
        far = False
        for rows, columns, tile in self._tiles(states, about):
            if columns.start == 0 and tile.device.type == "cpu":
                far = bool(tile.amin() < NOTHING)
            if far:
                tile.clamp_(min=NOTHING)
            if largest:
                values = tile.amax(-1)
                better = (values > top[rows]).nonzero()[
                    :, 0
                ]  # few: a maximum with its place takes four times as long
                place[rows.start + better] = tile[better].argmax(-1) + columns.start
                top[rows] = torch.maximum(top[rows], values)
            totals[rows] += tile.exp_().sum(-1)
            if mean:
                share = tile.to(self.weight.dtype)
                shares[rows] += share.sum(
                    -1, dtype=self.exact
                )  # rounded as they are in the product
                rows_of_head[rows] += share @ self.weight[columns]
        if mean:
            rows_of_head /= shares[:, None]
        if self.words is not None:
            place = self.words[place]
        return _Sums(about.to(self.exact), totals.log(), top, place, rows_of_head)

    def _tiles(
        self, states: Tensor, about: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Logits less `about` by rows and columns; each tile may be written to, and is
        gone when the next one comes.
        """
        most_rows, most_columns = TILES.get(states.device.type, TILES["cuda"])
        room = min(most_rows, len(states)) * min(most_columns, len(self.weight))
        rounded = torch.empty(room, dtype=self.weight.dtype, device=states.device)
        exact = (
            rounded
            if self.weight.dtype == self.exact
            else torch.empty_like(rounded, dtype=self.exact)
        )
        for rows in _slices(len(states), most_rows):
            given, less = states[rows], about[rows, None]
            for columns in _slices(len(self.weight), most_columns):
                part = self.weight[columns]
                shape = len(given), len(part)
                out, tile = (
                    buffer[: shape[0] * shape[1]].view(shape)
                    for buffer in (rounded, exact)
                )
                torch.addmm(less, given, part.T, beta=-1, alpha=self.scale, out=out)
                if exact is not rounded:
                    tile.copy_(out)
                if self.bias is not None:
                    tile += self.bias[columns]
                yield rows, columns, tile

    def _by_logits(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        dense: Dense | None,
        likeliest: bool,
    ) -> TokenScores:
        parts: list[TokenScores] = []
        on_cpu = hidden.device.type == "cpu"
        for rows in _slices(
            len(hidden),
            max(1, LOGITS[on_cpu] // text_config(self.head.model).vocab_size),
        ):
            logits = self.head.logits(hidden[rows])
            base = None if dense is None else self.head.logits(dense.kept[rows])
            wanted = None if targets is None else targets[rows].to(logits.device)
            for few in _slices(len(logits), CACHED if on_cpu else len(logits)):
                aims, dense_logits = (
                    None if each is None else each[few] for each in (wanted, base)
                )
                parts.append(_from_logits(logits[few], aims, dense_logits, likeliest))
        return TokenScores(
            *(
                torch.cat([getattr(part, one.name) for part in parts])
                for one in fields(TokenScores)
            )
        )


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _scores(
    sums: _Sums, wanted: Tensor | None, kl: Tensor | None, likeliest: bool
) -> TokenScores:
    nothing = sums.about[:0]
    return TokenScores(
        nothing if wanted is None else sums.log_sums + (sums.about - wanted),
        nothing if kl is None else kl,
        sums.likeliest if likeliest else nothing.long(),
        (sums.largest - sums.log_sums).exp() if likeliest else nothing,
    )


def _from_logits(
    logits: Tensor, targets: Tensor | None, dense: Tensor | None, likeliest: bool
) -> TokenScores:
    """From logits, (rows, vocabulary). Written out, since torch's `kl_div` takes four
    times as long on a CPU.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_q = logits.to(exact).log_softmax(-1)
    nll, kl, top, place = (
        log_q.new_empty(0),
        log_q.new_empty(0),
        log_q.new_empty(0),
        log_q.new_empty(0).long(),
    )
    if targets is not None:
        nll = -log_q.gather(1, targets[:, None])[:, 0]
    if dense is not None:
        log_p = dense.to(exact).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if likeliest:
        top, place = log_q.max(-1)
    return TokenScores(nll, kl, place, top.exp())
