"""The paper's experiment: three variants, three fractions, with and without the last layer, beside the dense model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...measuring.plan_times import TIMED, Timed, time_plan
from ...measuring.quality import Quality, Scores, gather, score, summarize
from ...measuring.similarity import measure_similarity
from ...plan import Configuration, Plan, paper_grid
from ...progress import Progress, silent
from ...records import ledger
from ...running.generating import continue_prompts
from ...structure.anatomy import Anatomy, Sublayer, locate

if TYPE_CHECKING:
    from ..ray_workers import Workers

RESULTS, SCORES, SIMILARITY, SAMPLES = "results.jsonl", "scores.jsonl", "similarity.jsonl", "samples.jsonl"
LEAVE_ONE_OUT = "leave_one_out.jsonl"
PROMPTS = ("The capital of France is", "To make a good cup of tea, first")  # for the examples of what a plan says
SAMPLE_TOKENS = 32
FEW_SEQUENCES = 2  # for what leaving out each sublayer costs: a plan a sublayer is a lot of plans
DECODED_TOKEN = 20  # what a decoded token takes, in prefilled ones, to guess the time left


def sweep(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    out: Path,
    provenance: dict[str, Any],
    *,
    timed: Timed = TIMED,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
    workers: Workers | None = None,
) -> list[dict[str, Any]]:
    """Evaluate and time the paper's grid on `batches` of token ids, (batch, tokens) each; one record a configuration.

    Writes to `out`: results.jsonl, a line as soon as a configuration is done; scores.jsonl, the scores of every
    sequence; similarity.jsonl, a line for each layer and kind; leave_one_out.jsonl, what leaving out each sublayer
    alone costs on the first two sequences; and, given a tokenizer, samples.jsonl, what some of the plans say. Called
    again on the same folder it goes on where it stopped. `workers` evaluate, if given; times are always this process's.
    Raises `UsageError` when the folder holds the results of other settings, is in use, or cannot be written.
    """
    rows = paper_grid(locate(model))
    settings = provenance | {"timed": asdict(timed), "seed": seed, "batches": _digest(batches)}
    with ledger.lock(out):
        done = {(r["variant"], r["fraction"], r["keep_last"]): r for r in ledger.read(out / RESULTS, ledger.Record)}
        for record in done.values():
            ledger.check_same(record["provenance"], settings, out)
        parts, few = _removable(locate(model)), _first(batches, FEW_SEQUENCES)
        steps = _Steps(progress, batches, rows, timed, locate(model).sublayers, parts, few)
        score_batch = workers.score if workers else partial(score, model)
        scores = _score(score_batch, rows, batches, out, settings, steps)
        for row, found in zip(rows, scores):
            key = (row.variant, row.fraction, row.keep_last)
            if key not in done:
                steps.doing(f"timing {row.name}")
                done[key] = _record(model, row, summarize(found, scores[0]), settings, timed, seed)
                ledger.append(out / RESULTS, done[key])
            steps.timed()
        records = [done[row.variant, row.fraction, row.keep_last] for row in rows]
        _similarity(model, batches, out, settings, steps)
        _leave_one_out(score_batch, parts, few, out, settings, steps)
        if tokenizer:
            _samples(model, tokenizer, records, out, settings, steps)
        return records


def _score(
    score_batch: Callable[[Sequence[Plan], Tensor], list[Scores]],
    rows: list[Configuration],
    batches: Sequence[Tensor],
    out: Path,
    settings: dict[str, Any],
    steps: _Steps,
) -> list[Scores]:
    """Scores of each row over all batches, taken from the folder as far as they are there."""
    path = out / SCORES
    held = ledger.read(path)
    for line in held:
        ledger.check_same(line["provenance"], settings, out)
    lines = {line["batch"]: line["scores"] for line in held}
    totals = [Scores() for _ in rows]
    for number, tokens in enumerate(batches):
        if number not in lines:
            steps.doing("evaluating all configurations")
            found = score_batch([row.plan for row in rows[1:]], tokens)
            lines[number] = [asdict(scores) for scores in found]
            ledger.append(path, {"batch": number, "scores": lines[number], "provenance": settings})
        for total, scores in zip(totals, lines[number]):
            total.extend(Scores(**scores))
        steps.scored(tokens)
    return totals


def _similarity(
    model: PreTrainedModel, batches: Sequence[Tensor], out: Path, settings: dict[str, Any], steps: _Steps
) -> None:
    held = ledger.read(out / SIMILARITY)
    for line in held:
        ledger.check_same(line["provenance"], settings, out)
    done = {(line["layer"], line["kind"]) for line in held}
    if len(done) < 3 * len(locate(model).blocks):
        steps.doing("comparing the layers")
        rows = [asdict(row) | {"provenance": settings} for row in measure_similarity(model, batches)]
        ledger.append(out / SIMILARITY, *(row for row in rows if (row["layer"], row["kind"]) not in done))


def _removable(anatomy: Anatomy) -> list[Sublayer]:
    """The sublayers that can be left out alone: the only attention of a model cannot."""
    return [part for part in anatomy.sublayers if part.kind == "mlp" or len(anatomy.blocks) > 1]


def _first(batches: Sequence[Tensor], sequences: int) -> list[Tensor]:
    """The first sequences of `batches`, in as many batches as they are spread over."""
    few: list[Tensor] = []
    for tokens in batches:
        few.append(tokens[: sequences - sum(map(len, few))])
    return [tokens for tokens in few if len(tokens)]


def _leave_one_out(
    score_batch: Callable[[Sequence[Plan], Tensor], list[Scores]],
    parts: Sequence[Sublayer],
    few: Sequence[Tensor],
    out: Path,
    settings: dict[str, Any],
    steps: _Steps,
) -> None:
    """What leaving out each of the sublayers alone costs, on a few sequences."""
    held = ledger.read(out / LEAVE_ONE_OUT)
    for line in held:
        ledger.check_same(line["provenance"], settings, out)
    done = {(line["kind"], line["layer"]) for line in held}
    if len(done) < len(parts):
        steps.doing("leaving out each sublayer alone")
        plans = [Plan(**{part.kind: [part.index]}) for part in parts]
        qualities = gather(score_batch(plans, tokens) for tokens in few)
        rows = [_cost(part, quality) | {"provenance": settings} for part, quality in zip(parts, qualities)]
        ledger.append(out / LEAVE_ONE_OUT, *(row for row in rows if (row["kind"], row["layer"]) not in done))
    steps.left_out()


def _cost(part: Sublayer, quality: Quality) -> dict[str, Any]:
    fields = ("delta_nll", "delta_nll_se", "sequences")
    return {"kind": part.kind, "layer": part.index} | {name: getattr(quality, name) for name in fields}


def _samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: list[dict[str, Any]],
    out: Path,
    settings: dict[str, Any],
    steps: _Steps,
) -> None:
    """How the dense model, and of each variant the plan that loses least, continue a few prompts."""
    held = ledger.read(out / SAMPLES)
    for line in held:
        ledger.check_same(line["provenance"], settings, out)
    done = [line["plan"] for line in held]
    for record in _least_lost(records):
        if record["plan"] not in done:
            steps.doing(f"generating, {record['variant']}")
            said = continue_prompts(model, tokenizer, Plan(**record["plan"]), PROMPTS, SAMPLE_TOKENS)
            samples = [{"prompt": prompt, "said": text} for prompt, text in zip(PROMPTS, said)]
            key = {name: record[name] for name in ("variant", "fraction", "keep_last", "plan")}
            ledger.append(out / SAMPLES, key | {"samples": samples, "provenance": settings})


def _least_lost(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant the record with the smallest loss, in the order of the grid."""
    best: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["nll"] if record["nll"] is not None else float("inf")):
        best.setdefault(record["variant"], record)
    return [record for record in records if record is best[record["variant"]]]


