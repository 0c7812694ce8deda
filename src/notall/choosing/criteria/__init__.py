"""Ways to choose what to skip, one idea a file.

A new one is one function, and a line in `CRITERIA`; of another package, an entry point of the group `notall.criteria`.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import UsageError, expect, shortened
from ...models.extensions import explained, installed_names, named, positional
from ...structure.anatomy import base_model
from ...structure.locating import locate
from ..budget import Budget
from ..searching import search
from ..space import UNIT_KINDS, Space, UnitKind
from .evolution import choose_by_evolution
from .features import choose_angular, score_cosine, score_relative_magnitude
from .gradients import score_first_order, score_fisher
from .losses import choose_greedily, score_leave_one_out
from .position import score_deepest, score_random, score_shallowest
from .quadratic import choose_quadratic
from .setting import Chosen, Setting, UnitScores, take
from .weights import has_projections, score_gate_norm

__all__ = [
    "CRITERIA",
    "Chosen",
    "Criterion",
    "Setting",
    "UnitScores",
    "choose",
    "criterion",
    "every_criterion",
    "suits",
]


@dataclass(frozen=True)
class Criterion:
    """A way to choose: give `score`, of which the lowest is skipped first, or `choose`.

    Set `measured` where it goes by the objective. `kinds` are the kinds of units that it can choose among: attention,
    mlp, block, period, sublayer. `needs` names modules that an extra brings, and `layers` a test that each layer of a
    model must pass.
    """

    name: str
    description: str
    score: Callable[[Setting], UnitScores] | None = None
    choose: Callable[[Setting, Budget], Chosen] | None = None
    measured: bool = False
    kinds: tuple[UnitKind, ...] = UNIT_KINDS
    needs: tuple[str, ...] = ()
    layers: Callable[[nn.Module], bool] | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.choose is None):
            raise UsageError(f"the criterion {shortened(self.name)} needs one of score and choose")

    def scores(self, setting: Setting) -> UnitScores:
        """By `score`. Raises `UsageError` where it fails, and where a unit that may be skipped has no number."""
        assert self.score
        with self._explained():
            scores = self.score(setting)
        expect(scores, Mapping, f"back a score for each unit, a dict, from the criterion {shortened(self.name)}")
        for unit in setting.space.units:
            score: Any = scores.get(unit)
            if not isinstance(score, Real) or math.isnan(score):
                raise UsageError(f"the criterion {shortened(self.name)} gives no number to {unit}: score every unit")
        return scores

    def chosen(self, setting: Setting, budget: Budget) -> Chosen:
        """By `choose`. Raises `UsageError` where it fails, and where it returns no `Chosen` that meets the budget."""
        assert self.choose
        with self._explained():
            found = self.choose(setting, budget)
        expect(found, Chosen, f"back a Chosen from the criterion {shortened(self.name)}")
        if not self._is_ours:
            self._check(found, setting, budget)
        return found

    def _check(self, found: Chosen, setting: Setting, budget: Budget) -> None:
        """Raise `UsageError` for a set that cannot be skipped, and for one that saves too little in all the time."""
        named = f"the criterion {shortened(self.name)}"
        unknown = sorted(set(found.skipped) - set(setting.space.names))
        if unknown:
            raise UsageError(f"{named} skips {shortened(unknown[0])}, which may not be: choose of setting.space.names")
        if not setting.space.allows(frozenset(found.skipped)):
            told = ", ".join(setting.space.sorted(found.skipped))
            raise UsageError(f"{named} skips {shortened(told)}, which {setting.space} does not allow: ask space.moves")
        if math.isfinite(budget.target) and not budget.met(found.skipped) and not setting.late:
            saved = f"{budget.saved(found.skipped):,.4g} of {budget.target:,.4g}"
            raise UsageError(f"{named} saves {saved}, and the budget is {budget.description}: go on until budget.met")

    def _explained(self) -> AbstractContextManager[None]:
        """What code of others raises is one line; what notall's own does is to be seen whole."""
        return nullcontext() if self._is_ours else explained(f"the criterion {self.name}")

    @property
    def _is_ours(self) -> bool:
        return CRITERIA.get(self.name) is self

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a model's layers are such that this can choose among them."""
        held = base_model(model).get_submodule(locate(model).layers).children()
        return self.layers is None or all(map(self.layers, held))


