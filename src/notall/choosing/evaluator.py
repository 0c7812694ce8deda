"""What evaluates sets of skipped sublayers, for every criterion and for the search: as
they are, or after a repair.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..measuring.token_scores import Dense, TokenScorer
from ..models.loading import dtype_name
from ..plan import Plan
from ..repairing.refitting import Refitting
from ..repairing.streams import DenseStream
from ..results.facts import SearchCost
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.record import RecordKey, is_number
from ..results.repairs import EvaluationRecord
from ..running.recording import Recording, record
from ..running.replay import Replay
from ..running.steps import PrefixCache
from ..structure.locating import locate
from ..structure.model_structure import base_model
from .objective import Objective, kl
from .search_config import SearchConfig
from .space import Skipped, Space, plan_of

GUESSED_TOKENS = 8192  # of a larger vocabulary, for guesses
RIDGES = (0.01, 0.3, 3.0)  # enough to tell sets apart
LATEST = 3  # repairs whose streams are kept
ONE_IN = 2  # sequences, of which one is judged and the other fitted to


class Evaluator:
    """The objective of any set of skipped sublayers; `spent` is what those asked for
    took, also in an earlier run.

    Going on after a kill, it runs the states of its prefix again and counts them: up to
    one forward pass more. `states_bytes` bounds the states kept of the prefix: where
    all of them don't fit, every second, third... is kept. `folder` keeps what was
    evaluated, in the file `name` if that is given; `settings` tell whose it is. `space`
    tells for which tokens sets are skipped: for every one without it. Raises
    `UsageError` when the folder is another's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        states_bytes: int = SearchConfig.states_bytes,
        folder: Path | None = None,
        name: str | None = None,
        settings: Provenance | Mapping[str, object] | None = None,
        space: Space | None = None,
    ) -> None:
        self.model = base_model(model)
        self.objective = objective
        self._plan: Callable[[Skipped], Plan] = space.plan if space else plan_of
        self.judged_by = objective.name
        self.structure = locate(self.model)
        self.all = objective.part(1.0)
        self.tokens = sum(batch.tokens for batch in objective.batches)
        self.spent = SearchCost()
        self._counted = set[RecordKey]()
        self._known: dict[RecordKey, tuple[float, SearchCost]] = {}
        self._prefix = self._steps(frozenset())
        self._prefix_caches: dict[int, PrefixCache] = {}
        self._guessers: dict[frozenset[int], TokenScorer] = {}
        self._dense_heads: dict[tuple[int, TokenScorer], Dense] = {}
        self._states_bytes = states_bytes
        is_of_prompts = space is not None and space.phase == "prefill"
        of = f" of {space.prefill_in_words}" if space and is_of_prompts else ""
        about = Provenance.of(
            settings or {},
            objective=objective.name + of,
            calibration=objective.digest(),
            fingerprint=self.structure.fingerprint,
            dtype=dtype_name(self.model),
            guesses=f"on {GUESSED_TOKENS:,} words",
        )
        self._ledger = None
        if folder:
            self._ledger = Ledger(folder, EvaluationRecord, about, name=name)
        for line in self._ledger or ():
            cost = line.cost if is_number(line.cost) else math.inf
            self._known[frozenset(line.skipped), line.batches] = cost, line.spent

    @cached_property
    def _scorer(self) -> TokenScorer:
        return TokenScorer(self.model)

    @cached_property
    @torch.inference_mode()
    def _recordings(self) -> list[Recording]:
        return [
            record(self.model, batch.prompt_tokens, **batch.inputs)
            for batch in self.objective.batches
        ]

    @property
    def forward(self) -> int:
        """Sublayer executions of one dense forward pass over the calibration set."""
        return len(self.structure.sublayers)

    def set_prefix(self, base: Skipped) -> None:
        """Keep the states of this set: what is asked for next begins like it."""
        self._prefix = self._steps(base)

    def cost(self, skipped: Skipped, share: float = 1.0) -> float:
        """The objective of one set; or a guess at it, comparable with other guesses, on
        a `share` of the text.

        That is the first batches of each of its terms. Of a large vocabulary a guess
        takes what is likely and asked.
        """
        return self.costs([skipped], share)[0]

    def cheapest(self, wanted: Callable[[Skipped], bool]) -> list[Skipped]:
        """Of the sets that were evaluated on all of the text those that are `wanted`,
        the cheapest first.
        """
        whole = {
            skipped: cost
            for (skipped, part), (cost, _) in self._known.items()
            if part == "all"
        }
        return sorted(filter(wanted, whole), key=whole.__getitem__)

    def costs(self, sets: Sequence[Skipped], share: float = 1.0) -> list[float]:
        """The objective of each set; all are run together."""
        numbers = self.objective.part(share)
        distinct = dict.fromkeys(sets)
        new = [one for one in distinct if self._key(one, numbers) not in self._known]
        if new:
            self._evaluate(new, numbers)
        found = []
        for key in (self._key(skipped, numbers) for skipped in sets):
            cost, spent = self._known[key]
            if key not in self._counted:
                self._counted.add(key)
                self.spent += spent
            found.append(cost)
        return found

    @torch.inference_mode()
    def _evaluate(self, sets: list[Skipped], numbers: frozenset[int]) -> None:
        start, began = time.process_time(), time.monotonic()
        replay = Replay(self.model, [self._plan(skipped) for skipped in sets])
        losses: list[dict[int, list[float]]] = [{} for _ in sets]
        ran = 0.0
        scorer = self._scorer if numbers == self.all else self._guesser(numbers)
        for number in sorted(numbers):
            batch = self.objective.batches[number]
            before = replay.ran
            dense = self._dense(number, scorer) if batch.targets is None else None
            recording, cache = self._recordings[number], self._prefix_cache(number)
            for places, hidden in replay.hidden_states(recording, cache):
                # hidden: (batch, tokens, hidden), of the plans at `places`
                scores = scorer.score(batch.judged(hidden), batch.targets, dense)
                nats = scores.kl if batch.targets is None else scores.nll  # (places,)
                items = batch.items(nats).tolist()
                for place in places:
                    losses[place][number] = items
            ran += (replay.ran - before) * (batch.tokens / self.tokens)
        each = SearchCost(
            evaluations=1,
            executions=ran / len(sets),
            seconds=(time.process_time() - start) / len(sets),
            wall_seconds=(time.monotonic() - began) / len(sets),
        )
        totals = {
            skipped: self.objective.total(found) for skipped, found in zip(sets, losses)
        }
        self._note(numbers, totals, each)

    def _guesser(self, numbers: frozenset[int]) -> TokenScorer:
        """What scores a part of the text: on a part of the vocabulary too, since it is
        for guesses.
        """
        if numbers not in self._guessers:
            batches = [self.objective.batches[number] for number in numbers]
            targets = [one.targets for one in batches if one.targets is not None]
            dense = (self._dense_states(number) for number in numbers)
            guesser = self._scorer.on_likely_words(dense, GUESSED_TOKENS, targets)
            self._guessers[numbers] = guesser
        return self._guessers[numbers]

    def _dense(self, number: int, scorer: TokenScorer) -> Dense:
        """What the original model predicts at the places of a batch."""
        if (number, scorer) not in self._dense_heads:
            _, dense = scorer.dense(self._dense_states(number))
            self._dense_heads[number, scorer] = dense
        return self._dense_heads[number, scorer]

    def _dense_states(self, number: int) -> Tensor:
        """The original model's states at the places of a batch, (places, hidden)."""
        replay = Replay(self.model, [Plan()])
        recording, cache = self._recordings[number], self._prefix_cache(number)
        _, hidden = next(replay.hidden_states(recording, cache))
        return self.objective.batches[number].judged(hidden)

    def _prefix_cache(self, number: int) -> PrefixCache:
        """The states of the prefix on a batch: every n-th, so that they fit."""
        cache = self._prefix_caches.get(number)
        if cache is None:
            embedded = self._recordings[number].embedded
            state_bytes = embedded.shape[-1] * embedded.element_size()  # of a token
            all_bytes = self.forward * self.tokens * state_bytes
            every = math.ceil(all_bytes / self._states_bytes)
            cache = PrefixCache(self._prefix, every)
        if cache.names != self._prefix:
            cache = cache.moved(self._prefix)
        self._prefix_caches[number] = cache
        return cache

    def _steps(self, skipped: Skipped) -> tuple[str, ...]:
        return Replay(self.model, [self._plan(skipped)]).path

    def _key(self, skipped: Skipped, numbers: frozenset[int]) -> RecordKey:
        return skipped, "all" if numbers == self.all else len(numbers)

    def _note(
        self, numbers: frozenset[int], costs: Mapping[Skipped, float], spent: SearchCost
    ) -> None:
        records = []
        for skipped, cost in costs.items():
            key = self._key(skipped, numbers)
            if not math.isfinite(cost):
                cost = math.inf  # a model that overflows is as bad as can be
            self._known[key] = cost, spent
            records.append(
                EvaluationRecord(
                    skipped=tuple(sorted(skipped)),
                    batches=key[1],
                    cost=cost,
                    spent=spent,
                )
            )
        if self._ledger is not None:
            self._ledger.add(*records)


