"""SHA-256 in hex: of texts, tensors, tables and files."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import cache_folder, write_cached
from .files import contents

if TYPE_CHECKING:
    from torch import Tensor


def digest_of(parts: "Iterable[str | bytes | Tensor]") -> str:
    """Of texts in UTF-8, bytes, and tensors as they lie in memory, one behind the
    other.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str | bytes):
            digest.update(part.encode() if isinstance(part, str) else part)
        else:
            import torch  # only where there are tensors

            digest.update(
                part.detach()
                .cpu()
                .contiguous()
                .flatten()
                .view(torch.uint8)
                .numpy()
                .data
            )
    return digest.hexdigest()


def digest_of_json(value: object) -> str:
    """Of what JSON makes of `value`: of tables in whatever order, and of what it cannot
    hold as str() has it.
    """
    return digest_of([json.dumps(value, sort_keys=True, default=str)])


def digest_of_file(path: Path) -> str:
    """Of a file's bytes, read again only when the file is another or was changed."""
    state = path.stat()
    # The time of modification can be set, and rsync and cp -p do so; inode and time of
    # change cannot.
    same = (
        path.resolve(),
        state.st_size,
        state.st_mtime_ns,
        state.st_dev,
        state.st_ino,
        state.st_ctime_ns,
    )
    name = digest_of([":".join(map(str, same))])
    note = cache_folder("sha256", name[:2]) / name  # folders stay small
    with contextlib.suppress(OSError, ValueError):
        if twice := re.fullmatch(r"([0-9a-f]{64})\1", contents(note).decode()):
            return twice[1]
    with path.open("rb") as file:
        found = digest_of(iter(lambda: file.read(1 << 22), b""))
    write_cached(note, found * 2)  # so that a damaged note is none
    return found
