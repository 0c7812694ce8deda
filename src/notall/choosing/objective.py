"""What a set of skipped sublayers is judged by: a loss on a text, on answers, on a
task's questions, or a mix. What an objective is made of is in `terms`.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError, nearest, shortened
from ..measuring.quality import check_prompt
from ..models.texts import all_checked, read_prompts
from .answered import TOKENS_AT_ONCE, answers as answers, retrieval as retrieval
from .task_margins import task as task
from .terms import Batch as Batch, Objective as Objective, Term as Term

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskShelf

OBJECTIVE_NAMES = "nll", "kl", "retrieval", "answers"  # of objectives, but for tasks
OF_TEXT = OBJECTIVE_NAMES[:2]


def nll(
    batches: Sequence[Tensor], weight: float = 1.0, prompt_tokens: int | None = None
) -> Objective:
    """Mean negative log-likelihood a token, by sequence; `batches` are token ids,
    (batch, tokens) each.

    With `prompt_tokens` so many first tokens of each sequence are its prompt, and what
    follows is judged.
    """
    return _by_text("nll", batches, weight, prompt_tokens)


def kl(
    batches: Sequence[Tensor], weight: float = 1.0, prompt_tokens: int | None = None
) -> Objective:
    """Mean KL(dense || skipped) of the next token, by sequence; `batches` and
    `prompt_tokens` are as for `nll`.
    """
    return _by_text("kl", batches, weight, prompt_tokens)


def mix(objectives: Sequence[Objective]) -> Objective:
    """The sum of several objectives, each with its weight."""
    return Objective(
        tuple(term for objective in objectives for term in objective.terms)
    )


def _by_text(
    name: str, batches: Sequence[Tensor], weight: float, prompt: int | None
) -> Objective:
    """So few sequences at a time that a part of a short text can be judged."""
    for ids in batches:
        check_prompt([], ids.shape[1], prompt)
    parts: list[Batch] = []
    for ids in all_checked(batches):
        sequences = max(1, TOKENS_AT_ONCE // ids.shape[1])
        parts += [_text(few, name == "nll", prompt) for few in ids.split(sequences)]
    return Objective((Term(name, tuple(parts), weight),))


def _text(ids: Tensor, by_nll: bool, prompt: int | None) -> Batch:
    """Judged by the mean over each sequence of token ids, (batch, tokens), at the
    places before each judged token.
    """
    start = prompt or 1
    judged = ids[:, start:]  # (batch, judged tokens)
    rows, columns = torch.ones_like(judged).nonzero(as_tuple=True)  # (places,) each

    def by_sequence(losses: Tensor) -> Tensor:
        return losses.view(len(ids), -1).mean(1)  # (places,) to (batch,)

    return Batch(
        {"input_ids": ids},
        rows,
        columns + start - 1,
        by_sequence,
        judged.flatten() if by_nll else None,
        prompt,
    )


def build_objective(
    wanted: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Tensor],
    *,
    prompts: Path | None = None,
    task_path: "Path | TaskShelf | None" = None,
    task_limit: int = 100,
    prompt_tokens: int | None = None,
) -> Objective:
    """What `wanted` is a sum of (see `terms_of`), on `batches`, (batch, tokens) ids
    each, or answers to `prompts`.

    With `prompt_tokens` it is of text alone, of which so many first tokens are the
    prompt.
    """

    def term(weight: float, name: str) -> Objective:
        if prompt_tokens and name not in OF_TEXT:
            raise UsageError(
                "what a prompt skips is judged by the text behind it, and not by"
                f" {shortened(name)}: give the objective {' or '.join(OF_TEXT)}"
            )
        if name.startswith("task:"):
            named = name.removeprefix("task:")
            return task(model, tokenizer, named, task_path, task_limit, weight)
        if name == "answers" and prompts:
            return answers(model, tokenizer, read_prompts(prompts), weight)
        if name == "retrieval":
            return retrieval(model, tokenizer, weight)
        return (nll if name == "nll" else kl)(batches, weight, prompt_tokens)

    return mix([term(*each) for each in terms_of(wanted, prompts)])


def terms_of(wanted: str, prompts: Path | None) -> list[tuple[float, str]]:
    """The weights and names that `wanted` is a sum of, such as `kl + 0.5*task:NAME`.

    Raises `UsageError` for others, and for `answers` without `prompts`.
    """
    found = []
    for part in wanted.split("+"):
        word, _, name = map(str.strip, part.rpartition("*"))
        weight = 0.0
        with suppress(ValueError):
            weight = float(word or 1)
        if weight == 0 or not math.isfinite(weight):
            raise UsageError(
                f"{shortened(word)!r} is no weight: write an objective such as kl +"
                " 0.5*task:NAME"
            )
        if name not in OBJECTIVE_NAMES and not name.startswith("task:"):
            raise UsageError(
                f"there is no objective {shortened(name)!r}{nearest(name, OBJECTIVE_NAMES)}: give"
                f" {', '.join(OBJECTIVE_NAMES)}, task:NAME, or a sum of them"
            )
        if name == "answers" and prompts is None:
            raise UsageError(
                "the objective `answers` needs --prompts: a text file with a prompt a"
                " line, or .jsonl"
            )
        found.append((weight, name))
    return found
