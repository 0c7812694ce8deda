"""Paths as users write them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from ..errors import UsageError, shortened


def expanded(path: str | PathLike[str]) -> Path:
    """A path with the home directory in place of its ~. Raises UsageError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no home directory for {shortened(Path(path))}: write the path without ~") from None
