"""How likely a model finds the ends of token sequences, for many plans at once, in as
few tokens as it can be had.

Sequences that begin alike are packed: laid out as one tree, so that what they share is
computed once. A mask lets a token see its own path only, and its position is its depth:
a model whose attention knows nothing but these computes for each path what it computes
for the sequence alone, which is tried before it is relied on.
"""

import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.token_scores import TokenScorer
from ..plan import Plan
from ..running.recording import record
from ..running.replay import Replay
from ..structure.model_structure import (
    base_model,
    inputs_device,
    positions_of,
    text_config,
)

TOKENS_AT_ONCE = {
    "cpu": 4096,
    "cuda": 32768,
    "mps": 8192,
}  # of a batch, when its size is "auto"; halved as needed
# likewise, with their answers: a decoding step of one row takes as long as one of many
WRITTEN_AT_ONCE = 32768
# A token attends over its whole pack, seen or not, so a pack stays within reach of its
# longest path.
MOST_TIMES_LONGEST, MOST_BESIDE = 2, 256

T = TypeVar("T")
BatchSize = int | Literal["auto"]  # requests at a time; auto: as many as memory holds
Sequences = dict[
    tuple[int, ...], dict[int, tuple[int, ...]]
]  # a sequence: the requests about it, what each asks for


@dataclass(frozen=True)
class Request:
    """`sequence` is what the model reads; its last len(`continuation`) predictions are
    held against `continuation`.
    """

    sequence: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def prompt_tokens(self) -> int:
        """How many tokens come ahead of the continuation."""
        return len(self.sequence) + 1 - len(self.continuation)


@dataclass(frozen=True)
class RequestScores:
    """For some requests: log-likelihoods in nats, and how many tokens are no first
    choice; (plans, requests) each.
    """

    requests: list[int]
    log_likelihoods: Tensor  # float64
    missed: Tensor  # float64

    @property
    def greedy(self) -> Tensor:
        """Whether greedy decoding says the same, bool."""
        return self.missed == 0


