"""What sweep, compare and paper share: stages, each done once and kept in the folder,
so that a killed run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import product
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import Field

from ..errors import UsageError
from ..extras import FIGURES, installed
from ..files import write_whole
from ..options import Workload
from ..plan import KIND_NAMES, Plan, several
from ..progress import Progress, Stages, silent
from ..results.facts import (
    COSINE,
    GRID,
    SIMILARITY,
    Check,
    Configured,
    Quality,
    Scores,
    Similarity,
    TaskScore,
    Times,
)
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import (
    Count,
    Number,
    Record,
    SublayerName,
    SublayerNames,
    Unsigned,
    is_number,
)
from ..results.table import as_csv, as_latex, pivot
from ..strict_json import Settings
from .options import TaskChoice

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..evaluation.harness import PlansLM
    from ..evaluation.ray_workers import Workers
    from ..evaluation.task_scores import TaskResult
    from ..evaluation.tasks import Job
    from ..structure.model_structure import ModelStructure

SIMILARITY_READS = "1 − cosine similarity. Low: little of the input is changed"

UNREPAIRED = "none"
RepairName = Annotated[str, Field(pattern=r"^[\w.:-]{1,120}$")]  # also module:function


class ScoresRecord(
    Record, kind="scores", key=("batch", "repair", "names", "prompt_tokens")
):
    """Scores on one batch of token ids, by what is skipped; of the original model by
    nothing.
    """

    batch: Count = Field(description="its number, from 0")
    repair: RepairName = Field(
        UNREPAIRED, description="what made up for what is skipped"
    )
    prompt_tokens: Count | None = Field(
        None,
        description="first tokens of each sequence, its prompt, which are not scored",
    )
    scores: dict[SublayerNames, Scores]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.scores)


class SimilarityRecord(Record, Similarity, kind="similarity", key=("layer", "kind")):
    """One block or sublayer of a run."""


class LeaveOneOutRecord(Record, kind="leave_one_out", key=("sublayer",)):
    """One sublayer left out, on a few sequences."""

    sublayer: SublayerName
    delta_nll: Number = Field(
        description="nll less the original model's, nats per token"
    )
    delta_nll_se: Unsigned = Field(
        math.nan, description="of the paired differences, nats per token"
    )
    sequences: Count | None = Field(None, description="on how many")


class BenchmarkRecord(
    Record, TaskScore, Configured, kind="benchmark", key=("task", "metric", *GRID)
):
    """One configuration on one task, beside the original model on the same
    documents.
    """


class DiagnosticsRecord(
    Record, Check, Configured, kind="diagnostics", key=("part", "check", *GRID)
):
    """One check of one configuration beside the original model."""

    part: str = Field(description="of the diagnostics")


@dataclass(frozen=True)
class Subject:
    """What a run is of: a model, its tokenizer and a text, (batch, tokens) token ids
    each; and where its results go.

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
        return sum(batch.numel() for batch in self.batches)

    def score(
        self, plans: Sequence[Plan], tokens: Tensor, prompt_tokens: int | None = None
    ) -> list[Scores]:
        """As `quality.score`: of the original model, then of each plan."""
        from ..measuring.quality import score

        if self.workers:
            return self.workers.score(plans, tokens, prompt_tokens)
        return score(self.model, plans, tokens, prompt_tokens)


class Scored(NamedTuple):
    """What is scored: a plan, its repair, and behind how many tokens of each
    sequence.
    """

    repair: str
    skipped: str
    prompt_tokens: int | None = None

    @property
    def dense(self) -> Scored:
        """The original model on the same tokens."""
        return Scored(UNREPAIRED, "", self.prompt_tokens)


def scored_as(
    plan: Plan, repair: str = UNREPAIRED, prompt_tokens: int | None = None
) -> Scored:
    return Scored(repair, plan.skipped, prompt_tokens)


