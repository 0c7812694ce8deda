"""The folder of what is kept between runs, `$NOTALL_CACHE` or `~/.cache/notall`, and the hashes in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

from ..errors import UsageError


def cache_folder() -> Path:
    """The folder of all that is kept between runs, made if absent. Raises UsageError where it can't be."""
    try:
        folder = Path(os.environ.get("NOTALL_CACHE") or "~/.cache/notall").expanduser()
    except RuntimeError:
        raise UsageError("there is no home directory for the cache: set NOTALL_CACHE to a folder") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def sha256(path: Path) -> str:
    """The hex digest of a file's bytes, computed again only when the file is another or was changed."""
    state = path.stat()
    # The time of modification can be set, and rsync and cp -p do so; inode and time of change cannot.
    same = (path.resolve(), state.st_size, state.st_mtime_ns, state.st_dev, state.st_ino, state.st_ctime_ns)
    note = cache_folder() / "sha256" / hashlib.sha256(":".join(map(str, same)).encode()).hexdigest()
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{64}", kept := note.read_text(encoding="utf-8")):
            return kept
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    keep(note, digest.hexdigest())
    return digest.hexdigest()


def keep(path: Path, content: str) -> None:
    """Write a file of the cache, whole or not at all; where it can't be, only the next run is slower."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(content, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write the cache folder {folder} ({error.strerror}): set NOTALL_CACHE to another")
