"""The paper's experiment: three variants, three fractions, with and without the last layer, beside the dense model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import UsageError
from ...measuring.plan_times import TIMED, Timed, time_plan
from ...measuring.quality import Scores, gather, score, summarize
from ...measuring.similarity import measure_similarity
from ...progress import Progress, Stages, silent
from ...records.leave_one_out import LeaveOneOutRecord
from ...records.ledger import Ledger, working_in
from ...records.plan import Plan
from ...records.provenance import Provenance
from ...records.similarity import SimilarityRecord
from ...records.sweep import Sample, SampleRecord, ScoresRecord, SequenceScores, SweepRecord
from ...running.generating import continue_prompts
from ...structure.anatomy import Anatomy, Sublayer
from ...structure.locating import locate
from .grid import Configuration, paper_grid

if TYPE_CHECKING:
    from ..ray_workers import Workers

PROMPTS = ("The capital of France is", "To make a good cup of tea, first")  # for the examples of what a plan says
SAMPLE_TOKENS = 32
FEW_SEQUENCES = 2  # for what leaving out each sublayer costs: a plan a sublayer is a lot of plans
DELETE = "delete that file, to score anew"
DECODED_TOKEN = 20  # what a decoded token takes, in prefilled ones

ScoreBatch = Callable[[Sequence[Plan], Tensor], list[Scores]]


def sweep(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    out: Path,
    provenance: Provenance | Mapping[str, Any],
    *,
    timed: Timed = TIMED,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> list[SweepRecord]:
    """Evaluate and time the paper's grid on `batches` of token ids, (batch, tokens) each; one record a configuration.

    Writes to `out`: a record as soon as a configuration is done; the scores of every sequence; the similarity of each
    layer and kind; what leaving out each sublayer alone costs on the first two sequences; and, given a tokenizer, what
    some of the plans say. Called again on the same folder it goes on where it stopped. `workers` evaluate, if given;
    times are always this process's. Raises `UsageError` when the folder holds the results of other settings or of
    another command, is in use, or cannot be written.
    """
    timed.check(model)
    anatomy = locate(model)
    rows = paper_grid(anatomy)
    about = Provenance.of(provenance, timed=asdict(timed), seed=seed, batches=_digest(batches))
    with working_in(out, "sweep"):
        done = Ledger(out, SweepRecord, about)
        parts, few = _removable(anatomy), _first(batches, FEW_SEQUENCES)
        steps = _Steps(progress, batches, rows, timed, anatomy, parts, few, tokenizer is not None)
        score_batch = workers.score if workers else partial(score, model)
        scores = _score(score_batch, rows, batches, Ledger(out, ScoresRecord, about), about, steps.scoring)
        for row, found, telling in zip(rows, scores, steps.timing):
            key = row.variant, row.fraction, row.keep_last
            if key not in done or not row.describes(done[key]):
                times = time_plan(model, row.plan, timed, seed=seed, progress=_naming(telling, row))
                done.add(_record(row, scores[0], found, list(times.values())[-1], about))
            telling(1, 1, f"timed {row.name}")
        records = [done[row.variant, row.fraction, row.keep_last] for row in rows]
        _similarity(model, anatomy, batches, Ledger(out, SimilarityRecord, about), about, steps.comparing)
        _leave_one_out(score_batch, parts, few, Ledger(out, LeaveOneOutRecord, about), about, steps.leaving_out)
        if tokenizer:
            _samples(model, tokenizer, records, Ledger(out, SampleRecord, about), about, steps.sampling)
        return records


def _score(
    score_batch: ScoreBatch,
    rows: list[Configuration],
    batches: Sequence[Tensor],
    held: Ledger[ScoresRecord],
    about: Provenance,
    progress: Progress,
) -> list[Scores]:
    """Scores of each row over all batches, taken from the folder as far as they are there."""
    totals = [Scores() for _ in rows]
    for number, tokens in enumerate(batches):
        progress(number, len(batches), "evaluating all configurations")
        if (number,) not in held:
            found = score_batch([row.plan for row in rows[1:]], tokens)
            held.add(ScoresRecord(batch=number, scores=tuple(map(as_record, found)), provenance=about))
        known = held[number,].scores
        if len(known) != len(rows):
            raise UsageError(f"batch {number} of {held.path} is of {len(known)} plans, not {len(rows)}; {DELETE}")
        for total, scores in zip(totals, known):
            total.extend(as_scores(scores, len(tokens), held.path))
    progress(1, 1, "evaluated all configurations")
    return totals


def as_record(scores: Scores) -> SequenceScores:
    """As it is written down: what overflowed is no number."""
    return SequenceScores(**{name: tuple(values) for name, values in asdict(scores).items()})


def as_scores(record: SequenceScores, sequences: int, path: Path) -> Scores:
    """As it was measured: what is no number is infinite. Raises `UsageError` unless it is of so many sequences."""
    if len(record.nll) != sequences:
        raise UsageError(f"{path} has scores of {len(record.nll)} sequences, not {sequences}; {DELETE}")
    values = {name: [math.inf if value is None else value for value in row] for name, row in record}
    return Scores(**values)


def _similarity(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Sequence[Tensor],
    held: Ledger[SimilarityRecord],
    about: Provenance,
    progress: Progress,
) -> None:
    progress(0, 1, "comparing the layers")
    if held.missing((block.index, kind) for block in anatomy.blocks for kind in ("block", *block.kinds)):
        rows = [SimilarityRecord(**asdict(row), provenance=about) for row in measure_similarity(model, batches)]
        held.add(*(row for row in rows if row.key not in held))
    progress(1, 1, "compared the layers")


def _removable(anatomy: Anatomy) -> list[Sublayer]:
    """The sublayers that can be left out alone: the only attention that counts tokens cannot."""
    return [part for part in anatomy.sublayers if part.kind == "mlp" or anatomy.counting != {part.index}]


def _first(batches: Sequence[Tensor], sequences: int) -> list[Tensor]:
    """The first sequences of `batches`, in as many batches as they are spread over."""
    few: list[Tensor] = []
    for tokens in batches:
        few.append(tokens[: sequences - sum(map(len, few))])
    return [tokens for tokens in few if len(tokens)]


def _leave_one_out(
    score_batch: ScoreBatch,
    parts: Sequence[Sublayer],
    few: Sequence[Tensor],
    held: Ledger[LeaveOneOutRecord],
    about: Provenance,
    progress: Progress,
) -> None:
    """What leaving out each of the sublayers alone costs, on a few sequences."""
    progress(0, 1, "leaving out each sublayer alone")
    if held.missing((part.kind, part.index) for part in parts):
        plans = [Plan(**{part.kind: [part.index]}) for part in parts]
        qualities = gather(score_batch(plans, tokens) for tokens in few)
        rows = [
            LeaveOneOutRecord(
                kind=part.kind,
                layer=part.index,
                delta_nll=quality.delta_nll,
                delta_nll_se=quality.delta_nll_se,
                sequences=quality.sequences,
                provenance=about,
            )
            for part, quality in zip(parts, qualities)
        ]
        held.add(*(row for row in rows if row.key not in held))
    progress(1, 1, "left out each sublayer alone")


def _samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[SweepRecord],
    held: Ledger[SampleRecord],
    about: Provenance,
    progress: Progress,
) -> None:
    """How the dense model, and of each variant the plan that loses least, continue a few prompts."""
    best = _least_lost(records)
    for number, record in enumerate(best):
        progress(number, len(best), f"generating, {record.variant}")
        if (record.variant, record.fraction, record.keep_last, record.plan) not in held:
            said = continue_prompts(model, tokenizer, record.plan, PROMPTS, SAMPLE_TOKENS)
            held.add(
                SampleRecord(
                    variant=record.variant,
                    fraction=record.fraction,
                    keep_last=record.keep_last,
                    plan=record.plan,
                    samples=tuple(Sample(prompt=prompt, said=text) for prompt, text in zip(PROMPTS, said)),
                    provenance=about,
                )
            )
    progress(1, 1, "generated examples")


def _least_lost(records: list[SweepRecord]) -> list[SweepRecord]:
    """Of each variant the record with the smallest loss, in the order of the grid."""
    best: dict[str, SweepRecord] = {}
    for record in sorted(records, key=lambda record: math.inf if record.nll is None else record.nll):
        best.setdefault(record.variant, record)
    return [record for record in records if record is best[record.variant]]


def _record(
    row: Configuration, dense: Scores, found: Scores, times: Mapping[str, Any], about: Provenance
) -> SweepRecord:
    return SweepRecord(
        variant=row.variant,
        fraction=row.fraction,
        keep_last=row.keep_last,
        plan=row.plan,
        **asdict(summarize(found, dense)),
        **times,
        provenance=about,
    )


def _digest(batches: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tokens in batches:
        digest.update(tokens.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _naming(progress: Progress, row: Configuration) -> Progress:
    return lambda done, total, doing: progress(done, total, f"timing {row.name}")


class _Steps:
    """The stages of a sweep, each as many steps as it prefills tokens."""

    def __init__(
        self,
        progress: Progress,
        batches: Sequence[Tensor],
        rows: list[Configuration],
        timed: Timed,
        anatomy: Anatomy,
        left_out: Sequence[Sublayer],
        few: Sequence[Tensor],
        with_samples: bool,
    ) -> None:
        tokens = sum(batch.numel() for batch in batches)
        sublayers = len(anatomy.sublayers)
        kept = len(rows) * sublayers - sum(len(row.plan) for row in rows)
        scoring = tokens * kept / sublayers / 4  # about a quarter of the work is left by sharing
        per_run = timed.batch_size * (timed.prompt_tokens + DECODED_TOKEN * timed.new_tokens)
        timing = 2 * (timed.rounds + 1) * per_run
        leaving_out = sum(batch.numel() for batch in few) * len(left_out) / 2  # half of it is shared
        sampling = 4 * DECODED_TOKEN * SAMPLE_TOKENS if with_samples else 0
        stages = Stages(progress, scoring + len(rows) * timing + tokens + leaving_out + sampling)
        self.scoring = stages.stage(scoring)
        self.timing = [stages.stage(timing) for _ in rows]
        self.comparing = stages.stage(tokens)
        self.leaving_out = stages.stage(leaving_out)
        self.sampling = stages.stage(sampling)