class HeldScores:
    """Scores of plans on the batches of a subject: what lacks is computed together,
    batch by batch.
    """

    def __init__(self, subject: Subject, about: Provenance) -> None:
        self.subject, self.about = subject, about
        self.kept = Ledger(subject.out, ScoresRecord, about)
        self._held = {
            (one.batch, *Scored(one.repair, skipped, one.prompt_tokens)): its
            for one in self.kept
            for skipped, its in one.scores.items()
        }

    def measure(
        self, plans: Mapping[Scored, Plan], doing: str, progress: Progress = silent
    ) -> None:
        """Of each of `plans`, which may be repaired; the dense one may be among
        them.
        """
        prompts = dict.fromkeys(key.prompt_tokens for key in plans)
        for number, prompt in product(range(len(self.subject.batches)), prompts):
            asked = [key for key in plans if key.prompt_tokens == prompt]
            if lacking := [key for key in asked if (number, *key) not in self._held]:
                progress(number, len(self.subject.batches), doing)
                self._score(number, {key: plans[key] for key in lacking}, prompt)
        progress(1, 1, doing)

    def _score(
        self, number: int, plans: Mapping[Scored, Plan], prompt: int | None
    ) -> None:
        """Of the batch of that number, all behind one prompt, and keep it."""
        dense = scored_as(Plan(), prompt_tokens=prompt)
        asked = [key for key in plans if key != dense]
        tokens = self.subject.batches[number]
        scores = self.subject.score([plans[key] for key in asked], tokens, prompt)
        found = dict(zip([dense, *asked], scores))
        self._held |= {(number, *key): found[key] for key in plans}
        by_repair: dict[str, dict[str, Scores]] = {}
        for key in plans:
            by_repair.setdefault(key.repair, {})[key.skipped] = found[key]
        about: Settings = {
            "batch": number,
            **({"prompt_tokens": prompt} if prompt else {}),
        }
        self.kept.add(
            *(
                ScoresRecord(
                    **about, repair=repair, scores=scores, provenance=self.about
                )
                for repair, scores in by_repair.items()
            )
        )

    def has(self, key: Scored) -> bool:
        return all(
            (number, *key) in self._held for number in range(len(self.subject.batches))
        )

    def scores(self, key: Scored) -> Scores:
        """Of all batches; what was no number is infinite. Raises `UsageError` for other
        numbers of sequences.
        """
        places = [(number, *key) for number in range(len(self.subject.batches))]
        held = [self._held[place] for place in places]
        for one, tokens in zip(held, self.subject.batches):
            if len(one.nll) != len(tokens):
                told = (
                    f"{self.kept.path} has scores of"
                    f" {several(len(one.nll), 'sequence')}, not {len(tokens)}"
                )
                raise UsageError(f"{told}; delete that file, to score anew")
        whole = {
            name: tuple(one if is_number(one) else math.inf for one in some)
            for name, some in reduce(add, held)
        }
        return Scores(**whole)

    def quality(self, key: Scored) -> Quality:
        from ..measuring.quality import summarize

        return summarize(self.scores(key), self.scores(key.dense))


def time_plan(
    subject: Subject,
    plan: Plan,
    workload: Workload,
    progress: Progress = silent,
    name: str = "",
) -> Times:
    from ..measuring.speed import time_plans

    plans = {name: plan} if plan else {}
    return [
        *time_plans(
            subject.model, plans, workload, seed=subject.seed, progress=progress
        ).values()
    ][-1]


def similarities(
    subject: Subject, about: Provenance, progress: Progress
) -> list[SimilarityRecord]:
    from ..measuring.quality import measure_similarity

    progress(0, 1, "similarity by depth")
    held = Ledger(subject.out, SimilarityRecord, about)
    wanted = [
        (block.index, kind)
        for block in subject.structure.blocks
        for kind in ("block", *block.kinds)
    ]
    if held.missing(wanted):
        found = measure_similarity(subject.model, subject.batches)
        records = [SimilarityRecord.from_fact(row, provenance=about) for row in found]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "similarity by depth")
    return [held[key] for key in wanted]


