"""A repair while it is under way: weights step by step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..records.ledger import Ledger
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.repair import RefitRecord
from ..running.repaired import RepairedPlan
from ..running.repaired_folders import PLAN, file_of, read_weights, write_weights


class Kept:
    """What was refit so far. The plan file comes last, so that a folder with one is whole."""

    def __init__(self, folder: Path, about: Provenance) -> None:
        self.folder = folder
        self.refits = Ledger(folder, RefitRecord, about)

    def weights(self, refit: RefitRecord) -> dict[str, Tensor]:
        """By their paths in the dense model; none where the step was left alone."""
        return {} if refit.ridge is None else read_weights(self.folder, file_of(refit))

    def add(self, refit: RefitRecord, weights: dict[str, Tensor]) -> None:
        """Weights first: a line says that they are there."""
        if weights:
            write_weights(self.folder / file_of(refit), weights)
        self.refits.add(refit)

    def has(self, steps: Iterable[tuple[str, ...]]) -> bool:
        """Whether all of these steps are done with, by the names of their sublayers."""
        return all((names,) in self.refits for names in steps)

    def finish(self, plan: Plan) -> RepairedPlan:
        """The plan with all that was refit."""
        weights = {path: weight for refit in self.refits for path, weight in self.weights(refit).items()}
        plan.save(self.folder / PLAN)
        return RepairedPlan.of(plan, weights=weights, refits=tuple(self.refits))
