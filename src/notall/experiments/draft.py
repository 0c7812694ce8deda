"""What a plan brings as a draft model for speculative decoding: predicted from its
parts, and measured as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from ..errors import UsageError, raised_by, shortened
from ..options import Workload, option
from ..plan import Plan, refuse_prefill
from ..progress import Progress, Stages, silent, tracked
from ..results.facts import Decoding
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.record import Count, Positive, Quartiles, Record, Share, Skips, Unsigned

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..measuring.acceptance import Accepted


MOST_DRAFTED = 64
Samples = Mapping[str, Sequence[float]]  # milliseconds, a round each, by what was timed
# what is timed: steps, and ways to generate
DENSE_STEP = "a decode step"
DRAFT_STEP = "a draft step"
CHECK_STEP = "the check of {}"
GENERATING = "generating"
WITH = "generating with a draft"


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


@dataclass(frozen=True)
class DraftOptions:
    """Prompts are continued, with 1 to `most` tokens drafted a round; all is timed in
    rounds, in turn.
    """

    PANEL: ClassVar[str] = "Timing"

    prompt_tokens: int = option(128, "tokens of each prompt")
    generation_tokens: int = option(64, "tokens that continue it, at most")
    most: int = option(
        8, "most tokens that are drafted a round: 1 to this many are tried"
    )
    rounds: int = option(5, "timed rounds; each times all models in turn")

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` for counts that the model, or a check of drafts, has no
        room for.
        """
        if not 1 <= self.most <= MOST_DRAFTED:
            raise UsageError(
                f"--most must be 1 to {MOST_DRAFTED}, got {shortened(self.most)}"
            )
        Workload(self.prompt_tokens, self.generation_tokens, rounds=self.rounds).check(
            model
        )
        if self.generation_tokens <= self.most:
            raise UsageError(
                f"--generation-tokens {self.generation_tokens} is fewer than the check"
                f" of {self.most} drafted ones reads: give at least {self.most + 1}, or"
                " draft fewer"
            )


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
    from ..measuring.acceptance import judge_draft, write_texts
    from ..measuring.speed import interleaved, step_ms
    from ..running.skipping import draft_model

    how.check(model)
    refuse_prefill(plan, "a draft model")
    asked = {
        "prompt_tokens": how.prompt_tokens,
        "generation_tokens": how.generation_tokens,
    }
    source = Provenance.of(provenance, seed=seed, **asked)
    stages, draft = Stages(progress, 10), draft_model(model, plan)
    prompts = windows[:, : how.prompt_tokens]  # (texts, prompt)
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
                judge_draft(model, draft, prompt, text, decoding)
                for prompt, text in pairs
            ]
        step = partial(step_ms, tokens=windows[:1], prompt=how.prompt_tokens)
        steps = {
            DENSE_STEP: partial(step, model, width=1),
            DRAFT_STEP: partial(step, draft, width=1),
        }
        steps |= {
            CHECK_STEP.format(drafted): partial(step, model, width=drafted + 1)
            for drafted in range(1, how.most + 1)
        }
        times = interleaved(steps, how.rounds, progress=stages.stage(4))
        record = partial(
            DraftRecord,
            plan=plan,
            model=plan.state,
            rounds=how.rounds,
            provenance=source,
        )
        records = [
            _record(partial(record, decoding=decoding), drafted, texts, times)
            for decoding, texts in judged.items()
            for drafted in range(1, how.most + 1)
        ]
        greedy = records[: how.most]  # they come first
        best = max(range(how.most), key=lambda place: greedy[place].predicted.median)
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
    record: partial[DraftRecord],
    drafted: int,
    texts: Sequence[Accepted],
    times: Samples,
) -> DraftRecord:
    """A round takes so many draft steps and a check; the same tokens took the original
    model a step each.
    """
    from ..measuring.acceptance import acceptance, tokens_per_round
    from ..measuring.speed import speedup

    accepted, accepted_se = acceptance(texts, drafted)
    tokens, tokens_se = tokens_per_round(texts, drafted)
    dense, draft = times[DENSE_STEP], times[DRAFT_STEP]
    check = times[CHECK_STEP.format(drafted)]
    taken = [drafted * drafting + checking for drafting, checking in zip(draft, check)]
    return record(
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

    settings = draft.generation_config
    settings.num_assistant_tokens = drafted
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0  # or it ends drafts early

    texts: dict[str, list[list[int]]] = {}  # token ids, by the way to generate

    def go_on(prompt: Tensor, **assistant: Any) -> list[int]:
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
        texts[way] = [go_on(prompt, **assistant) for prompt in prompts.split(1)]
        return 1e3 * (time.perf_counter() - start)

    try:
        go_on(prompts[:1], assistant_model=draft)
    except UsageError as error:
        return None, None, str(error)
    ways = {
        GENERATING: partial(timed, GENERATING),
        WITH: partial(timed, WITH, assistant_model=draft),
    }
    times = interleaved(ways, how.rounds, progress=progress)
    same = sum(map(list.__eq__, texts[WITH], texts[GENERATING]))
    return speedup(times[GENERATING], times[WITH]), same, ""