def write_similarity(
    rows: Sequence[Similarity], path: Path, model: str, text: str = ""
) -> list[Path]:
    """`path`.csv and .tex, and with the extra `report` .png, .svg and .html; what was
    written, measured on `text`.
    """
    on = f" on {text}" if text else ""
    what = (
        f"Cosine similarity of the residual stream of {model} before and after each"
        f" block, attention and MLP{on}"
    )
    caption = f"{what}: mean over tokens ± standard error over windows."
    figures = [
        (row, KIND_NAMES[row.kind], COSINE.cell(row))
        for row in sorted(rows, key=lambda row: row.layer)
    ]
    lines, _ = pivot("similarity", SIMILARITY[:1], figures, lambda row: row.layer)
    texts = {
        ".csv": as_csv(rows),
        ".tex": as_latex(lines, caption=caption, label="similarity"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in texts.items():
        write_whole(path.with_name(path.name + suffix), content)
    drawn = [".png", ".svg", ".html"] if installed(*FIGURES) else []
    if drawn:
        from ..charts.layers import similarity
        from ..charts.style import framed, save

        save(
            framed(similarity(rows), f"Change by depth, {model}", SIMILARITY_READS),
            path,
        )
    return [path.with_name(path.name + suffix) for suffix in (*texts, *drawn)]


def run_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plans: Sequence[Plan],
    jobs: Sequence[Job],
    choice: TaskChoice,
    folder: Path | None,
    progress: Progress,
) -> list[TaskResult]:
    """As `run_tasks` with the settings of `choice`; nothing where there are no jobs."""
    if not jobs:
        return []
    from ..evaluation.harness import run_tasks

    assert tokenizer
    return run_tasks(
        model, tokenizer, plans, jobs, folder=folder, progress=progress, **choice.how
    )


def benchmark(
    subject: Subject,
    rows: Sequence[Configured],
    choice: TaskChoice,
    generating_rows: Sequence[Configured] | None = None,
    stages: Stages | None = None,
) -> list[BenchmarkRecord]:
    """One record a task, metric and row (the dense one first), kept as soon as a task
    is done, and each answer at once.

    All data is read and checked before anything is computed, and what that takes is
    added to `stages`. Tasks that generate text are for `generating_rows`, where given.
    Raises `UsageError` as `run_tasks` does, and as `Ledger` does.
    """
    from ..evaluation.checks import source_of
    from ..evaluation.harness import LM_EVAL_VERSION, PlansLM, evaluate_job

    settings = {
        "lm_eval": LM_EVAL_VERSION,
        "asked_fewshot": choice.num_fewshot,
        "truncate": choice.truncate,
    }
    about = Provenance.of(subject.provenance, **settings)
    abouts = {
        one: Provenance.of(
            about, asked=one, limit=choice.limit_of(one), **source_of(one)
        )
        for one in choice.names
    }
    rows_of = {
        False: rows,
        True: generating_rows or rows,
    }  # text is generated plan by plan

    def known(name: str) -> list[BenchmarkRecord]:
        """Of these rows, of the task that was asked for by this name."""
        asked = (record for record in held if record.what.get("asked") == name)
        return [
            record for record in asked if any(row.describes(record) for row in rows)
        ]

    @cache
    def model(of_few: bool) -> PlansLM:
        assert subject.tokenizer
        plans = [row.plan for row in rows_of[of_few]]
        return PlansLM(
            subject.model,
            subject.tokenizer,
            plans,
            subject.out,
            workers=subject.workers,
            **choice.how,
        )

    with working_in(subject.out, "paper"):
        held = Ledger(
            subject.out,
            BenchmarkRecord,
            lambda one: abouts.get(str(one.what.get("asked")), about),
        )
        asked = {}
        for name in choice.names:
            if not (found := known(name)) or len(found) != found[0].what.get("records"):
                job = choice.build(name)
                generates = any(
                    task.OUTPUT_TYPE == "generate_until" for task in job.tasks.values()
                )
                asked[name] = job, generates and bool(generating_rows)
        for job, of_few in asked.values():
            model(of_few).check(job)
        stages = stages or Stages(silent, 0)
        steps = {
            name: job.steps(len(rows_of[of_few]))
            for name, (job, of_few) in asked.items()
        }
        stages.steps += sum(steps.values())
        for name, (job, of_few) in asked.items():
            lm, before = model(of_few), {record.key for record in known(name)}
            lm.progress = stages.stage(steps[name])
            answers = evaluate_job(lm, job)
            source = Provenance.of(abouts[name], records=len(answers))
            facts = ((one.score, rows_of[of_few][one.number]) for one in answers)
            made = (
                BenchmarkRecord.from_fact(*some, provenance=source) for some in facts
            )
            held.add(*(record for record in made if record.key not in before))
        return [record for name in choice.names for record in known(name)]


def checking_steps(windows: Sequence[Tensor], plans: int) -> float:
    """What the diagnostics take so many plans, the original one among them, in tokens
    that are read.
    """
    from ..evaluation.diagnostics import steps_of

    return sum(steps_of(windows, plans).values())


def diagnose(
    subject: Subject,
    rows: Sequence[Configured],
    windows: Sequence[Tensor],
    progress: Progress,
) -> list[DiagnosticsRecord]:
    """One record a configuration and check; a part of the diagnostics is kept as soon
    as it is done.
    """
    from ..evaluation.diagnostics import KEYS, PARTS, run_diagnostics, steps_of

    assert subject.tokenizer
    size = {"windows": [len(windows), windows[0].numel()], "passkeys": KEYS}
    about, plans = (
        Provenance.of(subject.provenance, seed=subject.seed, **size),
        [row.plan for row in rows],
    )
    with working_in(subject.out, "paper"):
        held, steps = (
            Ledger(subject.out, DiagnosticsRecord, about),
            steps_of(windows, len(plans) + 1),
        )
        stages = Stages(progress, sum(steps.values()))
        for part in PARTS:
            telling = stages.stage(steps[part])
            telling(0, 1, f"{part}, all configurations")
            counts = {
                sum(record.part == part and row.describes(record) for record in held)
                for row in rows
            }
            if len(counts) == 1 and counts != {0}:
                continue
            records: list[DiagnosticsRecord] = []
            found = run_diagnostics(
                subject.model,
                subject.tokenizer,
                plans,
                windows,
                parts=[part],
                seed=subject.seed,
            )
            for row, checks in zip(rows, found):
                records += [
                    DiagnosticsRecord.from_fact(one, row, part=part, provenance=about)
                    for one in checks
                ]
            held.add(*records)
        progress(1, 1, "diagnostics")
        return [record for record in held if any(row.describes(record) for row in rows)]
