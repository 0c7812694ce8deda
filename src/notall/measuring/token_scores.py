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

import math
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
# Logits of a head that is no matrix, at once: on a CPU (True), and elsewhere.
LOGITS = {True: 2**23, False: 2**27}
# exp() of less is as good as none, and takes a CPU up to 150 times as long.
LEAST_LOG_PROB = -80.0
# Rows of logits whose log-probabilities are made at once on a CPU: they stay in a cache.
CACHED = 16


@dataclass(frozen=True)
class TokenScores:
    """One value per row, (rows,), or none, (0,): what was not asked for."""

    nll: Tensor  # nats, at least float32
    kl: Tensor  # nats, at least float32
    likeliest: Tensor  # int64, a token
    confidence: Tensor  # the probability of `likeliest`, 0 to 1


@dataclass(frozen=True)
class Dense:
    """The original model's distributions, a row each, as plans are held against
    them.
    """

    # the head's mean row, (rows, width); if it is no matrix, the last layer's output,
    # (rows, hidden)
    kept: Tensor
    # (rows,): what is added to its product with a plan's states to be the logsumexp that
    # they would have without any KL; None if the head is no matrix
    anchor: Tensor | None


@dataclass(frozen=True)
class _Sums:
    """Of all exp(logit - about), per row: the logarithm of their sum, and what was
    asked for besides.
    """

    about: Tensor  # (rows,)
    log_sums: Tensor  # (rows,)
    largest: Tensor  # (rows,): the largest logit less `about`
    likeliest: Tensor  # (rows,): the token of that
    mean: Tensor  # (rows, width): the mean row of the head; (0,) if not asked for


