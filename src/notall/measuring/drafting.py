"""What a plan brings as a draft model for speculative decoding: predicted from its parts, and measured as a whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, raised_by, shortened
from ..models.load_errors import quiet
from ..progress import Progress, Stages, silent, tracked
from ..records.columns import Row
from ..records.drafting import Decoding, DraftRecord
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.drafting import draft_model
from ..running.generating import check_positions
from ..running.repaired import RepairedPlan
from .acceptance import Accepted, acceptance, judge, tokens_per_round, write_texts
from .speed import Spread, in_turn, speedup, step_ms

MOST_DRAFTED = 64


@dataclass(frozen=True)
class Drafting:
    """Prompts of so many tokens are continued with `new_tokens`, 1 to `most` of them drafted a round.

    All is timed `rounds` times, in turn.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    most: int = 8
    rounds: int = 3


@dataclass(frozen=True)
class Drafted:
    """What was found; `refused` says why transformers does not draft for this model, "" where it does."""

    records: list[DraftRecord]
    refused: str


def measure_draft(
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    how: Drafting,
    about: Provenance | Mapping[str, Any],
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Drafted:
    """What the model without `plan` brings as a draft model, a record for each way to decode and number drafted.

    `windows` are token ids, (texts, prompt + new): `model` continues their prompts itself, and steps are timed on the
    first of them as it is. Kept in the folder `out` beside earlier records, if given.

    Raises `UsageError` for counts that make no draft, as `skip` does, and before anything is run when the folder is in
    use, holds another command's results or cannot be written.
    """
    _check(model, how)
    source = Provenance.of(about, seed=seed, prompt=how.prompt_tokens, new=how.new_tokens)
    stages = Stages(progress, 10)
    with working_in(out, "draft") if out else nullcontext():
        kept = Ledger(out, DraftRecord) if out else None
        draft, prompts = draft_model(model, plan), windows[:, : how.prompt_tokens]
        judged = {
            decoding: _judged(model, draft, prompts, how.new_tokens, decoding, seed, stages.stage(1))
            for decoding in get_args(Decoding)
        }
        drafts = range(1, how.most + 1)
        times = in_turn(_steps(model, draft, windows[:1], how), how.rounds, progress=stages.stage(4))
        predicted = {
            (decoding, drafted): _predicted(times, drafted, tokens_per_round(texts, drafted)[0])
            for decoding, texts in judged.items()
            for drafted in drafts
        }
        best = max(drafts, key=lambda drafted: float(predicted["greedy", drafted]["predicted"]))
        generating = _Generating(model, draft, prompts, how.new_tokens, best)
        measured = generating.measured(how.rounds, stages.stage(4))
        records = [
            DraftRecord(
                plan=plan,
                model="repaired" if isinstance(plan, RepairedPlan) else "skipped",
                decoding=decoding,
                drafted=drafted,
                texts=len(texts),
                rounds=how.rounds,
                **_accepted(texts, drafted),
                **predicted[decoding, drafted],
                **(measured if (decoding, drafted) == ("greedy", best) else {}),
                provenance=source,
            )
            for decoding, texts in judged.items()
            for drafted in drafts
        ]
        if kept is not None:
            kept.add(*records)
    return Drafted(records, generating.refused)


def _check(model: PreTrainedModel, how: Drafting) -> None:
    if not 1 <= how.most <= MOST_DRAFTED:
        raise UsageError(f"a draft of {shortened(how.most)} tokens is none: give from 1 to {MOST_DRAFTED}")
    if how.rounds < 1:
        raise UsageError(f"rounds is {shortened(how.rounds)}; give 1 or more")
    if how.prompt_tokens < 1:
        raise UsageError(f"a prompt of {shortened(how.prompt_tokens)} tokens is none: give 1 or more")
    check_positions(model, how.prompt_tokens, how.new_tokens)
    if how.new_tokens <= how.most:
        raise UsageError(
            f"{how.new_tokens} new tokens are fewer than the check of {how.most} drafted ones reads: give at least "
            f"{how.most + 1}, or draft fewer"
        )


def _judged(
    model: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Tensor,
    new_tokens: int,
    decoding: Decoding,
    seed: int,
    progress: Progress,
) -> list[Accepted]:
    progress(0, 1, f"writing {decoding} texts")
    texts = write_texts(model, prompts, new_tokens, decoding, seed=seed)
    pairs = tracked(list(zip(prompts, texts)), f"judging {decoding} texts", progress)
    return [judge(model, draft, prompt, text, decoding) for prompt, text in pairs]


DENSE, DRAFT = "a decode step", "a draft step"
ALONE, WITH = "generating", "generating with a draft"


def _check_of(drafted: int) -> str:
    return f"the check of {drafted}"


def _steps(
    model: PreTrainedModel, draft: PreTrainedModel, window: Tensor, how: Drafting
) -> dict[str, Callable[[], float]]:
    """What is timed: each answers milliseconds."""
    step = partial(step_ms, tokens=window, prompt=how.prompt_tokens)
    checks = {_check_of(drafted): partial(step, model, width=drafted + 1) for drafted in range(1, how.most + 1)}
    return {DENSE: partial(step, model, width=1), DRAFT: partial(step, draft, width=1), **checks}


def _accepted(texts: Sequence[Accepted], drafted: int) -> Row:
    found = {"acceptance": acceptance(texts, drafted), "tokens_per_round": tokens_per_round(texts, drafted)}
    return {f"{name}{end}": value for name, pair in found.items() for end, value in zip(("", "_se"), pair)}


def _predicted(times: Mapping[str, Sequence[float]], drafted: int, tokens: float) -> Row:
    """A round takes so many draft steps and a check; the same tokens took the dense model a step each."""
    dense, draft, check = times[DENSE], times[DRAFT], times[_check_of(drafted)]
    medians = {"dense_ms": dense, "draft_ms": draft, "check_ms": check}
    taken = [drafted * drafting + checking for drafting, checking in zip(draft, check)]
    faster = speedup([tokens * step for step in dense], taken)
    return {name: Spread.of(each).median for name, each in medians.items()} | _with_spread("predicted", faster)


def _with_spread(name: str, spread: Spread) -> Row:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


@dataclass
class _Generating:
    """transformers' own generate, greedy, with `drafted` tokens of the draft model a round, and without it."""

    model: PreTrainedModel
    draft: PreTrainedModel
    prompts: Tensor
    new_tokens: int
    drafted: int
    said: dict[str, list[list[int]]] = field(default_factory=dict)
    refused: str = ""

    def __post_init__(self) -> None:
        settings = self.draft.generation_config
        settings.num_assistant_tokens = self.drafted
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0  # or it ends drafts early
        try:
            self._continue(self.prompts[:1], assistant_model=self.draft)
        except UsageError as error:
            self.refused = str(error)

    def measured(self, rounds: int, progress: Progress) -> Row:
        """How many times faster it is with the draft, and how many texts are the same; nothing where it is refused."""
        if self.refused:
            return {}
        ways = {ALONE: partial(self.timed, ALONE), WITH: partial(self.timed, WITH, assistant_model=self.draft)}
        times = in_turn(ways, rounds, progress=progress)
        same = sum(map(list.__eq__, self.said[WITH], self.said[ALONE]))
        return _with_spread("measured", speedup(times[ALONE], times[WITH])) | {"same_texts": same}

    def timed(self, way: str, **assistant: Any) -> float:
        """Milliseconds of continuing all prompts, one after the other."""
        start = time.perf_counter()
        self.said[way] = [self._continue(prompt, **assistant).tolist() for prompt in self.prompts.split(1)]
        return 1e3 * (time.perf_counter() - start)

    def _continue(self, prompt: Tensor, **assistant: Any) -> Tensor:
        plain = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}  # whatever the model would rather do
        mask = torch.ones_like(prompt)
        with quiet(), raised_by("transformers", "transformers does not draft for this model", "another engine may"):
            said = self.model.generate(
                prompt, attention_mask=mask, max_new_tokens=self.new_tokens, **plain, **assistant
            )
        return said[0, prompt.shape[1] :]