def _record(
    model: PreTrainedModel,
    row: Configuration,
    quality: Quality,
    settings: dict[str, Any],
    timed: Timed,
    seed: int,
) -> dict[str, Any]:
    timing = time_plan(model, row.plan, **asdict(timed), seed=seed)[-1]
    del timing["model"]
    return {
        "variant": row.variant,
        "fraction": row.fraction,
        "keep_last": row.keep_last,
        "plan": row.plan.indices,
        **asdict(quality),
        **timing,
        "provenance": settings,
    }


def _digest(batches: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tokens in batches:
        digest.update(tokens.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Steps:
    """How far a sweep is, in tokens prefilled."""

    def __init__(
        self,
        progress: Progress,
        batches: Sequence[Tensor],
        rows: list[Configuration],
        timed: Timed,
        sublayers: Sequence[object],
        left_out: Sequence[object],
        few: Sequence[Tensor],
    ) -> None:
        self.progress, self.done, self.label = progress, 0.0, ""
        kept = len(rows) * len(sublayers) - sum(len(row.plan) for row in rows)
        self.score_factor = kept / len(sublayers) / 4  # about a quarter of the work is left by sharing
        per_run = timed.batch_size * (timed.prompt_tokens + DECODED_TOKEN * timed.new_tokens)
        self.timing = 2 * (timed.rounds + 1) * per_run
        self.leaving_out = sum(tokens.numel() for tokens in few) * len(left_out) / 2  # half of it is shared
        scoring = sum(tokens.numel() for tokens in batches) * self.score_factor
        self.total = scoring + len(rows) * self.timing + self.leaving_out

    def doing(self, label: str) -> None:
        self.label = label
        self.progress(self.done, self.total, label)

    def scored(self, tokens: Tensor) -> None:
        self._advance(tokens.numel() * self.score_factor)

    def timed(self) -> None:
        self._advance(self.timing)

    def left_out(self) -> None:
        self._advance(self.leaving_out)

    def _advance(self, amount: float) -> None:
        self.done += amount
        self.progress(self.done, self.total, self.label)
