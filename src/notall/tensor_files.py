"""Files of tensors: safetensors that hold the digest of their tensors, and are written
whole or not at all.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .digests import digest_of, digest_of_json
from .errors import UsageError, shortened
from .files import open_to_others, saving, take_name, temporary, writing

AGAIN = "delete it, and run again"
# In the metadata of a file: the digest of its tensors, and of what they were made of.
DIGEST = "sha256"
OF = "of"

Tensors = dict[str, Tensor]
Notes = dict[str, str]  # in the headers of files
TensorsAndNotes = tuple[Tensors, Notes]


def digest_of_tensors(tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> str:
    """The SHA-256 of names, dtypes, shapes and bytes, and of what is noted with
    them.
    """

    def parts() -> Iterator[str | Tensor]:
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tensor.dtype} {[*tensor.shape]}\n"
            yield tensor
        for name, note in sorted(notes.items()):
            yield f"{name}: {note}\n"

    return digest_of(parts())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None
) -> str:
    """Write a file, in place of an earlier one; its `digest_of_tensors`.

    Raises `UsageError` where that fails, and for a file of others, who use such names,
    too.
    """
    refuse_replacing(path)
    held = {
        name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()
    }
    digest = digest_of_tensors(held, notes or {})
    with writing(shortened(path), "make room, or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path) as scratch:
            # safetensors has a temporary file beside it, which a killed run leaves.
            scratch.mkdir()
            part = scratch / path.name
            with saving():
                save_file(held, part, {**(notes or {}), DIGEST: digest})
            open_to_others(part)  # safetensors lets only the owner read it
            take_name(part, path)
    return digest


def read_tensors(
    path: Path, digest: str | None = None, *, of: str | None = None, fix: str = AGAIN
) -> TensorsAndNotes:
    """The tensors of a file, and its notes.

    Raises `UsageError`, with `fix`, for a file that is damaged, or has another digest
    than `digest` or was made of other things than `of`, where these are given.
    """
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # it is no mapping
            tensors = {name: file.get_tensor(name) for name in names}
            notes: Notes = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{shortened(path)} is damaged ({shortened(error)}): {fix}"
        ) from None
    if notes.pop(DIGEST, None) != (found := digest_of_tensors(tensors, notes)):
        raise UsageError(
            f"{shortened(path)} is damaged (its tensors are not those that were"
            f" written): {fix}"
        )
    if digest not in (None, found) or of not in (None, notes.get(OF)):
        raise UsageError(
            f"{shortened(path)} is not the file that was written here: {fix}"
        )
    return tensors, notes


def refuse_replacing(path: Path) -> None:
    """Raise `UsageError` where a file or folder of others is in the way; a link is
    replaced.
    """
    if path.exists() and not path.is_symlink() and not is_tensors(path):
        fix = "move it away, or choose another folder"
        raise UsageError(
            f"{shortened(path)} is there, and notall did not write it: {fix}"
        )


def is_tensors(path: Path) -> bool:
    """Whether `write_tensors` wrote a file, as far as its header tells."""
    try:
        with safe_open(path, "pt") as file:
            return DIGEST in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def cached_tensors(
    folder: Path, name: str, key: object, make: Callable[[], TensorsAndNotes]
) -> TensorsAndNotes:
    """What `make` returns, read from `folder` where a file of this name and key is.

    `key` is what the tensors are made of, as JSON can write it.
    """
    of = digest_of_json(key)
    path = folder / f"{name}-{of[:16]}.safetensors"
    if not path.is_file():
        tensors, notes = make()
        write_tensors(path, tensors, {**notes, OF: of})
    return read_tensors(path, of=of)
