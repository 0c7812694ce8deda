"""What a criterion is, what it is given, and what it answers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...entry_points import explained_plugin, first_line
from ...errors import UsageError, expect, shortened
from ...progress import Progress, silent
from ...results.facts import SearchCost
from ...structure.locating import locate
from ...structure.model_structure import base_model
from ..budget import Budget
from ..evaluator import Evaluator
from ..search_config import SearchConfig
from ..space import UNIT_KINDS, Choice, Skipped, Space, Unit, UnitKind

UnitScores = Mapping[Unit, float]  # the lowest is skipped first


@dataclass(frozen=True)
class Setting:
    """A model, the sets to choose from, a calibration text ((batch, tokens) token ids
    each), and what evaluates sets.

    `deadline` is when to stop looking, on the clock of `time.monotonic`; `patience` is
    how many evaluations may bring nothing before a search ends; `progress` reports how
    far the choice is; `grown_on` is the share of the text that a search grows its sets
    on, before it refines them on all of it.
    """

    model: PreTrainedModel
    space: Space
    batches: Sequence[Tensor]
    evaluator: Evaluator
    seed: int = 0
    deadline: float = float("inf")
    patience: int = SearchConfig.patience
    progress: Progress = silent
    grown_on: float = 1.0

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def until(self, share: float) -> "Setting":
        """The same, late when this share of the time that is left has passed."""
        now = time.monotonic()
        return replace(self, deadline=now + share * max(0.0, self.deadline - now))

    def passed(self, passes: float, since: float, began: float | None = None) -> None:
        """Count passes over the calibration text.

        They began at `since` on the clock of `time.process_time`, and at `began` on
        `time.monotonic`'s.
        """
        share = sum(tokens.numel() for tokens in self.batches) / self.evaluator.tokens
        self.evaluator.spent += SearchCost(
            evaluations=1,
            executions=passes * share * self.evaluator.forward,
            seconds=time.process_time() - since,
            wall_seconds=0.0 if began is None else time.monotonic() - began,
        )


@dataclass(frozen=True)
class Criterion:
    """A way to choose: give `score`, of which the lowest is skipped first, or `choose`;
    its docstring describes it.

    `reads` is what it goes by: the "config" alone, the "weights", a "text", or the
    "objective". `kinds` are the kinds of units that it can choose among: attention,
    mlp, block, period, sublayer. `passes` says how many forward passes over the text it
    takes, about, from the number of units and how many of them are skipped; progress
    goes by it. `needs` names modules that an extra brings, and `layers` is a test that
    each layer of a model must pass.
    """

    name: str
    description: str = ""
    score: Callable[[Setting], UnitScores] | None = None
    choose: Callable[[Setting, Budget], Choice] | None = None
    reads: Literal["config", "weights", "text", "objective"] = "text"
    kinds: tuple[UnitKind, ...] = UNIT_KINDS
    passes: Callable[[int, float], float] | None = None
    needs: tuple[str, ...] = ()
    layers: Callable[[nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.choose is None):
            raise UsageError(
                f"the criterion {shortened(self.name)} needs one of score and choose"
            )
        if not self.description:
            object.__setattr__(
                self, "description", first_line(self.score or self.choose)
            )

    def cost(self, space: Space, count: float) -> float:
        """Forward passes to choose `count` of `space`, about; not stated, one, or as
        many as the search takes.
        """
        if self.passes:
            return self.passes(len(space.units), count)
        return 1.0 if self.score else 2 * count + 20

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a model's layers are such that this can choose among them."""
        layers = base_model(model).get_submodule(locate(model).layers).children()
        return self.layers is None or all(map(self.layers, layers))

    def scores(self, setting: Setting) -> UnitScores:
        """By `score`. Raises `UsageError` where it fails, and where a unit that may be
        skipped has no number.
        """
        assert self.score
        with self._explained(self.score):
            scores = self.score(setting)
        expect(
            scores,
            Mapping,
            "back a score for each unit, a dict, from the criterion"
            f" {shortened(self.name)}",
        )
        for unit in setting.space.units:
            score: object = scores.get(unit)
            if not isinstance(score, Real) or math.isnan(score):
                raise UsageError(
                    f"the criterion {shortened(self.name)} gives no number to {unit}:"
                    " score every unit"
                )
        return scores

    def chosen(self, setting: Setting, budget: Budget) -> Choice:
        """By `choose`. Raises `UsageError` where it fails, and where it returns no
        `Choice` that meets the budget.
        """
        assert self.choose
        with self._explained(self.choose):
            found = self.choose(setting, budget)
        named = f"the criterion {shortened(self.name)}"
        expect(found, Choice, f"back a Choice from {named}")
        if _is_ours(self.choose):
            return found
        unknown = sorted(set(found.skipped) - set(setting.space.names))
        if unknown:
            raise UsageError(
                f"{named} skips {shortened(unknown[0])}, which may not be: choose of"
                " setting.space.names"
            )
        if not setting.space.allows(frozenset(found.skipped)):
            names = ", ".join(setting.space.sorted(found.skipped))
            raise UsageError(
                f"{named} skips {shortened(names)}, which {setting.space} does not"
                " allow: ask space.moves"
            )
        if (
            math.isfinite(budget.target)
            and not budget.met(found.skipped)
            and not setting.late
        ):
            saved = f"{budget.saved(found.skipped):,.4g} of {budget.target:,.4g}"
            raise UsageError(
                f"{named} saves {saved}, and the budget is {budget.description}: go on"
                " until budget.met"
            )
        return found

    def _explained(
        self, function: Callable[..., object]
    ) -> AbstractContextManager[None]:
        """What code of others raises is one line; what notall's own does is to be seen
        whole.
        """
        return (
            nullcontext()
            if _is_ours(function)
            else explained_plugin(f"the criterion {self.name}")
        )


def _is_ours(function: Callable[..., object]) -> bool:
    return (
        getattr(function, "__module__", "").partition(".")[0]
        == __name__.partition(".")[0]
    )


def take(setting: Setting, scores: UnitScores, budget: Budget) -> Choice:
    """The units with the lowest scores (of a portable set, sums), until the budget is
    met, or would not be any more.
    """
    skipped, order = Skipped(), list[Unit]()
    dense = setting.evaluator.cost(skipped) if budget.target == math.inf else 0.0

    while not budget.met(skipped) and (moves := setting.space.moves(skipped)):
        unit = min(
            moves,
            key=lambda one: (
                scores[one] if one in scores else sum(scores[name,] for name in one)
            ),
        )
        grown = skipped.union(unit)
        if (
            budget.target == math.inf
            and setting.evaluator.cost(grown) - dense > budget.limit
        ):
            break
        skipped = grown
        order.append(unit)
    return Choice(skipped, tuple(order))
