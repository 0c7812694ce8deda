"""Score and time each model in the engine, one in memory at a time."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from operator import sub
from pathlib import Path
from statistics import fmean, median

from ...engines import Engine, weight_bytes, worker
from ...errors import UsageError
from ...exporters import Source
from ...exporters.manifest import NotAsSkipped
from ...files import temporary
from ...integrity import check_manifest
from ...measuring.statistics import mean_and_error
from ...options import Workload
from ...plan import Plan
from ...progress import Progress, silent
from ...results.facts import Times
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ...results.record import RecordKey, is_number
from ...strict_json import Settings
from .checkpoints import write_plain
from .finding import as_file_name
from .front import pareto_front
from .options import check_workload
from .records import NAMED, EngineScoresRecord, EngineTimesRecord, ParetoRecord
from .windows import Windows
from .written import WrittenCheckpoints

DENSE_NAME = "dense"
SCORING = 1.5  # to write and to score a variant takes so many timings, about


@dataclass(frozen=True)
class EngineModel:
    """A model to measure: `spec` without what `plan` skips, with the plan's weights if
    it brings any.
    """

    name: str
    spec: str
    plan: Plan
    windows: Windows
    about: str = ""  # what else fixes it, as another model's revision
    stored: str | None = None  # how its own weights are quantised
    revision: str | None = None  # that was asked for
    trust_remote_code: bool = False

    def source(self, about: Provenance) -> Provenance:
        """`about`, with what distinguishes it from another model of the same name."""
        fixed = {
            "plan": self.plan.indices,
            "weights": self.plan.digest,
            "other": self.about,
        }
        return Provenance.of(about, subject=fixed)


@dataclass(frozen=True)
class Variant:
    """A model with its weights represented as a type of the engine."""

    model: EngineModel
    type: str

    @property
    def key(self) -> RecordKey:
        """The name of the model, whether it is repaired, and the type."""
        return (self.model.name, self.model.plan.state == "repaired", self.type)

    @property
    def named(self) -> Settings:
        """The key as fields of a record."""
        return dict(zip(NAMED, self.key))

    def __str__(self) -> str:
        repaired = "-repaired" if self.key[1] else ""
        return f"{as_file_name(self.model.name)}{repaired}-{as_file_name(self.type)}"


def measure_pareto(
    engine: Engine,
    models: Sequence[EngineModel],
    types: Sequence[str],
    workload: Workload,
    out: Path,
    provenance: Provenance,
    *,
    progress: Progress = silent,
) -> list[ParetoRecord]:
    """Measure each model in each of `types`, and the first one, the original model, in
    plain weights too.

    A plain checkpoint that is not asked for goes once the quantised ones are made of
    it. Records are written to `out` as they come, and the same call goes on where one
    that was killed stopped. What an engine cannot run is in the records with what it
    said, and is tried again by the next call. Raises `EngineFailed` where that is the
    plain original model, and `UsageError` where `out` is in use or holds other work.
    """
    check_workload(workload)
    names = [(model.name, model.plan.state) for model in models]
    for name, state in names:
        if names.count((name, state)) > 1:
            raise UsageError(
                f"two of the models are called {name}: rename the file or folder of one"
            )
    dense = Variant(models[0], engine.plain)
    asked = [
        Variant(one, kind)
        for one in models
        for kind in ((one.stored,) if one.stored else types)
    ]
    variants = [dense, *(one for one in asked if one.key != dense.key)]
    with working_in(out, "pareto"):
        return _Run(engine, variants, workload, out, provenance, progress).records()


@dataclass
class _Run:
    engine: Engine
    variants: Sequence[Variant]
    workload: Workload
    out: Path
    provenance: Provenance
    progress: Progress

    def __post_init__(self) -> None:
        self.dense = self.variants[0]
        self.failed: dict[RecordKey, str] = {}
        self.written = WrittenCheckpoints.of(self.out)
        self.sources: dict[RecordKey, Path] = {}
        self.scores = Ledger(self.out, EngineScoresRecord, self._source)
        self.times = Ledger(self.out, EngineTimesRecord, self._source)

    def records(self) -> list[ParetoRecord]:
        known = Ledger(self.out, ParetoRecord)
        for variant in self.variants:
            self.written.check_own(self._place_of(variant))
        for number, variant in enumerate(self.variants):
            self._trying(variant, partial(self._score, variant, SCORING * number))
            later = self.variants[number + 1 :]
            if all(one.key[:2] != variant.key[:2] for one in later):
                self._drop_source(variant)
        for number in range(self.workload.rounds):
            self._round(number)
        found = [self._compared(variant) for variant in self.variants]
        best = [record.key for record in pareto_front(found)]
        known.renew(
            record.model_copy(update={"best": record.key in best}) for record in found
        )
        return [known[variant.key] for variant in self.variants]

    def _report(self, step: float, doing: str) -> None:
        steps = len(self.variants) * (SCORING + self.workload.rounds)
        self.progress(step, steps, doing)

    def _source(self, record: EngineScoresRecord | EngineTimesRecord) -> Provenance:
        by_name = {variant.key[:2]: variant.model for variant in self.variants}
        model = by_name.get((record.model, record.repaired))
        return model.source(self.provenance) if model else self.provenance

    def _trying(self, variant: Variant, work: Callable[[], None]) -> None:
        try:
            work()
        except (worker.EngineFailed, NotAsSkipped) as error:
            if variant is self.dense:
                raise
            self.failed[variant.key] = str(error)

    def _score(self, variant: Variant, step: float) -> None:
        if variant.key in self.scores:
            return
        writing = "writing and verifying" if variant.model.plan else "writing"
        self._report(step, f"{writing} {variant}")
        checkpoint = self._written(variant)
        self._report(step + 0.5, f"scoring {variant}")
        windows = variant.model.windows
        scored = worker.call(
            self.engine, "score", checkpoint=checkpoint, windows=windows.tokens
        )
        reported = [
            [value for value in window if value is not None] for window in scored
        ]
        self.scores.add(
            EngineScoresRecord(
                **variant.named,
                file_bytes=weight_bytes(checkpoint),
                nll=tuple(fmean(window) if window else math.nan for window in reported),
                tokens=tuple(len(tokens) - 1 for tokens in windows.tokens),
                text_bytes=windows.text_bytes,
                tokens_as_dense=windows.tokens == self.dense.model.windows.tokens,
                provenance=variant.model.source(self.provenance),
            )
        )

    def _place_of(self, variant: Variant) -> Path:
        return self.written.folder / f"{variant}{self.engine.suffix}"

    def _written(self, variant: Variant) -> Path:
        """Its checkpoint; one that nothing is known of may be another run's, and is
        written again.
        """
        checkpoint = self._place_of(variant)
        if self.written.check_own(checkpoint) and variant.key in self.scores:
            if self.engine.runs_code(checkpoint):
                from ...exporters.remote_code import check_code

                check_code(checkpoint)
            if checkpoint.is_dir():
                check_manifest(checkpoint, "delete it, and run again")
            return checkpoint
        self.written.make_way(checkpoint)
        model = variant.model
        if variant.type in (self.engine.plain, model.stored):
            source = Source(
                model.spec,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            )
            stored = bool(model.stored)
            write_plain(self.engine, source, model.plan, checkpoint, stored)
            return checkpoint
        plain = self._source_of(variant)
        with temporary(checkpoint) as scratch:
            worker.call(
                self.engine, "quantise", plain=plain, kind=variant.type, out=scratch
            )
            scratch.rename(checkpoint)
        return checkpoint

    def _source_of(self, variant: Variant) -> Path:
        """The plain checkpoint of its model, which stays until all types are made of
        it.
        """
        plain = replace(variant, type=self.engine.plain)
        if plain.key not in self.sources:
            self.sources[plain.key] = self._written(plain)
        return self.sources[plain.key]

    def _drop_source(self, variant: Variant) -> None:
        """Unless it was asked for."""
        plain = replace(variant, type=self.engine.plain)
        checkpoint = self.sources.pop(plain.key, None)
        if checkpoint is None or plain.key in [one.key for one in self.variants]:
            return
        if checkpoint.is_dir():
            shutil.rmtree(checkpoint)
        checkpoint.unlink(missing_ok=True)

    def _round(self, number: int) -> None:
        running = [
            variant for variant in self.variants if variant.key not in self.failed
        ]
        if all((*variant.key, number) in self.times for variant in running):
            return
        start = len(self.variants) * (SCORING + number)
        for place, variant in enumerate(running[:: -1 if number % 2 else 1]):
            self._report(start + place, f"timing {variant}, round {number + 1}")
            self._trying(variant, partial(self._time, variant, number))

    def _time(self, variant: Variant, number: int) -> None:
        tokens = cycle(chain.from_iterable(variant.model.windows.tokens))
        taken = worker.call(
            self.engine,
            "time",
            checkpoint=self._written(variant),
            prompt=list(islice(tokens, self.workload.prompt_tokens)),
            new=self.workload.generation_tokens,
        )
        taken["memory_bytes"] = max(taken["memory_bytes"], 0)
        about = variant.model.source(self.provenance)
        self.times.add(
            EngineTimesRecord(**variant.named, round=number, **taken, provenance=about)
        )

    def _compared(self, variant: Variant) -> ParetoRecord:
        about = {
            **variant.named,
            "skipped": variant.model.plan.skipped,
            "provenance": variant.model.source(self.provenance),
        }
        if variant.key in self.failed:
            return ParetoRecord(**about, failed=self.failed[variant.key])
        scores, rounds = self.scores[variant.key], self._rounds(variant)
        return ParetoRecord(
            **about,
            **self._losses(scores),
            windows=len(scores.nll),
            tokens=sum(scores.tokens),
            file_bytes=scores.file_bytes,
            memory_bytes=round(median(one.memory_bytes for one in rounds)),
            memory_of=rounds[0].memory_of,
            times=self._times(variant),
            rounds=len(rounds),
            round_ms=self._round_ms(variant),
        )

    def _losses(self, scores: EngineScoresRecord) -> Settings:
        """NLL and bits per byte with their differences to the original model's, each
        with its standard error over windows; nan where a window has no number.
        """
        dense = self.scores[self.dense.key]
        bits = scores.bits_per_byte
        windows = {
            "nll": [*scores.nll],
            "bits_per_byte": bits,
            "delta_bits": [*map(sub, bits, dense.bits_per_byte)],
            "delta_nll": [math.nan],
        }
        if scores.tokens_as_dense:
            windows["delta_nll"] = [*map(sub, scores.nll, dense.nll)]
        found: Settings = {}
        for name, values in windows.items():
            mean, error = math.nan, math.nan
            if all(map(is_number, values)):
                mean, error = mean_and_error(values)
            found |= {name: mean, f"{name}_se": error}
        return found

    def _alike(self, variant: Variant) -> list[Variant]:
        """All variants of its shape, since these do the same: other numbers in weights
        make none faster.
        """

        def shape(one: Variant) -> tuple[object, ...]:
            return one.model.spec, one.model.plan.indices, one.type

        return [
            one
            for one in self.variants
            if shape(one) == shape(variant) and one.key not in self.failed
        ]

    def _round_ms(self, variant: Variant) -> tuple[float, ...]:
        """Of a decode step in each round, the mean of all of its shape."""
        by_round = zip(*map(self._rounds, self._alike(variant)))
        return tuple(
            fmean(one.decode_ms_per_token for one in some) for some in by_round
        )

    def _times(self, variant: Variant) -> Times:
        """Of all of its shape."""
        from ...measuring.speed import RoundTimes

        def timing(variants: Sequence[Variant]) -> RoundTimes:
            by_round = zip(*map(self._rounds, variants))
            taken = [one for some in by_round for one in some]
            return RoundTimes(
                tuple(one.prefill_ms for one in taken),
                tuple(one.decode_ms_per_token for one in taken),
                None,
            )

        alike = self._alike(variant)
        return timing(alike).compared_with(timing([self.dense] * len(alike)))

    def _rounds(self, variant: Variant) -> list[EngineTimesRecord]:
        keys = ((*variant.key, number) for number in range(self.workload.rounds))
        return [self.times[key] for key in keys]
