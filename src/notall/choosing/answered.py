"""Objectives on answers behind a context: the original model's own, and retrieval."""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.retrieval import FITTED, episode
from ..plan import Plan
from ..running.generating import check_positions, greedy, prompt_tokens
from ..running.skipping import skip
from ..structure.model_structure import positions_of
from .terms import Batch, Objective, Term

TOKENS_AT_ONCE = 1024  # of a batch, about
RETRIEVAL_EPISODES = 8  # of `retrieval`
EPISODE_TOKENS = 256  # of each, about
T = TypeVar("T")
# Token ids of a context, and of what is judged behind it.
PromptAndAnswer = tuple[list[int], list[int]]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    weight: float = 1.0,
    new_tokens: int = 48,
) -> Objective:
    """KL(dense || skipped), the mean over the tokens of the original model's own greedy
    answers, by prompt.

    Raises `UsageError` for a prompt without tokens, and for more tokens than the model
    has positions.
    """
    answered: list[PromptAndAnswer] = []
    for prompt in prompts:
        ids = prompt_tokens(tokenizer, prompt)
        check_positions(model, len(ids), new_tokens)
        with skip(model, Plan()):
            (answer,) = greedy(model, torch.tensor([ids]), new_tokens)
        answered.append((ids, answer))
    return _by_means("answers", answered, weight)


def retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weight: float = 1.0
) -> Objective:
    """KL(dense || skipped), the mean over the tokens of what is asked for far behind
    it, by episode.

    The episodes have the forms that are fitted to (see `models.retrieval`), and are
    those of no text. One that exceeds the model's positions loses its beginning.
    """
    draw = random.Random("retrieval")
    answered: list[PromptAndAnswer] = []
    for number in range(RETRIEVAL_EPISODES):
        one = episode(FITTED[number % len(FITTED)], EPISODE_TOKENS, draw)
        ids = prompt_tokens(tokenizer, one.text + one.answer)
        known = prompt_tokens(tokenizer, one.text)
        end = min(len(known), len(ids) - 1)
        first = int(max(0, len(ids) - positions_of(model)))
        answered.append((ids[first:end], ids[end:]))
    return _by_means("retrieval", answered, weight)


def _by_means(name: str, rows: Sequence[PromptAndAnswer], weight: float) -> Objective:
    """The mean KL over the tokens behind each context."""
    parts = together(rows, lambda row: len(row[0]) + len(row[1]))
    batches = [batch_of(part, _means) for part in parts]
    return Objective((Term(name, tuple(batches), weight),))


def _means(answers: Sequence[Tensor]) -> Tensor:
    """From the losses of each answer's tokens, (tokens,) each: (answers,)."""
    return torch.stack([nats.mean() for nats in answers])


def batch_of(
    rows: Sequence[PromptAndAnswer],
    items: Callable[[Sequence[Tensor]], Tensor],
    by_nll: bool = False,
) -> Batch:
    """Contexts and answers, padded on the right, with a loss at each answer's tokens.

    `items` makes the items' losses, (items,), from those of each answer's tokens,
    (tokens,) each: their NLL, or without `by_nll` KL(dense || skipped).
    """
    sequences = [torch.tensor(context + answer) for context, answer in rows]
    masks = [torch.ones_like(sequence) for sequence in sequences]
    places: list[tuple[int, int]] = []  # a row and a column, the one before the token
    for row, (context, answer) in enumerate(rows):
        start = len(context) - 1
        places += [(row, start + place) for place in range(len(answer))]
    rows_of, columns = torch.tensor(places).unbind(1)  # (places,) each
    lengths = [len(answer) for _, answer in rows]
    targets = None
    if by_nll:
        targets = torch.tensor([token for _, answer in rows for token in answer])
    inputs = {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }  # (batch, tokens) each
    return Batch(
        inputs, rows_of, columns, lambda losses: items(losses.split(lengths)), targets
    )


def together(items: Iterable[T], size: Callable[[T], int]) -> list[list[T]]:
    """Items in their order, cut so that each part has about `TOKENS_AT_ONCE` tokens."""
    parts: list[list[T]] = []
    for item in items:
        if not parts or sum(map(size, parts[-1])) + size(item) > TOKENS_AT_ONCE:
            parts.append([])
        parts[-1].append(item)
    return parts
