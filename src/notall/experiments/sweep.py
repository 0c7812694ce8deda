"""The paper's experiment: three variants at some fractions, with and without the last
layer, and the original model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import ConfigDict, Field

from ..digests import digest_of
from ..errors import UsageError
from ..options import PAPER_GRID, WORKLOAD, GridOptions, Workload
from ..plan import Plan
from ..progress import Progress, Stages, generation_work, reading, silent
from ..results.facts import GRID, Configured, Times
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import (
    Count,
    Fact,
    Number,
    Record,
    SublayerName,
    Unsigned,
    is_number,
)
from ..strict_json import Settings
from .held_scores import HeldScores, scored_as
from .similarity import similarities
from .subject import MeasuredPlan, Subject, time_plan

if TYPE_CHECKING:
    from torch import Tensor

    from ..structure.model_structure import ModelStructure


# whose continuations by some plans are kept
SAMPLE_PROMPTS = ("The capital of France is", "To make a good cup of tea, first")
SAMPLE_TOKENS = 32
# for what leaving out each sublayer costs: a plan for each is a lot of plans
FEW_SEQUENCES = 2


class InPromptLoss(Fact):
    """What the same sublayers cost where the prompt alone skips them, behind that
    prompt.
    """

    prompt_tokens: Count = Field(
        description="first tokens of each window, which are not scored"
    )
    in_prompt_delta_nll: Number = Field(
        description="less the original model's there, nats per token"
    )
    in_prompt_delta_nll_se: Unsigned = Field(description="of the paired differences")
    in_prompt_kl: Number = Field(
        description="KL(dense || skipped) of the next token, nats per token"
    )
    in_prompt_kl_se: Unsigned = Field(description="nats per token")


class SweepRecord(MeasuredPlan, Record, Configured, kind="sweep", key=GRID):
    """One configuration, measured."""

    times: Times
    in_prompt: InPromptLoss | None = Field(
        None,
        description=(
            "the same sublayers, skipped in the prompt alone; None where they cannot be"
        ),
    )


class ContinuationsRecord(Record, Configured, kind="samples", key=(*GRID, "plan")):
    """How one plan continues prompts; the field is called `said` on disk."""

    model_config = ConfigDict(populate_by_name=True)

    continuations: dict[str, str] = Field(alias="said", description="by prompt")

    def line(self) -> Settings:
        """As it is on disk."""
        line = super().line()
        return {
            "said" if name == "continuations" else name: value
            for name, value in line.items()
        }


def sweep(
    subject: Subject,
    workload: Workload = WORKLOAD,
    grid: GridOptions = PAPER_GRID,
    progress: Progress = silent,
) -> list[SweepRecord]:
    """Evaluate and time the paper's grid on the subject's text; one record a
    configuration.

    The folder also gets the scores of every sequence, similarities, what leaving out
    each sublayer alone costs and what some plans say. Goes on where it stopped. Raises
    `UsageError` when the folder holds results of other settings.
    """
    from ..choosing.criteria.data_free import paper_grid
    from ..running.skipping import footprint

    workload.check(subject.model)
    rows = paper_grid(subject.structure, grid)
    asked = {
        "workload": asdict(workload),
        "seed": subject.seed,
        "batches": digest_of(subject.batches)[:16],
    }
    about = Provenance.of(subject.provenance, **asked)
    prompt = subject.batches[0].shape[1] // 2
    in_prompt = {
        row.configuration: in_prompt_alone(subject.structure, row.plan, prompt)
        for row in rows
    }
    scoring, timing = reading(subject.tokens, 2 * len(rows)), workload.steps
    leaving_out = subject.batches[0].shape[-1] * len(subject.structure.sublayers)
    sampling = generation_work(SAMPLE_TOKENS, 4) if subject.tokenizer else 0
    stages = Stages(
        progress, scoring + len(rows) * timing + subject.tokens + leaving_out + sampling
    )
    with working_in(subject.out, "sweep"):
        done = Ledger(subject.out, SweepRecord, about)
        held = HeldScores(subject, about)
        plans = {scored_as(row.plan): row.plan for row in rows}
        behind_prompt = [plan for plan in in_prompt.values() if plan]
        if behind_prompt:
            behind_prompt.insert(0, Plan())
        plans |= {scored_as(one, prompt_tokens=prompt): one for one in behind_prompt}
        held.measure(plans, "evaluating all configurations", stages.stage(scoring))
        for row in rows:
            report, counterpart = stages.stage(timing), in_prompt[row.configuration]
            known = next((one for one in done if row.describes(one)), None)
            # folders of earlier releases have no figures of the prompt alone
            lacks_prompt = counterpart and not (known and known.in_prompt)
            if known is None or lacks_prompt:
                times = known.times if known else None
                times = times or time_plan(
                    subject, row.plan, workload, report, row.name
                )
                facts: Settings = {
                    "quality": held.quality(scored_as(row.plan)),
                    "times": times,
                    "footprint": footprint(subject.model, row.plan),
                }
                if counterpart:
                    facts["in_prompt"] = _behind(held, counterpart, prompt)
                done.add(SweepRecord.from_fact(row, **facts, provenance=about))
            report(1, 1, f"timed {row.name}")
        records = [done[row.configuration] for row in rows]
        similarities(subject, about, stages.stage(subject.tokens))
        leave_one_out(subject, about, stages.stage(leaving_out))
        if subject.tokenizer:
            continuations(subject, least_lost(records), about, stages.stage(sampling))
        return records


def in_prompt_alone(
    structure: ModelStructure, plan: Plan, prompt_tokens: int
) -> Plan | None:
    """The same sublayers, skipped in a prompt of so many tokens alone; None where they
    cannot be.
    """
    in_prompt = Plan(prefill={"attention": plan.attention, "mlp": plan.mlp})
    if not in_prompt or prompt_tokens <= in_prompt.prefill.last_tokens:
        return None
    with suppress(UsageError):
        in_prompt.check(structure)
        return in_prompt
    return None


def _behind(held: HeldScores, plan: Plan, prompt_tokens: int) -> InPromptLoss:
    found = held.quality(scored_as(plan, prompt_tokens=prompt_tokens))
    return InPromptLoss(
        prompt_tokens=prompt_tokens,
        in_prompt_delta_nll=found.delta_nll,
        in_prompt_delta_nll_se=found.delta_nll_se,
        in_prompt_kl=found.kl,
        in_prompt_kl_se=found.kl_se,
    )


def leave_one_out(subject: Subject, about: Provenance, progress: Progress) -> None:
    """What leaving out each of the sublayers alone costs, on the first sequences."""
    from ..measuring.quality import gather

    structure, held = subject.structure, Ledger(subject.out, LeaveOneOutRecord, about)
    # The only attention that counts tokens cannot be left out alone.
    parts = [
        part
        for part in structure.sublayers
        if part.kind == "mlp" or structure.counting != {part.index}
    ]
    progress(0, 1, "leaving out each sublayer alone")
    if held.missing((part.name,) for part in parts):
        few: list[Tensor] = []
        for tokens in subject.batches:
            few.append(tokens[: FEW_SEQUENCES - sum(map(len, few))])
        plans = [Plan(**{part.kind: [part.index]}) for part in parts]
        qualities = gather(
            subject.score(plans, tokens) for tokens in few if len(tokens)
        )
        records = [
            LeaveOneOutRecord.from_fact(one, sublayer=part.name, provenance=about)
            for part, one in zip(parts, qualities)
        ]
        held.add(*(record for record in records if record.key not in held))
    progress(1, 1, "left out each sublayer alone")


def continuations(
    subject: Subject, rows: Sequence[Configured], about: Provenance, progress: Progress
) -> None:
    """How the plans of `rows` continue `SAMPLE_PROMPTS`, greedily, kept in the folder."""
    from ..running.generating import continue_prompts

    assert subject.tokenizer
    held = Ledger(subject.out, ContinuationsRecord, about)
    for number, row in enumerate(rows):
        progress(number, len(rows), f"generating, {row.variant}")
        if (*row.configuration, row.plan) not in held:
            texts = continue_prompts(
                subject.model,
                subject.tokenizer,
                row.plan,
                SAMPLE_PROMPTS,
                SAMPLE_TOKENS,
            )
            by_prompt = dict(zip(SAMPLE_PROMPTS, texts))
            held.add(
                ContinuationsRecord.from_fact(
                    row, continuations=by_prompt, provenance=about
                )
            )
    progress(1, 1, "generated examples")


def least_lost(records: Sequence[SweepRecord]) -> list[SweepRecord]:
    """Of each variant the record with the smallest loss, in the order of the grid."""

    def loss(record: SweepRecord) -> float:
        return record.quality.nll if is_number(record.quality.nll) else 1e300

    best: dict[str, SweepRecord] = {}
    for record in sorted(records, key=loss):
        best.setdefault(record.variant, record)
    return [record for record in records if record is best[record.variant]]


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
