"""What sweep, compare and paper share: stages, each done once and kept in the folder, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import UsageError
from ..options import Workload
from ..plan import Plan
from ..progress import Progress, Stages, silent
from ..results.facts import Check, Configured, Footprint, Quality, TaskScore, Times
from ..results.ledger import Ledger, refuse_foreign, working_in
from ..results.provenance import Provenance
from ..results.record import Count, Fact, Loss, Number, Record, Share, SublayerName, SublayerNames, Unsigned, is_number
from .options import TaskChoice
from .similarity import SimilarityRecord

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.harness import PlansLM
    from ..evaluation.ray_workers import Workers
    from ..evaluation.tasks import Job
    from ..measuring.quality import Scores
    from ..structure.model_structure import ModelStructure, Sublayer

PROMPTS = ("The capital of France is", "To make a good cup of tea, first")  # for the examples of what a plan says
SAMPLE_TOKENS = 32
FEW_SEQUENCES = 2  # for what leaving out each sublayer costs: a plan a sublayer is a lot of plans

UNREPAIRED = "none"
RepairName = Annotated[str, Field(pattern=r"^[\w.:-]{1,120}$")]  # also module:function


# --- what is written down ---------------------------------------------------------------------------------------------


class SequenceScores(Fact):
    """Of one plan on one batch, a value a sequence."""

    nll: tuple[Loss, ...] = Field(description="nats per token")
    kl: tuple[Number, ...] = Field(description="nats per token")
    top1_agreement: tuple[Share, ...] = Field(description="0 to 1")

    @model_validator(mode="after")
    def _of_each_sequence(self) -> SequenceScores:
        if not len(self.nll) == len(self.kl) == len(self.top1_agreement):
            raise ValueError("nll, kl and top1_agreement are of different numbers of sequences")
        return self


class ScoresRecord(Record):
    """Scores on one batch of token ids, by what is skipped; of the dense model by nothing."""

    file = "scores.jsonl"
    commands = ("sweep", "compare")
    key_fields = ("batch", "repair", "names")

    record: Literal["scores"] = "scores"
    batch: Count = Field(description="its number, from 0")
    repair: RepairName = Field(UNREPAIRED, description="what made up for what is skipped")
    scores: dict[SublayerNames, SequenceScores]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scores)


class LeaveOneOutRecord(Record):
    """One sublayer left out, on a few sequences."""

    file = "leave_one_out.jsonl"
    commands = ("sweep",)
    key_fields = ("sublayer",)

    record: Literal["leave_one_out"] = "leave_one_out"
    sublayer: SublayerName
    delta_nll: Number = Field(description="nll less the dense model's, nats per token")
    delta_nll_se: Unsigned = Field(math.nan, description="of the paired differences, nats per token")
    sequences: Count | None = Field(None, description="on how many")


class PlanTimesRecord(Record):
    """The times of a plan; plans that leave as much of a model take as long, and are timed once."""

    file = "plan_times.jsonl"
    commands = ("compare",)
    key_fields = ("footprint",)

    record: Literal["plan_times"] = "plan_times"
    footprint: Footprint
    times: Times


class SaidRecord(Record, Configured):
    """How one plan continues prompts."""

    file = "samples.jsonl"
    commands = ("sweep",)
    key_fields = ("variant", "fraction", "keep_last", "plan")

    record: Literal["samples"] = "samples"
    said: dict[str, str] = Field(description="by prompt")


class BenchmarkRecord(Record, TaskScore, Configured):
    """One configuration on one task, beside the dense model on the same documents."""

    file = "benchmarks.jsonl"
    commands = ("paper",)
    key_fields = ("task", "metric", "variant", "fraction", "keep_last")

    record: Literal["benchmark"] = "benchmark"


class DiagnosticsRecord(Record, Check, Configured):
    """One check of one configuration beside the dense model."""

    file = "diagnostics.jsonl"
    commands = ("paper",)
    key_fields = ("part", "check", "variant", "fraction", "keep_last")

    record: Literal["diagnostics"] = "diagnostics"
    part: str = Field(description="of the diagnostics")


# --- what is run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a run is of: a model, its tokenizer and a text, (batch, tokens) token ids each; and where its results go.

    `workers` score plans and answer tasks, if given; times are always this process's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    batches: Sequence[Tensor]
    out: Path
    provenance: Provenance
    seed: int = 0
    workers: Workers | None = None

    @property
    def structure(self) -> ModelStructure:
        from ..structure.locating import locate

        return locate(self.model)

    @property
    def tokens(self) -> int:
        """Of its text."""
        return sum(batch.numel() for batch in self.batches)

    @property
    def digest(self) -> str:
        """Of its text."""
        digest = hashlib.sha256()
        for tokens in self.batches:
            digest.update(tokens.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def score(self, plans: Sequence[Plan], tokens: Tensor) -> list[Scores]:
        """As `quality.score`: of the dense model, then of each plan."""
        from ..measuring.quality import score

        return self.workers.score(plans, tokens) if self.workers else score(self.model, plans, tokens)


# --- scores -----------------------------------------------------------------------------------------------------------

Scored = tuple[str, str]  # the repair, and the names of what is skipped
DENSE: Scored = (UNREPAIRED, "")


def scored_as(plan: Plan, repair: str = UNREPAIRED) -> Scored:
    return repair, " ".join(plan.names)


class HeldScores:
    """Scores of plans on the batches of a subject: what lacks is computed together, batch by batch."""

    def __init__(self, subject: Subject, about: Provenance) -> None:
        self.subject, self.about = subject, about
        self.kept = Ledger(subject.out, ScoresRecord, about)
        self._held = {
            (one.batch, one.repair, names): scores for one in self.kept for names, scores in one.scores.items()
        }

    def measure(self, plans: Mapping[Scored, Plan], doing: str, progress: Progress = silent) -> None:
        """Of each of `plans`, which may be repaired; the first one may be the dense one."""
        for number, tokens in enumerate(self.subject.batches):
            lacking = [key for key in plans if (number, *key) not in self._held]
            if not lacking:
                continue
            progress(number, len(self.subject.batches), doing)
            asked = [key for key in lacking if key != DENSE]
            found = dict(zip([DENSE, *asked], self.subject.score([plans[key] for key in asked], tokens)))
            records = []
            for repair, keys in groupby(lacking, key=lambda key: key[0]):
                told = {names: asdict(found[repair, names]) for _, names in keys}
                scores = {key: SequenceScores(**{name: tuple(one[name]) for name in one}) for key, one in told.items()}
                records.append(ScoresRecord(batch=number, repair=repair, scores=scores, provenance=self.about))
                self._held |= {(number, repair, names): one for names, one in scores.items()}
            self.kept.add(*records)
        progress(1, 1, doing)

    def has(self, key: Scored) -> bool:
        """Of all batches."""
        return all((number, *key) in self._held for number in range(len(self.subject.batches)))

    def scores(self, key: Scored) -> Scores:
        """Of all batches; what was no number is infinite. Raises `UsageError` for other numbers of sequences."""
        from ..measuring.quality import Scores

        total = Scores()
        for number, tokens in enumerate(self.subject.batches):
            place = (number, *key)
            held = self._held[place]
            if len(held.nll) != len(tokens):
                raise UsageError(
                    f"{self.kept.path} has scores of {len(held.nll)} sequences, not {len(tokens)}; delete that file, "
                    "to score anew"
                )
            total.extend(
                Scores(**{name: [value if is_number(value) else math.inf for value in some] for name, some in held})
            )
        return total

    def quality(self, key: Scored) -> Quality:
        """Beside the dense model."""
        from ..measuring.quality import summarize

        return summarize(self.scores(key), self.scores(DENSE))


# --- times ------------------------------------------------------------------------------------------------------------


def time_plan(subject: Subject, plan: Plan, workload: Workload, progress: Progress = silent) -> Times:
    """In turn with the dense model."""
    from ..measuring.speed import time_plans

    plans = {"skipped": plan} if plan else {}
    return [*time_plans(subject.model, plans, workload, seed=subject.seed, progress=progress).values()][-1]


def shared_times(
    subject: Subject, plans: Sequence[Plan], workload: Workload, about: Provenance, progress: Progress
) -> dict[Plan, Times]:
    """Of each plan, in turn with the dense model; plans that leave as much of each kind are timed once."""
    from ..running.footprint import footprint

    about = Provenance.of(about, workload=asdict(workload))
    held = Ledger(subject.out, PlanTimesRecord, about)
    found = {}
    for number, plan in enumerate(plans):
        left = footprint(subject.model, plan)
        if (left,) not in held:
            progress(number, len(plans), f"timing {plan}")
            times = time_plan(subject, plan, workload)
            held.add(PlanTimesRecord(footprint=left, times=times, provenance=about))
        found[plan] = held[left,].times
    return found


# --- layers and examples ----------------------------------------------------------------------------------------------


def similarity_by_depth(subject: Subject, about: Provenance, progress: Progress) -> list[SimilarityRecord]:
    """Of each block and sublayer."""
    from ..measuring.similarity import measure_similarity

    progress(0, 1, "similarity by depth")
    held = Ledger(subject.out, SimilarityRecord, about)
    wanted = [(block.index, kind) for block in subject.structure.blocks for kind in ("block", *block.kinds)]
    if held.missing(wanted):
        found = measure_similarity(subject.model, subject.batches)
        records = [SimilarityRecord.from_fact(row, provenance=about) for row in found]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "similarity by depth")
    return [held[key] for key in wanted]


def removable(structure: ModelStructure) -> list[Sublayer]:
    """The sublayers that can be left out alone: the only attention that counts tokens cannot."""
    return [part for part in structure.sublayers if part.kind == "mlp" or structure.counting != {part.index}]


def leave_one_out(subject: Subject, about: Provenance, progress: Progress) -> None:
    """What leaving out each of the sublayers alone costs, on the first sequences."""
    from ..measuring.quality import gather

    parts, held = removable(subject.structure), Ledger(subject.out, LeaveOneOutRecord, about)
    progress(0, 1, "leaving out each sublayer alone")
    if held.missing((part.name,) for part in parts):
        few: list[Tensor] = []
        for tokens in subject.batches:
            few.append(tokens[: FEW_SEQUENCES - sum(map(len, few))])
        plans = [Plan(**{part.kind: [part.index]}) for part in parts]
        qualities = gather(subject.score(plans, tokens) for tokens in few if len(tokens))
        records = [
            LeaveOneOutRecord(
                sublayer=part.name,
                delta_nll=one.delta_nll,
                delta_nll_se=one.delta_nll_se,
                sequences=one.sequences,
                provenance=about,
            )
            for part, one in zip(parts, qualities)
        ]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "left out each sublayer alone")


def continuations(subject: Subject, rows: Sequence[Configured], about: Provenance, progress: Progress) -> None:
    """How each of `rows` continues a few prompts."""
    from ..running.generating import continue_prompts

    assert subject.tokenizer
    held = Ledger(subject.out, SaidRecord, about)
    for number, row in enumerate(rows):
        progress(number, len(rows), f"generating, {row.variant}")
        if (*row.configuration, row.plan) not in held:
            said = continue_prompts(subject.model, subject.tokenizer, row.plan, PROMPTS, SAMPLE_TOKENS)
            held.add(SaidRecord(**fields_of(row), said=dict(zip(PROMPTS, said)), provenance=about))
    progress(1, 1, "generated examples")


def fields_of(row: Configured) -> dict[str, Any]:
    """Those of a row of the grid, also of a record that extends one."""
    return {name: getattr(row, name) for name in Configured.model_fields}


# --- benchmarks and diagnostics ---------------------------------------------------------------------------------------


def task_scores(
    subject: Subject, plans: Sequence[Plan], jobs: Sequence[Job], choice: TaskChoice, progress: Progress
) -> dict[Plan, tuple[TaskScore, ...]]:
    """The scores of each plan; every answer is kept as it comes."""
    from ..evaluation.harness import run_tasks

    assert subject.tokenizer
    found = run_tasks(
        *(subject.model, subject.tokenizer, plans, jobs),
        folder=subject.out / "answers",
        batch_size=choice.batch_size,
        truncate=choice.truncate,
        progress=progress,
    )
    return {
        plan: tuple(result.score for result in found if result.number == number) for number, plan in enumerate(plans)
    }


class Benchmarks:
    """Some tasks for `rows` (the dense one first): their data is read, and all is checked, before anything is computed.

    Tasks that generate text take a pass for each row: they are for `generating_rows`, where given. Raises `UsageError`
    as `run_tasks` does, and when the folder holds the results of other settings or of another command.
    """

    def __init__(
        self,
        subject: Subject,
        rows: Sequence[Configured],
        choice: TaskChoice,
        generating_rows: Sequence[Configured] | None = None,
    ) -> None:
        from ..evaluation.harness import LM_EVAL_VERSION

        self.subject, self.rows, self.choice, self.generating_rows = subject, rows, choice, generating_rows
        settings = {"lm_eval": LM_EVAL_VERSION, "asked_fewshot": choice.num_fewshot, "truncate": choice.truncate}
        self.about = Provenance.of(subject.provenance, **settings)
        self.abouts = {
            name: Provenance.of(self.about, asked=name, limit=choice.limit_of(name)) for name in choice.names
        }
        refuse_foreign(subject.out, "paper")
        held = self._ledger()
        self.jobs = {name: choice.build(name) for name in choice.names if not self._is_done(held, name)}
        self.models: dict[int, PlansLM] = {}  # by how many rows they are for
        for job in self.jobs.values():
            self._model(job).check(job)

    def run(self, progress: Progress = silent) -> list[BenchmarkRecord]:
        """One record a task, metric and row.

        Writes the records of a task as soon as it is done, and each answer as it comes: the same call goes on where it
        stopped. Raises `UsageError` when another process works in the folder, and when it cannot be written.
        """
        from ..evaluation.harness import evaluate_job

        with working_in(self.subject.out, "paper"):
            held = self._ledger()
            stages = Stages(progress, len(self.choice.names))
            for name in self.choice.names:
                telling = stages.stage(1)
                if name not in self.jobs or self._is_done(held, name):
                    continue
                job, rows = self.jobs[name], self._rows_of(self.jobs[name])
                found = evaluate_job(self._model(job, telling), job)
                source = Provenance.of(self.abouts[name], records=len(found))
                known = {record.key for record in self._of(held, name)}
                records = (
                    BenchmarkRecord.from_fact(one.score, **fields_of(rows[one.number]), provenance=source)
                    for one in found
                )
                held.add(*(record for record in records if record.key not in known))
            progress(stages.steps, stages.steps, "benchmarks")
            return [record for name in self.choice.names for record in self._of(held, name)]

    def _ledger(self) -> Ledger[BenchmarkRecord]:
        return Ledger(
            self.subject.out, BenchmarkRecord, lambda one: self.abouts.get(str(one.what.get("asked")), self.about)
        )

    def _of(self, records: Iterable[BenchmarkRecord], name: str) -> list[BenchmarkRecord]:
        """What is known of these rows, of the task that was asked for by this name."""
        asked = (record for record in records if record.what.get("asked") == name)
        return [record for record in asked if any(row.describes(record) for row in self.rows)]

    def _is_done(self, records: Ledger[BenchmarkRecord], name: str) -> bool:
        held = self._of(records, name)
        return bool(held) and len(held) == held[0].what.get("records")

    def _rows_of(self, job: Job) -> Sequence[Configured]:
        """Text is generated plan by plan."""
        generates = any(task.OUTPUT_TYPE == "generate_until" for task in job.tasks.values())
        return self.generating_rows if self.generating_rows and generates else self.rows

    def _model(self, job: Job, progress: Progress = silent) -> PlansLM:
        """The harness's model for the rows of a job, made when it is first needed."""
        from ..evaluation.harness import PlansLM

        subject, rows = self.subject, self._rows_of(job)
        assert subject.tokenizer
        if len(rows) not in self.models:
            self.models[len(rows)] = PlansLM(
                *(subject.model, subject.tokenizer, [row.plan for row in rows], subject.out),
                batch_size=self.choice.batch_size,
                truncate=self.choice.truncate,
                workers=subject.workers,
            )
        self.models[len(rows)].progress = progress
        return self.models[len(rows)]


