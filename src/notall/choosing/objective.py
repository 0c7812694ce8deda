"""What a set of skipped sublayers is judged by: a loss on a text, on answers, on a
task's questions, or a mix.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..errors import UsageError, nearest, shortened
from ..measuring.quality import check_prompt
from ..models.retrieval import FITTED, episode
from ..models.texts import all_checked, read_prompts
from ..plan import Plan
from ..running.generating import check_positions, greedy, prompt_tokens
from ..running.skipping import skip
from ..structure.model_structure import positions_of

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskShelf

TOKENS_AT_ONCE = 1024
NAMES = "nll", "kl", "retrieval", "answers"  # of objectives, but for tasks
OF_TEXT = NAMES[:2]
EPISODES, EPISODE_TOKENS = (
    8,
    256,
)  # of `retrieval`: how many, and about how many tokens each has
T = TypeVar("T")
Answered = tuple[
    list[int], list[int]
]  # token ids of a context, and of what is judged behind it


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, as for the model's forward, and at which places of
    them there is a loss, in nats.
    """

    inputs: dict[str, Tensor]
    rows: Tensor  # (places,)
    columns: Tensor  # (places,)
    items: Callable[
        [Tensor], Tensor
    ]  # makes the losses of the items, (items,), of those of the places, (places,)
    targets: Tensor | None = (
        # (places,) token ids whose NLL it is; else KL(dense || skipped) of the next
        # token
        None
    )
    prompt_tokens: int | None = (
        None  # so many first ones of each sequence are a prompt, where that is known
    )

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].numel()

    def judged(self, hidden: Tensor) -> Tensor:
        """The places at which the objective looks, (places, hidden), of (batch, tokens,
        hidden).
        """
        return hidden[self.rows.to(hidden.device), self.columns.to(hidden.device)]


@dataclass(frozen=True)
class Term:
    """The mean of a loss over all items of its batches, times `weight`."""

    name: str
    batches: tuple[Batch, ...] = field(repr=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """The sum of its terms: lower is better."""

    terms: tuple[Term, ...]

    @property
    def name(self) -> str:
        return " + ".join(
            t.name if t.weight == 1 else f"{t.weight:g}*{t.name}" for t in self.terms
        )

    @property
    def prompt_tokens(self) -> int | None:
        """The most of a batch; None where there is no prompt."""
        return max(
            filter(None, (batch.prompt_tokens for batch in self.batches)), default=None
        )

    @property
    def batches(self) -> tuple[Batch, ...]:
        return tuple(batch for term in self.terms for batch in term.batches)

    @property
    def windows(self) -> list[Tensor]:
        """Token ids, (batch, tokens) each, of the text that it is a loss on."""
        terms = (term for term in self.terms if term.name in ("nll", "kl"))
        return [batch.inputs["input_ids"] for term in terms for batch in term.batches]

    def _numbered(self) -> Iterator[tuple[Term, range]]:
        start = 0
        for term in self.terms:
            yield term, range(start, start + len(term.batches))
            start += len(term.batches)

    def part(self, share: float) -> frozenset[int]:
        """The numbers of the first batches of each term: `share` of them, at least one
        a term.
        """
        parts = (
            numbers[: math.ceil(share * len(numbers) - 1e-9) or 1]
            for _, numbers in self._numbered()
        )
        return frozenset(number for numbers in parts for number in numbers)

    def total(self, losses: dict[int, list[float]]) -> float:
        """The objective, from the losses of each batch's items by the batch's number;
        batches may be lacking.
        """
        total = 0.0
        for term, numbers in self._numbered():
            items = [value for number in numbers for value in losses.get(number, ())]
            total += term.weight * math.fsum(items) / len(items)
        return total

    def digest(self) -> str:
        """A hash of what is measured: the terms, their weights and their inputs."""
        inputs = (
            part
            for batch in self.batches
            for pair in sorted(batch.inputs.items())
            for part in pair
        )
        prompts = (
            f"prompt {batch.prompt_tokens}"
            for batch in self.batches
            if batch.prompt_tokens
        )
        return digest_of([self.name, *inputs, *prompts])[:16]


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
    few = [
        part
        for ids in all_checked(batches)
        for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1]))
    ]
    return Objective(
        (Term(name, tuple(_text(ids, name == "nll", prompt) for ids in few), weight),)
    )


