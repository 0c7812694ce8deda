"""Many machines: plans that lie together in their tree, spread over the workers of a
Ray cluster (the extra `ray`).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..measuring.quality import score
from ..plan import Plan
from ..results.facts import Scores
from ..running.cluster import Pool, joined
from ..running.steps import live_steps
from ..structure.model_structure import ModelStructure
from .scoring import BatchSize, Request, RequestScores, Scorer, common

SLICE = 256  # requests that are answered before anything is kept


class Workers(AbstractContextManager["Workers"]):
    """Workers of a Ray cluster, each with the model of `load_options`, the arguments of
    `notall.load`.

    There are `count` of them, or as many as the GPUs allow at `gpus` each, or without
    GPUs as many as half of the CPUs. Raises `UsageError` when no cluster is at
    `address`, when it has no room, and when a worker can't load the model.
    """

    def __init__(
        self,
        load_options: Mapping[str, Any],
        structure: ModelStructure,
        address: str = "local",
        *,
        count: int | None = None,
        gpus: int = 1,
    ) -> None:
        self.structure = structure
        with ExitStack() as stack:
            stack.enter_context(joined(address))
            self.pool = Pool(_Worker, load_options, count, gpus)
            stack.callback(self.pool.close)
            self.held = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        self.held.close()

    def score(
        self, plans: Sequence[Plan], tokens: Tensor, prompt_tokens: int | None = None
    ) -> list[Scores]:
        """As `quality.score`: scores of the original model, then of each plan, on one
        batch of token ids.
        """
        groups = self._split(plans)
        asked = [
            ([plans[number] for number in group], tokens.cpu(), prompt_tokens)
            for group in groups
        ]
        answers = self.pool.run([("score", arguments) for arguments in asked])
        found = {
            number: scores
            for group, (_, *rest) in zip(groups, answers)
            for number, scores in zip(group, rest)
        }
        return [answers[0][0], *(found[number] for number in range(len(plans)))]

    def score_requests(
        self,
        plans: Sequence[Plan],
        requests: Sequence[Request],
        batch_size: BatchSize = "auto",
    ) -> Iterator[RequestScores]:
        """As `Scorer.score`, some requests at a time, of which those that begin alike
        are together.
        """
        order = sorted(
            range(len(requests)), key=lambda number: requests[number].sequence
        )
        for start in range(0, len(order), SLICE):
            numbers = order[start : start + SLICE]
            groups, some = self._split(plans), [requests[number] for number in numbers]
            tasks = [
                (
                    "score_requests",
                    ([plans[number] for number in group], some, batch_size),
                )
                for group in groups
            ]
            likely = torch.empty(len(plans), len(some), dtype=torch.float64)
            missed = torch.empty_like(likely)
            for group, batches in zip(groups, self.pool.run(tasks)):
                for scores in batches:
                    places = torch.tensor(group)[:, None], torch.tensor(scores.requests)
                    likely[places], missed[places] = (
                        scores.log_likelihoods,
                        scores.missed,
                    )
            yield RequestScores(numbers, likely, missed)

    def _split(self, plans: Sequence[Plan]) -> list[list[int]]:
        return split_branches(self.structure, plans, len(self.pool.actors))


def split_branches(
    structure: ModelStructure, plans: Sequence[Plan], parts: int
) -> list[list[int]]:
    """The numbers of `plans` in at most `parts` groups of plans that share as much as
    they can.

    Plans are put in the order in which a walk through their tree meets them, and cut so
    that the largest group has as little work, sublayers and heads, as cutting that
    order allows: the first plan of a group pays for its whole path.
    """
    paths = [
        tuple(part.name for _, live in live_steps(structure, plan) for part in live)
        for plan in plans
    ]
    order = sorted(range(len(plans)), key=paths.__getitem__)

    def filled(most: int) -> list[list[int]]:
        """Groups of at most `most` work each, each as full as it gets."""
        groups: list[list[int]] = []
        work = most
        for number in order:
            path = paths[number]
            work += (
                len(path) - (common(paths[groups[-1][-1]], path) if groups else 0) + 1
            )
            if work > most:
                groups.append([])
                work = len(path) + 1
            groups[-1].append(number)
        return groups

    return next(
        groups
        for most in count(max(map(len, paths)) + 1)
        if len(groups := filled(most)) <= parts
    )


class _Worker:
    """What runs on a machine of the cluster."""

    def __init__(self, **load_options: Any) -> None:
        from ..models.loading import load

        self.model, _ = load(**load_options)
        self.scorer = cache(lambda batch_size: Scorer(self.model, batch_size))

    def ready(self) -> int:
        return os.getpid()

    def score(
        self, plans: list[Plan], tokens: Tensor, prompt_tokens: int | None = None
    ) -> list[Scores]:
        return score(self.model, plans, tokens, prompt_tokens)

    def score_requests(
        self, plans: list[Plan], requests: list[Request], batch_size: BatchSize
    ) -> list[RequestScores]:
        return list(self.scorer(batch_size).score(plans, requests))
