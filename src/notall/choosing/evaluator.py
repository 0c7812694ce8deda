"""The one engine that evaluates sets of skipped sublayers: for every criterion, and for the search.

Sets that keep the same first sublayers share them (see `replay`), and sets that are asked for one after the other go
on from the states of a base set, the trunk. Work is counted in sublayer executions over the whole calibration set.
What was evaluated is written down, so that a run that was killed asks for it again and has it at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..measuring.token_scores import Dense, TokenScorer
from ..models.loading import dtype_name
from ..records.ledger import Ledger
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..records.search import EvaluationRecord
from ..running.replay import Recording, Replay, Trunk, live_steps, record, step_name
from ..structure.anatomy import base_model
from ..structure.locating import locate
from .objective import Batch, Objective
from .space import Skipped, plan_of

STATES_BYTES = 2 * 2**30
WORDS = 8192  # of a larger vocabulary, for guesses


@dataclass
class Spent:
    """What evaluations took: how many, sublayers run over the whole calibration set, what they would be without
    sharing, and CPU seconds of all threads."""

    evaluations: int = 0
    executions: float = 0.0
    one_by_one: float = 0.0
    seconds: float = 0.0

    def add(self, other: Spent) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Evaluator:
    """The objective of any set of skipped sublayers; `spent` is what those asked for took, also in an earlier run.

    Going on after a kill, it runs the states of its trunk again and counts them: up to one forward pass more.
    `states_bytes` bounds the states kept of the trunk: where all of them don't fit, every second, third... is kept.
    `folder` keeps what was evaluated, in the file `name` if that is given; `settings` tell whose it is. Raises
    `UsageError` when it is another's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        states_bytes: int = STATES_BYTES,
        folder: Path | None = None,
        name: str | None = None,
        settings: Provenance | Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.objective = base_model(model), objective
        self.anatomy = locate(self.model)
        self.all = objective.part(1.0)
        self.tokens = sum(batch.tokens for batch in objective.batches)
        self.spent, self._counted = Spent(), set[tuple[Any, ...]]()
        self._known: dict[tuple[Any, ...], tuple[float, Spent]] = {}
        self._kept = self._open(folder, name, settings or {}) if folder else None
        self._recordings: list[Recording] | None = None
        self._trunks: dict[int, Trunk] = {}
        self._trunk = self._steps(frozenset())
        self._scorer = TokenScorer(self.model)
        self._guessers: dict[frozenset[int], TokenScorer] = {}
        self._dense_kept: dict[tuple[int, TokenScorer], Dense] = {}
        self._states_bytes = states_bytes

    @property
    def judged_by(self) -> str:
        return self.objective.name

    @property
    def forward(self) -> int:
        """Sublayer executions of one dense forward pass over the calibration set."""
        return len(self.anatomy.sublayers)

    def stand_on(self, base: Skipped) -> None:
        """Keep the states of this set: what is asked for next begins like it."""
        self._trunk = self._steps(base)

    def cost(self, skipped: Skipped, share: float = 1.0) -> float:
        """The objective of one set; or a guess at it, comparable with other guesses, on a `share` of the text.

        That is the first batches of each of its terms. Of a large vocabulary a guess takes what is likely and asked.
        """
        return self.costs([skipped], share)[0]

    def costs(self, sets: Sequence[Skipped], share: float = 1.0) -> list[float]:
        """The objective of each set; all are run together."""
        numbers = self.objective.part(share)
        new = [s for s in dict.fromkeys(sets) if self._key(s, numbers) not in self._known]
        if new:
            self._evaluate(new, numbers)
        return [self._recall(self._key(skipped, numbers)) for skipped in sets]

    def _recall(self, key: tuple[Any, ...]) -> float:
        cost, spent = self._known[key]
        if key not in self._counted:
            self._counted.add(key)
            self.spent.add(spent)
        return cost

    def _evaluate(self, sets: list[Skipped], numbers: frozenset[int]) -> None:
        start = time.process_time()
        replay = Replay(self.model, [plan_of(skipped) for skipped in sets])
        losses: list[dict[int, list[float]]] = [{} for _ in sets]
        ran = one_by_one = 0.0
        scorer = self._scorer if numbers == self.all else self._guesser(numbers)
        for number in sorted(numbers):
            before = replay.ran
            for place, items in self._run(replay, number, scorer):
                losses[place][number] = items
            share = self.objective.batches[number].tokens / self.tokens
            ran += (replay.ran - before) * share
            one_by_one += replay.one_by_one * share
        each = Spent(1, ran / len(sets), one_by_one / len(sets), (time.process_time() - start) / len(sets))
        self._note(numbers, {skipped: self.objective.total(found) for skipped, found in zip(sets, losses)}, each)

    @torch.inference_mode()
    def _run(self, replay: Replay, number: int, scorer: TokenScorer) -> list[tuple[int, list[float]]]:
        """For each of the replay's plans: its number, and the losses of the items of one batch."""
        batch, recording = self.objective.batches[number], self._recording(number)
        dense = self._dense(number, scorer) if batch.targets is None else None
        found = []
        for places, hidden in replay.hidden_states(recording, self._trunk_of(number)):
            scores = scorer.score(_asked(batch, hidden), batch.targets, dense)
            values = scores.kl if batch.targets is None else scores.nll
            items = batch.items(values).tolist()
            found += [(place, items) for place in places]
        return found

    def _recording(self, number: int) -> Recording:
        if self._recordings is None:
            with torch.inference_mode():
                self._recordings = [record(self.model, **batch.inputs) for batch in self.objective.batches]
        return self._recordings[number]

    @torch.inference_mode()
    def _guesser(self, numbers: frozenset[int]) -> TokenScorer:
        """What scores a part of the text: on a part of the vocabulary too, since it is for guesses."""
        if numbers not in self._guessers:
            targets = [found for number in numbers if (found := self.objective.batches[number].targets) is not None]
            dense = (self._dense_states(number) for number in numbers)
            self._guessers[numbers] = self._scorer.on_likely_words(dense, WORDS, targets)
        return self._guessers[numbers]

    def _dense(self, number: int, scorer: TokenScorer) -> Dense:
        if (number, scorer) not in self._dense_kept:
            _, self._dense_kept[number, scorer] = scorer.dense(self._dense_states(number))
        return self._dense_kept[number, scorer]

    def _dense_states(self, number: int) -> Tensor:
        replay = Replay(self.model, [Plan()])
        (_, hidden) = next(replay.hidden_states(self._recording(number), self._trunk_of(number)))
        return _asked(self.objective.batches[number], hidden)

    def _trunk_of(self, number: int) -> Trunk:
        trunk = self._trunks.get(number)
        if trunk is None:
            embedded = self._recording(number).embedded
            all_states = self.forward * self.tokens * embedded.shape[-1] * embedded.element_size()
            trunk = Trunk(self._trunk, math.ceil(all_states / self._states_bytes))
        if trunk.names != self._trunk:
            trunk = trunk.moved(self._trunk)
        self._trunks[number] = trunk
        return trunk

    def _steps(self, skipped: Skipped) -> tuple[str, ...]:
        return tuple(step_name(parts) for _, parts in live_steps(self.anatomy, plan_of(skipped)))

    # --- what is written down

    def _key(self, skipped: Skipped, numbers: frozenset[int]) -> tuple[Any, ...]:
        return skipped, "all" if numbers == self.all else len(numbers)

    def _note(self, numbers: frozenset[int], costs: Mapping[Skipped, float], spent: Spent) -> None:
        records = []
        for skipped, cost in costs.items():
            key = self._key(skipped, numbers)
            if not math.isfinite(cost):
                cost = math.inf  # a model that overflows without these is as bad as can be
            self._known[key] = cost, spent
            names = tuple(sorted(skipped))
            records.append(EvaluationRecord(skipped=names, batches=key[1], cost=cost, **vars(spent)))
        if self._kept is not None:
            self._kept.add(*records)

    def _open(
        self, folder: Path, name: str | None, settings: Provenance | Mapping[str, Any]
    ) -> Ledger[EvaluationRecord]:
        """What was evaluated before, and where more goes."""
        about = Provenance.of(
            settings,
            objective=self.objective.name,
            calibration=self.objective.digest(),
            fingerprint=self.anatomy.fingerprint,
            dtype=dtype_name(self.model),
            guesses=f"on {WORDS:,} words",
        )
        kept = Ledger(folder, EvaluationRecord, about, name=name)
        for line in kept:
            spent = Spent(line.evaluations, line.executions, line.one_by_one, line.seconds)
            cost = math.inf if line.cost is None else line.cost
            self._known[frozenset(line.skipped), line.batches] = cost, spent
        return kept


def _asked(batch: Batch, hidden: Tensor) -> Tensor:
    """The places at which the objective looks, (places, hidden), of (batch, tokens, hidden)."""
    return hidden[batch.rows.to(hidden.device), batch.columns.to(hidden.device)]
