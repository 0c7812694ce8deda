"""What a plan brings as a draft model for speculative decoding: predicted from its
parts, and measured as a whole.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from ..errors import UsageError, raised_by, shortened
from ..options import Workload, option
from ..plan import Plan, refuse_prefill, several
from ..progress import Progress, Stages, silent, tracked
from ..results.facts import SIGNIFICANT, Decoding
from ..results.ledger import Ledger, working_in
from ..results.lines import finite
from ..results.provenance import Provenance
from ..results.record import Count, Positive, Quartiles, Record, Share, Skips, Unsigned
from ..results.table import Column, number, table, with_error, with_quartiles, words
from ..strict_json import Settings
from .folder import Folder, Section, Shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..measuring.acceptance import Accepted

MOST_DRAFTED = 64
Samples = Mapping[str, Sequence[float]]  # milliseconds, a round each, by what was timed
DENSE, DRAFT, CHECK = "a decode step", "a draft step", "the check of {}"
ALONE, WITH = "generating", "generating with a draft"
NOTE = (
    "The plan's model drafts tokens, and the original checks them in one step: the text"
    " is the original model's. Below 1, drafting is slower. Predicted: what a round"
    " gives over what its steps take. Measured: transformers' own generate, greedy, at"
    " the number of tokens that is best."
)


class DraftRecord(Record, Skips, kind="draft"):
    """Rounds of so many drafted tokens and a check of them. Every measurement is one of
    its own.
    """

    model: Literal["skipped", "repaired"] = Field(description="which model drafts")
    decoding: Decoding = Field(
        description="the likeliest token each time, or sampled at temperature 1"
    )
    drafted: Count = Field(description="tokens that are drafted a round")
    acceptance: Share = Field(
        description=(
            "how likely the last of them is accepted once those before it were, 0 to 1"
        )
    )
    acceptance_se: Unsigned = Field(description="over texts")
    tokens_per_round: Positive = Field(
        description="tokens that a round gives, with the original model's own one"
    )
    tokens_per_round_se: Unsigned = Field(description="over texts")
    dense_ms: Positive = Field(
        description=(
            "milliseconds of a decode step of the original model, median of the rounds"
        )
    )
    draft_ms: Positive = Field(description="likewise of the draft model")
    check_ms: Positive = Field(
        description=(
            "likewise of the original model's check: one step of drafted + 1 tokens"
        )
    )
    predicted: Quartiles = Field(
        description="speedup of decoding by these times, one ratio a round; > 1: faster"
    )
    measured: Quartiles | None = Field(
        None,
        description=(
            "likewise of transformers' generate with the draft, prefill and all;"
            " greedy, at the best"
        ),
    )
    same_texts: Count | None = Field(
        None, description="how many texts have the very tokens that they have without"
    )
    texts: Count = Field(description="how many prompts were continued")
    rounds: Count = Field(description="how often all was timed, in turn")

    @model_validator(mode="after")
    def _measured_whole(self) -> DraftRecord:
        if (self.measured is None) != (self.same_texts is None):
            raise ValueError("what was measured lacks a part")
        return self


COLUMNS: tuple[Column[DraftRecord], ...] = (
    words("decoding", lambda one: one.decoding),
    number("drafted", lambda one: one.drafted, "d", unit="tokens a round"),
    with_quartiles("predicted speedup", lambda one: one.predicted, ".2f"),
    with_quartiles("measured speedup", lambda one: one.measured, ".2f"),
    with_error(
        "tokens a round",
        lambda one: (one.tokens_per_round, one.tokens_per_round_se),
        ".2f",
    ),
    with_error(
        "the last accepted", lambda one: (one.acceptance, one.acceptance_se), ".2f"
    ),
    number("draft ms", lambda one: one.draft_ms, ".1f"),
    number("check ms", lambda one: one.check_ms, ".1f"),
    number("dense ms", lambda one: one.dense_ms, ".1f"),
    words(
        "same texts",
        lambda one: (
            "" if one.same_texts is None else f"{one.same_texts} of {one.texts}"
        ),
    ),
    words("model", lambda one: one.model),
    words("skipped", lambda one: one.plan.in_words()),
)


@dataclass(frozen=True)
class DraftOptions:
    """Prompts are continued, with 1 to `most` tokens drafted a round; all is timed in
    rounds, in turn.
    """

    PANEL: ClassVar = "Timing"

    prompt_tokens: int = option(128, "tokens of each prompt")
    generation_tokens: int = option(64, "tokens that continue it, at most")
    most: int = option(
        8, "most tokens that are drafted a round: 1 to this many are tried"
    )
    rounds: int = option(5, "timed rounds; each times all models in turn")

    def check(self, model: PreTrainedModel) -> None:
        if not 1 <= self.most <= MOST_DRAFTED:
            raise UsageError(
                f"--most must be 1 to {MOST_DRAFTED}, got {shortened(self.most)}"
            )
        Workload(self.prompt_tokens, self.generation_tokens, rounds=self.rounds).check(
            model
        )
        if self.generation_tokens <= self.most:
            told = (
                f"--generation-tokens {self.generation_tokens} is fewer than the check"
            )
            fix = f"give at least {self.most + 1}, or draft fewer"
            raise UsageError(f"{told} of {self.most} drafted ones reads: {fix}")


class Drafted(NamedTuple):
    """What was found; `refused` says why transformers does not draft for this model, ""
    where it does.
    """

    records: list[DraftRecord]
    refused: str


def measure_draft(
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    how: DraftOptions,
    provenance: Provenance,
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Drafted:
    """What the model without `plan` brings as a draft model, a record for each way to
    decode and number drafted.

    `windows` are token ids, (texts, prompt + generated): `model` continues their
    prompts itself, and steps are timed on the first of them as it is. Raises
    `UsageError` before anything is run, as `DraftOptions.check` and `Ledger` do.
    """
    from ..measuring.acceptance import judge, write_texts
    from ..measuring.speed import interleaved, step_ms
    from ..running.skipping import draft_model

    how.check(model)
    refuse_prefill(plan, "a draft model")
    asked = {
        "prompt_tokens": how.prompt_tokens,
        "generation_tokens": how.generation_tokens,
    }
    source = Provenance.of(provenance, seed=seed, **asked)
    stages, draft, prompts = (
        Stages(progress, 10),
        draft_model(model, plan),
        windows[:, : how.prompt_tokens],
    )
    with working_in(out, "draft"):
        kept = Ledger(out, DraftRecord) if out else None
        judged: dict[Decoding, list[Accepted]] = {}
        for decoding in get_args(Decoding):
            stage = stages.stage(1)
            stage(0, 1, f"writing {decoding} texts")
            texts = write_texts(
                model, prompts, how.generation_tokens, decoding, seed=seed
            )
            pairs = tracked(
                list(zip(prompts, texts)), f"judging {decoding} texts", stage
            )
            judged[decoding] = [
                judge(model, draft, prompt, text, decoding) for prompt, text in pairs
            ]
        step = partial(step_ms, tokens=windows[:1], prompt=how.prompt_tokens)
        steps = {
            DENSE: partial(step, model, width=1),
            DRAFT: partial(step, draft, width=1),
        }
        steps |= {
            CHECK.format(drafted): partial(step, model, width=drafted + 1)
            for drafted in range(1, how.most + 1)
        }
        times = interleaved(steps, how.rounds, progress=stages.stage(4))
        said = partial(
            DraftRecord,
            plan=plan,
            model=plan.state,
            rounds=how.rounds,
            provenance=source,
        )
        records = [
            _record(partial(said, decoding=decoding), drafted, texts, times)
            for decoding, texts in judged.items()
            for drafted in range(1, how.most + 1)
        ]
        best = max(
            range(how.most), key=lambda place: records[place].predicted.median
        )  # greedy ones come first
        measured, same, refused = generated(
            model, draft, prompts, how, records[best].drafted, stages.stage(4)
        )
        if measured:
            records[best] = records[best].model_copy(
                update={"measured": measured, "same_texts": same}
            )
        if kept is not None:
            kept.add(*records)
    return Drafted(records, refused)


def _record(
    said: partial[DraftRecord], drafted: int, texts: Sequence[Accepted], times: Samples
) -> DraftRecord:
    """A round takes so many draft steps and a check; the same tokens took the original
    model a step each.
    """
    from ..measuring.acceptance import acceptance, tokens_per_round
    from ..measuring.speed import speedup

    accepted, accepted_se = acceptance(texts, drafted)
    tokens, tokens_se = tokens_per_round(texts, drafted)
    dense, draft, check = times[DENSE], times[DRAFT], times[CHECK.format(drafted)]
    taken = [drafted * drafting + checking for drafting, checking in zip(draft, check)]
    return said(
        drafted=drafted,
        acceptance=accepted,
        acceptance_se=accepted_se,
        tokens_per_round=tokens,
        tokens_per_round_se=tokens_se,
        dense_ms=Quartiles.of(dense).median,
        draft_ms=Quartiles.of(draft).median,
        check_ms=Quartiles.of(check).median,
        predicted=speedup([tokens * step for step in dense], taken),
        texts=len(texts),
    )


def generated(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Tensor,
    how: DraftOptions,
    drafted: int,
    progress: Progress,
) -> tuple[Quartiles | None, int | None, str]:
    """How much faster transformers' greedy generate is with the draft, how many texts
    are the same, or why it isn't.
    """
    from ..measuring.speed import interleaved, speedup
    from ..models.load_errors import quiet
    from ..running.generating import greedy

    settings, said = draft.generation_config, dict[str, list[list[int]]]()
    settings.num_assistant_tokens = drafted
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # or it ends drafts early

    def go_on(prompt: Tensor, **assistant: PreTrainedModel) -> list[int]:
        with (
            quiet(),
            raised_by(
                "transformers",
                "transformers does not draft for this model",
                "another engine may",
            ),
        ):
            return greedy(model, prompt, how.generation_tokens, **assistant)[0]

    def timed(way: str, **assistant: PreTrainedModel) -> float:
        start = time.perf_counter()
        said[way] = [go_on(prompt, **assistant) for prompt in prompts.split(1)]
        return 1e3 * (time.perf_counter() - start)

    try:
        go_on(prompts[:1], assistant_model=draft)
    except UsageError as error:
        return None, None, str(error)
    ways = {
        ALONE: partial(timed, ALONE),
        WITH: partial(timed, WITH, assistant_model=draft),
    }
    times = interleaved(ways, how.rounds, progress=progress)
    return (
        speedup(times[ALONE], times[WITH]),
        sum(map(list.__eq__, said[WITH], said[ALONE])),
        "",
    )


def verdict(found: Drafted) -> Settings:
    """If it makes decoding faster, at how many tokens a round it is best, and what
    transformers made of it.

    That is `said` in words; `best` has the figures by the way to decode, those at the
    best speedup that is predicted.
    """
    figures, phrases = dict[str, Settings](), list[str]()
    for decoding in get_args(Decoding):
        some = [one for one in found.records if one.decoding == decoding]
        if not some:
            continue
        best = max(some, key=lambda one: one.predicted.median)
        predicted, measured = (
            best.predicted,
            (best.measured.median if best.measured else math.nan),
        )
        times = {
            "predicted": predicted.median,
            "measured": measured,
            "tokens_per_round": best.tokens_per_round,
        }
        figures[decoding] = {"drafted": best.drafted, **times}
        pace = _pace(best, len(some))
        told = (
            f"at best {predicted.median:.2f}x predicted, with"
            f" {several(best.drafted, 'token')} a round"
        )
        told += f"; measured in transformers: {measured:.2f}x" if best.measured else ""
        phrases.append(f"{pace} {decoding} ({told})")
    said = f"Drafting with it would be {', and '.join(phrases)}."
    if found.refused:
        said += f" Nothing was measured: {found.refused}."
    return finite({"said": said, "best": figures, "refused": found.refused or None})


def _pace(best: DraftRecord, tried: int) -> str:
    """Whether drafting is faster, by the best of so many numbers of tokens that were
    `tried`.

    By the 95 % interval of what is predicted, of the rounds and of the texts, made
    wider as the best of several is looked at (Bonferroni); and slower where what was
    measured says so.
    """
    from ..measuring.statistics import Estimate, combined, of_rounds

    share = best.tokens_per_round_se / best.tokens_per_round
    of_texts = Estimate(0.0, share * best.predicted.median, best.texts - 1)
    low, high = combined([(1.0, of_rounds(best.predicted)), (1.0, of_texts)]).ends(
        1 - SIGNIFICANT / tried
    )
    if high < 1 or (best.measured and of_rounds(best.measured).ends()[1] < 1):
        return "slower"
    return "faster" if low > 1 else "inconclusive"


def shown(folder: Folder) -> Shown:
    records = folder.of(DraftRecord)
    return Shown(
        sections=(
            Section(
                "drafts",
                "As a draft model",
                table=table("drafts", COLUMNS, records),
                note=NOTE,
            ),
        )
    )
