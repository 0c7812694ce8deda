"""What a results folder holds, whichever command wrote it: records by their kind."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TypeVar

from ..errors import UsageError
from ..inputs import Settings
from ..plan import Fingerprint
from ..results import lines
from ..results.ledger import header_of, kind_at, read, refuse_foreign
from ..results.provenance import Provenance
from ..results.record import KINDS, Command, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Folder:
    """`files` are those of our kinds; `foreign` those that no command of ours wrote, their lines as they are."""

    path: Path
    files: dict[str, tuple[Record, ...]]  # by the kind of their records
    foreign: dict[str, tuple[Settings, ...]]  # by the name of the file, without suffix

    def of(self, kind: type[R]) -> tuple[R, ...]:
        """The records of a kind, each with its provenance; none where there is no such file."""
        return tuple(record for record in self.files.get(kind.kind_name, ()) if isinstance(record, kind))

    def __contains__(self, kind: type[Record]) -> bool:
        return bool(self.files.get(kind.kind_name))

    @cached_property
    def provenance(self) -> Provenance:
        return next(self._provenances(), Provenance(what={}))

    @property
    def model(self) -> str:
        return str(self.provenance.what.get("model", "the model"))

    @cached_property
    def layers(self) -> int:
        """How many the model has; 0 where its shape is nowhere told."""
        shapes = (Fingerprint.parse(about.what.get("fingerprint")) for about in self._provenances())
        return next((shape.layers for shape in shapes if shape), 0)

    @property
    def command(self) -> list[str]:
        """The words of the command that it is of; [] where that is not known."""
        try:
            return shlex.split(str(self.provenance.where.get("command", "")))
        except ValueError:
            return []

    @property
    def plan_options(self) -> list[str]:
        words = self.command
        pairs = [words[at : at + 2] for at, word in enumerate(words[:-1]) if word in ("--skip", "--plan")]
        kept = ["--keep-last"] if "--keep-last" in words else []
        return [word for pair in pairs for word in pair] + kept or ["--plan", "plan.json"]

    def _provenances(self) -> Iterator[Provenance]:
        for records in self.files.values():
            yield from (record.provenance for record in records if record.provenance)


def know_every_kind() -> None:
    """Import what no command has asked for yet: a kind of records is known once its module is imported."""
    for one in iter_modules([str(Path(__file__).parent)]):
        import_module(f".{one.name}", __package__)


def check_folder(folder: Path | None, command: Command) -> None:
    """Raise `UsageError` where `command` could not write to `folder`: another's results are there, or it may not."""
    if folder is None:
        return
    lines.refuse_unwritable(folder)
    refuse_foreign(folder, command)


def read_folder(path: Path) -> Folder:
    """Read what is there. Raises `UsageError` where nothing is, or a line is malformed."""
    if path.is_file():
        raise UsageError(f"{path} is a file: give the folder that it lies in")
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}; make one with notall sweep --out {path}")
    know_every_kind()
    files, foreign = dict[str, tuple[Record, ...]](), dict[str, tuple[Settings, ...]]()
    for file in sorted(path.glob("*.jsonl")):
        if name := kind_at(file):
            kind = KINDS[name]
            header = header_of(file) if kind.headed else None
            update = {"provenance": header.provenance} if header else {}
            files[name] = tuple(one.model_copy(update=update) for one in read(file, kind))
        elif rows := tuple(lines.read(file)):
            foreign[file.stem] = rows
    if not any(files.values()) and not foreign:
        inside = next((child for child in sorted(path.iterdir()) if any(child.glob("*.jsonl"))), None)
        advice = f"{inside} does" if inside else f"make some with notall sweep --out {path}, or let a run end"
        raise UsageError(f"{path} holds no results; {advice}")
    return Folder(path, files, foreign)
