"""Models, skipped and quantised, side by side in one engine, one in memory at a time:
what each loses and takes.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice
from operator import sub
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from ..engines import Engine, Memory, engine_named, weight_bytes, worker
from ..errors import UsageError, shortened
from ..exporters import export
from ..exporters.manifest import NotAsSkipped, NotVerified, read_manifest, verdict_of
from ..extras import FIGURES, installed
from ..files import temporary, write_whole
from ..integrity import check_manifest
from ..measuring.statistics import (
    LEAST_ROUNDS,
    LEAST_WINDOWS,
    Estimate,
    mean_and_error,
    of_rounds,
)
from ..options import Workload, option
from ..plan import Plan, refuse_prefill, several, several_of
from ..progress import Progress, Stages, silent
from ..results.facts import DECODE_MS, PREFILL_MS, SPEEDUPS, Times
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import (
    Count,
    Fact,
    Key,
    Loss,
    Number,
    Positive,
    Record,
    SublayerNames,
    Unsigned,
    is_number,
)
from ..results.table import Column, in_bytes, size, table, with_error, within, words
from ..strict_json import Settings
from .folder import Figure, Folder, Message, Section, Shown
from .options import Words, read_plans, words_of
from .repair import METHODS, NONE, REFIT, check_method
from .search import BudgetChoice, SearchRecord, SpaceOptions, keep_choice
from .written import Written

if TYPE_CHECKING:
    import altair as alt
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..choosing.space import Space

CHOSEN_BY = 16  # sequences of the text; all of it is repaired with
DENSE, SCORING = (
    "dense",
    1.5,
)  # to write and to score a variant takes so many timings, about
FIRST, FASTER = (
    "1.1,1.2",
    "1.3,1.5",
)  # speedups that are found by default, and those to add to them
NAMED = ("model", "repaired", "type")
Name = Annotated[str, Field(min_length=1, max_length=80)]


class Represented(Fact):
    model: Name = Field(description="dense, the name of a plan, or another model")
    repaired: bool = Field(
        description="whether what it keeps was refit before it was quantised"
    )
    type: Name = Field(
        description="how its weights are represented, as the engine calls it"
    )

    @property
    def named(self) -> str:
        return ", ".join(
            [self.model, *(["repaired"] if self.repaired else []), self.type]
        )


class EngineScoresRecord(Record, Represented, kind="engine_scores", key=NAMED):
    """What one model loses on each window of the held-out text, and what its file
    weighs.
    """

    file_bytes: Count = Field(description="of weights on disk")
    nll: tuple[Number, ...] = Field(description="nats per token, a mean a window")
    tokens: tuple[Count, ...] = Field(
        description="that were to be predicted, of each window"
    )
    text_bytes: tuple[Count, ...] = Field(description="what those tokens are in UTF-8")
    tokens_as_dense: bool = Field(
        description="whether its tokens are the original's, so that nats are comparable"
    )

    @property
    def bits_per_byte(self) -> list[float]:
        """Of each window; a token of which the engine reports nothing counts as its
        mean.
        """
        return [
            nll * count / size / math.log(2) if size else math.nan
            for nll, count, size in zip(self.nll, self.tokens, self.text_bytes)
        ]


class EngineTimesRecord(
    Record, Represented, kind="engine_times", key=(*NAMED, "round")
):
    """What one model took in one round; in a round each model is timed once."""

    round: Count = Field(description="its number, from 0")
    prefill_ms: Positive = Field(
        description="milliseconds from the prompt to the first new token"
    )
    decode_ms_per_token: Positive = Field(description="milliseconds")
    memory_bytes: Count = Field(
        description="by which the engine's process grew, or most on devices"
    )
    memory_of: Memory = Field(
        "process",
        description="whose memory that is: the process's, or that of CUDA devices",
    )


class ParetoRecord(Record, Represented, kind="pareto", key=NAMED):
    """One model beside the dense one; differences are paired by window, speedups by
    round.
    """

    skipped: SublayerNames = Field(
        "", description="names of sublayers that it leaves out"
    )
    nll: Loss = Field(
        math.nan,
        description="as the engine computes it on held-out text, nats per token",
    )
    nll_se: Unsigned = Field(math.nan, description="over windows")
    delta_nll: Number = Field(
        math.nan,
        description="nll less the original model's; none where its tokens are others",
    )
    delta_nll_se: Unsigned = Field(
        math.nan, description="of the paired differences, over windows"
    )
    bits_per_byte: Loss = Field(
        math.nan, description="of the predicted text: comparable between tokenizers"
    )
    bits_per_byte_se: Unsigned = Field(math.nan, description="over windows")
    delta_bits: Number = Field(
        math.nan, description="bits_per_byte less the original model's"
    )
    delta_bits_se: Unsigned = Field(
        math.nan, description="of the paired differences, over windows"
    )
    windows: Count | None = Field(None, description="of held-out text")
    tokens: Count | None = Field(None, description="predicted, of all windows")
    file_bytes: Count | None = Field(None, description="of weights on disk")
    memory_bytes: Count | None = Field(
        None, description="see `memory_of`; median of the rounds"
    )
    memory_of: Memory | None = Field(
        None, description="the process: by how much it grew; devices: most allocated"
    )
    times: Times | None = Field(
        None,
        description="speedups over the plain original, alike for models of one shape",
    )
    rounds: Count | None = Field(None, description="in which it was timed")
    round_ms: tuple[Positive, ...] = Field(
        (), description="of a decode step in each round, as all of its shape"
    )
    best: bool = Field(
        False,
        description="whether it is faster than what loses less, at the level 0.95",
    )
    failed: str | None = Field(
        None, description="what the engine said, where it could not run it"
    )

    def loss(self, *, by_bits: bool) -> tuple[float, float]:
        """What it loses to the original model, with its error: bits per byte, or nats
        per token.
        """
        return (
            (self.delta_bits, self.delta_bits_se)
            if by_bits
            else (self.delta_nll, self.delta_nll_se)
        )

    @property
    def faster(self) -> float:
        """How many times as fast as the original model it decodes; nan where it was not
        timed.
        """
        return self.times.speedup_decode.median if self.times else math.nan


DELTA_BITS: Column[ParetoRecord] = with_error(
    "bits added", lambda one: one.loss(by_bits=True), unit="bits per byte"
)
DELTA_NLL: Column[ParetoRecord] = with_error(
    "NLL added", lambda one: one.loss(by_bits=False), unit="nats per token"
)
COLUMNS: tuple[Column[ParetoRecord], ...] = (
    words("model", lambda one: one.model),
    words("type", lambda one: one.type),
    words("repaired", lambda one: "yes" if one.repaired else ""),
    DELTA_NLL,
    *within(SPEEDUPS, lambda one: one.times),
    words("on the Pareto front", lambda one: "yes" if one.best else ""),
    size("file", lambda one: one.file_bytes),
    size("memory", lambda one: one.memory_bytes),
    words("memory of", lambda one: one.memory_of if one.memory_of != "process" else ""),
    with_error("bits per byte", lambda one: (one.bits_per_byte, one.bits_per_byte_se)),
    DELTA_BITS,
    with_error("NLL", lambda one: (one.nll, one.nll_se), unit="nats per token"),
    *within((DECODE_MS, PREFILL_MS), lambda one: one.times),
    words(
        "without",
        lambda one: (
            several(len(one.skipped.split()), "sublayer") if one.skipped else ""
        ),
    ),
    words("not measured", lambda one: one.failed),
)


def is_faster(one: ParetoRecord, other: ParetoRecord) -> bool:
    """Whether it decodes faster: Student's t of the rounds' own ratios, one-sided at
    0.025.

    Records without the rounds are compared by their quartiles.
    """
    if one.round_ms and len(one.round_ms) == len(other.round_ms):
        ratios = [
            math.log(theirs / ours)
            for ours, theirs in zip(one.round_ms, other.round_ms)
        ]
        more = Estimate(*mean_and_error(ratios), len(ratios) - 1)
    elif one.times and other.times:
        more = of_rounds(one.times.speedup_decode).less(
            of_rounds(other.times.speedup_decode)
        )
    else:
        return False
    return more.ends()[0] > 0


def loses_less(one: ParetoRecord, other: ParetoRecord, *, by_bits: bool) -> bool:
    """Whether its loss is lower, one-sided at 0.025, as if the errors over windows were
    independent.
    """
    ours, theirs = (
        Estimate(*each.loss(by_bits=by_bits), (each.windows or 0) - 1)
        for each in (one, other)
    )
    return theirs.less(ours).ends()[0] > 0


def goes_by_bits(records: Iterable[ParetoRecord]) -> bool:
    """Whether some model has other tokens, so that all are compared by bits per
    byte.
    """
    return any(
        is_number(one.bits_per_byte) and not is_number(one.delta_nll) for one in records
    )


def pareto_front(records: Sequence[ParetoRecord]) -> list[ParetoRecord]:
    """Taken by their loss, the records that are faster than all before them, as far as
    `is_faster` can tell.
    """
    by_bits, found = goes_by_bits(records), list[ParetoRecord]()
    measured = [
        one for one in records if one.times and is_number(one.loss(by_bits=by_bits)[0])
    ]
    for one in sorted(
        measured, key=lambda each: (each.loss(by_bits=by_bits)[0], -each.faster)
    ):
        if all(is_faster(one, other) for other in found):
            found.append(one)
    return found


@dataclass(frozen=True)
class Windows:
    """The text as a model's own token ids, window by window, and the bytes in UTF-8 of
    all tokens but the first.
    """

    tokens: tuple[tuple[int, ...], ...]
    text_bytes: tuple[int, ...]

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]]
    ) -> Windows:
        tokens = tuple(tuple(row) for row in rows)
        return cls(
            tokens, tuple(len(_text_of(tokenizer, row[1:]).encode()) for row in tokens)
        )


def by_another(
    theirs: PreTrainedTokenizerBase, ours: PreTrainedTokenizerBase, windows: Windows
) -> Windows:
    """The same text in the tokens of another model. Raises `UsageError` where a window
    comes to fewer than two.
    """
    rows = [
        list(theirs(_text_of(ours, row), verbose=False)["input_ids"])
        for row in windows.tokens
    ]
    if any(len(row) < 2 for row in rows):
        raise UsageError(
            "a window of the held-out text is a single token of another model: give a"
            " greater --length"
        )
    return Windows.of(theirs, rows)


def _text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = str(
        tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )
    return text.strip("\ufffd")  # of a character that a window cuts through


@dataclass(frozen=True)
class Finding:
    """Finds plans of a model by the search, and repairs them, on `batches` of token
    ids; kept in the folder `out`.
    """

    model: PreTrainedModel
    space: Space
    batches: list[Tensor]
    out: Path
    provenance: Provenance
    seed: int = 0

    def check(self, plan: Plan) -> None:
        """Raise `UsageError` where it is a plan, or a repair, of another model."""
        from ..running.repaired import RepairedPlan

        plan.check(self.space.structure)
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(self.model)

    def found(
        self,
        counts: Sequence[float],
        speedups: Sequence[float],
        workload: Workload,
        progress: Progress = silent,
    ) -> dict[str, Plan]:
        """By name what is skipped to skip so many, or to run the workload so many times
        as fast.
        """
        budgets = {
            f"less {several_of(str(self.space), count)}": BudgetChoice(("count", count))
            for count in counts
        }
        budgets |= {
            f"{faster:g}x in torch": BudgetChoice(("speedup", faster))
            for faster in speedups
        }
        stages = Stages(progress, len(budgets))
        return {
            name: self._searched(name, one, workload, stages.stage(1))
            for name, one in budgets.items()
        }

    def _searched(
        self, name: str, budget: BudgetChoice, workload: Workload, progress: Progress
    ) -> Plan:
        from ..choosing.choice import choose_plan
        from ..choosing.objective import kl

        out, space = self.out / file_name(name), self.space
        source = Provenance.of(
            self.provenance, space=str(space), chosen_of=list(space.names)
        )
        for record in Ledger(out, SearchRecord, source):
            return space.plan(record.plan.names)
        own = [row for batch in self.batches for row in batch.split(1)][:CHOSEN_BY]
        chosen = choose_plan(
            *(
                self.model,
                "search",
                space,
                budget.of(self.model, space, workload),
                own,
                kl(own),
            ),
            out=out,
            provenance=source,
            seed=self.seed,
            progress=progress,
        )
        keep_choice(out, chosen, source)
        return chosen.plan

    def repaired(
        self, plans: Mapping[str, Plan], method: str, progress: Progress = silent
    ) -> list[tuple[str, Plan]]:
        """Each plan as it is, and then repaired; one that brings weights is repaired
        already.
        """
        from ..repairing.methods import repair_into

        stages, both = Stages(progress, len(plans)), list[tuple[str, Plan]]()
        for name, plan in plans.items():
            stage, repaired, out = (
                stages.stage(1),
                plan,
                self.out / f"{file_name(name)}-repaired",
            )
            if plan.state != "repaired":
                repaired = repair_into(
                    out, method, self.model, plan, self.batches, self.provenance, stage
                )
            both += [(name, plan.unrepaired), (name, repaired)]
        return both


def checkpoint_bytes(out: Path) -> int:
    """Of the weights that a run left in its folder."""
    return sum(map(weight_bytes, (out / "checkpoints").glob("*")))


def file_name(name: str) -> str:
    return name.replace("/", "-").replace(" ", "-")


@dataclass(frozen=True)
class Subject:
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
    """A subject with its weights represented as a type of the engine."""

    subject: Subject
    type: str

    @property
    def key(self) -> Key:
        return (self.subject.name, self.subject.plan.state == "repaired", self.type)

    @property
    def named(self) -> Settings:
        return dict(zip(NAMED, self.key))

    def __str__(self) -> str:
        repaired = "-repaired" if self.key[1] else ""
        return f"{file_name(self.subject.name)}{repaired}-{file_name(self.type)}"


def check_workload(workload: Workload) -> None:
    if workload.rounds < 1:
        raise UsageError("times take a round at least: give --rounds 1 or more")
    if workload.concurrency != 1:
        raise UsageError("engines are timed on one sequence: leave --concurrency at 1")


def measure_pareto(
    engine: Engine,
    subjects: Sequence[Subject],
    types: Sequence[str],
    workload: Workload,
    out: Path,
    provenance: Provenance,
    *,
    progress: Progress = silent,
) -> list[ParetoRecord]:
    """Measure each subject in each of `types`, and the first one, the original model,
    in plain weights too.

    A plain checkpoint that is not asked for goes once the quantised ones are made of
    it. Records are written to `out` as they come, and the same call goes on where one
    that was killed stopped. What an engine cannot run is in the records with what it
    said, and is tried again by the next call. Raises `EngineFailed` where that is the
    plain original model, and `UsageError` where `out` is in use or holds other work.
    """
    check_workload(workload)
    names = [(subject.name, subject.plan.state) for subject in subjects]
    if twice := next(
        (name for name, state in names if names.count((name, state)) > 1), None
    ):
        raise UsageError(
            f"two of the models are called {twice}: rename the file or folder of one"
        )
    dense = Variant(subjects[0], engine.plain)
    asked = [
        Variant(one, kind)
        for one in subjects
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
        self.failed: dict[Key, str] = {}
        self.written = Written.of(self.out)
        self.sources: dict[Key, Path] = {}
        self.scores = Ledger(self.out, EngineScoresRecord, self._source)
        self.times = Ledger(self.out, EngineTimesRecord, self._source)

    def records(self) -> list[ParetoRecord]:
        known = Ledger(self.out, ParetoRecord)
        for variant in self.variants:
            self.written.check_own(self._place_of(variant))
        for number, variant in enumerate(self.variants):
            self._trying(variant, partial(self._score, variant, SCORING * number))
            if all(
                later.key[:2] != variant.key[:2]
                for later in self.variants[number + 1 :]
            ):
                self._drop_source(variant)
        for number in range(self.workload.rounds):
            self._round(number)
        found = [self._compared(variant) for variant in self.variants]
        best = [record.key for record in pareto_front(found)]
        known.renew(
            record.model_copy(update={"best": record.key in best}) for record in found
        )
        return [known[variant.key] for variant in self.variants]

    def _tell(self, step: float, what: str) -> None:
        self.progress(step, len(self.variants) * (SCORING + self.workload.rounds), what)

    def _source(self, record: EngineScoresRecord | EngineTimesRecord) -> Provenance:
        by_name = {variant.key[:2]: variant.subject for variant in self.variants}
        subject = by_name.get((record.model, record.repaired))
        return subject.source(self.provenance) if subject else self.provenance

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
        self._tell(
            step,
            (
                f"writing and verifying {variant}"
                if variant.subject.plan
                else f"writing {variant}"
            ),
        )
        checkpoint = self._written(variant)
        self._tell(step + 0.5, f"scoring {variant}")
        windows = variant.subject.windows
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
                tokens_as_dense=windows.tokens == self.dense.subject.windows.tokens,
                provenance=variant.subject.source(self.provenance),
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
                from ..exporters.remote_code import (
                    check_code,
                )  # here, as it imports transformers

                check_code(checkpoint)
            if checkpoint.is_dir():
                check_manifest(checkpoint, "delete it, and run again")
            return checkpoint
        self.written.make_way(checkpoint)
        of = variant.subject
        if variant.type in (self.engine.plain, of.stored):
            loading = {
                "revision": of.revision,
                "trust_remote_code": of.trust_remote_code,
            }
            write_plain(
                self.engine, of.spec, of.plan, checkpoint, bool(of.stored), **loading
            )
            return checkpoint
        plain = self._source_of(variant)
        with temporary(checkpoint) as partial_one:
            worker.call(
                self.engine, "quantise", plain=plain, kind=variant.type, out=partial_one
            )
            partial_one.rename(checkpoint)
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
            self._tell(start + place, f"timing {variant}, round {number + 1}")
            self._trying(variant, partial(self._time, variant, number))

    def _time(self, variant: Variant, number: int) -> None:
        prompt = list(
            islice(
                cycle(chain.from_iterable(variant.subject.windows.tokens)),
                self.workload.prompt_tokens,
            )
        )
        new = self.workload.generation_tokens
        taken = worker.call(
            self.engine,
            "time",
            checkpoint=self._written(variant),
            prompt=prompt,
            new=new,
        )
        taken["memory_bytes"] = max(taken["memory_bytes"], 0)
        about = variant.subject.source(self.provenance)
        self.times.add(
            EngineTimesRecord(**variant.named, round=number, **taken, provenance=about)
        )

    def _compared(self, variant: Variant) -> ParetoRecord:
        skipped = variant.subject.plan.skipped
        about = {
            **variant.named,
            "skipped": skipped,
            "provenance": variant.subject.source(self.provenance),
        }
        if variant.key in self.failed:
            return ParetoRecord(**about, failed=self.failed[variant.key])
        scores, dense = self.scores[variant.key], self.scores[self.dense.key]
        rounds = self._rounds(variant)
        bits, others = scores.bits_per_byte, dense.bits_per_byte
        means = {
            "nll": scores.nll,
            "bits_per_byte": bits,
            "delta_bits": map(sub, bits, others),
        }
        means["delta_nll"] = (
            map(sub, scores.nll, dense.nll) if scores.tokens_as_dense else [math.nan]
        )
        for name, values in means.items():
            each = [*values]
            known = all(map(is_number, each))
            about[name], about[f"{name}_se"] = (
                mean_and_error(each) if known else (math.nan, math.nan)
            )
        return ParetoRecord(
            **about,
            windows=len(scores.nll),
            tokens=sum(scores.tokens),
            file_bytes=scores.file_bytes,
            memory_bytes=round(median(one.memory_bytes for one in rounds)),
            memory_of=rounds[0].memory_of,
            times=self._times(variant),
            rounds=len(rounds),
            round_ms=self._round_ms(variant),
        )

    def _alike(self, variant: Variant) -> list[Variant]:
        """All variants of its shape, since these do the same: other numbers in weights
        make none faster.
        """

        def shape(one: Variant) -> tuple[object, ...]:
            return one.subject.spec, one.subject.plan.indices, one.type

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
        from ..measuring.speed import RoundTimes

        def timing(variants: Sequence[Variant]) -> RoundTimes:
            taken = [
                one
                for round_of_them in zip(*map(self._rounds, variants))
                for one in round_of_them
            ]
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


def write_plain(
    engine: Engine,
    spec: str | Path,
    plan: Plan,
    out: Path,
    stored: bool = False,
    **loading: Any,
) -> None:
    """Write the model without what the plan skips, plain or as it is `stored`, as the
    engine reads it; whole or not.

    An export is run, and compared with the skipped model. Raises `NotAsSkipped` where
    it answers differently, and `EngineFailed` where that cannot be seen: what is not
    verified is not measured.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with temporary(out) as scratch:
        scratch.mkdir()
        source = engine.source(spec, scratch)
        if stored and Path(source).is_dir():
            source = shutil.copytree(source, scratch / "copy")
        elif plan or source == spec:
            if (
                source != spec and plan.state == "repaired"
            ):  # whose weights are not told by rounded ones
                plan = plan.model_copy(update={"replaced": {}})
            dtype = (
                engine.dtype if engine.plain == engine.dtype and not stored else None
            )
            folder = export(
                source, plan, engine.target, scratch / "export", dtype=dtype, **loading
            )
            if isinstance(verdict := verdict_of(read_manifest(folder)), NotVerified):
                raise worker.EngineFailed(str(verdict))
            source = next(folder.glob(f"*{engine.suffix}")) if engine.suffix else folder
        Path(source).rename(out)


