"""What plans answered to requests: in memory, and in a file as the answers come, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UsageError, shortened
from ..plan import Plan
from ..results.evaluations import AnswersRecord, Said
from ..results.ledger import Ledger

A = TypeVar("A")


class Answers:
    """Answers of `plans`, by number, to requests, by key.

    `origin` says what gave them (model, tokenizer): a file may hold those of several origins and plans, and only what
    fits is used. Raises `UsageError` when the file can't be read or written, or is damaged before its last line.
    """

    def __init__(self, folder: Path | None, origin: str, plans: Sequence[Plan]) -> None:
        self.origin = origin
        self.names = [_digest(*plan.identity) for plan in plans]
        self.distinct = [number for number, name in enumerate(self.names) if name not in self.names[:number]]
        self._known: dict[tuple[str, str], Said] = {}  # by request and plan
        self._ledger = Ledger(folder, AnswersRecord) if folder else None
        for record in self._ledger or ():
            self._note(record.plans, record.answers)

    def key(self, *request: Any) -> str:
        """A request's name, the same in every run."""
        return _digest(self.origin, *request)

    def get(self, key: str, number: int, form: type[A]) -> A:
        """Raises `UsageError` where the file has something of another form."""
        answer = self._known[key, self.names[number]]
        if not isinstance(answer, form):
            where = self._ledger.path if self._ledger is not None else "what was answered"
            raise UsageError(
                f"{where} has {shortened(repr(answer))} where an answer should be; delete the file, and ask again"
            )
        return answer

    def has(self, key: str, number: int) -> bool:
        return (key, self.names[number]) in self._known

    def lacking(self, keys: Iterable[str]) -> dict[tuple[int, ...], list[str]]:
        """The distinct keys whose answers are not all there, by the plans that lack them: of equal ones, the first."""
        found: dict[tuple[int, ...], list[str]] = {}
        for key in dict.fromkeys(keys):
            numbers = tuple(number for number in self.distinct if not self.has(key, number))
            if numbers:
                found.setdefault(numbers, []).append(key)
        return found

    def add(self, numbers: Sequence[int], answers: Mapping[str, Sequence[Said]]) -> None:
        """Keep, by key, the answers of the plans `numbers`; they are in the file when this returns."""
        names = tuple(self.names[number] for number in numbers)
        if self._ledger is not None:
            self._ledger.add(AnswersRecord(plans=names, answers={key: tuple(said) for key, said in answers.items()}))
        self._note(names, answers)

    def _note(self, names: Sequence[str], answers: Mapping[str, Sequence[Said]]) -> None:
        for key, values in answers.items():
            self._known |= {(key, name): said for name, said in zip(names, values)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]
