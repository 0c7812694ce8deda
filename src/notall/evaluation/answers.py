"""Answers of plans to requests, kept in a file that an interrupted run goes on from."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..digests import digest_of_json
from ..errors import UsageError, shortened
from ..plan import Plan
from ..results.ledger import Ledger
from ..results.repairs import AnswersRecord, Said

A = TypeVar("A")


class Answers:
    """Answers of `plans`, by number, to requests, by key; a file of them may hold other
    origins' and plans' too.
    """

    def __init__(self, folder: Path | None, origin: str, plans: Sequence[Plan]) -> None:
        self.origin = origin
        self.names = [digest_of_json(plan.identity)[:24] for plan in plans]
        self.distinct = [
            number
            for number, name in enumerate(self.names)
            if name not in self.names[:number]
        ]
        self._known: dict[tuple[str, str], Said] = {}  # by request and plan
        # absolute, since tasks of the harness run in another working folder
        self._ledger = Ledger(folder.absolute(), AnswersRecord) if folder else None
        for record in self._ledger or ():
            self._note(record.plans, record.answers)

    def key(self, *request: object) -> str:
        """The key of a request: of what it asks, and of whom."""
        return digest_of_json([self.origin, *request])[:24]

    def get(self, key: str, number: int, form: type[A]) -> A:
        """Raises `UsageError` where the file has something of another form."""
        answer = self._known[key, self.names[number]]
        if not isinstance(answer, form):
            where = (
                self._ledger.path if self._ledger is not None else "what was answered"
            )
            problem = f"{where} has {shortened(repr(answer))} where an answer should be"
            raise UsageError(f"{problem}; delete the file, and ask again")
        return answer

    def place(self, number: int) -> int:
        """Of a plan among those that differ, from 1; of equal ones that of the
        first.
        """
        return 1 + self.distinct.index(self.names.index(self.names[number]))

    def has(self, key: str, number: int) -> bool:
        """Whether the plan `number` has answered the request of `key`."""
        return (key, self.names[number]) in self._known

    def lacking(self, keys: Iterable[str]) -> dict[tuple[int, ...], list[str]]:
        """The distinct keys whose answers are not all there, by the plans that lack
        them: of equal ones, the first.
        """
        found: dict[tuple[int, ...], list[str]] = {}
        for key in dict.fromkeys(keys):
            if numbers := tuple(
                number for number in self.distinct if not self.has(key, number)
            ):
                found.setdefault(numbers, []).append(key)
        return found

    def add(
        self, numbers: Sequence[int], answers: Mapping[str, Sequence[Said]]
    ) -> None:
        """Keep, by key, the answers of the plans `numbers`; they are in the file when
        this returns.
        """
        names = tuple(self.names[number] for number in numbers)
        if self._ledger is not None:
            self._ledger.add(
                AnswersRecord(
                    plans=names,
                    answers={key: tuple(given) for key, given in answers.items()},
                )
            )
        self._note(names, answers)

    def _note(
        self, names: Sequence[str], answers: Mapping[str, Sequence[Said]]
    ) -> None:
        for key, values in answers.items():
            self._known |= {(key, name): given for name, given in zip(names, values)}
