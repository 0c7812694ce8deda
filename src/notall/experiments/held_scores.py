"""Scores of plans on held-out text, each computed once and kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from itertools import product
from operator import add
from typing import Annotated, NamedTuple

from pydantic import Field

from ..errors import UsageError
from ..plan import Plan, several
from ..progress import Progress, silent
from ..results.facts import Quality, Scores
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.record import Count, Record, SublayerNames, is_number
from ..strict_json import Settings
from .subject import Subject

UNREPAIRED = "none"
RepairName = Annotated[str, Field(pattern=r"^[\w.:-]{1,120}$")]  # also module:function


class ScoresRecord(
    Record, kind="scores", key=("batch", "repair", "names", "prompt_tokens")
):
    """Scores on one batch of token ids, by what is skipped; of the original model by
    nothing.
    """

    batch: Count = Field(description="its number, from 0")
    repair: RepairName = Field(
        UNREPAIRED, description="what made up for what is skipped"
    )
    prompt_tokens: Count | None = Field(
        None,
        description="first tokens of each sequence, its prompt, which are not scored",
    )
    scores: dict[SublayerNames, Scores]

    @property
    def names(self) -> tuple[str, ...]:
        """What is skipped in each of the scores."""
        return tuple(self.scores)


class Scored(NamedTuple):
    """What is scored: a plan, its repair, and behind how many tokens of each
    sequence.
    """

    repair: str
    skipped: str
    prompt_tokens: int | None = None

    @property
    def dense(self) -> Scored:
        """The original model on the same tokens."""
        return Scored(UNREPAIRED, "", self.prompt_tokens)


def scored_as(
    plan: Plan, repair: str = UNREPAIRED, prompt_tokens: int | None = None
) -> Scored:
    """The key of a plan's scores; `prompt_tokens` are not scored."""
    return Scored(repair, plan.skipped, prompt_tokens)


class HeldScores:
    """Scores of plans on the batches of a subject: missing ones are computed together,
    batch by batch.
    """

    def __init__(self, subject: Subject, about: Provenance) -> None:
        self.subject, self.about = subject, about
        self.kept = Ledger(subject.out, ScoresRecord, about)
        self._held = {
            (one.batch, *Scored(one.repair, skipped, one.prompt_tokens)): its
            for one in self.kept
            for skipped, its in one.scores.items()
        }

    def measure(
        self, plans: Mapping[Scored, Plan], doing: str, progress: Progress = silent
    ) -> None:
        """Of each of `plans`, which may be repaired; the dense one may be among
        them.
        """
        prompts = dict.fromkeys(key.prompt_tokens for key in plans)
        for number, prompt in product(range(len(self.subject.batches)), prompts):
            asked = [key for key in plans if key.prompt_tokens == prompt]
            missing = [key for key in asked if (number, *key) not in self._held]
            if missing:
                progress(number, len(self.subject.batches), doing)
                self._score(number, {key: plans[key] for key in missing}, prompt)
        progress(1, 1, doing)

    def _score(
        self, number: int, plans: Mapping[Scored, Plan], prompt: int | None
    ) -> None:
        """Of the batch of that number, all behind one prompt, and keep it."""
        dense = scored_as(Plan(), prompt_tokens=prompt)
        asked = [key for key in plans if key != dense]
        tokens = self.subject.batches[number]
        scores = self.subject.score([plans[key] for key in asked], tokens, prompt)
        found = dict(zip([dense, *asked], scores))
        self._held |= {(number, *key): found[key] for key in plans}
        by_repair: dict[str, dict[str, Scores]] = {}
        for key in plans:
            by_repair.setdefault(key.repair, {})[key.skipped] = found[key]
        about: Settings = {"batch": number, "provenance": self.about}
        if prompt:
            about["prompt_tokens"] = prompt
        records = [
            ScoresRecord(**about, repair=repair, scores=scores)
            for repair, scores in by_repair.items()
        ]
        self.kept.add(*records)

    def has(self, key: Scored) -> bool:
        """Whether every batch is scored."""
        return all(
            (number, *key) in self._held for number in range(len(self.subject.batches))
        )

    def scores(self, key: Scored) -> Scores:
        """Of all batches; what was no number is infinite. Raises `UsageError` for other
        numbers of sequences.
        """
        places = [(number, *key) for number in range(len(self.subject.batches))]
        held = [self._held[place] for place in places]
        for one, tokens in zip(held, self.subject.batches):
            if len(one.nll) != len(tokens):
                raise UsageError(
                    f"{self.kept.path} has scores of"
                    f" {several(len(one.nll), 'sequence')}, not {len(tokens)}; delete"
                    " that file, to score anew"
                )
        whole = {
            name: tuple(one if is_number(one) else math.inf for one in some)
            for name, some in reduce(add, held)
        }
        return Scores(**whole)

    def quality(self, key: Scored) -> Quality:
        """Compared with the original model on the same tokens."""
        from ..measuring.quality import summarize

        return summarize(self.scores(key), self.scores(key.dense))
