"""notall tasks, report and reproduce: what there is to ask, and what came of it."""

import io
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..encodings import printable
from ..experiments import reproduce as reproducing
from ..experiments.options.tasks import TaskPath
from ..experiments.options.words import Words
from ..extras import FIGURES, need
from ..options import Json, Option, OutFolder
from ..plan import several
from ..report.reproduced import COLUMNS, conclusion
from ..results.facts import NAMED_TASKS
from ..results.table import table
from ..results.terminal import progress_bar, show
from .app import MISSED, app, command, options_in


@command(example="notall tasks arc")
def tasks(
    word: Annotated[
        str,
        Option("list only names that hold this word", metavar="[WORD]", argument=True),
    ] = "",
    task_path: TaskPath = None,
    as_json: Json = False,
) -> None:
    """List what --tasks takes: checks that need no data, tasks of
    lm-evaluation-harness, openllm, the paper's six.
    """
    need("lm_eval")
    with progress_bar("reading the harness's tasks"):
        from ..evaluation.tasks import TaskShelf

        found = TaskShelf(task_path).listed(word)
    title = f"{several(len(found), 'name')} for --tasks"
    if any(one.num_fewshot for one in found):
        title += "; shots as the leaderboard shows them"
    show({"tasks": table(title, NAMED_TASKS, found)}, as_json=as_json)


@command(example="notall report results -o report.html")
def report(
    folder: Annotated[
        Path, Option("folder of results", metavar="DIR", argument=True)
    ] = Path("results"),
    out: Annotated[Path, Option("where to write the page", ("--out", "-o"))] = Path(
        "report.html"
    ),
    join: Annotated[
        Words,
        Option("comparison to rank in the same table; repeat it for more"),
    ] = (),
) -> None:
    """Turn a results folder into one page that opens anywhere, without a network."""
    need(*FIGURES, "jinja2")
    from ..report.page import write_report

    print(printable(f"{write_report(folder, out, join)}: open it in a browser"))


@command(example="notall reproduce comparison --row cosine --out again")
def reproduce(
    folder: Annotated[
        Path, Option("folder of results", metavar="DIR", argument=True)
    ] = Path("results"),
    row: Annotated[
        Words,
        Option("only rows whose names begin with these words; repeat it for more"),
    ] = (),
    swap: Annotated[
        Words,
        Option(
            "another word for one of the recorded command; repeat it for more",
            ("--replace",),
            "WORD=OTHER",
        ),
    ] = (),
    functions: Annotated[
        Path | None,
        Option(
            "folder of modules whose functions the command may run (default: it runs"
            " none)",
            (),
            "DIR",
        ),
    ] = None,
    out: OutFolder = Path("reproduced"),
    as_json: Json = False,
) -> None:
    """Make a results folder again, from its records alone, and compare every figure.

    The recorded command runs again. A model, text, plan or function that has changed is
    refused by its digest. Exit code 3 follows where a figure differs beyond the
    tolerance.
    """
    commands = reproducing.CommandLine(options_in, _run)
    found = reproducing.reproduce(folder, row, swap, out, commands, functions)
    shown = [
        one
        for one in found
        if one.agreement != "equal" or not one.row.startswith("similarity")
    ]  # which are many
    rows = table(f"{folder}, made again in {out}", COLUMNS, shown)
    summary = conclusion(found, folder)
    show(
        {"reproduced": replace(rows, facts=tuple(found))},
        as_json=as_json,
        also={"verdict": summary},
        then=[summary],
    )
    if any(one.agreement in ("differs", "not made") for one in found):
        raise typer.Exit(MISSED)


def _run(line: list[str]) -> None:
    """Run a command in this process, without its tables; records name it as if it had
    been typed.
    """
    typed, sys.argv = sys.argv, ["notall", *line]
    try:
        with redirect_stdout(io.StringIO()):
            app(line, prog_name="notall", standalone_mode=False)
    finally:
        sys.argv = typed
