"""How many tokens of a draft the original accepts, found by one pass of both over text
that the original model wrote.

Greedy, a drafted token is accepted where it is the original's first choice. Sampled,
one drafted from q is with the probability min(1, p/q), any with sum(min(p, q)), and one
that the text goes on with with min(p, q) / p. Source: Leviathan et al. 2023, arXiv
2211.17192.
"""

import math
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

    # before it is known which token that is
    expected: tuple[float, ...]
    # given that the text goes on as it does; greedy both are the same, 0 or 1
    known: tuple[float, ...]


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
        drawn = sample(model, prompts, new_tokens, seed=seed)  # (B, P + new tokens)
        new = drawn[:, prompts.shape[1] :]
        rows = [up_to_end(model, row) for row in new.tolist()]
    return [torch.tensor(row, device=prompts.device) for row in rows]


def judge_draft(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompt: Tensor,
    text: Tensor,
    decoding: Decoding,
) -> Accepted:
    """Of each token of `text`, (tokens,), which `model` wrote behind `prompt`, (P,): is
    it accepted from `draft`?
    """
    whole = torch.cat([prompt, text])
    tokens = whole[None, :-1]  # (1, P + tokens - 1)
    count = len(text)

    def logits_of(one: PreTrainedModel) -> Tensor:
        """Of the tokens of the text, (tokens, vocabulary)."""
        last = last_logits(one, count)
        logits: Tensor = one(input_ids=tokens, use_cache=False, **last).logits
        return logits[0, -count:].float()

    with torch.inference_mode():
        p = logits_of(model)
        q = logits_of(draft)
        if decoding == "greedy":
            is_same = q.argmax(-1) == text  # (tokens,)
            same = tuple(is_same.float().tolist())
            return Accepted(same, same)
        p = p.softmax(-1)
        q = q.softmax(-1)
        column = text[:, None]
        text_p = p.gather(1, column)[:, 0]  # (tokens,)
        text_q = q.gather(1, column)[:, 0]
        known = (text_q / text_p).clamp(max=1)
        overlap = torch.minimum(p, q)  # (tokens, vocabulary)
        expected = overlap.sum(-1).clamp(max=1)  # (tokens,)
        return Accepted(tuple(expected.tolist()), tuple(known.tolist()))


def acceptance(texts: Sequence[Accepted], place: int) -> tuple[float, float]:
    """The chance that token `place` of a draft, from 1, is accepted once all before it
    were, and its error; or nan.
    """

    def chance(some: Sequence[Accepted]) -> float:
        comes_there: list[float] = []
        both: list[float] = []  # comes there, and is accepted
        for text in some:
            for start in range(len(text.known) - place + 1):
                token = start + place - 1
                chance_before = math.prod(text.known[start:token])
                comes_there.append(chance_before)
                both.append(chance_before * text.expected[token])
        weight = math.fsum(comes_there)
        return math.fsum(both) / weight if weight else math.nan

    return chance(texts), jackknife_error(chance, texts)


def tokens_per_round(texts: Sequence[Accepted], drafted: int) -> tuple[float, float]:
    """How many tokens a round of `drafted` tokens and their check gives, and its
    standard error over the texts.
    """

    def mean(some: Sequence[Accepted]) -> float:
        tokens = sum(len(text.known) for text in some)
        taken = math.fsum(rounds(text.known, drafted) for text in some)
        return tokens / taken

    return mean(texts), jackknife_error(mean, texts)


def rounds(known: Sequence[float], drafted: int) -> float:
    """How many rounds write a text whose tokens are accepted with these chances; none
    drafts more than is left.
    """
    count = len(known)
    begins = [1.0] + [0.0] * count  # the chance that a round begins at each token
    for start in range(count):
        alive = begins[start]
        last = min(start + drafted, count - 1)
        for place in range(start, last):
            chance = known[place]
            begins[place + 1] += alive * (1 - chance)
            alive *= chance
        begins[last + 1] += alive
    return math.fsum(begins[:-1])
