"""How many documents of each task are used."""

import re
from collections.abc import Mapping, Sequence

from ..errors import UsageError, nearest, shortened


def stock_name(name: str) -> str:
    """The harness's own name of a task: one of a folder that stands in for it is named
    local_ and its name.
    """
    return name.removeprefix("local_")


class Limits:
    """How many documents of a task are used: `most`, unless `by_task` names the task or
    the group it was asked as.
    """

    def __init__(
        self, most: int | None = None, by_task: Mapping[str, int] | None = None
    ) -> None:
        self.most, self.by_task = most, dict(by_task or {})
        for count in (*self.by_task.values(), most):
            if count is not None and count < 1:
                raise UsageError(
                    f"limit {count} leaves no document; give a number from 1, or none"
                    " for all"
                )

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Limits":
        """From words such as `40` and `mmlu=2`. Raises `UsageError` for anything
        else.
        """
        most, by_task = None, {}
        for word in words:
            name, _, count = word.rpartition("=")
            if not re.fullmatch("[0-9]{1,9}", count):
                raise UsageError(
                    f"--limit {shortened(word)} is no number; give 40, or mmlu=2 for"
                    " one task"
                )
            if name:
                by_task[name] = int(count)
            else:
                most = int(count)
        return cls(most, by_task)

    def check(self, tasks: Sequence[str]) -> None:
        """Raise `UsageError` for a limit of what is none of `tasks`."""
        known = {*tasks, *map(stock_name, tasks)}
        for name, count in self.by_task.items():
            if name not in known:
                near = f"{nearest(name, sorted(known))}: {shortened(', '.join(tasks))}"
                raise UsageError(
                    f"--limit {shortened(name)}={count} is of no task that is run{near}"
                )

    def of(self, task: str) -> int | None:
        """The limit of `task`; a group's holds for each of its tasks."""
        return self.by_task.get(task, self.by_task.get(stock_name(task), self.most))
