"""notall card: the model card of an export, with what was measured of it."""

from pathlib import Path
from typing import Annotated

from ..exporters.card import CARD
from ..options import Json, Option
from ..report.card import write_card
from ..results.terminal import show
from .app import command


@command(example="notall card smollm2-pruned plan.eval plan.bench")
def card(
    checkpoint: Annotated[
        Path, Option("folder of an export", metavar="CHECKPOINT", argument=True)
    ],
    records: Annotated[
        tuple[Path, ...],
        Option(
            "folders of results of its plan: eval, bench, search, compare, repair, heal",
            metavar="RECORDS",
            argument=True,
        ),
    ] = (),
    as_json: Json = False,
) -> None:
    """Write the model card of an export, with results of its plan.

    They become tables in its README.md, and metadata that hubs read. Earlier results
    there are replaced, and your own text stays. Results of another model, plan or
    repair are refused.
    """
    tables = write_card(checkpoint, records)
    path = checkpoint / CARD
    written = {"card": str(path)}
    show(tables, as_json=as_json, also=written, then=[f"Written: {path}"])
