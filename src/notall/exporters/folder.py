"""The folder of an export: it appears whole or not at all, and tokenizer, settings and licence go into it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import UsageError, shortened
from ..files import open_to_others, own_file
from ..results.lines import refuse_unwritable
from ..results.table import in_bytes

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "tokenizer.model.v*", "*.tiktoken", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "merges.txt",
    "bpe.codes", "emoji.json", "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
SETTINGS = (
    "chat_template.jinja", "chat_template.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TERMS = ("license*", "licence*", "copying*", "notice*", "use_policy*")  # in any case


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
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UsageError(
            f"the export takes {in_bytes(size)}, and {shortened(existing)} has {in_bytes(free)} left; "
            "free some, or choose another disk"
        )


def companions(folder: Path, *, code: bool) -> list[Path]:
    """The files of a dense model's folder that go along; with `code`, its Python files too.

    Raises `UsageError` where one is a link out of the folder.
    """
    wanted = (*TOKENIZER, *SETTINGS, *(("*.py",) if code else ()))
    names = sorted(path.name for path in folder.iterdir())
    listed = [name for name in names if _is_one_of(name, wanted) or _is_one_of(name.lower(), TERMS)]
    return [path for name in listed if (path := own_file(folder, name))]


def copy_companions(files: Iterable[Path], folder: Path) -> None:
    """Copy files into the folder of an export; what it has written itself stays."""
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
