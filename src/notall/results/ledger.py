"""One run's records of one kind in a folder: read and checked once, then only added
to.
"""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError

from ..errors import UsageError, shortened
from . import lines
from .provenance import Provenance
from .record import BESIDE, HOMES, Command, HeaderRecord, Record, RecordKey

R = TypeVar("R", bound=Record)
About = Provenance | Record
ProvenanceOf = (
    Provenance | Callable[[R], Provenance] | None
)  # of all records, or of each
RECORDED = ContextVar[tuple[Record, Path] | None](
    "of a folder whose records a run makes again", default=None
)
GO_ON = "choose another folder (--out), or give the same settings to go on with it"
AS_IT_WAS = "give it as it was, or keep what comes of it now as results of your own"


class Ledger(Generic[R]):
    """The records of a kind in `folder`, by their keys, of the run that `about` says;
    `name` is another file.
    """

    def __init__(
        self,
        folder: Path,
        kind: type[R],
        about: ProvenanceOf[R] = None,
        name: str | None = None,
    ) -> None:
        self.path, self._kind = folder / (name or kind.file), kind
        self._held: dict[RecordKey, R] = {}
        self._header: HeaderRecord | None = None  # which is still to be written
        if kind.headed:
            assert isinstance(about, Provenance)
            header = header_of(self.path)
            self._header = (
                None if header else HeaderRecord(of=kind.kind_name, provenance=about)
            )
            check_same(header.provenance if header else about, about, folder)
        for record in read_records(self.path, kind):
            wanted = about(record) if callable(about) else about
            if wanted and record.provenance:
                check_same(record.provenance, wanted, folder)
            elif wanted and not kind.headed:
                problem = (
                    f"{self.path} has a record that does not say where it comes from"
                )
                raise UsageError(
                    f"{problem}; delete its line, or choose another folder"
                )
            self._hold(record)

    def __contains__(self, key: RecordKey) -> bool:
        return key in self._held

    def __getitem__(self, key: RecordKey) -> R:
        return self._held[key]

    def __iter__(self) -> Iterator[R]:
        return iter(self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def missing(self, keys: Iterable[RecordKey]) -> list[RecordKey]:
        """Those of `keys` that nothing is known of, in their order, each once."""
        return [key for key in dict.fromkeys(keys) if key not in self._held]

    def add(self, *records: R) -> None:
        """Write records, all at once; they are on disk when this returns. Raises
        `UsageError` where that fails.
        """
        header = [self._header.line()] if self._header else []
        lines.append(self.path, *header, *(record.line() for record in records))
        self._header = None
        for record in records:
            self._hold(record)

    def renew(self, records: Iterable[R]) -> None:
        """Add those that are new, or tell something else than what is held, wherever
        and whenever that was made.
        """
        dumped = partial(
            Record.model_dump, mode="json", exclude={"provenance": {"where"}}
        )
        self.add(
            *(
                one
                for one in records
                if one.key not in self or dumped(self[one.key]) != dumped(one)
            )
        )

    def _hold(self, record: R) -> None:
        """By key; a record of a kind without a key, of which each is one of its own, by
        its number.
        """
        self._held[record.key if self._kind.key_fields else (len(self._held),)] = record


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a file in their order, of each key the last. Raises `UsageError`
    that names a malformed line.
    """
    found = [*lines.numbered(path)][1 if kind.headed else 0 :]  # the header has no key
    records = [_checked(path, number, text, kind) for number, text in found]
    return (
        list({record.key: record for record in records}.values())
        if kind.key_fields
        else records
    )


def header_of(path: Path) -> HeaderRecord | None:
    """Where all lines of a file come from, as its first one says; None without a
    file.
    """
    first = next(lines.numbered(path), None)
    return _checked(path, *first, HeaderRecord) if first else None


def kind_at(path: Path) -> str | None:
    """The name of the kind of a file's records, as its first line says; None for one
    that is not ours.
    """
    first = next(lines.numbered(path), None)
    if first is None:
        return None
    line = lines.parsed(path, *first)
    kind = str(line.get("of") if line.get("record") == "header" else line.get("record"))
    if kind in HOMES:
        return kind
    if path.name in {file for file, _ in HOMES.values()}:
        problem = (
            f"line {first[0]} of {path}: record: {shortened(kind)} is no kind of ours"
        )
        raise UsageError(f"{problem}; repair or delete that line")
    return None


def as_recorded(about: Provenance) -> Provenance:
    """`about`; raises `UsageError` where records of other settings are to be made
    again.
    """
    if recorded := RECORDED.get():
        check_same(recorded[0], about, recorded[1], AS_IT_WAS)
    return about


def check_same(
    held: About, wanted: About, out: Path, fix: str = GO_ON, found: Container[str] = ()
) -> None:
    """Raise `UsageError` when `out` holds results of other settings, but for those that
    were `found`.
    """
    for name, value in lines.finite(wanted.what).items():
        if name not in found and held.what.get(name) != value:
            problem = (
                f"{out} holds results with {name} {shortened(held.what.get(name))}, not"
                f" {shortened(value)}"
            )
            raise UsageError(f"{problem}; {fix}")


def refuse_foreign(folder: Path, command: Command) -> None:
    """Raise `UsageError` when `folder` holds what another command wrote, or links.

    Without records, also for what is written over.
    """
    is_ours = False
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else ():
        lines.refuse_link(path)
        kind = kind_at(path)
        if kind and command not in (commands := HOMES[kind][1]):
            problem = f"{folder} holds results of notall {commands[0]} ({path.name})"
            raise UsageError(f"{problem}; choose another folder for notall {command}")
        is_ours |= bool(kind)
    for path in (
        ()
        if is_ours
        else (one for name in BESIDE.get(command, ()) for one in folder.glob(name))
    ):
        raise UsageError(
            f"{path} is there, and notall did not write it: choose another folder, or"
            " move it away"
        )


@contextmanager
def working_in(folder: Path | None, command: Command) -> Iterator[None]:
    """Keep `folder`, if any, for this process. Raises `UsageError` as `refuse_foreign`
    and `lines.lock` do.
    """
    if folder:
        refuse_foreign(folder, command)
    with lines.lock(folder) if folder else nullcontext():
        yield


def _checked(path: Path, number: int, text: bytes, kind: type[R]) -> R:
    lines.parsed(path, number, text)  # strictly: pydantic takes the last of two keys
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        problem = (
            f"{shortened('.'.join(map(str, first['loc'])))}: {shortened(first['msg'])}"
        )
        raise UsageError(
            f"line {number} of {path}: {problem}; repair or delete that line"
        ) from None
