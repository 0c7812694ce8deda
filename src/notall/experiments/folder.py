"""Whether a command may write to a folder."""

from pathlib import Path

from ..results import lines
from ..results.ledger import refuse_foreign
from ..results.record import Command


def check_folder(folder: Path | None, command: Command) -> None:
    """Raise `UsageError` where `command` could not write to `folder`: another's results
    are there, or it may not.
    """
    if folder is None:
        return
    lines.refuse_unwritable(folder)
    refuse_foreign(folder, command)
