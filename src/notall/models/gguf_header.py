"""Whether a GGUF file is as long as its header says. Readers believe its counts, and run for hours on a wrong one."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from ..errors import UsageError

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its type
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
        for _ in range(fields):
            self.take(self.number("Q"))
            self.value(self.number("I"))
        for _ in range(tensors):
            self.take(self.number("Q"))
            self.take(8 * self.number("I"))
            self.take(4 + 8)

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in SIZES:
            self.take(SIZES[kind])
        elif kind == STRING:
            self.take(self.number("Q"))
        elif kind == ARRAY and depth < DEEPEST:
            inner, count = self.number("I"), self.number("Q")
            if count > LONGEST:
                raise EOFError(f"a list of {count} entries")
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise EOFError("a value of no known type")

    def number(self, form: str) -> int:
        return int(struct.unpack_from(self.order + form, self.data, self.take(struct.calcsize(form)))[0])

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.data) - self.position:
            raise EOFError("it ends within its header")
        self.position += size
        return self.position - size
