"""Sets of skipped sublayers judged by what they lose after a cheap repair: what is worth skipping is not the same then.

The attention of an early layer, say, may cost several nats as it is, and next to nothing once its neighbours make up
for it. A cheap repair is fitted to half of the sequences, at the neighbours of gaps alone, and judged on the others:
its stream ends in what the last layer answers there, so that the judging costs the head alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.token_scores import Dense
from ..records.provenance import Provenance
from ..repairing.refitting import Calibration, Repair
from .evaluator import STATES_BYTES, Evaluator, Spent
from .objective import kl
from .space import Skipped, plan_of

RIDGES = (0.01, 0.3, 3.0)  # enough to tell sets apart
LATEST = 3  # repairs whose streams are kept
ONE_IN = 2  # sequences, of which one is judged and the other fitted to


class AfterRepair(Evaluator):
    """The KL that is left of any set of skipped sublayers after a cheap repair; `batches` are as for `repair`.

    A repair goes on from where it parts from that of the base set, or from one of the last few. `states_bytes` bounds
    the streams that are kept for that; the dense model's is kept whole. Raises `UsageError` for fewer than four
    sequences, and as `Evaluator` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        states_bytes: int = STATES_BYTES,
        folder: Path | None = None,
        settings: Provenance | Any = None,
    ) -> None:
        if sum(len(batch) for batch in batches) < 4:
            raise UsageError("a search for what is best after a repair takes four sequences or more; give more text")
        about = Provenance.of(settings or {}, after="a cheap repair")
        rows = [row for batch in batches for row in batch.split(1)]
        super().__init__(model, kl(rows), states_bytes=states_bytes, folder=folder, settings=about)
        self._base: Skipped = frozenset()
        self._repairs: dict[frozenset[int], dict[Skipped, Repair]] = {}
        self._texts: dict[frozenset[int], Calibration] = {}
        self._heads: dict[frozenset[int], list[Dense]] = {}

    @property
    def judged_by(self) -> str:
        return "kl after a repair"

    def stand_on(self, base: Skipped) -> None:
        """Keep the stream of this set's repair: what is asked for next begins like it."""
        self._base = base

    def _evaluate(self, sets: list[Skipped], numbers: frozenset[int]) -> None:
        part = numbers if len(numbers) > 1 else frozenset([0, 1])  # one to fit to, one to judge
        for skipped in sets:
            start = time.process_time()
            losses, ran = self._losses(skipped, part)
            share = len(part) / len(self.all)
            spent = Spent(1, ran * share, ran * share, time.process_time() - start)
            self._note(numbers, {skipped: self.objective.total(losses)}, spent)

    @torch.no_grad()
    def _losses(self, skipped: Skipped, numbers: frozenset[int]) -> tuple[dict[int, list[float]], int]:
        """Of each sequence that is judged its KL, and how many sublayers ran."""
        text = self._text(numbers)
        judged = [place for place, held in enumerate(text.held) if held]
        if not skipped:
            return {place: [0.0] for place in judged}, 0
        repair = self._repair(text, skipped, numbers)
        found = {}
        for place, dense in zip(judged, self._heads[numbers]):
            rows = repair.states[place][:, :-1].flatten(0, 1)
            found[place] = [float(self._scorer.score(rows, None, dense).kl.mean())]
        return found, repair.ran

    def _repair(self, text: Calibration, skipped: Skipped, numbers: frozenset[int]) -> Repair:
        others = self._repairs.setdefault(numbers, {})
        repair = Repair(text, plan_of(skipped), ridges=RIDGES, near=True, keep_all=True)
        repair.run(others=[*others.values()])
        others[skipped] = repair
        each = len(repair.steps) * sum(hidden.nbytes for hidden in repair.states)
        most = min(self._states_bytes // each, LATEST)
        for old in [one for one in others if one != self._base][: max(len(others) - most, 0)]:
            del others[old]
        return repair

    def _text(self, numbers: frozenset[int]) -> Calibration:
        if numbers not in self._texts:
            tokens = [self.objective.batches[number].inputs["input_ids"] for number in sorted(numbers)]
            text = self._texts[numbers] = Calibration(self.model, tokens, one_in=ONE_IN, keep_all=True)
            (last,) = text.dense.before(len(text.dense.lines))
            self._heads[numbers] = [
                self._scorer.dense(states[:, :-1].flatten(0, 1))[1] for states, held in zip(last, text.held) if held
            ]
        return self._texts[numbers]