def choose_by_search(setting: Setting, budget: Budget) -> Chosen:
    """The lazy search with its refinement (see `searching`), in the order of the cosine where nothing is known yet."""
    found = search(
        setting.space,
        budget,
        setting.evaluator,
        cheap=score_cosine(setting),
        patience=setting.patience,
        late=lambda: setting.late,
        progress=setting.progress,
    )
    return Chosen(found.skipped, found.order)


_ALL = (
    Criterion("deepest", "place: the deepest first (the paper's rule, 2407.15516)", score_deepest),
    Criterion("shallowest", "place: the shallowest first", score_shallowest),
    Criterion("random", "chance: an order drawn with the seed", score_random),
    Criterion("cosine", "1 - cosine before and after (LLM-Drop 2406.15786, ShortGPT 2403.03853)", score_cosine),
    Criterion("angular", "angle over a run of blocks (2403.17887)", choose=choose_angular, kinds=("block",)),
    Criterion("magnitude", "|f(x)| / |x + f(x)| (2312.09299)", score_relative_magnitude),
    Criterion("first-order", "gradient of the NLL to a gate (1611.06440)", score_first_order),
    Criterion("fisher", "the same gradient, squared per sequence (1801.05787)", score_fisher),
    Criterion(
        "gate-norm",
        "|W_Q W_K^T|, without a text (2512.20636)",
        score_gate_norm,
        kinds=("attention",),
        layers=has_projections,
    ),
    Criterion(
        "leave-one-out", "rise of the objective when only this unit is skipped", score_leave_one_out, measured=True
    ),
    Criterion("greedy", "the objective, step by step (SLEB, BlockPruner, FinerCut)", None, choose_greedily, True),
    Criterion("evolution", "sets that swap and are selected (EvoPress 2410.14649)", None, choose_by_evolution, True),
    Criterion(
        "quadratic",
        "the least sum of single and pairwise effects (after 2602.00161; extra: solver)",
        choose=choose_quadratic,
        measured=True,
        needs=("scipy",),
    ),
    Criterion("search", "lazy greedy, refined by swaps", None, choose_by_search, True),
)
CRITERIA = {one.name: one for one in _ALL}


GROUP = "notall.criteria"  # of entry points


Way = str | Criterion | Callable[..., Any]  # see `criterion`


def criterion(way: Way) -> Criterion:
    """The criterion of a name: one that `notall criteria` lists, or `module:function`.

    A function becomes one: of a `Setting`, it scores; of a `Setting` and a `Budget`, it chooses. A `Criterion` is
    itself. Raises `UsageError` for a name that there is nothing of, and for a module that cannot be imported.
    """
    if not isinstance(way, str):
        return _made(getattr(way, "__name__", "criterion"), way) if not isinstance(way, Criterion) else way
    return _made(way, named(way, CRITERIA, GROUP, "criterion"))


def every_criterion() -> dict[str, Criterion]:
    """By name, those of installed packages too, but for those that fail: they are warned of."""
    found = dict(CRITERIA)
    for name in installed_names(GROUP):
        try:
            found[name] = criterion(name)
        except UsageError as error:
            warnings.warn(f"an installed criterion is left out: {error}", stacklevel=2)
    return found


def _made(name: str, found: Any) -> Criterion:
    """A criterion by the name it was asked for; a function becomes one."""
    if isinstance(found, Criterion):
        return found if found.name == name else replace(found, name=name)
    if not inspect.isfunction(found):
        raise UsageError(f"{shortened(name)} is no criterion: give a function from a Setting to scores, or a Criterion")
    described = (inspect.getdoc(found) or "").partition("\n")[0].rstrip(".")
    taken = positional(found)
    if 1 not in taken and 2 not in taken:
        raise UsageError(f"{shortened(name)} is no criterion: let it take a Setting, and a Budget if it chooses itself")
    return Criterion(name, described, found) if 1 in taken else Criterion(name, described, choose=found)


def suits(way: Way, space: Space) -> bool:
    """Whether a criterion can choose from `space`."""
    return space.unit_kind in criterion(way).kinds


def choose(way: Way, setting: Setting, budget: Budget) -> Chosen:
    """What a criterion skips of `setting.space` to meet `budget`. Raises `UsageError` where it can't."""
    one = criterion(way)
    if not set(setting.space.names) <= budget.saves.keys():
        raise UsageError(f"the budget ({budget.description}) is of another space: make it of the space to choose from")
    if not suits(one, setting.space):
        raise UsageError(f"{one.name} chooses among {' and '.join(one.kinds)} only, not {setting.space.kind}")
    return take(setting, one.scores(setting), budget) if one.score else one.chosen(setting, budget)
