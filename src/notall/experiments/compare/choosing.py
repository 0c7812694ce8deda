"""What each criterion chooses, kept in the folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...entry_points import hash_of_source
from ...progress import Progress
from ...results.facts import SearchCost
from ...results.ledger import Ledger
from ...results.provenance import Provenance
from ...results.repairs import EvaluationRecord
from ...strict_json import Settings
from ..subject import Subject
from .options import AskedChoice, CalibratedObjective
from .plans import file_name
from .records import CHOICE_FIELDS, ChoiceRecord

if TYPE_CHECKING:
    from ...choosing.criteria import UnitScores


class Choosing:
    """Runs each criterion, or takes its choice from the folder where it is there."""

    def __init__(
        self,
        subject: Subject,
        objectives: Mapping[str, CalibratedObjective],
        about: Provenance,
    ) -> None:
        self.subject, self.objectives, self.about = subject, objectives, about
        self.scored: dict[tuple[str, str, str], tuple[UnitScores, SearchCost]] = {}
        self.held = Ledger(
            subject.out,
            ChoiceRecord,
            lambda record: self._about(record.criterion, record.objective),
        )

    def choices(
        self, asked: Sequence[tuple[AskedChoice, Progress]]
    ) -> list[ChoiceRecord]:
        """The choice of each run, kept as soon as it is made."""
        for run, progress in asked:
            if run.key not in self.held:
                self.held.add(self._choose(run, progress))
            progress(1, 1, run.name)
        return [self.held[run.key] for run, _ in asked]

    def _about(self, criterion: str, objective: str) -> Provenance:
        """Where a choice by these comes from; nothing is held against those that are
        not asked for.
        """
        by = self.objectives.get(objective)
        goal = {"by": f"{by.objective.name} {by.objective.digest()}"} if by else {}
        return Provenance.of(self.about, **goal, **hash_of_source(criterion))

    def _choose(self, run: AskedChoice, progress: Progress) -> ChoiceRecord:
        """Scores are shared between counts."""
        from ...choosing.budget import by_count
        from ...choosing.criteria import Setting, choose, criterion
        from ...choosing.criteria.setting import take
        from ...choosing.evaluator import Evaluator
        from ...choosing.space import plan_of

        by, method = self.objectives[run.objective], criterion(run.criterion)
        evaluates = method.reads == "objective"
        folder = self.subject.out / Path(EvaluationRecord.file).stem
        evaluator = Evaluator(
            self.subject.model,
            by.objective,
            folder=folder if evaluates else None,
            # what uses the same objective shares evaluations
            name=f"{file_name(f'{run.criterion} {run.objective}')}.jsonl",
            settings=self.about,
        )

        def report(done: float, total: float, doing: str) -> None:
            progress(done, total, f"{run.name}: {doing}")

        setting = Setting(
            self.subject.model,
            run.space,
            by.batches,
            evaluator,
            self.subject.seed,
            progress=report,
        )
        budget, rise = by_count(run.space, run.count), math.nan
        if method.score:
            same = run.key[:3]
            if same not in self.scored:
                self.scored[same] = method.scores(setting), evaluator.spent
            scores, spent = self.scored[same]
            chosen = take(setting, scores, budget)
        else:
            chosen, spent = choose(run.criterion, setting, budget), evaluator.spent
            if evaluates:  # known already, or one evaluation more
                rise = evaluator.cost(chosen.skipped) - evaluator.cost(frozenset())
        asked: Settings = dict(zip(CHOICE_FIELDS, run.key))
        return ChoiceRecord(
            **asked,
            plan=plan_of(chosen.skipped),
            order=tuple(tuple(unit) for unit in chosen.order),
            calibration_tokens=sum(tokens.numel() for tokens in by.batches),
            spent=spent,
            forwards=spent.executions / evaluator.forward,
            calibration_delta=rise,
            provenance=self._about(run.criterion, run.objective),
        )
