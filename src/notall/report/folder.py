"""A results folder, whichever command wrote it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ..errors import UsageError, shortened
from ..plan import Fingerprint
from ..results.ledger import header_of, kind_at, read_records
from ..results.provenance import Provenance
from ..results.record import RECORD_KINDS, Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Folder:
    """A results folder: the records that commands of notall wrote."""

    path: Path
    files: dict[str, tuple[Record, ...]]  # by their kind

    def of(self, kind: type[R]) -> tuple[R, ...]:
        """The records of a kind, each with its provenance; none where there is no such
        file.
        """
        return tuple(
            record
            for record in self.files.get(kind.kind_name, ())
            if isinstance(record, kind)
        )

    def __contains__(self, kind: type[Record]) -> bool:
        return bool(self.files.get(kind.kind_name))

    @cached_property
    def provenance(self) -> Provenance:
        """That of the first record that has one."""
        return next(self._provenances(), Provenance(what={}))

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.provenance.what.get("model", "the model"))

    @cached_property
    def layers(self) -> int:
        """How many the model has; 0 where no record has its shape."""
        shapes = (
            Fingerprint.parse(about.what.get("fingerprint"))
            for about in self._provenances()
        )
        return next((shape.layers for shape in shapes if shape), 0)

    @property
    def plan_options(self) -> list[str]:
        """The options that name the plan of the folder's command, for the next one."""
        words = self.provenance.command
        options = [*_valued(words, "--skip", "--plan")]
        options += _valued(words, "--phase", "--last-tokens")
        if "--keep-last" in words:
            options.append("--keep-last")
        return options or ["--plan", "plan.json"]

    def _provenances(self) -> Iterator[Provenance]:
        for records in self.files.values():
            yield from (record.provenance for record in records if record.provenance)


def _valued(words: Sequence[str], *names: str) -> Iterator[str]:
    """The options of these names with their values, as they stand in a command."""
    for option, value in zip(words, words[1:]):
        if option in names:
            yield from (option, value)


def read_folder(path: Path) -> Folder:
    """Read what is there. Raises `UsageError` where nothing is, a line is malformed, or
    models are mixed.
    """
    if path.is_file():
        raise UsageError(f"{path} is a file: give the folder that it lies in")
    if not path.is_dir():
        raise UsageError(
            f"there is no folder {path}; make one with notall sweep --out {path}"
        )
    files = dict[str, tuple[Record, ...]]()
    for file in sorted(path.glob("*.jsonl")):
        if name := kind_at(file):
            kind = RECORD_KINDS[name]
            header = header_of(file) if kind.headed else None
            update = {"provenance": header.provenance} if header else {}
            records = read_records(file, kind)
            files[name] = tuple(one.model_copy(update=update) for one in records)
    if not any(files.values()):
        raise UsageError(f"{path} holds no results; {_advice(path)}")
    _check_one_model(path, files)
    return Folder(path, files)


def _advice(path: Path) -> str:
    """Where results are, if in a folder of this one, or else how to make some."""
    for child in sorted(path.iterdir()):
        if any(child.glob("*.jsonl")):
            return f"{child} does"
    return f"make some with notall sweep --out {path}, or let a run end"


def _check_one_model(path: Path, files: Mapping[str, Sequence[Record]]) -> None:
    """Raise `UsageError` where records are of several models, by their revisions."""
    models: dict[str, str] = {}
    for name, records in files.items():
        about = records[0].provenance if records else None
        if about and "revision" in about.what:
            revision = str(about.what["revision"])
            model = shortened(str(about.what.get("model")))
            models[revision] = (
                f"{RECORD_KINDS[name].file} is of {model}, {revision[:9]}"
            )
    if len(models) > 1:
        raise UsageError(
            f"{path} holds results of several models ({'; '.join(models.values())}):"
            " move the others elsewhere"
        )