def diagnose(
    subject: Subject, rows: Sequence[Configured], windows: Sequence[Tensor], progress: Progress
) -> list[DiagnosticsRecord]:
    """One record a configuration and check; a part of the diagnostics is kept as soon as it is done."""
    from ..evaluation.diagnostics import CONTEXTS, PARTS, run_diagnostics

    assert subject.tokenizer
    size = {"windows": [len(windows), windows[0].numel()], "contexts": [*CONTEXTS]}
    about, plans = Provenance.of(subject.provenance, seed=subject.seed, **size), [row.plan for row in rows]
    with working_in(subject.out, "paper"):
        held = Ledger(subject.out, DiagnosticsRecord, about)
        for place, part in enumerate(PARTS):
            progress(place, len(PARTS), f"{part}, all configurations")
            counts = {sum(record.part == part and row.describes(record) for record in held) for row in rows}
            if len(counts) == 1 and counts != {0}:
                continue
            found = run_diagnostics(subject.model, subject.tokenizer, plans, windows, parts=[part], seed=subject.seed)
            held.add(
                *(
                    DiagnosticsRecord.from_fact(check, **fields_of(row), part=part, provenance=about)
                    for row, checks in zip(rows, found)
                    for check in checks
                )
            )
        progress(1, 1, "diagnostics")
        return [record for record in held if any(row.describes(record) for row in rows)]
