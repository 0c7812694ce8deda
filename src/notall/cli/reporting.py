"""The command that turns results into a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..reporting.extras import FIGURES, need
from ..reporting.printable import printable
from .app import SHOW, app


@app.command(rich_help_panel=SHOW, epilog="Example:  notall report results -o report.html")
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="folder of results, as most commands write one",
        ),
    ] = Path("results"),
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the page")] = Path("report.html"),
) -> None:
    """Turn a results folder into one page that opens anywhere, without a network."""
    need(*FIGURES, "jinja2")
    from ..reporting.page import write_report

    typer.echo(printable(f"{write_report(folder, out)}: open it in a browser"))
