"""Commands that choose what to skip."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..console import show
from .app import CHOOSE, app
from .columns import FOOTPRINT_COLUMNS
from .inputs import deepest_plan, empty_model
from .options import Json, Model, Revision, Skippable, Trust


@app.command(
    rich_help_panel=CHOOSE,
    epilog="Example:  notall plan smollm2 --skip attention --fraction 0.33 --keep-last -o plan.json",
)
def plan(
    model: Model = "smollm2",
    skip: Annotated[Skippable, typer.Option(help="what to leave out")] = Skippable.attention,
    fraction: Annotated[
        float, typer.Option(help="share of the layers, 0 to 1; round(fraction x layers) are skipped")
    ] = 0.33,
    keep_last: Annotated[bool, typer.Option("--keep-last", help="preserve the last layer")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the plan")] = Path("plan.json"),
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write the paper's plan: skip the deepest sublayers. Needs only a config."""
    from ..footprint import footprint
    from ..plan import Plan

    net = empty_model(model, revision, trust_remote_code)
    chosen = deepest_plan(net, skip, fraction, keep_last)
    chosen.save(out)
    rows = [
        {"model": name, **asdict(footprint(net, which))} for name, which in (("dense", Plan()), ("skipped", chosen))
    ]
    show(rows, FOOTPRINT_COLUMNS, as_json=as_json, title=f"{out}: skip {chosen}")
