"""Benchmark scores by configuration and task, and their averages."""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from ...measuring.statistics import (
    Estimate,
    combined,
    mean_and_error,
    paired_difference,
    sign_flip_p_value,
    summed,
)
from ...results.facts import Configured, TaskScore
from ...results.record import is_number
from ..benchmarks import BenchmarkRecord
from .records import DENSE, Average, Configuration

HEADINGS = {
    "arc_challenge": "ARC-C",
    "hellaswag": "HellaSwag",
    "mmlu": "MMLU",
    "truthfulqa_mc2": "TruthfulQA",
    "winogrande": "Winogrande",
    "gsm8k": "GSM8K",
}


PROBABILITY_ROUNDING = (
    1e-6  # probabilities of choices may add up to a little more than 1
)


def heading_of(task: str) -> str:
    """The leaderboard's name of a task, else the harness's; `local_` marks a stand-in for
    the harness's task.
    """
    name = task.removeprefix("local_")
    return HEADINGS.get(name, name)


class Scoreboard:
    """Benchmark records by configuration and column; a column is a task, or task and
    metric where it has several.
    """

    def __init__(self, records: Sequence[BenchmarkRecord]) -> None:
        self.cells: dict[Configuration, dict[str, BenchmarkRecord]] = {}
        scores = {(record.task, record.metric) for record in records}
        metrics = Counter(task for task, _ in scores)
        for record in records:
            column = heading_of(record.task)
            if metrics[record.task] > 1:
                column += f", {record.usual_metric}"
            self.cells.setdefault(record.configuration, {})[column] = record

    @cached_property
    def shared(self) -> list[str]:
        """The columns that every configuration has, as shares of 0 to 1: what an
        average is taken over.
        """
        every = [
            {column for column, score in row.items() if is_share(score)}
            for row in self.cells.values()
        ]
        return [
            column
            for column in self.cells.get(DENSE, ())
            if all(column in row for row in every)
        ]

    @property
    def fewest(self) -> int:
        """The fewest documents of a task; questions on one passage count as one."""
        scores = (row[column] for row in self.cells.values() for column in self.shared)
        counts = (
            len(set(one.sources)) if one.sources else one.documents for one in scores
        )
        return min(counts, default=0)

    def difference(
        self, key: Configuration, other: Configuration
    ) -> tuple[float, float, float]:
        """The average of `key` less that of `other`, its standard error and p value,
        paired by document where known.
        """
        errors, terms = [], list[float]()
        for column in self.shared:
            ours, theirs = self.cells[key][column], self.cells[other][column]
            differences = [a - b for a, b in zip(_shares(ours), _shares(theirs))]
            if differences:
                _, error = mean_and_error(differences, ours.sources)
            else:
                error = ours.delta_se if other == DENSE else math.nan
            errors.append(error)
            terms += summed(
                [one / len(differences) for one in differences], ours.sources
            )
        count = len(self.shared)
        error = math.sqrt(math.fsum(error**2 for error in errors)) / count
        p_value = sign_flip_p_value(terms) if terms else math.nan
        return self.judged(key, other).value, error, p_value

    def judged(self, key: Configuration, other: Configuration) -> Estimate:
        """The average of `key` less that of `other`, with the error that claims are
        judged by.
        """
        parts = []
        for column in self.shared:
            ours, theirs = self.cells[key][column], self.cells[other][column]
            if ours.values and theirs.values:
                one = paired_difference(_shares(ours), _shares(theirs), ours.sources)
            else:
                error = ours.delta_se if other == DENSE else math.nan
                one = Estimate(ours.value - theirs.value, error, ours.documents - 1)
            parts.append((1 / len(self.shared), one))
        return combined(parts)

    def averages(self) -> list[Average]:
        """One for each configuration; none where nothing is shared."""
        if not self.shared:
            return []
        return [self._average(key) for key in self.cells]

    def _average(self, key: Configuration) -> Average:
        row = self.cells[key]
        value, _ = mean_and_error([row[column].value for column in self.shared])
        delta, error, p_value = self.difference(key, DENSE)
        first = next(iter(row.values()))
        configuration = {name: getattr(first, name) for name in Configured.model_fields}
        return Average(
            **configuration,
            value=value,
            delta=delta,
            delta_se=error,
            p_value=p_value,
            tasks=len(self.shared),
        )


def is_share(record: TaskScore) -> bool:
    """Whether a score is a share of 0 to 1, of the task and of each document."""
    shares = [record.value] if record.values is None else _shares(record)
    # fewer where a value of some document is no number
    known = is_number(record.value) and (
        record.values is None or len(shares) >= record.documents
    )
    return known and all(
        -PROBABILITY_ROUNDING <= value <= 1 + PROBABILITY_ROUNDING for value in shares
    )


def _shares(record: TaskScore) -> list[float]:
    return [value for value in record.values or () if is_number(value)]
