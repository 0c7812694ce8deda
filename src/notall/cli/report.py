"""notall report: turn results into a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import FIGURES, need
from ..options import Option
from ..results.printable import printable
from .app import SHOW, command


@command(SHOW, example="notall report results -o report.html")
def report(
    folder: Annotated[
        Path, Option("folder of results, as most commands write one", metavar="DIR", argument=True)
    ] = Path("results"),
    out: Annotated[Path, Option("where to write the page", ("--out", "-o"))] = Path("report.html"),
) -> None:
    """Turn a results folder into one page that opens anywhere, without a network."""
    need(*FIGURES, "jinja2")
    from ..report.page import write_report

    typer.echo(printable(f"{write_report(folder, out)}: open it in a browser"))