class Scorer:
    """Scores requests; `tokens` counts what it ran, without padding, `plain_tokens`
    what distinct sequences hold.
    """

    def __init__(self, model: PreTrainedModel, batch_size: BatchSize = "auto") -> None:
        if batch_size != "auto" and batch_size < 1:
            raise UsageError(
                f"batch size {batch_size} is not a number from 1; give one, or auto"
            )
        self.model = base_model(model)
        self.device = inputs_device(self.model)
        self.most_packs: float = math.inf
        self.most_tokens: float = math.inf
        if batch_size == "auto":
            self.most_tokens = TOKENS_AT_ONCE.get(self.device.type, 8192)
        else:
            self.most_packs = batch_size
        self.most_written = max(self.most_tokens, WRITTEN_AT_ONCE)
        config = text_config(self.model)
        parameters = inspect.signature(type(self.model).forward).parameters
        takes_any_mask = config._attn_implementation in ("sdpa", "eager")
        self.packs = "position_ids" in parameters and takes_any_mask
        # as long as the buffers of some models, which no pack may exceed
        self.context = positions_of(self.model)
        # a mask of one's own knows nothing of these
        windows = ("sliding_window", "attention_chunk_size")
        self.window = min(getattr(config, name, None) or math.inf for name in windows)
        self.token_scorer = TokenScorer(self.model)
        self.proved = 0  # the longest sequence for which packed was seen to equal plain
        self.tokens = self.plain_tokens = 0

    def score(
        self, plans: Sequence[Plan], requests: Sequence[Request]
    ) -> Iterator[RequestScores]:
        """In batches, the longest first. Raises `UsageError` where one sequence takes
        more memory than there is.
        """
        replay = Replay(self.model, plans)
        # a plan skips what comes ahead of a continuation
        by_prompt = any(plan.prefill for plan in plans)
        groups: dict[int | None, Sequences] = {}
        for number, request in enumerate(requests):
            about = groups.setdefault(request.prompt_tokens if by_prompt else None, {})
            about.setdefault(request.sequence, {})[number] = request.continuation
        for prompt in sorted(groups, key=lambda tokens: -(tokens or 0)):
            yield from self._score(replay, groups[prompt], prompt)

    def _score(
        self, replay: Replay, about: Sequences, prompt: int | None
    ) -> Iterator[RequestScores]:
        """Of sequences whose prompts are of one length, or None: nothing needs to know
        it.
        """
        self.plain_tokens += sum(map(len, about))
        waiting = deque(sorted(self._arrange(about, prompt), key=len, reverse=True))
        while waiting:
            fitting = self.fitting(len(waiting[0]), len(waiting))
            batch = [waiting.popleft() for _ in range(fitting)]
            run = partial(self._run, replay, batch, about, prompt)
            scores = unless_out_of_memory(run)
            if scores is not None:
                yield scores
            elif len(batch) == 1 and len(batch[0].paths) > 1:
                waiting.extendleft(reversed([*plain(batch[0].paths)]))
            else:
                self.shrink(len(batch), len(batch[0]))
                waiting.extendleft(reversed(batch))

    def fitting(self, width: int, count: int, *, written: bool = False) -> int:
        """How many of `count` rows of `width` tokens to run at once, or to write,
        answers included.
        """
        most = self.most_written if written else self.most_tokens
        return int(max(1, min(count, self.most_packs, most // width)))

    def shrink(self, rows: int, width: int) -> None:
        """Run at most half of that from now on: it took more memory than there is.
        Raises `UsageError` at one row.
        """
        clear_device_cache(garbage_collection=True)
        if rows == 1:
            raise UsageError(
                f"one sequence of {width} tokens takes more memory than"
                f" {self.device} has; give a smaller dtype, fewer examples, or a"
                " device_map"
            )
        if self.most_tokens < math.inf:
            half = rows * width // 2
            self.most_tokens = min(self.most_tokens, half)
            self.most_written = min(self.most_written, half)
        else:
            self.most_packs = rows // 2

    def _arrange(self, about: Sequences, prompt: int | None = None) -> "list[Pack]":
        """All sequences in packs: of several where that is seen to change nothing, of
        one where it is not.

        With a `prompt` of so many tokens a pack has sequences of one prompt, which is
        then its beginning.
        """
        short = sorted(sequence for sequence in about if len(sequence) <= self.window)
        alike = groupby(
            short, key=lambda sequence: sequence[:prompt] if prompt else None
        )
        packs: list[Pack] = []
        for _, some in alike if self.packs else ():
            packs += packs_of(some, self.context)
        lengths = [
            max(map(len, pack.paths)) if len(pack.paths) > 1 else 0 for pack in packs
        ]
        longest = max(lengths, default=0)
        if longest > self.proved:
            complaint = self._prove(packs[lengths.index(longest)], about)
            if complaint:
                warnings.warn(
                    f"answers are computed one by one, not packed: {complaint}",
                    stacklevel=5,
                )
                self.packs = False
            self.proved = longest
        if not self.packs:
            return list(plain(about))
        long = [sequence for sequence in about if len(sequence) > self.window]
        return packs + list(plain(long))

    def _prove(self, pack: "Pack", about: Sequences) -> str | None:
        """Compare a pack with its last and its longest path run alone, on the original;
        None if nothing differs.
        """
        dense = Replay(self.model, [Plan()])
        expected: dict[int, float] = {}
        for single in plain({max(pack.paths, key=len), list(pack.paths)[-1]}):
            scores = self._run(dense, [single], about)
            expected |= dict(zip(scores.requests, scores.log_likelihoods[0].tolist()))
        try:
            found = self._run(dense, [pack], about)
        # an architecture that can't take such a mask says so in a way of its own
        except Exception as error:
            return f"the model does not take a mask of its own ({type(error).__name__})"
        got = dict(zip(found.requests, found.log_likelihoods[0].tolist()))
        asked = {
            number: asks for path in pack.paths for number, asks in about[path].items()
        }
        for number, value in expected.items():
            difference = abs(got[number] - value)
            if not difference <= answer_tolerance(self.model.dtype, len(asked[number])):
                return f"packed, a log-likelihood differs by {difference:.1e} nats"
        return None

    def _run(
        self,
        replay: Replay,
        packs: "list[Pack]",
        about: Sequences,
        prompt: int | None = None,
    ) -> RequestScores:
        """The scores of all requests about the sequences of `packs`, in one batch."""
        numbers: list[int] = []
        # which of `numbers`, row, column, token
        places: list[tuple[int, int, int, int]] = []
        for row, pack in enumerate(packs):
            for sequence, path in pack.paths.items():
                for number, asks in about[sequence].items():
                    places += [
                        (len(numbers), row, column, token)
                        for column, token in zip(path[-len(asks) :], asks)
                    ]
                    numbers.append(number)
        owners, rows, columns, targets = torch.tensor(places).T  # (tokens asked,) each
        inputs = inputs_of(packs, self.model.dtype)
        self.tokens += sum(map(len, packs))
        shape = replay.plans, len(numbers)
        likely = torch.empty(shape, dtype=torch.float64)  # (plans, requests)
        missed = torch.empty_like(likely)

        def by_request(values: Tensor) -> Tensor:
            """Sums over the tokens of each request: (tokens asked,) to (requests,)."""
            zeros = torch.zeros(len(numbers), dtype=torch.float64)
            return zeros.index_add_(0, owners, values)

        with torch.inference_mode():
            recording = record(self.model, prompt, **inputs)
            for plans, hidden in replay.hidden_states(recording):
                # (packs, tokens, hidden) to (tokens asked, hidden)
                judged = hidden[rows.to(hidden.device), columns.to(hidden.device)]
                scores = self.token_scorer.score(judged, targets, likeliest=True)
                likely[plans] = by_request(-scores.nll.cpu().double())
                is_other = scores.likeliest.cpu() != targets
                missed[plans] = by_request(is_other.double())
        return RequestScores(numbers, likely, missed)


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """What `work` answers, or None when it takes more memory than there is."""
    try:
        return work()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    return None


def answer_tolerance(dtype: torch.dtype, tokens: int) -> float:
    """By how many nats an answer of so many tokens may differ between two batches: what
    rounding makes of it.
    """
    if dtype in (torch.float32, torch.float64):
        return max(1e-4, 1e-5 * tokens)
    return max(0.3, 0.1 * tokens)


@dataclass
class Pack:
    """A tree of tokens in the order in which they are run, every parent before its
    children.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    # by sequence, where its tokens are
    paths: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    # for each path, how many of its tokens were there before it
    forks: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, sequence: tuple[int, ...], after: tuple[int, ...] = ()) -> None:
        """Add a sequence behind what it shares with `after`, which is in the pack."""
        shared = common(after, sequence)
        new = range(len(self), len(self) + len(sequence) - shared)
        self.tokens += sequence[shared:]
        self.positions += range(shared, len(sequence))
        old = self.paths[after][:shared] if after else []
        self.paths[sequence] = [*old, *new]
        self.forks.append(shared)

    def sight(self, width: int) -> Tensor:
        """Which tokens each token sees, bool (width, width); padding sees itself, as a
        softmax needs something.
        """
        seen = torch.eye(width, dtype=torch.bool)
        for path, fork in zip(self.paths.values(), self.forks):
            index = torch.tensor(path)  # (path,)
            causal = torch.ones(len(path), len(path), dtype=torch.bool).tril()
            seen[index[fork:, None], index] = causal[fork:]  # (path - fork, path)
        return seen


def common(first: Sequence[object], second: Sequence[object]) -> int:
    """How much two sequences share from their beginning."""
    for place, (ours, theirs) in enumerate(zip(first, second)):
        if ours != theirs:
            return place
    return min(len(first), len(second))


def packs_of(
    sequences: Iterable[tuple[int, ...]], most: float = math.inf
) -> Iterator[Pack]:
    """Distinct sequences in as few tokens as packs of sensible size, `most` tokens,
    allow: similar ones together.
    """
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
    """Token ids (packs, tokens), padded on the right; of several paths positions, a
    mask (packs, 1, tokens, tokens).
    """
    tokens = [torch.tensor(pack.tokens) for pack in packs]
    ids = pad_sequence(tokens, batch_first=True)  # (packs, tokens)
    inputs = {"input_ids": ids}
    if any(len(pack.paths) > 1 for pack in packs):
        positions = [torch.tensor(pack.positions) for pack in packs]
        inputs["position_ids"] = pad_sequence(positions, batch_first=True)
        unseen = torch.stack([~pack.sight(ids.shape[1]) for pack in packs])
        mask = torch.zeros(unseen.shape, dtype=dtype)  # (packs, tokens, tokens)
        mask.masked_fill_(unseen, torch.finfo(dtype).min)
        inputs["attention_mask"] = mask[:, None]
    return inputs
