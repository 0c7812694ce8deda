"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError, shortened
from ..models.paths import open_to_others
from ..records.columns import in_bytes
from ..records.lines import refuse_unwritable


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `out` when the `with` is left in good order, and is removed otherwise.

    Raises `UsageError` when `out` exists, and when it cannot be written (no space, no permission).
    """
    check_absent(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}; choose another folder") from None
    try:
        yield scratch
        open_to_others(scratch)  # mkdtemp makes folders that only their owner can read
        os.rename(scratch, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(f"no space left for {out}; free some, or choose another disk") from None
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise UsageError(f"{out} was made by someone else meanwhile; choose another folder") from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_absent(out: Path) -> None:
    """Raise `UsageError` where a folder `out` cannot be made."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already; choose another folder, or remove it first")
    refuse_unwritable(out.parent)


def check_room(folder: Path, size: int) -> None:
    """Raise `UsageError` where the disk of `folder`, which need not be there, has fewer than `size` bytes left."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise UsageError(
            f"the export takes {in_bytes(size)}, and {shortened(place)} has {in_bytes(free)} left; "
            "free some, or choose another disk"
        )