class AfterRepair(Evaluator):
    """The KL that is left after a repair, fitted to half of the sequences at gaps
    alone, and judged on the others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Tensor],
        *,
        states_bytes: int = SearchConfig.states_bytes,
        folder: Path | None = None,
        settings: Provenance | Mapping[str, object] | None = None,
    ) -> None:
        locate(base_model(model)).refuse_stubs("a repair")
        if sum(len(batch) for batch in batches) < 4:
            raise UsageError(
                "a search for what is best after a repair takes four sequences or more;"
                " give more text"
            )
        about = Provenance.of(settings or {}, after="a cheap repair")
        rows = [row for batch in batches for row in batch.split(1)]
        super().__init__(
            model, kl(rows), states_bytes=states_bytes, folder=folder, settings=about
        )
        self.judged_by = "kl after a repair"
        self._base: Skipped = frozenset()
        self._repairs: dict[frozenset[int], dict[Skipped, Refitting]] = {}
        self._texts: dict[frozenset[int], tuple[DenseStream, dict[int, Dense]]] = {}

    def set_prefix(self, base: Skipped) -> None:
        """Keep the stream of this set's repair: what is asked for next begins like
        it.
        """
        self._base = base

    @torch.no_grad()
    def _evaluate(self, sets: list[Skipped], numbers: frozenset[int]) -> None:
        # one to fit to, one to judge
        part = numbers if len(numbers) > 1 else frozenset([0, 1])
        for skipped in sets:
            start, began = time.process_time(), time.monotonic()
            text, heads = self._text(part)
            losses = {place: [0.0] for place in heads}
            ran = 0.0
            if skipped:
                repair = self._repair(text, skipped, part)
                for place, dense in heads.items():
                    rows = repair.states[place][:, :-1].flatten(
                        0, 1
                    )  # (tokens, hidden)
                    scores = self._scorer.score(rows, None, dense)
                    losses[place] = [float(scores.kl.mean())]
                ran = repair.ran * (len(part) / len(self.all))
            spent = SearchCost(
                evaluations=1,
                executions=ran,
                seconds=time.process_time() - start,
                wall_seconds=time.monotonic() - began,
            )
            self._note(numbers, {skipped: self.objective.total(losses)}, spent)

    def _repair(
        self, text: DenseStream, skipped: Skipped, numbers: frozenset[int]
    ) -> Refitting:
        others = self._repairs.setdefault(numbers, {})
        repair = Refitting(
            text, plan_of(skipped), ridges=RIDGES, near=True, keep_all=True
        )
        repair.run(others=[*others.values()])
        others[skipped] = repair
        each = len(repair.steps) * sum(hidden.nbytes for hidden in repair.states)
        most = min(self._states_bytes // each, LATEST)
        oldest = [one for one in others if one != self._base]
        for one in oldest[: max(len(others) - most, 0)]:
            del others[one]
        return repair

    def _text(self, numbers: frozenset[int]) -> tuple[DenseStream, dict[int, Dense]]:
        """Some of the sequences, and what the original model says of those that are
        judged, by their places.
        """
        if numbers not in self._texts:
            tokens = [
                self.objective.batches[number].inputs["input_ids"]
                for number in sorted(numbers)
            ]
            text = DenseStream(self.model, tokens, one_in=ONE_IN, keep_all=True)
            (last,) = text.before(len(text.lines))
            judged = {
                place: last[place][:, :-1].flatten(0, 1)
                for place, held in enumerate(text.held)
                if held
            }
            self._texts[numbers] = (
                text,
                {place: self._scorer.dense(rows)[1] for place, rows in judged.items()},
            )
        return self._texts[numbers]
