"""Importance criteria, one idea a file. A new one is a function and a line in `_ALL`,
or is of `GROUP`.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace

from ...entry_points import installed_names, named, takes
from ...errors import UsageError, shortened
from ..budget import Budget
from ..space import UNIT_KINDS, Choice, Space
from . import search
from .data_free import (
    has_projections,
    score_deepest,
    score_gate_norm,
    score_random,
    score_shallowest,
)
from .losses import choose_by_evolution, choose_greedily, score_leave_one_out
from .one_pass import (
    choose_angular,
    score_cosine,
    score_first_order,
    score_fisher,
    score_relative_magnitude,
)
from .quadratic import choose_quadratic
from .setting import Criterion, Setting, UnitScores, take

__all__ = [
    "Choice",
    "Criterion",
    "CriterionLike",
    "Setting",
    "UnitScores",
    "criterion",
    "every_criterion",
]

_ALL = (
    Criterion("deepest", score=score_deepest, reads="config"),
    Criterion("shallowest", score=score_shallowest, reads="config"),
    Criterion("random", score=score_random, reads="config"),
    Criterion("cosine", score=score_cosine),
    Criterion(
        "angular", choose=choose_angular, kinds=("block",), passes=lambda n, count: 1
    ),
    Criterion("magnitude", score=score_relative_magnitude),
    Criterion("first-order", score=score_first_order),
    Criterion("fisher", score=score_fisher),
    Criterion(
        "gate-norm",
        score=score_gate_norm,
        reads="weights",
        kinds=("attention",),
        layers=has_projections,
    ),
    Criterion(
        "leave-one-out",
        score=score_leave_one_out,
        reads="objective",
        passes=lambda n, count: n / 2,
    ),
    Criterion(
        "greedy",
        choose=choose_greedily,
        reads="objective",
        passes=lambda n, count: n * count / 2,
    ),
    Criterion(
        "evolution",
        choose=choose_by_evolution,
        reads="objective",
        passes=lambda n, count: 150,
    ),
    Criterion(
        "quadratic",
        choose=choose_quadratic,
        reads="objective",
        passes=lambda n, _: n**2 / 24,
    ),
    Criterion("search", choose=search.search_sets, reads="objective"),
)
CRITERIA = {one.name: one for one in _ALL}
GROUP = "notall.criteria"  # of entry points

CriterionLike = str | Criterion | Callable[..., object]  # see `criterion`


def criterion(given: CriterionLike) -> Criterion:
    """The criterion of a name: one that `notall criteria` lists, or `module:function`.

    A function becomes one: of a `Setting`, it scores; of a `Setting` and a `Budget`, it
    chooses. A `Criterion` is itself. Raises `UsageError` for a name that there is
    nothing of, and for a module that cannot be imported.
    """
    if isinstance(given, str):
        name, found = given, named(given, CRITERIA, GROUP, "criterion")
    else:
        name, found = getattr(given, "__name__", "criterion"), given
    if isinstance(found, Criterion):
        return (
            replace(found, name=name)
            if isinstance(given, str) and found.name != name
            else found
        )
    if not inspect.isfunction(found):
        raise UsageError(
            f"{shortened(name)} is no criterion: give a function from a Setting to"
            " scores, or a Criterion"
        )
    if takes(found, 1):
        return Criterion(name, score=found)
    if takes(found, 2):
        return Criterion(name, choose=found)
    raise UsageError(
        f"{shortened(name)} is no criterion: let it take a Setting, and a Budget if it"
        " chooses itself"
    )


def every_criterion() -> dict[str, Criterion]:
    """By name, those of installed packages too, but for those that fail: they are
    warned of.
    """
    found = dict(CRITERIA)
    for name in installed_names(GROUP):
        try:
            found[name] = criterion(name)
        except UsageError as error:
            warnings.warn(f"an installed criterion is left out: {error}", stacklevel=2)
    return found


def suits(given: CriterionLike, space: Space) -> bool:
    kind = (
        space.kind if space.kind in UNIT_KINDS else "attention"
    )  # which all mixers are
    return kind in criterion(given).kinds


def choose(given: CriterionLike, setting: Setting, budget: Budget) -> Choice:
    """What a criterion skips of `setting.space` to meet `budget`. Raises `UsageError`
    where it can't.
    """
    one = criterion(given)
    if not set(setting.space.names) <= budget.saves.keys():
        raise UsageError(
            f"the budget ({budget.description}) is of another space: make it of the"
            " space to choose from"
        )
    if not suits(one, setting.space):
        raise UsageError(
            f"{one.name} chooses among {' and '.join(one.kinds)} only, not"
            f" {setting.space.kind}"
        )
    return (
        take(setting, one.scores(setting), budget)
        if one.score
        else one.chosen(setting, budget)
    )
