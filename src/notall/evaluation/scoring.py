"""How likely a model finds the ends of token sequences, for many plans at once, in as few tokens as it can be had.

Sequences that begin alike are packed (see `packing`) as long as packing is seen to change nothing; plans share their
first sublayers (see `replay`). Batches shrink when memory runs out.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.token_scores import TokenScorer
from ..plan import Plan
from ..running.replay import Replay, record
from ..structure.model_structure import base_model, positions_of, text_config
from .packing import Pack, inputs_of, packed, plain

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 32768, "mps": 8192}  # of a batch, when its size is "auto"; halved as needed
MASKED_ATTENTION = ("sdpa", "eager")  # the implementations that take any mask
WINDOWS = ("sliding_window", "attention_chunk_size")  # a mask of one's own knows nothing of these
EXACT = (torch.float32, torch.float64)

T = TypeVar("T")
Sequences = dict[tuple[int, ...], list[int]]  # a sequence: the requests about it


@dataclass(frozen=True)
class Request:
    """`sequence` is what the model reads; its last len(`continuation`) predictions are held against `continuation`."""

    sequence: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class RequestScores:
    """For some requests: log-likelihoods in nats, and whether greedy decoding says the same; (plans, requests) each."""

    requests: list[int]
    log_likelihoods: Tensor  # float64
    greedy: Tensor  # bool


class Scorer:
    """Scores requests; `tokens` counts what it ran, without padding, and `plain_tokens` what distinct sequences hold.

    `batch_size` is in packs, or "auto": as many as make up `TOKENS_AT_ONCE`.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int | Literal["auto"] = "auto") -> None:
        if batch_size != "auto" and batch_size < 1:
            raise UsageError(f"batch size {batch_size} is not a number from 1; give one, or auto")
        self.model = base_model(model)
        self.device = self.model.get_input_embeddings().weight.device
        self.most_packs = math.inf if batch_size == "auto" else batch_size
        self.most_tokens = TOKENS_AT_ONCE.get(self.device.type, 8192) if batch_size == "auto" else math.inf
        config = text_config(self.model)
        takes_positions = "position_ids" in inspect.signature(type(self.model).forward).parameters
        self.packs = takes_positions and config._attn_implementation in MASKED_ATTENTION
        # Some models have buffers as long as their context, so a pack must not be longer.
        self.context = positions_of(self.model)
        self.window = min(getattr(config, name, None) or math.inf for name in WINDOWS)
        self.token_scorer = TokenScorer(self.model)
        self.proved = 0  # the longest sequence for which packed was seen to equal plain
        self.tokens = self.plain_tokens = 0

    def score(self, plans: Sequence[Plan], requests: Sequence[Request]) -> Iterator[RequestScores]:
        """Score all `requests` under each of `plans`, the longest first, batch after batch.

        Raises `UsageError` when a single sequence takes more memory than there is.
        """
        replay = Replay(self.model, plans)
        about: Sequences = {}
        for number, request in enumerate(requests):
            about.setdefault(request.sequence, []).append(number)
        self.plain_tokens += sum(map(len, about))
        waiting = deque(sorted(self._arrange(about, requests), key=len, reverse=True))
        while waiting:
            batch = [waiting.popleft() for _ in range(self.fitting(len(waiting[0]), len(waiting)))]
            scores = unless_out_of_memory(partial(self._run, replay, batch, about, requests))
            if scores is None:
                waiting.extendleft(reversed(self._smaller(batch)))
            else:
                yield scores

    def fitting(self, width: int, count: int) -> int:
        """How many of `count` rows of `width` tokens to run at once."""
        return int(max(1, min(count, self.most_packs, self.most_tokens // width)))

    def shrink(self, rows: int, width: int) -> None:
        """Run at most half of that from now on: it took more memory than there is. Raises `UsageError` at one row."""
        clear_device_cache(garbage_collection=True)
        if rows == 1:
            raise UsageError(
                f"one sequence of {width} tokens takes more memory than {self.device} has; "
                "give a smaller dtype, fewer examples, or a device_map"
            )
        if self.most_tokens < math.inf:
            self.most_tokens = rows * width // 2
        else:
            self.most_packs = rows // 2

    def _smaller(self, batch: list[Pack]) -> list[Pack]:
        """What to run instead of a batch that did not fit into memory."""
        if len(batch) == 1 and len(batch[0].paths) > 1:
            return list(plain(batch[0].paths))
        self.shrink(len(batch), len(batch[0]))
        return batch

    def _arrange(self, about: Sequences, requests: Sequence[Request]) -> list[Pack]:
        """All sequences in packs: of several where that is seen to change nothing, of one where it is not."""
        short = [sequence for sequence in about if len(sequence) <= self.window]
        packs = list(packed(short, self.context)) if self.packs else []
        shared = [pack for pack in packs if len(pack.paths) > 1]
        longest = max(shared, key=_longest_path, default=None)
        if longest and _longest_path(longest) > self.proved:
            complaint = self._prove(longest, about, requests)
            if complaint:
                warnings.warn(f"answers are computed one by one, not packed: {complaint}", stacklevel=4)
                self.packs = False
            self.proved = _longest_path(longest)
        if not self.packs:
            return list(plain(about))
        return packs + list(plain(sequence for sequence in about if len(sequence) > self.window))

    def _prove(self, pack: Pack, about: Sequences, requests: Sequence[Request]) -> str | None:
        """Compare a pack with its last and its longest path run alone, on the dense model; None if nothing differs."""
        dense = Replay(self.model, [Plan()])
        expected: dict[int, float] = {}
        for single in plain({max(pack.paths, key=len), list(pack.paths)[-1]}):
            scores = self._run(dense, [single], about, requests)
            expected |= dict(zip(scores.requests, scores.log_likelihoods[0].tolist()))
        try:
            found = self._run(dense, [pack], about, requests)
        except Exception as error:  # an architecture that can't take such a mask says so in a way of its own
            return f"the model does not take a mask of its own ({type(error).__name__})"
        got = dict(zip(found.requests, found.log_likelihoods[0].tolist()))
        for number, value in expected.items():
            difference = abs(got[number] - value)
            if not difference <= tolerance(self.model.dtype, len(requests[number].continuation)):
                return f"packed, a log-likelihood differs by {difference:.1e} nats"
        return None

    def _run(self, replay: Replay, packs: list[Pack], about: Sequences, requests: Sequence[Request]) -> RequestScores:
        numbers, places = _places(packs, about, requests)
        owners, rows, columns, targets = torch.tensor(places).T
        inputs = {name: value.to(self.device) for name, value in inputs_of(packs, self.model.dtype).items()}
        self.tokens += sum(map(len, packs))
        likely = torch.empty(replay.plans, len(numbers), dtype=torch.float64)
        missed = torch.empty_like(likely)
        with torch.inference_mode():
            for plans, hidden in replay.hidden_states(record(self.model, **inputs)):
                judged = hidden[rows.to(hidden.device), columns.to(hidden.device)]
                scores = self.token_scorer.score(judged, targets, likeliest=True)
                likely[plans], missed[plans] = (
                    torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, owners, values)
                    for values in (-scores.nll.cpu().double(), (scores.likeliest.cpu() != targets).double())
                )
        return RequestScores(numbers, likely, missed == 0)


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What `work` answers, or None when it takes more memory than there is."""
    try:
        return work()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    return None


def tolerance(dtype: torch.dtype, tokens: int) -> float:
    """By how many nats an answer of so many tokens may differ between two batches: what rounding makes of it."""
    return max(1e-4, 1e-5 * tokens) if dtype in EXACT else max(0.3, 0.1 * tokens)


def _longest_path(pack: Pack) -> int:
    return max(map(len, pack.paths))


def _places(
    packs: Sequence[Pack], about: Sequences, requests: Sequence[Request]
) -> tuple[list[int], list[tuple[int, int, int, int]]]:
    """The requests about `packs`, and for each of their tokens: which of them, its row, its column, the token."""
    numbers: list[int] = []
    places: list[tuple[int, int, int, int]] = []
    for row, pack in enumerate(packs):
        for sequence, path in pack.paths.items():
            for number in about[sequence]:
                continuation = requests[number].continuation
                columns = path[-len(continuation) :]
                places += [(len(numbers), row, column, token) for column, token in zip(columns, continuation)]
                numbers.append(number)
    return numbers, places