@dataclass(frozen=True)
class EngineOptions:
    """The engine, how it represents weights, and what is measured beside the model."""

    PANEL: ClassVar = "Engine"

    engine: str = option(
        "llama.cpp",
        "llama.cpp (for a .gguf file), transformers, vllm, or your own module:Class",
    )
    types: Words = option(
        (),
        "ways to represent weights, with commas: F16, Q8_0, Q5_K_M, Q4_K_M in"
        " llama.cpp, int8, int4 in transformers, int8 in vllm (default: all that"
        " usually run). The original model is measured in plain weights too, and the"
        " plans' plain weights are deleted once they are quantised",
        metavar="TYPE",
    )
    threads: int | None = option(
        None, "threads of the engine (default: one for each core)", least=1
    )
    also: Words = option(
        (), "another model to measure with this one; repeat it for more"
    )

    def of(self, model: PreTrainedModel | None = None) -> Engine:
        """The engine, with plain weights in the dtype of a model. Raises `UsageError`
        where there is none so called.
        """
        from ..measuring.speed import cores
        from ..models.loading import dtype_name

        found = engine_named(self.engine)(self.threads or cores())
        return replace(found, dtype=dtype_name(model)) if model else found

    def check_plans(self, plans: Iterable[Plan]) -> None:
        """Raise `UsageError` for a plan that skips in the prompt alone, which none of
        the engines can run yet.
        """
        for plan in plans:
            refuse_prefill(plan, f"the engine {self.engine}")

    def provenance(
        self, about: Provenance, engine: Engine, workload: Workload, **more: object
    ) -> Provenance:
        """`about`, with what decides figures in the engine, as `more` does, and its
        version.
        """
        tokens = {
            "prompt_tokens": workload.prompt_tokens,
            "generation_tokens": workload.generation_tokens,
        }
        versions = {**about.where["versions"], engine.package: engine.version}
        what = (
            about.what
            | {"engine": self.engine, "threads": engine.threads}
            | tokens
            | more
        )
        return Provenance(what=what, where=about.where | {"versions": versions})


