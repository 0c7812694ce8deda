"""Tensors in files: written whole or not at all, and read back only as they were written. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..digests import digest_of, digest_of_json
from ..errors import UsageError, shortened
from ..files import open_to_others

DIGEST = "sha256"  # of the tensors, in the metadata of their file

Tensors = dict[str, Tensor]
Notes = dict[str, str]
Kept = tuple[Tensors, Notes]


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes."""
    named = sorted(tensors.items())
    return digest_of(part for name, one in named for part in (f"{name} {one.dtype} {[*one.shape]}\n", one))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> str:
    """Write a file, in place of one that is there; its `digest_of_tensors`. Raises `UsageError` where that fails."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest, part = digest_of_tensors(held), path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(held, part, {**(notes or {}), DIGEST: digest})
        open_to_others(part)  # safetensors makes files that only their owner can read
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or shortened(str(error).rpartition("I/O error: ")[2])
        raise UsageError(
            f"cannot write {shortened(path)}: {reason}; make room or give access, or choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            part.unlink()
    return digest


def read_tensors(path: Path, digest: str | None = None, *, fix: str = "delete it, and run again") -> Kept:
    """The tensors of a file, and its notes.

    Raises `UsageError`, which ends in `fix`, for others than were written, or than those of `digest`.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            notes: Notes = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{shortened(path)} is damaged ({shortened(error)}): {fix}") from None
    found = digest_of_tensors(tensors)
    if found != notes.pop(DIGEST, None):
        raise UsageError(f"{shortened(path)} is damaged (its tensors are not those that were written): {fix}")
    if digest not in (None, found):
        raise UsageError(f"{shortened(path)} is not the file that was written here: {fix}")
    return tensors, notes


def kept_tensors(folder: Path, name: str, key: object, make: Callable[[], Kept]) -> Kept:
    """What `make` returns, from `folder` where it is kept under this name and key, which JSON can write."""
    path = folder / f"{name}-{digest_of_json(key)[:16]}.safetensors"
    if not path.is_file():
        write_tensors(path, *make())
    return read_tensors(path)