class TokenScorer:
    """Scores of rows of the last layer's output of `model`, (rows, hidden) each; see
    `TokenScores`, `Dense`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = Head(model)
        self.is_matrix = self.head.projection is not None
        projection = self.head.projection or Projection(torch.empty(0), None, 1.0)
        self.weight = projection.weight  # (vocabulary, width)
        self.bias = projection.bias  # (vocabulary,), or None
        self.scale = projection.scale
        self.exact = torch.promote_types(self.weight.dtype, torch.float32)
        # (vocabulary,): the tokens of the rows of `weight`; None for all of them
        self.words: Tensor | None = None

    @torch.no_grad()
    def on_likely_words(
        self, hidden: Iterable[Tensor], words: int, targets: Sequence[Tensor]
    ) -> "TokenScorer":
        """As if the vocabulary were the `words` likeliest in rows of the original
        model, and the `targets`.
        """
        would_save_half = 2 * words <= len(self.weight)
        if not self.is_matrix or not would_save_half:
            return self
        masses = [self._mass(rows) for rows in hidden]  # (vocabulary,) each
        mass = torch.stack(masses).sum(0)  # (vocabulary,)
        likely = mass.topk(words).indices  # (words,)
        here = self.weight.device
        tokens = [one.to(here) for one in (likely, *targets)]
        part = copy(self)
        part.words = torch.cat(tokens).unique()
        part.weight = self.weight[part.words]
        part.bias = None if self.bias is None else self.bias[part.words]
        return part

    @torch.no_grad()
    def dense(
        self, hidden: Tensor, targets: Tensor | None = None, *, likeliest: bool = False
    ) -> tuple[TokenScores, Dense]:
        """Of the original model's rows: its own scores, with a KL of 0, and what plans
        are held against.
        """
        if not self.is_matrix:
            exact = torch.promote_types(hidden.dtype, torch.float32)
            zeros = hidden.new_zeros(len(hidden), dtype=exact)  # (rows,)
            scores = self._by_logits(hidden, targets, None, likeliest)
            return replace(scores, kl=zeros), Dense(hidden, None)
        states, wanted = self._read(hidden, targets)  # (rows, width), (rows,)
        sums, dense = self._dense(states, wanted, likeliest)
        no_kl = torch.zeros_like(sums.about)  # (rows,)
        return _scores(sums, wanted, no_kl, likeliest), dense

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
        states, wanted = self._read(hidden, targets)  # (rows, width), (rows,)
        alike = None if dense is None else self._alike(states, dense)  # (rows,)
        about = wanted if alike is None else alike
        assert about is not None, (
            "give targets, the original model's distributions, or both"
        )
        sums = self._sums(states, about, likeliest)
        kl = None
        if alike is not None:
            kl = sums.log_sums + (sums.about - alike)  # (rows,)
        return _scores(sums, wanted, kl, likeliest)

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
        aimed_at = dense_states.to(self.weight)  # (rows, width)
        given = states.to(self.weight)
        _, dense = self._dense(aimed_at, None, False)
        alike = self._alike(given, dense)  # (rows,)
        sums = self._sums(given, alike, mean=True)
        nats = sums.log_sums + (sums.about - alike)  # (rows,)
        slope = sums.mean * self.scale - dense.kept  # (rows, width)
        return nats.to(states.device), slope.to(states.device)

    def _mass(self, hidden: Tensor) -> Tensor:
        """The probability of each token, (vocabulary,), summed over the rows."""
        on_cpu = hidden.device.type == "cpu"
        at_once = max(1, LOGITS[on_cpu] // len(self.weight))
        sums: list[Tensor] = []  # (vocabulary,) each
        for few in hidden.split(at_once):
            logits = self.head.logits(few).to(self.exact)  # (few, vocabulary)
            probabilities = logits.softmax(-1)
            sums.append(probabilities.sum(0))
        return torch.stack(sums).sum(0)

    def _dense(
        self, states: Tensor, wanted: Tensor | None, likeliest: bool
    ) -> tuple[_Sums, Dense]:
        about = states.new_zeros(len(states)) if wanted is None else wanted
        near = self._sums(states, about)
        logsumexp = near.about + near.log_sums  # (rows,)
        sums = self._sums(states, logsumexp, likeliest, mean=True)
        kept = sums.mean * self.scale  # (rows, width)
        own_product = self._products(states, kept)  # (rows,)
        anchor = sums.about + sums.log_sums - own_product
        return sums, Dense(kept, anchor)

    def _read(
        self, hidden: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the matrix is given, (rows, width), and the logits of the targets,
        (rows,).
        """
        states = self.head.states(hidden)
        states = states.to(self.weight.device)
        if targets is None:
            return states, None
        targets = targets.to(states.device)
        if self.words is not None:
            targets = torch.searchsorted(self.words, targets)
        rows = self.weight[targets]  # (rows, width)
        wanted = self._products(states, rows) * self.scale  # (rows,)
        if self.bias is not None:
            wanted = wanted + self.bias[targets]
        return states, wanted

    def _products(self, states: Tensor, rows: Tensor) -> Tensor:
        """The product of each state with a row of its own: (rows, width) twice to
        (rows,).
        """
        products = states.to(self.exact) * rows  # (rows, width)
        return products.sum(-1)

    def _alike(self, states: Tensor, dense: Dense) -> Tensor:
        """The logsumexp that states would have without any KL, (rows,)."""
        assert dense.anchor is not None
        return self._products(states, dense.kept) + dense.anchor

    def _sums(
        self, states: Tensor, about: Tensor, largest: bool = False, mean: bool = False
    ) -> _Sums:
        """As `_summed`, and once more where `about` was far from the largest logits."""
        sums = self._summed(states, about, largest, mean)
        log_sums = sums.log_sums  # (rows,)
        is_near = log_sums.isfinite() & (log_sums > LEAST_LOG_PROB / 2)
        if not is_near.all():
            first = self._summed(states, about, True, False)
            about = about + first.largest
            sums = self._summed(states, about, largest, mean)
        return sums

    def _summed(
        self, states: Tensor, about: Tensor, largest: bool, mean: bool
    ) -> _Sums:
        """Sums over the vocabulary, of `states`, (rows, width), with their logits taken
        less `about`, (rows,).
        """
        about = about.to(states.dtype)
        totals = states.new_zeros(len(states), dtype=self.exact)  # (rows,)
        shares = torch.zeros_like(totals)
        top = torch.full_like(totals, -torch.inf)  # (rows,)
        place = torch.zeros_like(totals, dtype=torch.long)  # (rows,)
        shape = states.shape if mean else (0,)
        rows_of_head = states.new_zeros(shape, dtype=self.exact)  # (rows, width)
        far = False
        for rows, columns, tile in self._tiles(states, about):  # (some rows, columns)
            if columns.start == 0 and tile.device.type == "cpu":
                far = bool(tile.amin() < LEAST_LOG_PROB)
            if far:
                tile.clamp_(min=LEAST_LOG_PROB)
            if largest:
                values = tile.amax(-1)  # (some rows,)
                so_far = top[rows]
                # few: a maximum with its place takes four times as long
                better = (values > so_far).nonzero()[:, 0]
                in_tile = tile[better].argmax(-1)
                place[rows.start + better] = in_tile + columns.start
                top[rows] = torch.maximum(so_far, values)
            totals[rows] += tile.exp_().sum(-1)
            if mean:
                # rounded as they are in the product
                share = tile.to(self.weight.dtype)
                shares[rows] += share.sum(-1, dtype=self.exact)
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
        device = states.device
        most_rows, most_columns = TILES.get(device.type, TILES["cuda"])
        tile_rows = min(most_rows, len(states))
        tile_columns = min(most_columns, len(self.weight))
        room = tile_rows * tile_columns
        rounded = torch.empty(room, dtype=self.weight.dtype, device=device)
        exact = rounded
        if self.weight.dtype != self.exact:
            exact = torch.empty_like(rounded, dtype=self.exact)
        for rows in _slices(len(states), most_rows):
            given = states[rows]  # (some rows, width)
            less = about[rows, None]  # (some rows, 1)
            for columns in _slices(len(self.weight), most_columns):
                part = self.weight[columns]  # (columns, width)
                shape = len(given), len(part)
                size = math.prod(shape)
                out = rounded[:size].view(shape)
                tile = exact[:size].view(shape)
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
        """As `score`, of a head that is no matrix: some rows of logits at a time."""
        parts: list[TokenScores] = []
        on_cpu = hidden.device.type == "cpu"
        vocabulary = text_config(self.head.model).vocab_size
        at_once = max(1, LOGITS[on_cpu] // vocabulary)
        for rows in _slices(len(hidden), at_once):
            logits = self.head.logits(hidden[rows])  # (some rows, vocabulary)
            base = None if dense is None else self.head.logits(dense.kept[rows])
            wanted = None if targets is None else targets[rows].to(logits.device)
            cached = CACHED if on_cpu else len(logits)
            for few in _slices(len(logits), cached):
                aims = None if wanted is None else wanted[few]
                dense_logits = None if base is None else base[few]
                parts.append(_from_logits(logits[few], aims, dense_logits, likeliest))
        names = [one.name for one in fields(TokenScores)]
        columns = {
            name: torch.cat([getattr(part, name) for part in parts])  # (rows,)
            for name in names
        }
        return TokenScores(**columns)


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        end = min(start + size, length)
        yield slice(start, end)


def _scores(
    sums: _Sums, wanted: Tensor | None, kl: Tensor | None, likeliest: bool
) -> TokenScores:
    nothing = sums.about[:0]  # (0,)
    nll = nothing
    if wanted is not None:
        nll = sums.log_sums + (sums.about - wanted)  # (rows,)
    divergence = nothing if kl is None else kl
    if not likeliest:
        return TokenScores(nll, divergence, nothing.long(), nothing)
    confidence = (sums.largest - sums.log_sums).exp()
    return TokenScores(nll, divergence, sums.likeliest, confidence)


def _from_logits(
    logits: Tensor, targets: Tensor | None, dense: Tensor | None, likeliest: bool
) -> TokenScores:
    """From logits, (rows, vocabulary). Written out, since torch's `kl_div` takes four
    times as long on a CPU.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    log_q = logits.to(exact).log_softmax(-1)  # (rows, vocabulary)
    nothing = log_q.new_empty(0)
    nll = kl = top = nothing
    place = nothing.long()
    if targets is not None:
        log_of_targets = log_q.gather(1, targets[:, None])  # (rows, 1)
        nll = -log_of_targets[:, 0]  # (rows,)
    if dense is not None:
        log_p = dense.to(exact).log_softmax(-1)  # (rows, vocabulary)
        terms = log_p.exp() * (log_p - log_q)  # (rows, vocabulary)
        kl = terms.sum(-1)  # (rows,)
    if likeliest:
        top, place = log_q.max(-1)  # (rows,) each
    return TokenScores(nll, kl, place, top.exp())
