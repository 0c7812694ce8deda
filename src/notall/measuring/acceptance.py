"""How many tokens of a draft the original accepts, found by one pass of both over text
that the original model wrote.

Greedy, a drafted token is accepted where it is the original's first choice. Sampled,
one drafted from q is with the probability min(1, p/q), any with sum(min(p, q)), and one
that the text goes on with with min(p, q) / p. Source: Leviathan et al. 2023, arXiv
2211.17192.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..results.facts import Decoding
from ..running.generating import greedy, sample, up_to_end
from .speed import last_logits
from .statistics import jackknife_error


@dataclass(frozen=True)
class Accepted:
    """Of one text, a value from 0 to 1 a token: how likely a token that is drafted in
    its place is accepted.
    """

    expected: tuple[float, ...]  # before it is known which token that is
    known: tuple[
        float, ...
    ]  # given that the text goes on as it does; greedy both are the same, 0 or 1


def write_texts(
    model: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    decoding: Decoding,
    *,
    seed: int = 0,
) -> list[Tensor]:
    """What `model` says behind `prompts`, (B, P), greedy or sampled at temperature 1:
    ids up to an end, (tokens,).
    """
    if decoding == "greedy":
        rows = greedy(model, prompts, new_tokens)
    else:
        drawn = sample(model, prompts, new_tokens, seed=seed)[
            :, prompts.shape[1] :
        ].tolist()
        rows = [up_to_end(model, row) for row in drawn]
    return [torch.tensor(row, device=prompts.device) for row in rows]


def judge(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompt: Tensor,
    text: Tensor,
    decoding: Decoding,
) -> Accepted:
    """Of each token of `text`, (tokens,), which `model` wrote behind `prompt`, (P,): is
    it accepted from `draft`?
    """
    tokens, count = torch.cat([prompt, text])[None, :-1], len(text)
    with torch.inference_mode():
        answers = (
            each(input_ids=tokens, use_cache=False, **last_logits(each, count))
            for each in (model, draft)
        )
        p, q = (
            answer.logits[0, -count:].float() for answer in answers
        )  # (tokens of the text, vocabulary)
        if decoding == "greedy":
            same = tuple((q.argmax(-1) == text).float().tolist())
            return Accepted(same, same)
        p, q = p.softmax(-1), q.softmax(-1)
        text_p, text_q = (each.gather(1, text[:, None])[:, 0] for each in (p, q))
        known = (text_q / text_p).clamp(max=1)  # (tokens,)
        return Accepted(
            tuple(torch.minimum(p, q).sum(-1).clamp(max=1).tolist()),
            tuple(known.tolist()),
        )


def acceptance(texts: Sequence[Accepted], place: int) -> tuple[float, float]:
    """The chance that token `place` of a draft, from 1, is accepted once all before it
    were, and its error; or nan.
    """

    def chance(some: Sequence[Accepted]) -> float:
        starts = [
            (text, start)
            for text in some
            for start in range(len(text.known) - place + 1)
        ]
        comes_there = [
            math.prod(text.known[start : start + place - 1]) for text, start in starts
        ]
        accepted = [text.expected[start + place - 1] for text, start in starts]
        weight = math.fsum(comes_there)
        return (
            math.fsum(map(operator.mul, comes_there, accepted)) / weight
            if weight
            else math.nan
        )

    return chance(texts), jackknife_error(chance, texts)


def tokens_per_round(texts: Sequence[Accepted], drafted: int) -> tuple[float, float]:
    """How many tokens a round of `drafted` tokens and their check gives, and its
    standard error over the texts.
    """

    def mean(some: Sequence[Accepted]) -> float:
        return sum(len(text.known) for text in some) / math.fsum(
            rounds(text.known, drafted) for text in some
        )

    return mean(texts), jackknife_error(mean, texts)


def rounds(known: Sequence[float], drafted: int) -> float:
    """How many rounds write a text whose tokens are accepted with these chances; none
    drafts more than is left.
    """
    begins = [1.0] + [0.0] * len(known)  # the chance that a round begins at each token
    for start in range(len(known)):
        alive, last = begins[start], min(start + drafted, len(known) - 1)
        for place in range(start, last):
            begins[place + 1] += alive * (1 - known[place])
            alive *= known[place]
        begins[last + 1] += alive
    return math.fsum(begins[:-1])
