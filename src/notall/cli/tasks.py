"""notall tasks: what --tasks takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..extras import need
from ..options import Json, Option
from ..results.facts import NAMED_TASKS
from ..results.progress_bars import working
from ..results.table import table
from ..results.terminal import show
from .app import MEASURE, command


@command(MEASURE, example="notall tasks arc")
def tasks(
    word: Annotated[str, Option("list only names that hold this word", metavar="[WORD]", argument=True)] = "",
    task_path: Annotated[
        Path | None, Option("folder with more tasks: YAML files of the harness, which may run code")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what --tasks takes: tasks and groups of lm-evaluation-harness, and openllm, the paper's six."""
    need("lm_eval")
    with working("reading the harness's tasks"):
        from ..evaluation.tasks import TaskShelf

        found = TaskShelf(task_path).listed(word)
    named = "1 name" if len(found) == 1 else f"{len(found):,} names"
    shots = "; shots as the leaderboard shows them" if any(one.num_fewshot for one in found) else ""
    show({"tasks": (table(f"{named} for --tasks{shots}", NAMED_TASKS, found), found)}, as_json=as_json)