def _text(ids: Tensor, by_nll: bool, prompt: int | None) -> Batch:
    """Judged by the mean over each sequence, (batch, tokens) token ids, at the places
    ahead of each judged token.
    """
    start = prompt or 1
    rows, columns = torch.ones_like(ids[:, start:]).nonzero(as_tuple=True)
    targets = ids[:, start:].flatten() if by_nll else None
    inputs, columns = {"input_ids": ids}, columns + start - 1
    return Batch(
        inputs,
        rows,
        columns,
        lambda values: values.view(len(ids), -1).mean(1),
        targets,
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
            told = (
                "what a prompt skips is judged by the text behind it, and not by"
                f" {shortened(name)}"
            )
            raise UsageError(f"{told}: give the objective {' or '.join(OF_TEXT)}")
        if name.startswith("task:"):
            return task(model, tokenizer, name[5:], task_path, task_limit, weight)
        if name == "answers" and prompts:
            return answers(model, tokenizer, read_prompts(prompts), weight)
        if name == "retrieval":
            return retrieval(model, tokenizer, weight)
        return (nll if name == "nll" else kl)(batches, weight, prompt_tokens)

    return mix([term(*each) for each in terms_of(wanted, prompts)])


def terms_of(wanted: str, prompts: Path | None) -> list[tuple[float, str]]:
    """The weights and names that `wanted` is a sum of. Raises `UsageError` for others,
    and where prompts lack.
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
        if name not in NAMES and not name.startswith("task:"):
            said = f"there is no objective {shortened(name)!r}{nearest(name, NAMES)}"
            raise UsageError(
                f"{said}: give {', '.join(NAMES)}, task:NAME, or a sum of them"
            )
        if name == "answers" and prompts is None:
            raise UsageError(
                "the objective `answers` needs --prompts: a text file with a prompt a"
                " line, or .jsonl"
            )
        found.append((weight, name))
    return found


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
    said = []
    for prompt in prompts:
        ids = prompt_tokens(tokenizer, prompt)
        check_positions(model, len(ids), new_tokens)
        with skip(model, Plan()):
            (answer,) = greedy(model, torch.tensor([ids]), new_tokens)
        said.append((ids, answer))

    return _by_means("answers", model, said, weight)


def retrieval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weight: float = 1.0
) -> Objective:
    """KL(dense || skipped), the mean over the tokens of what is asked for far behind
    it, by episode.

    The episodes have the forms that are fitted to (see `models.retrieval`), and are
    those of no text. One that exceeds the model's positions loses its beginning.
    """
    draw, asked = random.Random("retrieval"), []
    for number in range(EPISODES):
        one = episode(FITTED[number % len(FITTED)], EPISODE_TOKENS, draw)
        ids, known = (
            prompt_tokens(tokenizer, text) for text in (one.text + one.answer, one.text)
        )
        end = min(len(known), len(ids) - 1)
        first = int(max(0, len(ids) - positions_of(model)))
        asked.append((ids[first:end], ids[end:]))
    return _by_means("retrieval", model, asked, weight)


def _by_means(
    name: str, model: PreTrainedModel, rows: Sequence[Answered], weight: float
) -> Objective:
    """The mean KL over the tokens behind each context."""
    parts = _together(rows, lambda pair: len(pair[0]) + len(pair[1]))
    batches = [_answered(part, _means) for part in parts]
    return Objective((Term(name, tuple(batches), weight),))


def _means(answers: Sequence[Tensor]) -> Tensor:
    return torch.stack([nats.mean() for nats in answers])


def task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    task_path: "Path | TaskShelf | None" = None,
    limit: int = 100,
    weight: float = 1.0,
) -> Objective:
    """Minus the margin of the gold answer, in nats, on the first `limit` questions of a
    task's training split.

    The margin is the gold answer's log-likelihood less that of the best other one,
    without examples. The questions and their encoding are lm-evaluation-harness's.
    Raises `UsageError` for a task without training questions or choices.
    """
    from ..evaluation.harness import PlansLM
    from ..evaluation.tasks import TaskShelf

    if limit < 1:
        raise UsageError(
            f"{limit} training questions of {name} make no objective: give 1 or more"
        )
    shelf = TaskShelf.of(task_path)
    (name,) = shelf.names([name])
    (harness_task,) = shelf.build(name, 0, 1).tasks.values()
    encode = PlansLM(model, tokenizer, [])._encode_pair
    questions = [
        ([encode(*pair) for pair in pairs], gold)
        for pairs, gold in _questions(harness_task, name, limit)
    ]
    batches = []
    for part in _together(
        questions, lambda one: len(one[0]) * max(len(a) + len(b) for a, b in one[0])
    ):
        margins = _margins([(len(pairs), gold) for pairs, gold in part])
        rows = [pair for pairs, _ in part for pair in pairs]
        batches.append(_answered(rows, margins, by_nll=True))
    return Objective((Term(f"task:{name}", tuple(batches), weight),))


def _questions(
    harness_task: Any, name: str, limit: int
) -> list[tuple[list[tuple[str, str]], int]]:
    """For each question its (context, answer) pairs, and which of them is gold."""
    if (
        harness_task.OUTPUT_TYPE != "multiple_choice"
        or not harness_task.has_training_docs()
    ):
        raise UsageError(
            f"{name} has no training questions with answers to choose from: take"
            " another task"
        )
    found = []
    for doc in list(harness_task.training_docs())[:limit]:
        doc = harness_task._process_doc(doc)
        context = harness_task.fewshot_context(doc, num_fewshot=0)
        requests = harness_task.construct_requests(doc, context, metadata=(name, 0, 1))
        choices = len(harness_task.doc_to_choice(doc))
        gold = (
            harness_task.doc_to_text(doc)
            if harness_task.multiple_input
            else harness_task.doc_to_target(doc)
        )
        if isinstance(gold, int) and 0 <= gold < choices > 1:
            found.append(([request.args for request in requests[:choices]], gold))
    if not found:
        raise UsageError(
            f"no training question of {name} has one right answer: take another task"
        )
    return found


def _margins(
    questions: Sequence[tuple[int, int]],
) -> Callable[[Sequence[Tensor]], Tensor]:
    """From the NLLs of all answers' tokens: minus the margins of questions of so many
    answers, one of them golden.
    """

    def items(answers: Sequence[Tensor]) -> Tensor:
        likely = iter([-answer.sum() for answer in answers])
        margins = []
        for count, gold in questions:
            values = [next(likely) for _ in range(count)]
            margins.append(
                values[gold] - torch.stack(values[:gold] + values[gold + 1 :]).max()
            )
        return -torch.stack(margins)

    return items


def _answered(
    rows: Sequence[Answered],
    items: Callable[[Sequence[Tensor]], Tensor],
    by_nll: bool = False,
) -> Batch:
    """Contexts and answers, padded on the right; `items` is given the losses of each
    answer's tokens.
    """
    sequences = [torch.tensor(context + answer) for context, answer in rows]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence(
        [torch.ones_like(sequence) for sequence in sequences], batch_first=True
    )
    spans = [
        range(len(context) - 1, len(context) + len(answer) - 1)
        for context, answer in rows
    ]
    places, lengths = (
        [(row, column) for row, span in enumerate(spans) for column in span],
        [*map(len, spans)],
    )
    targets = (
        torch.tensor([token for _, answer in rows for token in answer])
        if by_nll
        else None
    )
    rows_of, columns = torch.tensor(places).unbind(1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Batch(
        inputs, rows_of, columns, lambda values: items(values.split(lengths)), targets
    )


def _together(items: Iterable[T], size: Callable[[T], int]) -> list[list[T]]:
    """Items in their order, cut so that each part has about `TOKENS_AT_ONCE` tokens."""
    parts: list[list[T]] = []
    for item in items:
        if not parts or sum(map(size, parts[-1])) + size(item) > TOKENS_AT_ONCE:
            parts.append([])
        parts[-1].append(item)
    return parts
