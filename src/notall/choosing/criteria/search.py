"""The search: greedy, but lazy, and then refined by swaps.

What a candidate cost when it was last evaluated is a good guess, since costs mostly
grow as more is skipped: it is evaluated again only at the top of the queue. Neighbours
of what was skipped are guessed anew, on a part of the text. Importances do not add up:
swaps that lower the objective follow, tried on a part of the text. Whole blocks undo
each other best in a row (2403.17887), which single swaps do not come to: the best run
is a second place to start from. What a prompt alone skips is seen by what is skipped
behind it least of all: so is the run up to the last unit.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...progress import Progress, Stages, silent
from ..budget import Budget, contiguous_runs, deepest_run
from ..evaluator import AfterRepair
from ..space import Choice, Skipped, Unit, names_in
from .one_pass import score_cosine
from .setting import Setting

SCREENED = 0.25  # the share of the text that guesses are made on
LOOKS = 4  # swaps tried on a part of the text for one that is evaluated on all of it

Swap = tuple[Unit, Unit]  # what is given back, and what is skipped for it


def search_sets(
    setting: Setting, budget: Budget, cheap: Mapping[Unit, float] | None = None
) -> Choice:
    """Lazy greedy, refined by swaps: the set that raises the objective least, as far as
    this search sees.

    `cheap` scores, else the cosine's, order the first round; the refinement ends after
    swaps worth `setting.patience` evaluations of the text that don't lower the
    objective. When it gets late, the set is completed by the guesses there are, so that
    what comes back meets the budget.
    """
    cheap = score_cosine(setting) if cheap is None else cheap
    # whole blocks are portable sets, which a search among single pairs does not always
    # find
    space = setting.space
    spaces = [space, replace(space, kind="block")] if space.by_pairs else [space]
    searches = [_Search(replace(setting, space=one), budget, cheap) for one in spaces]
    stages = Stages(
        setting.progress,
        sum(one.total for one in searches) + (1 + setting.patience) * space.by_pairs,
    )
    for one in searches:
        one.progress = stages.stage(one.total)
        one.guess(one.moves(frozenset()))
        one.settle()
        if one.space.kind == "block":
            one.start_from_a_run()
        if one.space.phase == "prefill":
            # the last unit first, as what little is behind it sees it least
            one.start_from(one.deepest()[::-1])
        if setting.late:
            break
    looking = searches[0]
    best = max(searches, key=lambda one: (budget.counted(one.skipped), -one.cost))
    if best is not looking:
        looking.go_on_from(best, stages.stage(1 + setting.patience))
        looking.settle()
    setting.progress(stages.steps, stages.steps, f"{len(looking.skipped)} skipped")
    # what was completed late by guesses is evaluated, so that its cost is known
    setting.evaluator.cost(looking.skipped)
    return Choice(looking.skipped, tuple(looking.order))


@dataclass
class _Search:
    """A set that grows and changes, and what it costs."""

    setting: Setting
    budget: Budget
    cheap: Mapping[Unit, float]
    progress: Progress = silent

    def __post_init__(self) -> None:
        self.space, self.evaluator = self.setting.space, self.setting.evaluator
        self.skipped: Skipped = frozenset()
        self.order: list[Unit] = []
        self.dense = self.cost = self.evaluator.cost(self.skipped)
        # what the objective rose by with each unit, as last evaluated
        self.rises: dict[Unit, float] = {}
        # by how much it falls when a unit runs again, on a part of the text
        self.falls: dict[Unit, float] = {}
        self.moves = functools.cache(self.space.moves)
        self.done = 0.0
        self.total = self._expected_evaluations()

    def _expected_evaluations(self) -> float:
        """About how many evaluations of the text the search takes."""
        units = len(self.space.units)
        # of the units that are skipped, about: a third where a limit decides
        share = self.budget.target / self.budget.saved(self.space.names)
        share = 1 / 3 if share == math.inf else min(share, 1)
        steps = units / (1 + self.space.by_pairs) * share
        # a guess for each unit; for blocks, of the runs from there on too
        guesses = units * SCREENED * (2 if self.space.kind == "block" else 1)
        # rechecks and swaps that gain are more after a repair, as measured
        more = 2.5 if isinstance(self.evaluator, AfterRepair) else 1
        growing = steps * (more * steps / 3 * self.setting.grown_on + SCREENED)
        return guesses + growing + more * self.setting.patience

    def guess(self, units: list[Unit]) -> None:
        """What each of these would cost on top of the skipped set, on a part of the
        text, what is cheap first.
        """
        self.evaluator.set_prefix(self.skipped)
        for unit in sorted(units, key=self._cheap):
            if self.setting.late:
                return
            self.rises[unit] = self._more(self.skipped.union(unit))

    def settle(self) -> None:
        """Grow and refine, in turn, until one of them changes nothing."""
        self.grow()
        while self.refine() and self.grow():
            # what swaps gained may leave room for more, where the budget is a limit on
            # the objective
            pass

    def start_from_a_run(self) -> None:
        """Refine the best run of units that follow each other, where it costs less than
        what is skipped now.
        """
        self.evaluator.set_prefix(frozenset())
        if self.budget.target == math.inf:
            return
        guesses = {
            run: self._more(names_in(run))
            for run in contiguous_runs(self.space, self.budget).values()
            if not self.setting.late
        }
        if guesses and not self.setting.late:
            self.start_from(min(guesses, key=guesses.__getitem__))

    def start_from(self, run: tuple[Unit, ...]) -> None:
        """Refine these units, where they save as much as is asked for and cost less
        than what is skipped now.
        """
        skipped = names_in(run)
        if not run or self.setting.late or skipped == self.skipped:
            return
        cost = self._evaluate(skipped)
        is_within = cost - self.dense <= self.budget.limit
        found = -self.budget.counted(skipped), cost
        now = -self.budget.counted(self.skipped), self.cost
        if is_within and found < now:
            self.skipped = skipped
            self.cost = cost
            self.order = [*run]
            self.rises = {}
            self.guess(self.moves(self.skipped))
            self.settle()

    def deepest(self) -> tuple[Unit, ...]:
        """The run up to the last unit that meets the budget; of a limit alone the
        longest that costs no more.
        """
        self.evaluator.set_prefix(frozenset())
        if self.budget.target < math.inf:
            return deepest_run(self.space, self.budget)
        units = self.space.units
        least, most = 0, len(units)
        while least < most and not self.setting.late:
            middle = (least + most + 1) // 2
            tail = names_in(units[-middle:])
            rise = math.inf
            if self.space.allows(tail):
                rise = self._evaluate(tail) - self.dense
            if rise <= self.budget.limit:
                least = middle
            else:
                most = middle - 1
        return units[len(units) - least :]

    def go_on_from(self, other: "_Search", progress: Progress) -> None:
        """Take the set of another search, and refine it from here on."""
        self.skipped = other.skipped
        self.cost = other.cost
        self.order = [*other.order]
        self.progress = progress
        self.done = 0.0
        self.total = 1.0 + self.setting.patience

    def grow(self) -> bool:
        """Skip more until the budget is met, and say whether anything was."""
        before = self.skipped
        while not self.budget.met(self.skipped):
            unit = self._next()
            if unit is None:
                break
            rise = self.rises.get(unit, 0.0)
            if self.cost + rise - self.dense > self.budget.limit:
                break
            self.cost += rise
            self.skipped = self.skipped.union(unit)
            self.order.append(unit)
            if not self.budget.met(self.skipped):
                self.guess(self.space.neighbours(unit, self.skipped))
        return self.skipped != before

    def refine(self) -> bool:
        """Swap until `patience` evaluations brought nothing, tried on a part of the
        text first; say whether any did.
        """
        before = self._evaluate(self.skipped)  # which may have grown on a part of it
        self.cost = before
        self.falls = {}
        tried = {self.skipped}
        spent = 0.0
        guesses: dict[Swap, float] = {}
        self.evaluator.set_prefix(self.skipped)
        while spent < self.setting.patience and not self.setting.late:
            known = len(guesses)
            self._look(guesses, tried)
            spent += (len(guesses) - known) * SCREENED
            if not guesses:
                break
            back, unit = min(guesses, key=guesses.__getitem__)
            rise = guesses.pop((back, unit))
            # a set that grew on a part of the text trusts what that part says
            if rise > 0 and self.setting.grown_on < 1.0:
                continue
            spent += 1
            swapped = self.skipped.difference(back).union(unit)
            cost = self._evaluate(swapped)
            if cost < self.cost:
                self._swap(back, unit, cost)
                self.evaluator.set_prefix(self.skipped)
                guesses, spent = {}, 0.0
        return self.cost < before

    def _swap(self, back: Unit, unit: Unit, cost: float) -> None:
        """Run the sublayers of `back` again, and skip those of `unit`."""
        self.rises[back] = self.falls.pop(back)
        self.falls[unit] = self.rises[unit]
        self.skipped = self.skipped.difference(back).union(unit)
        self.cost = cost
        left = (tuple(name for name in one if name not in back) for one in self.order)
        self.order = [*filter(None, left), unit]

    def _look(self, guesses: dict[Swap, float], tried: set[Skipped]) -> None:
        """Try a few swaps on a part of the text, until one gains there."""
        for _ in range(LOOKS):
            swap = None if self.setting.late else self._best_swap(tried)
            if swap is None:
                return
            back, unit = swap
            swapped = self.skipped.difference(back).union(unit)
            tried.add(swapped)
            guesses[swap] = more = self._more(swapped)
            # over the set without `back`, which costs less by its fall
            self.rises[unit] = self.falls[back] + more
            if more < 0:
                return

    def _next(self) -> Unit | None:
        """The unit that is worth most, known on top of what is skipped now; a guess
        when it is late.
        """
        self.evaluator.set_prefix(self.skipped)
        moves, fresh = self.moves(self.skipped), set()
        while moves:
            best = min(moves, key=self._rate)
            if best in fresh:
                return best
            if self.setting.late:
                return best if self.budget.limit == math.inf else None
            self.rises[best] = self._more(
                self.skipped.union(best), self.setting.grown_on
            )
            fresh.add(best)
        return None

    def _rate(self, unit: Unit) -> tuple[float, float]:
        """What the queue is ordered by; what was never evaluated comes first, or last
        when it is late.
        """
        if unit not in self.rises:
            return (math.inf if self.setting.late else -math.inf), self._cheap(unit)
        return self.budget.rate(unit, self.rises[unit], self.skipped), self._cheap(unit)

    def _best_swap(self, tried: set[Skipped]) -> Swap | None:
        """What to give back and what to skip for it, of what was not tried, by the
        guesses there are.
        """
        best, best_gain = None, -math.inf
        enough = self.budget.counted(self.skipped)
        for back in self.space.returns(self.skipped):
            less = self.skipped.difference(back)
            if back not in self.falls:
                self.falls[back] = -self._more(less)
            for unit in self.moves(less):
                gain = self.falls[back] - self.rises.get(unit, math.inf)
                swapped = less.union(unit)
                if (
                    gain > best_gain
                    and swapped not in tried
                    and self.budget.saved(swapped) >= enough
                ):
                    best, best_gain = (back, unit), gain
        return best

    def _more(self, skipped: Skipped, share: float = SCREENED) -> float:
        """How much more than what is skipped now it costs, on a share of the text."""
        now = self.evaluator.cost(self.skipped, share)
        return self._evaluate(skipped, share) - now

    def _evaluate(self, skipped: Skipped, share: float = 1.0) -> float:
        cost = self.evaluator.cost(skipped, share)
        self.done += share
        # from there on ever slower: how many swaps gain is not known
        most = 0.8 * self.total
        rest = self.total - most
        beyond = max(self.done - most, 0.0) / rest
        shown = min(self.done, most) - rest * math.expm1(-beyond)
        self.progress(shown, self.total, self._so_far)
        return cost

    @property
    def _so_far(self) -> str:
        """What is skipped; before anything is, what costs least alone, of what was
        tried.
        """
        if self.skipped or not self.rises:
            return (  # none is -0.0000
                f"{len(self.skipped)} skipped, objective"
                f" {round(self.cost, 4) + 0.0:.4f}"
            )
        best = min(self.rises, key=self.rises.__getitem__)
        return (
            f"0 skipped, best of {len(self.rises)} tried alone: {' '.join(best)},"
            f" {self.rises[best]:+.4f}"
        )

    def _cheap(self, unit: Unit) -> float:
        return (
            self.cheap[unit]
            if unit in self.cheap
            else sum(self.cheap.get((name,), 0.0) for name in unit)
        )
