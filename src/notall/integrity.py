"""Whether what was written is what is read: JSON that ends with its own digest, and the
digests of a folder's files.

A folder that is written at once has a manifest, written last. Lines that are added one
by one have a digest each.
"""

import json
import math
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path

from .digests import digest_of, digest_of_file
from .errors import UsageError, shortened
from .files import contents, own_file, write_whole
from .strict_json import Settings, read_json

MANIFEST = "notall.json"  # of a checkpoint
REDONE = f"export it anew, or delete {MANIFEST} to take it as it is"
# A card that people go on writing, and code that notall never reads.
UNLISTED = (".md", ".py")
# What may be added, too, as may names with a dot in front.
NOT_HASHED = ("__pycache__", "LICENSE", "NOTICE")
SEALED = b', "sealed": "'  # the last field of a table, which no text in it can hold
# Bytes that are read sooner than it is found out whether they were changed.
SMALL_FILE_BYTES = 1 << 20


def sealed(table: bytes) -> bytes:
    """The JSON of a table that is not empty, with the digest of all else as its last
    field.
    """
    rest = table.rstrip()[:-1].rstrip()
    return rest + SEALED + digest_of([rest])[:16].encode() + b'"}'


def unsealed(table: bytes) -> bytes | None:
    """What was `sealed`, or a table that never was; None for another than was
    written.
    """
    rest, found, _ = table.rpartition(SEALED)
    if not found:
        return table
    return rest + b"}" if sealed(rest + b"}") == table.rstrip() else None


def check_files(
    folder: Path, files: Mapping[str, str], fix: str, most: float = math.inf
) -> None:
    """Raise `UsageError`, with `fix`, where a file of these SHA-256 is missing, or is
    not what was written.
    """
    for name, digest in files.items():
        if (file := own_file(folder, name)) is None:
            raise UsageError(f"{shortened(folder)} lacks {shortened(name)}: {fix}")
        if file.stat().st_size > most:
            continue
        if file.stat().st_size < SMALL_FILE_BYTES:
            found = digest_of([file.read_bytes()])
        else:
            found = digest_of_file(file)
        if found != digest:
            raise UsageError(
                f"{name} of {shortened(folder)} is damaged (it is not what was"
                f" written): {fix}"
            )


def write_manifest(folder: Path, manifest: Settings) -> None:
    """Write down what a finished `folder` holds: the fields of `manifest`, and the
    digests of its files.
    """
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in UNLISTED
    )
    files = {name: digest_of_file(folder / name) for name in names}
    write_whole(
        folder / MANIFEST,
        sealed(json.dumps({**manifest, "files": files}, indent=2).encode()) + b"\n",
    )


def read_manifest(folder: Path, fix: str = REDONE) -> Settings:
    """What a folder says of itself. Raises `UsageError`, with `fix`, where that is
    damaged.
    """
    with suppress(ValueError, OSError):
        table = unsealed(contents(folder / MANIFEST))
        manifest = read_json(table) if table else None
        if isinstance(manifest, dict) and _are_digests(manifest.get("files")):
            return manifest
    raise UsageError(f"{MANIFEST} of {shortened(folder)} is damaged: {fix}")


def _are_digests(files: object) -> bool:
    return isinstance(files, dict) and all(isinstance(d, str) for d in files.values())


def check_manifest(
    folder: Path,
    fix: str = REDONE,
    *,
    most: float = math.inf,
    strict: bool = True,
) -> Settings:
    """As `read_manifest`, and for a folder that is not as its manifest says; {} without
    one.

    Of files of more than `most` bytes it is only seen that they are there. Files that
    are not listed are refused, as by `refuse_unlisted`, unless `strict` is false.
    """
    if not own_file(folder, MANIFEST):
        return {}
    manifest = read_manifest(folder, fix)
    check_files(folder, manifest["files"], fix, most)
    if strict:
        refuse_unlisted(folder, manifest["files"])
    return manifest


def refuse_unlisted(folder: Path, files: Container[str]) -> None:
    """Raise `UsageError` where a folder holds what its manifest does not list.

    transformers reads whatever has one of its names. What nothing reads may be there.
    """
    for path in sorted(folder.iterdir()):
        name = path.name
        is_unread = (
            path.suffix in UNLISTED or name in NOT_HASHED or name.startswith(".")
        )
        if not is_unread and name not in files and name != MANIFEST:
            raise UsageError(
                f"{shortened(folder)} holds {shortened(name)}, which {MANIFEST} does"
                f" not list: move that file away, or delete {MANIFEST} to take the"
                " folder as it is"
            )
