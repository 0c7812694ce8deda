"""Scores of tasks next to the original model's: paired by item, items of one passage
together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..measuring.recovery import recovery_interval
from ..measuring.statistics import (
    JACKKNIFED,
    are_right_or_wrong,
    jackknife_error,
    mean_and_error,
    sign_flip_p_value,
    student_p_value,
    too_few,
)
from ..plan import Plan
from ..results.facts import Recovery, TaskScore
from ..strict_json import Settings

if TYPE_CHECKING:
    from .tasks import Job  # which needs the extra `eval`
# What a document calls the text that others ask about, too: questions on one passage
# are no independent items.
PASSAGES = (
    "passage",
    "flores_passage",
    "paragraph",
    "article",
    "context",
    "story",
    "source_id",
)


@dataclass(frozen=True)
class DocumentScore:
    """What one plan made of one document: its value of the metric, and the answers to
    its requests.
    """

    task: str
    doc_id: int
    value: Any
    # (log-likelihood in nats, whether it is the greedy one), a log-likelihood, or a text
    answers: tuple[Any, ...]
    source: str = ""  # the passage that it is about, or all of it


@dataclass(frozen=True)
class TaskResult:
    """One plan on one task by one metric, with the original model's on the same
    documents.
    """

    number: int  # of the plan, in the order given
    plan: Plan
    score: TaskScore
    samples: tuple[DocumentScore, ...]  # one a document


def scores_of(
    job: "Job", row: str, leaves: list[str], outcome: Settings, dense: Settings
) -> Iterator[tuple[TaskScore, tuple[DocumentScore, ...]]]:
    """A score for each metric to report of a row, which is a task or a group of tasks,
    and what it is made of.
    """
    figures = outcome["results"][row]
    for metric, value in figures.items():
        name, _, kind = metric.partition(",")
        if not kind or name.endswith("_stderr") or job.metric not in (None, metric):
            continue
        samples = _samples(outcome, leaves, metric)
        base = _samples(dense, leaves, metric)
        delta = float(value - dense["results"][row][metric])
        value_se = figures.get(f"{name}_stderr,{kind}")
        has_error = isinstance(value_se, int | float)
        better = outcome["higher_is_better"].get(row, {}).get(name)
        score = TaskScore(
            task=row,
            metric=metric,
            # a group of groups has none of its own
            num_fewshot=outcome["n-shot"][leaves[0]],
            documents=len(samples),
            value=float(value),
            value_se=float(value_se) if has_error else math.nan,
            delta=delta,
            higher_is_better=better,
            **_paired(job, samples, base, name, delta, better),
        )
        yield score, samples


def _paired(
    job: "Job",
    samples: Sequence[DocumentScore],
    base: Sequence[DocumentScore],
    name: str,
    delta: float,
    better: bool | None,
) -> Settings:
    """What a score says next to the original model's: paired by item, items of one
    passage together.
    """
    sources = _sources(samples)
    passages = len(set(sources)) if sources else len(samples)
    found: Settings = {"sources": sources, "too_few": too_few(passages, len(samples))}
    values = [sample.value for sample in samples]
    theirs = [sample.value for sample in base]
    are_numbers = all(isinstance(value, int | float) for value in (*values, *theirs))
    differences: list[float] = []
    mean_of_them, error = math.nan, math.nan
    if are_numbers:
        differences = [ours - other for ours, other in zip(values, theirs)]
        mean_of_them, error = mean_and_error(differences, sources)
    if math.isclose(mean_of_them, delta, abs_tol=1e-9):
        found |= {"delta_se": error, "p_value": sign_flip_p_value(differences, sources)}
        if are_right_or_wrong(values, theirs):  # what is wrong already gets no worse
            passage_of = sources or range(len(theirs))
            right = {one for one, value in zip(passage_of, theirs) if value}
            found["too_few"] = too_few(len(right), len(samples))
    else:
        error, parts = _error_without(job, samples, base, name)
        p_value = student_p_value(delta, error, parts - 1)
        found |= {"delta_se": error, "p_value": p_value}
    if are_numbers:
        found["values"] = tuple(map(float, values))
        kept = recovery_interval(values, theirs, sources) if better else None
        found["recovery"] = kept and Recovery.of(kept, len(samples))
    return found


def _sources(samples: Sequence[DocumentScore]) -> tuple[int, ...] | None:
    """Of each sample the number of its passage, in the order of the first; None where
    each has its own.
    """
    keys = [(sample.task, sample.source) for sample in samples]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(map(numbers.__getitem__, keys)) if len(numbers) < len(keys) else None


def _samples(
    outcome: Settings, leaves: list[str], metric: str
) -> tuple[DocumentScore, ...]:
    name, _, kind = metric.partition(",")
    return tuple(
        DocumentScore(
            leaf,
            sample["doc_id"],
            sample[name],
            tuple(answer for answer, *_ in sample["resps"]),
            _source_of(sample["doc"]),
        )
        for leaf in leaves
        for sample in outcome["samples"][leaf]
        if sample["filter"] == kind and name in sample
    )


def _source_of(document: object) -> str:
    """What two items must share to be of one passage: its text, or where there is none
    the whole document.
    """
    fields = document if isinstance(document, dict) else {}
    return next(
        (str(fields[name]) for name in PASSAGES if fields.get(name)), repr(document)
    )


def _error_without(
    job: "Job",
    samples: Sequence[DocumentScore],
    base: Sequence[DocumentScore],
    name: str,
) -> tuple[float, int]:
    """The standard error of a difference that is no mean of its items', and of how many
    parts it is.

    By leaving out passages; of a group it is that of the plain mean over its tasks.
    """
    from lm_eval.api.metrics import mean

    errors: list[float] = []
    parts = 0
    for task in dict.fromkeys(sample.task for sample in samples):
        by_source: dict[str, list[tuple[Any, Any]]] = {}
        for ours, theirs in zip(samples, base):
            if ours.task == task:
                by_source.setdefault(ours.source, []).append((ours.value, theirs.value))
        aggregate = job.tasks[task].aggregation().get(name, mean)

        def difference(
            passages: Sequence[list[tuple[Any, Any]]], aggregate: Any = aggregate
        ) -> float:
            ours, theirs = zip(*chain.from_iterable(passages))
            return aggregate(list(ours)) - aggregate(list(theirs))

        errors.append(jackknife_error(difference, [*by_source.values()]))
        parts += min(JACKKNIFED, len(by_source))
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors), parts