@dataclass(frozen=True)
class ParetoPlans(SpaceOptions):
    """Which plans are measured: files, and those that the search finds."""

    skip: str = option(
        "sublayer",
        "find plans that skip these, such as attention:4,8, or what --speedups choose"
        " among",
        metavar="KIND[:HOW MANY,...]",
    )
    plan: tuple[Path, ...] = option(
        (), "plan file, folder of a repair, or published:NAME; repeat it for more"
    )
    speedups: Words = option(
        (),
        f"find plans of these speedups in torch (default: {FIRST}, if no plan is"
        " given)",
    )
    repair: str = option(
        REFIT, f"measure repaired plans too: {METHODS}; or none", metavar="METHOD"
    )

    def given(self) -> dict[str, Plan]:
        """Plans by the names of their files. Raises `UsageError` for two of one name,
        and for a repair that is none.
        """
        if self.repair != NONE:
            check_method(self.repair)
        return read_plans(self.plan)

    @property
    def wanted(self) -> tuple[tuple[float, ...], list[float]]:
        """How many to skip, and how many times as fast to be. Raises `UsageError` for
        what is no number.
        """
        amounts, asked = self.amount.amounts, words_of(self.speedups)
        if not (self.plan or amounts or asked):
            asked = FIRST.split(",")
        return amounts, [self._speedup(word) for word in asked]

    def _speedup(self, word: str) -> float:
        try:
            return float(word)
        except ValueError:
            given, what = shortened(",".join(self.speedups)), repr(shortened(word))
            raise UsageError(
                f"--speedups {given}: {what} is no number; give some such as 1.1,1.2"
            ) from None


