"""Whether a GGUF file is as long as its header says. Readers believe its counts, and run for hours on a wrong one."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # by their types
STRING, ARRAY = 8, 9
LONGEST, DEEPEST = 1 << 22, 4  # entries of a list, lists in lists: a vocabulary has a quarter of a million words


def check_gguf(path: Path) -> None:
    """Raise `UsageError` where the header counts more than the file holds. Files of another format pass."""
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Walk(data).header()
            except EOFError as error:
                raise UsageError(f"{path.name} is no whole GGUF file: {error}; download it again") from None


def check_counts(fields: Mapping[str, float], tensors: int, longest: int) -> None:
    """Raise `EOFError` where more layers or experts are counted than the file can hold: readers build each of them.

    `fields` are the single numbers of the header, and `longest` is the greatest dimension of its `tensors`.
    """
    for ending, what, most in ((".block_count", "layers", tensors), (".expert_count", "experts", longest)):
        count = max((value for name, value in fields.items() if name.endswith(ending)), default=0)
        if count > most:
            raise EOFError(f"its header counts {count:.0f} {what}, and its tensors have room for {most}")


class _Walk:
    """A way through a header, which ends in `EOFError` at the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, 4
        is_little = len(data) < 8 or struct.unpack_from("<I", data, 4)[0] & 0xFFFF
        self.order = "<" if is_little else ">"

    def header(self) -> None:
        if self.number("I") not in (2, 3):
            return  # readers refuse other versions
        tensors, fields = self.number("Q"), self.number("Q")
        numbers: dict[str, float] = {}
        for _ in range(fields):
            size = self.number("Q")
            start = self.take(size)
            value = self.value(self.number("I"))
            if value is not None:
                numbers[self.data[start : start + size].decode(errors="replace")] = value
        longest = 0
        for _ in range(tensors):
            self.take(self.number("Q"))
            for _ in range(self.number("I")):
                longest = max(longest, self.number("Q"))
            self.take(4 + 8)
        if numbers.get("split.count", 1) == 1:  # a part of several may hold no tensors at all
            check_counts(numbers, tensors, longest)

    def value(self, kind: int, depth: int = 0) -> float | None:
        """The next value, where it is a number."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            self.take(self.number("Q"))
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if count > LONGEST:
                raise EOFError(f"a list of {count} entries")
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise EOFError("a value of no known type")
        return None

    def number(self, form: str) -> Any:
        return struct.unpack_from(self.order + form, self.data, self.take(struct.calcsize(form)))[0]

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.data) - self.position:
            raise EOFError("it ends within its header")
        self.position += size
        return self.position - size
