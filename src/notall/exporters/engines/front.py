"""Models, skipped and quantised, side by side in one engine: what each loses, weighs and takes.

A model is in memory while it is asked, and no other. Times are taken in rounds, each model once a round, so that what
changes on the machine meanwhile hits all of them; a round that was interrupted is taken again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...measuring.speed import Spread, speedup
from ...measuring.statistics import mean_and_error
from ...progress import Progress, silent
from ...records.front import EngineScoresRecord, EngineTimesRecord, FrontRecord, best_of, key_of
from ...records.ledger import Ledger, working_in
from ...records.plan import Plan
from ...records.provenance import Provenance
from ...records.record import Key, TimeFields
from .asking import EngineFailed, ask
from .engine import Engine, weight_bytes
from .plans import file_name
from .windows import Windows

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Subject:
    """A model to measure: `spec` without what `plan` skips, with the plan's weights if it brings any."""

    name: str
    spec: str
    plan: Plan
    windows: Windows
    about: str = ""  # what else fixes it, as another model's revision

    @property
    def repaired(self) -> bool:
        return bool(getattr(self.plan, "weights", {}))

    @property
    def stem(self) -> str:
        """What its files are called."""
        return file_name(self.name) + ("-repaired" if self.repaired else "")

    @property
    def fixed_by(self) -> dict[str, Any]:
        """What tells it from another model of the same name."""
        return {"plan": self.plan.indices, "weights": getattr(self.plan, "digest", ""), "other": self.about}


@dataclass(frozen=True)
class Rounds:
    """How models are timed."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5


@dataclass(frozen=True)
class Variant:
    subject: Subject
    type: str

    @property
    def key(self) -> Key:
        return (self.subject.name, self.subject.repaired, self.type)

    def in_round(self, number: int) -> Key:
        return (*self.key, number)

    @property
    def named(self) -> dict[str, Any]:
        return dict(zip(("model", "repaired", "type"), self.key))

    @property
    def shape(self) -> tuple[Any, ...]:
        return (self.subject.spec, self.subject.plan.indices, self.type)

    @property
    def words(self) -> str:
        return f"{self.subject.stem} {self.type}"


def measure_front(
    engine: Engine,
    subjects: Sequence[Subject],
    types: Sequence[str],
    rounds: Rounds,
    out: Path,
    about: Provenance,
    *,
    progress: Progress = silent,
) -> list[FrontRecord]:
    """Measure each subject in each type; the first subject is the dense model, and the first type plain.

    What is measured is kept in `out`, and the same call goes on where one that was killed stopped. What an engine
    cannot run is in the records with what it said, and is tried again by the next call. Raises `EngineFailed` where
    that is the plain dense model, and `UsageError` where `out` is in use or holds other work.
    """
    if rounds.rounds < 1:
        raise UsageError("times take a round at least: give --rounds 1 or more")
    names = [(subject.name, subject.repaired) for subject in subjects]
    if twice := [one for one in names if names.count(one) > 1]:
        raise UsageError(f"two of the models are called {twice[0][0]}: rename the file or folder of one")
    run = _Run(engine, subjects, types, rounds, out, about, progress)
    with working_in(out, "front"):
        return run.records()


class _Run:
    def __init__(
        self,
        engine: Engine,
        subjects: Sequence[Subject],
        types: Sequence[str],
        rounds: Rounds,
        out: Path,
        about: Provenance,
        progress: Progress,
    ) -> None:
        self.engine, self.rounds, self.out, self.about, self.progress = engine, rounds, out, about, progress
        self.variants = [Variant(subject, kind) for subject in subjects for kind in types]
        self.dense = self.variants[0]
        self.steps = len(self.variants) * (2 + rounds.rounds)
        self.failed: dict[Key, str] = {}

    def records(self) -> list[FrontRecord]:
        self.scores = Ledger(self.out, EngineScoresRecord, self._about_record)
        self.times = Ledger(self.out, EngineTimesRecord, self._about_record)
        kept = Ledger(self.out, FrontRecord)
        for number, variant in enumerate(self.variants):
            self._trying(variant, partial(self._scored, variant, 2 * number))
        for number in range(self.rounds.rounds):
            self._round(number)
        new = [record for record in self._compared() if not (record.key in kept and _same(kept[record.key], record))]
        if new:
            kept.add(*new)
        return [kept[variant.key] for variant in self.variants]

    def _about(self, subject: Subject) -> Provenance:
        return Provenance.of(self.about, subject=subject.fixed_by)

    def _about_record(self, record: EngineScoresRecord | EngineTimesRecord) -> Provenance:
        """Where a record of a model that is asked for must come from."""
        by_name = {variant.key[:2]: variant.subject for variant in self.variants}
        subject = by_name.get((record.model, record.repaired))
        return self._about(subject) if subject else self.about

    def _trying(self, variant: Variant, work: Callable[[], None]) -> None:
        if variant.key in self.failed:
            return
        try:
            work()
        except EngineFailed as error:
            if variant is self.dense:
                raise
            self.failed[variant.key] = str(error)

    def _checkpoint(self, variant: Variant) -> Path:
        return self.engine.place(self.out / CHECKPOINTS, f"{variant.subject.stem}-{variant.type}")

    # --- files and scores -------------------------------------------------------------------------------------------

    def _scored(self, variant: Variant, place: int) -> None:
        if variant.key in self.scores:
            return
        self.progress(place, self.steps, f"writing {variant.words}")
        checkpoint = self._written(variant)
        self.progress(place + 1, self.steps, f"scoring {variant.words}")
        windows = variant.subject.windows
        scored = ask(self.engine, "score", checkpoint=str(checkpoint), windows=windows.tokens)
        self.scores.add(
            EngineScoresRecord(
                **variant.named,
                file_bytes=weight_bytes(checkpoint),
                nll=tuple(_mean_told(window) for window in scored),
                tokens=tuple(len(tokens) - 1 for tokens in windows.tokens),
                text_bytes=windows.text_bytes,
                tokens_as_dense=windows.tokens == self.dense.subject.windows.tokens,
                provenance=self._about(variant.subject),
            )
        )

    def _written(self, variant: Variant) -> Path:
        """Its checkpoint; one that nothing is known of may be another run's, and is written again."""
        checkpoint = self._checkpoint(variant)
        if checkpoint.exists() and variant.key in self.scores:
            return checkpoint
        _remove(checkpoint)
        if variant.type == self.engine.plain:
            self.engine.write(variant.subject.spec, variant.subject.plan, checkpoint)
            return checkpoint
        plain = self._written(Variant(variant.subject, self.engine.plain))
        ask(self.engine, "quantise", plain=str(plain), kind=variant.type, out=str(checkpoint))
        return checkpoint

    # --- times ------------------------------------------------------------------------------------------------------

    def _round(self, number: int) -> None:
        running = [variant for variant in self.variants if variant.key not in self.failed]
        if all(variant.in_round(number) in self.times for variant in running):
            return
        start = len(self.variants) * (2 + number)
        for place, variant in enumerate(running[:: -1 if number % 2 else 1]):
            self.progress(start + place, self.steps, f"timing {variant.words}, round {number + 1}")
            self._trying(variant, partial(self._timed, variant, number))

    def _timed(self, variant: Variant, number: int) -> None:
        windows = variant.subject.windows.tokens
        prompt = list(islice(cycle([token for row in windows for token in row]), self.rounds.prompt_tokens))
        checkpoint = self._written(variant)
        taken = ask(self.engine, "time", checkpoint=str(checkpoint), prompt=prompt, new=self.rounds.new_tokens)
        taken["memory_bytes"] = max(taken["memory_bytes"], 0)
        about = self._about(variant.subject)
        self.times.add(EngineTimesRecord(**variant.named, round=number, **taken, provenance=about))

    # --- side by side -----------------------------------------------------------------------------------------------

    def _compared(self) -> list[FrontRecord]:
        found = [self._beside_dense(variant) for variant in self.variants]
        best = [key_of(row) for row in best_of([record.row() for record in found])]
        return [record.model_copy(update={"on_front": record.key in best}) for record in found]

    def _beside_dense(self, variant: Variant) -> FrontRecord:
        plan = variant.subject.plan
        names = [f"attn.{index}" for index in plan.attention] + [f"mlp.{index}" for index in plan.mlp]
        about = {**variant.named, "skipped": " ".join(names), "provenance": self._about(variant.subject)}
        if variant.key in self.failed:
            return FrontRecord(**about, failed=self.failed[variant.key])
        scores, dense = self.scores[variant.key], self.scores[self.dense.key]
        rounds = [self.times[variant.in_round(number)] for number in range(self.rounds.rounds)]
        return FrontRecord(
            **about,
            **_with_error("nll", scores.nll),
            **(_with_error("delta_nll", _less(scores.nll, dense.nll)) if scores.tokens_as_dense else {}),
            **_with_error("bits_per_byte", _bits(scores)),
            **_with_error("delta_bits", _less(_bits(scores), _bits(dense))),
            windows=len(scores.nll),
            tokens=sum(scores.tokens),
            file_bytes=scores.file_bytes,
            memory_bytes=round(Spread.of([one.memory_bytes for one in rounds]).median),
            times=self._times(variant),
            rounds=len(rounds),
        )

    def _times(self, variant: Variant) -> TimeFields:
        """Of all variants of its shape, since these do the same: other numbers in weights make none faster."""
        alike = [one for one in self.variants if one.shape == variant.shape and one.key not in self.failed]
        pairs = [
            (self.times[one.in_round(number)], self.times[self.dense.in_round(number)])
            for number in range(self.rounds.rounds)
            for one in alike
        ]
        return _times(*zip(*pairs))