def write_pareto(records: Sequence[ParetoRecord], out: Path, title: str) -> None:
    """The table and the sentence, `out/table.md`, and with the extra `report`
    `out/pareto.png`, .svg and .html.
    """
    rows = table(title, COLUMNS, records)
    write_whole(
        out / "table.md", f"{sentence(records)}\n\n{rows.markdown()}\n{rows.legend}\n"
    )
    if installed(*FIGURES):
        from ..charts import style

        told = "Lower right is better. Bars: standard error; quartiles of the speedup."
        style.save(style.framed(_drawn(records), title, told), out / "pareto")


def _drawn(records: Sequence[ParetoRecord]) -> alt.LayerChart:
    """A colour a model, a shape for what is repaired."""
    from ..charts.losses import Point, in_turn, tradeoff

    by_bits, points, best = goes_by_bits(records), list[Point](), list[Point]()
    for number, one in enumerate(records):
        lost, error = one.loss(by_bits=by_bits)
        point = Point(
            one.named,
            lost,
            error,
            one.times.speedup_decode if one.times else None,
            colour=one.model,
        )
        points.append(
            replace(
                point,
                shape="repaired" if one.repaired else "as it is",
                label=one.type,
                plan=number,
            )
        )
        best += points[-1:] if one.best else []
    colours, losses = (
        in_turn(dict.fromkeys(point.colour for point in points)),
        (DELTA_BITS if by_bits else DELTA_NLL),
    )
    return tradeoff(
        points,
        colours,
        colour="model",
        shape="weights",
        lost=losses.titled,
        best=best,
        dense=False,
    )


