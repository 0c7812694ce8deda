"""Folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `out` when the `with` is left in good order, and is removed otherwise.

    Raises `UsageError` when `out` exists, and when it cannot be written (no space, no permission).
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already; choose another folder, or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}; choose another folder") from None
    try:
        yield scratch
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only their owner can read
        os.rename(scratch, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UsageError(f"no space left for {out}; free some, or choose another disk") from None
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise UsageError(f"{out} was made by someone else meanwhile; choose another folder") from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
