"""What a plan costs in quality, and what each layer and sublayer does to the residual
stream of the original model.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..models.texts import IDS, checked
from ..plan import Kind, Plan, Skippable
from ..results.facts import Quality, Scores, Similarity
from ..running.recording import Enough, answering, record, standing_in
from ..running.replay import Replay
from ..structure.branches import run_branches, scaled
from ..structure.calls import Arguments, LayerCall, called_with, first
from ..structure.in_place import stubbed_layer
from ..structure.locating import locate
from ..structure.model_structure import Block, base_model
from .statistics import mean_and_error
from .token_scores import Dense, TokenScorer


def evaluate(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    batches: Iterable[Tensor],
    prompt_tokens: int | None = None,
) -> list[Quality]:
    """The quality of each plan on `batches` of token ids, (batch, tokens) each, beside
    the original model.

    All plans run together, sharing the sublayers before the first that differs. With
    `prompt_tokens` so many first tokens of each sequence are its prompt, and the tokens
    behind it alone are scored: a plan with a prefill part needs it. Raises `UsageError`
    when a plan does not fit, for what are no token ids of the model, for a prompt that
    leaves nothing to score or to skip, and for a model inside a `skip`.
    """
    expect(plans, Sequence, "a list of plans, such as [plan]")
    for plan in plans:
        expect(plan, Plan, "plans, such as notall.Plan(attention=[3])")
    replay = Replay(model, [Plan(), *plans])
    scorer = TokenScorer(model)
    scores = [
        _scores(replay, scorer, tokens, plans, prompt_tokens)
        for tokens in checked(batches, model)
    ]
    if not scores:
        raise UsageError(f"there is no text to measure on: give a list of {IDS}")
    return gather(scores)


def score(
    model: PreTrainedModel,
    plans: Sequence[Plan],
    tokens: Tensor,
    prompt_tokens: int | None = None,
) -> list[Scores]:
    """Scores of the original model, then of each plan, on one batch of token ids,
    (batch, tokens), as `evaluate`.
    """
    replay = Replay(model, [Plan(), *plans])
    scorer = TokenScorer(model)
    return _scores(replay, scorer, tokens, plans, prompt_tokens)


def _scores(
    replay: Replay,
    scorer: TokenScorer,
    tokens: Tensor,
    plans: Sequence[Plan],
    prompt_tokens: int | None,
) -> list[Scores]:
    """Those of the replay's plans, the original model and `plans`, on one batch of
    token ids, (batch, tokens).
    """
    check_prompt(plans, tokens.shape[1], prompt_tokens)
    start = prompt_tokens or 1  # nothing predicts the first token
    targets = tokens[:, start:].flatten()  # (rows,)
    recording = record(replay.model, prompt_tokens, input_ids=tokens)
    found: dict[int, Scores] = {}
    dense: Dense | None = None
    likeliest = targets  # until the original model's are known
    with torch.inference_mode():
        for numbers, hidden in replay.hidden_states(recording):
            predicting = hidden[:, start - 1 : -1]
            rows = predicting.flatten(0, 1)  # (rows, hidden)
            if dense is None:  # the original model comes first
                scores, dense = scorer.dense(rows, targets, likeliest=True)
                likeliest = scores.likeliest
            else:
                scores = scorer.score(rows, targets, dense, likeliest=True)
            same = (scores.likeliest == likeliest).to(scores.nll)
            by_token = [scores.nll, scores.kl, same]  # (rows,) each
            values = torch.stack([value.to(same.device) for value in by_token])
            by_sequence = values.view(3, len(tokens), -1).mean(-1)  # (3, batch)
            nll, kl, agreement = map(tuple, by_sequence.tolist())
            of_plan = Scores(nll=nll, kl=kl, top1_agreement=agreement)
            found |= dict.fromkeys(numbers, of_plan)
    return [found[number] for number in range(replay.plans)]


def check_prompt(plans: Sequence[Plan], tokens: int, prompt_tokens: int | None) -> None:
    """Raise `UsageError` unless `prompt_tokens` of `tokens` leave something to score,
    and something to skip.
    """
    whole = [plan.prefill.last_tokens for plan in plans if plan.prefill]
    needed = max(whole, default=0)
    if prompt_tokens is None:
        if needed:
            problem = (
                "a plan skips sublayers in the prompt alone, and nothing says which"
                " tokens are the prompt"
            )
            half = max(tokens // 2, 1)
            raise UsageError(
                f"{problem}: give prompt_tokens (--prompt-tokens), such as {half}"
            )
        return
    if not 1 <= prompt_tokens < tokens:
        problem = (
            f"a prompt of {prompt_tokens} tokens leaves nothing to score in windows of"
            f" {tokens}"
        )
        raise UsageError(f"{problem}: give 1 to {tokens - 1}, or longer windows")
    if prompt_tokens <= needed:
        problem = (
            f"of a prompt of {prompt_tokens} tokens nothing is skipped where its last"
            f" {needed} run whole"
        )
        raise UsageError(f"{problem}: give more than {needed} (--prompt-tokens)")


def gather(batches: Iterable[Sequence[Scores]]) -> list[Quality]:
    """A `Quality` per plan, from the scores of each batch: of the original model first,
    and then of each plan.
    """
    by_plan = zip(*batches)
    dense, *rest = (reduce(add, parts) for parts in by_plan)
    return [summarize(scores, dense) for scores in rest]


def summarize(scores: Scores, dense: Scores) -> Quality:
    """Means and errors over sequences, paired with the original model's scores on the
    same sequences.
    """
    found: dict[str, float] = {}
    pairs = zip(scores.nll, dense.nll)
    differences = [value - base for value, base in pairs]
    samples = {
        "nll": scores.nll,
        "delta_nll": differences,
        "kl": scores.kl,
        "top1_agreement": scores.top1_agreement,
    }
    for name, values in samples.items():
        mean, error = mean_and_error(values)
        found[name] = mean
        found[f"{name}_se"] = error
    largest = 700.0  # exp of more overflows
    return Quality(
        **found,
        perplexity=math.exp(min(found["nll"], largest)),
        sequences=len(scores.nll),
    )


@dataclass(frozen=True)
class Passage:
    """A block's passage: the residual stream, (batch, tokens, hidden), of several side
    by side, around its parts.
    """

    block: Block
    before: Tensor
    after: Tensor
    # by kind, before and after that sublayer
    around: dict[Kind, tuple[Tensor, Tensor]]


Look = Callable[[Passage], None]


def measure_similarity(
    model: PreTrainedModel, batches: Iterable[Tensor]
) -> list[Similarity]:
    """Cosine similarity of the residual stream before and after each block, attention
    and MLP of the original model.

    `batches` are token ids, (batch, tokens) each. The last block is compared before the
    final norm. Costs less than a forward pass, since no head is run, and keeps one
    block's hidden states at a time. Raises `UsageError` for what are no token ids.
    Source: arXiv 2407.15516, Fig. 1: cos(h[l], h[l-1]), averaged over tokens.
    """
    found: dict[tuple[int, Skippable], list[Tensor]] = {}

    def look(passage: Passage) -> None:
        whole = passage.before, passage.after
        parts: list[tuple[Skippable, tuple[Tensor, Tensor]]] = [("block", whole)]
        parts += passage.around.items()
        for kind, (before, after) in parts:
            by_token = cosine_similarity(before.float(), after.float(), dim=-1)
            of_part = found.setdefault((passage.block.index, kind), [])
            of_part.append(by_token.mean(dim=-1))  # (batch,)

    with torch.no_grad():
        for tokens in checked(batches, model):
            walk(model, look, input_ids=tokens)
    structure = locate(model)
    mixers: dict[tuple[int, str], str | None] = {}  # where they are of several kinds
    if len(structure.mixers) > 1:
        for part in structure.sublayers:
            mixers[part.index, part.kind] = part.mixer
    rows: list[Similarity] = []
    for (layer, kind), values in found.items():
        by_sequence = torch.cat(values)  # (sequences,)
        mean, error = mean_and_error(by_sequence.tolist())
        rows.append(
            Similarity(
                layer=layer,
                kind=kind,
                cosine=mean,
                cosine_se=error,
                mixer=mixers.get((layer, kind)),
            )
        )
    return rows


def walk(model: PreTrainedModel, look: Look, **inputs: Tensor) -> None:
    """Have `look` see the original's passages on `inputs`, a block's states at a time,
    without running the head.
    """
    inner = base_model(model)
    structure = locate(inner)
    shape = inputs["input_ids"].shape

    def seen(passage: Passage) -> None:
        look(passage)
        if passage.block is structure.blocks[-1]:
            raise Enough

    def watched(layer: nn.Module, block: Block) -> Callable[..., object]:
        if any(part.stub for part in block.sublayers):
            return _inside(layer, block, shape, seen)
        return _one_by_one(layer, block, seen)

    with suppress(Enough), standing_in(inner, structure, watched):
        inner(**inputs, use_cache=False)


def _one_by_one(layer: nn.Module, block: Block, look: Look) -> Callable[..., object]:
    """A forward for a layer whose sublayers can be run one at a time."""

    def answer(arguments: Arguments, before: Tensor) -> Tensor:
        after = before
        around: dict[Kind, tuple[Tensor, Tensor]] = {}
        for part in block.sublayers:
            start = before if block.parallel else after
            end = run_branches(part.branches, layer, start, LayerCall(arguments))
            around[part.kind] = start, end
            adds = block.parallel and after is not before
            after = after + (end - start) if adds else end
        after = scaled(after, block.scale)
        look(Passage(block, before, after, around))
        return after

    return answering(layer, block, answer)


def _inside(
    layer: nn.Module, block: Block, shape: Sequence[int], look: Look
) -> Callable[..., object]:
    """A forward for a layer whose sublayers run only inside of it: with none, with the
    first, with all of them.
    """
    stubs = [part.stub for part in block.sublayers if part.stub]
    fewer = []
    for ran in range(len(stubs) + 1):
        missing = dict.fromkeys(stubs[ran:])
        fewer.append(stubbed_layer(layer, block.index, missing))

    def as_stream(state: Tensor) -> Tensor:
        """Any number of streams as one, (batch, tokens, hidden)."""
        begins = tuple(state.shape[:2])
        if state.dim() > 3 and begins != tuple(shape):  # Gemma 3n's streams come first
            state = state.movedim(0, 2)
        return state.flatten(2)

    def forward(*args: object, **kwargs: object) -> object:
        _, given = called_with(layer, args, kwargs)
        before = as_stream(given).clone()
        states = []
        for twin in fewer:  # the dense layer comes last: others read what it makes
            answer = twin(*args, **kwargs)
            states.append(as_stream(first(answer)))
        around = dict(zip(block.kinds, pairwise(states)))
        look(Passage(block, before, states[-1], around))
        return answer

    return forward