def sentence(records: Sequence[ParetoRecord]) -> str:
    """What to take for a given speed: the front from the slowest to the fastest, and
    whether skipping is on it.
    """
    best, by_bits = pareto_front(records), goes_by_bits(records)
    if not best:
        return "No model was both scored and timed."
    unit = "bits per byte" if by_bits else "nats"
    choices = [
        f"{one.faster:.2f} times, {one.named} ({one.loss(by_bits=by_bits)[0]:+.3f}"
        f" {unit}, {in_bytes(one.file_bytes or 0)})"
        for one in best
    ]
    told = [
        f"What to take to decode so many times as fast as {records[0].named}:"
        f" {'; '.join(choices)}."
    ]
    told.append(f"Leaving sublayers out {_pays(records, best, by_bits)}.")
    rounds, windows = (
        records[0].rounds or LEAST_ROUNDS,
        records[0].windows or LEAST_WINDOWS,
    )
    few = [several(rounds, "round")] if rounds < LEAST_ROUNDS else []
    few += [f"{several(windows, 'window')} of text"] if windows < LEAST_WINDOWS else []
    if few:
        more = (
            f"give --rounds {LEAST_ROUNDS} and --held-out-sequences {LEAST_WINDOWS} or"
            " more"
        )
        told.append(f"That is of {' and '.join(few)}, too few to judge by: {more}.")
    return " ".join(told)


