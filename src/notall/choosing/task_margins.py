"""The objective on a task: the margin of the right answer on its training questions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from .answered import PromptAndAnswer, batch_of, together
from .terms import Objective, Term

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskShelf

Question = tuple[
    list[PromptAndAnswer], int
]  # (context, answer) pairs, and which is right


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
    questions: list[Question] = [
        ([encode(*pair) for pair in pairs], gold)
        for pairs, gold in _questions(harness_task, name, limit)
    ]
    batches = []
    for part in together(questions, _padded_tokens):
        rows = [pair for pairs, _ in part for pair in pairs]
        margins = _margins([(len(pairs), gold) for pairs, gold in part])
        batches.append(batch_of(rows, margins, by_nll=True))
    return Objective((Term(f"task:{name}", tuple(batches), weight),))


def _padded_tokens(question: Question) -> int:
    """The tokens of a question's answers, each as long as the longest."""
    pairs, _ = question
    longest = max(len(context) + len(answer) for context, answer in pairs)
    return len(pairs) * longest


def _questions(
    harness_task: Any, name: str, limit: int
) -> list[tuple[list[tuple[str, str]], int]]:
    """For each question its (context, answer) pairs, and which of them is gold."""
    is_choice = harness_task.OUTPUT_TYPE == "multiple_choice"
    if not is_choice or not harness_task.has_training_docs():
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
    """From the NLLs of all answers' tokens to minus the margins, (questions,).

    `questions` has for each its number of answers, and which of them is right.
    """

    def items(answers: Sequence[Tensor]) -> Tensor:
        likely = iter([-answer.sum() for answer in answers])
        margins = []
        for count, gold in questions:
            values = [next(likely) for _ in range(count)]
            others = torch.stack(values[:gold] + values[gold + 1 :])
            margins.append(values[gold] - others.max())
        return -torch.stack(margins)

    return items
