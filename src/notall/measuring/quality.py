"""What a plan costs in quality: NLL, KL to the dense model, and how often both would say the same next token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..models.texts import IDS, checked
from ..plan import Plan
from ..results.facts import Quality, Scores
from ..running.replay import Replay, record
from .statistics import mean_and_error
from .token_scores import TokenScorer


def evaluate(model: PreTrainedModel, plans: Sequence[Plan], batches: Iterable[Tensor]) -> list[Quality]:
    """The quality of each plan on `batches` of token ids, (batch, tokens) each, beside the dense model.

    All plans run together, sharing the sublayers before the first that differs. Raises `UsageError` when a plan
    does not fit, for what are no token ids of the model, and for a model inside a `skip`.
    """
    expect(plans, Sequence, "a list of plans, such as [plan]")
    for plan in plans:
        expect(plan, Plan, "plans, such as notall.Plan(attention=[3])")
    scores = [score(model, plans, tokens) for tokens in checked(batches, model)]
    if not scores:
        raise UsageError(f"there is no text to measure on: give a list of {IDS}")
    return gather(scores)


def score(model: PreTrainedModel, plans: Sequence[Plan], tokens: Tensor) -> list[Scores]:
    """Scores of the dense model, then of each plan, on one batch of token ids, (batch, tokens)."""
    replay, scorer = Replay(model, [Plan(), *plans]), TokenScorer(model)
    targets = tokens[:, 1:].flatten()
    found: dict[int, Scores] = {}
    dense, likeliest = None, targets
    with torch.inference_mode():
        for numbers, hidden in replay.hidden_states(record(replay.model, input_ids=tokens)):
            rows = hidden[:, :-1].flatten(0, 1)
            if dense is None:  # the dense model comes first
                scores, dense = scorer.dense(rows, targets, likeliest=True)
                likeliest = scores.likeliest
            else:
                scores = scorer.score(rows, targets, dense, likeliest=True)
            same = (scores.likeliest == likeliest).to(scores.nll)
            values = torch.stack([value.to(same.device) for value in (scores.nll, scores.kl, same)])
            nll, kl, agreement = map(tuple, values.view(3, len(tokens), -1).mean(-1).tolist())  # of each sequence
            found |= dict.fromkeys(numbers, Scores(nll=nll, kl=kl, top1_agreement=agreement))
    return [found[number] for number in range(len(plans) + 1)]


def gather(batches: Iterable[Sequence[Scores]]) -> list[Quality]:
    """The quality of each plan from what `score` answers for each batch."""
    dense, *rest = (reduce(add, parts) for parts in zip(*batches))
    return [summarize(scores, dense) for scores in rest]


def summarize(scores: Scores, dense: Scores) -> Quality:
    """Means and errors over sequences, paired with the dense model's scores on the same sequences."""
    nll, nll_se = mean_and_error(scores.nll)
    delta, delta_se = mean_and_error([value - base for value, base in zip(scores.nll, dense.nll)])
    kl, kl_se = mean_and_error(scores.kl)
    agreement, agreement_se = mean_and_error(scores.top1_agreement)
    return Quality(
        nll=nll,
        nll_se=nll_se,
        delta_nll=delta,
        delta_nll_se=delta_se,
        perplexity=math.exp(min(nll, 700.0)),
        kl=kl,
        kl_se=kl_se,
        top1_agreement=agreement,
        top1_agreement_se=agreement_se,
        sequences=len(scores.nll),
    )