def _pays(
    records: Sequence[ParetoRecord], best: Sequence[ParetoRecord], by_bits: bool
) -> str:
    """From which speed on skipping pays: where it is faster than each model that skips
    nothing, or loses less.
    """
    whole = [one for one in records if one.times and not one.skipped]
    skipping = [one for one in best if one.skipped]
    for one in skipping:
        if all(
            is_faster(one, other) or loses_less(one, other, by_bits=by_bits)
            for other in whole
        ):
            return f"pays from {one.faster:.2f} times on"
    if skipping:
        may = f"may pay from {skipping[0].faster:.2f} times on"
        return f"{may}: rounds and windows do not tell it from what skips nothing"
    return "is nowhere on this front: it is not measurably faster than what loses less"


def shown(folder: Folder) -> Shown:
    """What a page says of models in an engine, whose checkpoints are in the folder."""
    from ..charts.style import on_page

    records = folder.of(ParetoRecord)
    measured = any(one.times for one in records)
    drawn = (
        (Figure(on_page(_drawn(records)), "Loss against decode speedup in the engine"),)
        if measured
        else ()
    )
    section = Section(
        "pareto", "Skipping beside quantising", drawn, table("pareto", COLUMNS, records)
    )
    command = folder.provenance.command
    if command[:2] != ["notall", "pareto"]:
        engine = folder.provenance.what.get("engine", "llama.cpp")
        command = [
            "notall",
            "pareto",
            folder.model,
            "--engine",
            engine,
            "--out",
            str(folder.path),
        ]
    asked = {word.partition("=")[0] for word in command}
    own = (
        "" if {"--skip", "--plan", "--speedups"} & asked else f"{FIRST},"
    )  # without any of them it finds these
    more = shlex.join([*command, "--speedups", own + FASTER])
    message = Message(
        sentence(records), None, "measure what is faster beside these", more
    )
    return Shown(message=message, sections=(section,))
