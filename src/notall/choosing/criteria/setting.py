"""What a criterion is given, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from ...progress import Progress, silent
from ..budget import Budget
from ..evaluator import Evaluator, Spent
from ..searching import PATIENCE
from ..space import Skipped, Space, Unit

UnitScores = Mapping[Unit, float]  # the lowest is skipped first


@dataclass(frozen=True)
class Setting:
    """A model, the sets to choose from, a calibration text ((batch, tokens) token ids each), and what evaluates sets.

    `deadline` is when to stop looking, on the clock of `time.monotonic`; `patience` is how many evaluations may
    bring nothing before a search ends; `progress` is told how far the choice is.
    """

    model: PreTrainedModel
    space: Space
    batches: Sequence[Tensor]
    evaluator: Evaluator
    seed: int = 0
    deadline: float = float("inf")
    patience: int = PATIENCE
    progress: Progress = silent

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def until(self, share: float) -> Setting:
        """The same, late when this share of the time that is left has passed."""
        now = time.monotonic()
        return replace(self, deadline=now + share * max(0.0, self.deadline - now))

    def passed(self, passes: float, since: float) -> None:
        """Count passes over the calibration text that began at `since`, on the clock of `time.process_time`."""
        share = sum(tokens.numel() for tokens in self.batches) / self.evaluator.tokens
        executions = passes * share * self.evaluator.forward
        self.evaluator.spent.add(Spent(1, executions, executions, time.process_time() - since))


@dataclass(frozen=True)
class Chosen:
    """A set, and in which order it came to be: what was skipped first comes first, what was swapped in last."""

    skipped: Skipped
    order: tuple[Unit, ...]


def take(setting: Setting, scores: UnitScores, budget: Budget) -> Chosen:
    """The units with the lowest scores, until the budget is met; a portable set takes the pairs of the lowest sums.

    Where the budget is a limit on the objective, sets are evaluated as they grow, and the last within it is taken.
    """
    skipped: Skipped = frozenset()
    order: list[Unit] = []
    dense = setting.evaluator.cost(skipped) if budget.target == float("inf") else 0.0

    def sum_of(unit: Unit) -> float:
        return scores[unit] if unit in scores else sum(scores[name,] for name in unit)

    while not budget.met(skipped):
        moves = setting.space.moves(skipped)
        if not moves:
            break
        unit = min(moves, key=sum_of)
        grown = skipped.union(unit)
        if budget.target == float("inf") and setting.evaluator.cost(grown) - dense > budget.limit:
            break
        skipped = grown
        order.append(unit)
    return Chosen(skipped, tuple(order))
