"""What a command refuses before it loads a model: whatever can be known without one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, shortened
from ..records.lines import refuse_unwritable
from ..reporting.progress_bars import working

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskShelf


def check_texts(*sources: str | None) -> None:
    """Raise `UsageError` for a text that cannot be read."""
    from ..models.texts import read_text

    for source in sources:
        if source is not None:
            read_text(source)


def check_folders(**folders: Path | None) -> None:
    """By the commands that are to write to them. Raise `UsageError` where one cannot, or another's results are."""
    from ..records.ledger import check_folder

    for command, folder in folders.items():
        if folder is not None:
            check_folder(folder, command)  # type: ignore[arg-type]


def check_file(out: Path) -> None:
    """Raise `UsageError` where a file of this name cannot be written."""
    if out.is_dir():
        raise UsageError(f"{shortened(out)} is a folder: choose another -o")
    if out.exists() and not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {shortened(out)}: permission denied; choose another -o")
    refuse_unwritable(out.parent)


def check_tasks(
    names: Sequence[str],
    task_path: Path | None = None,
    *,
    num_fewshot: int | None = None,
    limits: Sequence[str] = (),
    also: Sequence[str] = (),
) -> TaskShelf | Path | None:
    """The tasks that there are, or, where none is wanted, `task_path` as it is. Raises `UsageError` for other names.

    Limits may be of what is run `also`.
    """
    if not names:
        return task_path
    with working("reading the harness's tasks"):
        from ..evaluation.tasks import Limits, TaskShelf, check_fewshot

        asked = Limits.parse(limits)
        check_fewshot(num_fewshot)
        shelf = TaskShelf(task_path)
    asked.check([*shelf.names(names), *also])
    return shelf


def check_objectives(
    wanted: Sequence[str],
    prompts: Path | None,
    task_path: Path | None,
    tasks: Sequence[str] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> TaskShelf | Path | None:
    """As `check_tasks`, of `tasks` and of those that objectives go by; a task's data is read.

    Raises `UsageError` for what is no objective, and for prompts that cannot be read.
    """
    from ..choosing.answer_objectives import read_prompts, terms_of

    parts = [name for one in wanted for _, name in terms_of(one, prompts)]
    if "answers" in parts and prompts:
        read_prompts(prompts)
    asked = [name.removeprefix("task:") for name in parts if name.startswith("task:")]
    limits = [] if limit is None else [str(limit)]
    shelf = check_tasks([*asked, *tasks], task_path, num_fewshot=num_fewshot, limits=limits)
    if asked and not isinstance(shelf, Path | None):
        for name in shelf.names(asked):
            shelf.build(name, 0, 1)
    return shelf
