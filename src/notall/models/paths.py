"""Paths as users write them."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from ..errors import UsageError, shortened


def expanded(path: str | PathLike[str]) -> Path:
    """A path with the home directory in place of its ~. Raises UsageError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"there is no home directory for {shortened(Path(path))}: write the path without ~") from None


def open_to_others(path: Path) -> None:
    """Let others read a folder or a file that was made for its owner alone, as far as the umask allows."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