Values = Sequence[float | None]


def _same(one: FrontRecord, other: FrontRecord) -> bool:
    """Whether they say the same, wherever and whenever that was put together."""
    return one.model_copy(update={"provenance": None}) == other.model_copy(update={"provenance": None})


def _remove(checkpoint: Path) -> None:
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _mean_told(window: Values) -> float | None:
    told = [value for value in window if value is not None]
    return math.fsum(told) / len(told) if told else None


def _bits(scores: EngineScoresRecord) -> Values:
    """A byte of each window; a token that the engine tells nothing of counts as its mean."""
    return [
        None if nll is None or not size else nll * count / size / math.log(2)
        for nll, count, size in zip(scores.nll, scores.tokens, scores.text_bytes)
    ]


def _less(values: Values, dense: Values) -> Values:
    return [None if one is None or other is None else one - other for one, other in zip(values, dense)]


def _with_error(name: str, values: Values) -> dict[str, Any]:
    if any(value is None for value in values):
        return {name: None, f"{name}_se": None}
    mean, error = mean_and_error([value for value in values if value is not None])
    return {name: mean, f"{name}_se": error}


def _times(rounds: Sequence[EngineTimesRecord], dense: Sequence[EngineTimesRecord]) -> TimeFields:
    fields: dict[str, float] = {}
    for field, name in (("prefill_ms", "speedup_prefill"), ("decode_ms_per_token", "speedup_decode")):
        taken, beside = ([getattr(one, field) for one in these] for these in (rounds, dense))
        for key, spread in ((field, Spread.of(taken)), (name, speedup(beside, taken))):
            fields |= {key: spread.median, f"{key}_low": spread.low, f"{key}_high": spread.high}
    return TimeFields(**fields)
