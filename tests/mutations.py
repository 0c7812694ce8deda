"""Seeded damage to files: bytes, lines, values of JSON, and headers of safetensors and
GGUF.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

DEEP = 5_000
# What JSON may hold where something else belongs, as text: some of it is what no JSON
# writer writes.
WRONG = (
    *("null", "true", "false", '""', '"x"', '"0"', '"1.5"', "[]", "{}", "[[]]", "[null]", '[""]', '{"": 1}'),
    *("0", "-0.0", "1", "-1", "0.5", "-2.5", "3.0", "1e-320", "1e308", "-1e308", "1e999", "-1e999", "NaN", "-Infinity"),
    *("40000000", str(2**31), str(2**63), str(-(2**63)), str(2**64), str(10**30), str(10**400), "1" + "0" * 5_000),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP),
    *('"' + "x" * 100_000 + '"', '"\\ud800"', '"\\u0000"', '"\\u001b[31m[red]\\u202e"', '"../../etc/passwd"', '"²"'),
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-8-sig", "utf-32", "utf-7", "cp037")


# --- bytes


def cut(draw: Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def flip(draw: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8)) if changed else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def overwrite(draw: Random, content: bytes) -> bytes:
    """A few bytes in a row by what is no text, or by what often stands for something
    else.
    """
    start = draw.randrange(len(content) + 1)
    piece = draw.choice(
        (
            b"\0",
            b"\0" * 64,
            b"\xff",
            b"\xff" * 8,
            b"\n",
            b"\r",
            b'"',
            b"{",
            b"]",
            b"\xc3",
            b" " * 70_000,
        )
    )
    return content[:start] + piece + content[start + draw.choice((0, len(piece))) :]


def leave_out(draw: Random, content: bytes) -> bytes:
    start = draw.randrange(len(content) + 1)
    return content[:start] + content[start + draw.choice((1, 2, 16, 256)) :]


def become(draw: Random, content: bytes) -> bytes:
    """Something else altogether."""
    return draw.choice(
        (
            b"",
            b"\n",
            b" \n\t\n",
            b"null\n",
            b"[]\n",
            b"{}\n",
            b"\0" * 4096,
            b"GGUF",
            b"PK\x03\x04",
            content * 2,
        )
    )


def encode(draw: Random, content: bytes) -> bytes:
    return content.decode("utf-8", "replace").encode(draw.choice(ENCODINGS), "replace")


BYTES: tuple[Mutation, ...] = (cut, flip, flip, overwrite, leave_out, become, encode)


# --- lines


def of_lines(draw: Random, content: bytes) -> bytes:
    """Lines missing, doubled, in another order, blank, or run together."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return b"\n"
    here, there = draw.randrange(len(lines)), draw.randrange(len(lines))
    what = draw.randrange(6)
    if what == 0:
        del lines[here]
    elif what == 1:
        lines.insert(there, lines[here])
    elif what == 2:
        lines[here], lines[there] = lines[there], lines[here]
    elif what == 3:
        lines.insert(
            there,
            draw.choice(
                (
                    b"\n",
                    b"{}\n",
                    b"[]\n",
                    b"null\n",
                    b"#\n",
                    b"\xff\n",
                    b'{"record": "sweep"}\n',
                )
            ),
        )
    elif what == 4:
        lines[here] = lines[here].rstrip(b"\r\n")
    else:
        lines[here] = lines[here][
            : draw.randrange(len(lines[here]))
        ] + b"\n" * draw.randrange(2)
    return b"".join(lines)


# --- JSON

Place = tuple[Any, Any]  # a dict or list, and a key or index of it


def places(value: Any) -> Iterator[Place]:
    for key in (
        value
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        yield from places(value[key])


def of_json(draw: Random, content: bytes) -> bytes:
    """One place of a document: another value, none, one more, its key twice, or changed
    places with another.
    """
    document = json.loads(content)
    found = list(places(document))
    if not found:
        return draw.choice(WRONG).encode()
    holder, key = draw.choice(found)
    raw: list[str] = []

    def marked(text: str) -> str:
        raw.append(text)
        return f"\x00{len(raw) - 1}\x00"

    what = draw.randrange(10)
    if what < 5:
        holder[key] = marked(draw.choice(WRONG))
    elif what == 5:
        del holder[key]
    elif what == 6 and isinstance(holder, dict):
        other = holder[draw.choice(list(holder))]
        holder[key] = marked(
            f"{json.dumps(holder[key])}, {json.dumps(key)}: {json.dumps(other)}"
        )
    elif what == 7:
        if isinstance(holder, dict):
            holder[draw.choice(("", "x", "record", "plan", "__class__", key + "_"))] = (
                marked(draw.choice(WRONG))
            )
        else:
            holder.insert(key, marked(draw.choice(WRONG)))
    elif what == 8 and isinstance(holder, dict):
        other = draw.choice((key.upper(), key + " ", key[:-1], *holder))
        holder[other] = holder.pop(key)
    else:
        other_holder, other = draw.choice(found)
        first, second = json.dumps(holder[key]), json.dumps(other_holder[other])
        holder[key] = marked(second)
        if isinstance(other_holder, dict) or other < len(other_holder):
            other_holder[other] = marked(first)
    text = json.dumps(document)
    for number, piece in reversed(list(enumerate(raw))):
        text = text.replace(f'"\\u0000{number}\\u0000"', piece)
    return text.encode()


def of_json_lines(draw: Random, content: bytes) -> bytes:
    """`of_json` in one line, or, as a common cause would have it, in the same place of
    each line.
    """
    lines = content.splitlines()
    if not lines:
        return b"null\n"
    if draw.random() < 0.2:
        seed = draw.random()
        return b"".join(of_json(Random(seed), line) + b"\n" for line in lines)
    here = draw.choice((0, len(lines) - 1, draw.randrange(len(lines))))
    lines[here] = of_json(draw, lines[here])
    return b"\n".join(lines) + b"\n"


def damaged_json(draw: Random, content: bytes) -> bytes:
    return draw.choice((*BYTES, of_lines, *[of_json] * 12))(draw, content)


def damaged_lines(draw: Random, content: bytes) -> bytes:
    return draw.choice((*BYTES, *[of_lines] * 4, *[of_json_lines] * 14))(draw, content)


def damaged_text(draw: Random, content: bytes) -> bytes:
    return draw.choice((*BYTES, of_lines, of_lines))(draw, content)


# --- headers of weights


def damaged_safetensors(draw: Random, content: bytes) -> bytes:
    """The header as JSON, its length, or bytes of the file, most of them in the
    header.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    what = draw.randrange(8)
    if what < 4:
        header = of_json(draw, header)
        return struct.pack("<Q", len(header)) + header + data
    if what == 4:
        wrong = draw.choice(
            (0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1)
        )
        return struct.pack("<Q", wrong) + content[8:]
    if what == 5:
        header = draw.choice(BYTES)(draw, header)
        return struct.pack("<Q", len(header)) + header + data
    return draw.choice((cut, flip, leave_out, become))(draw, content)


def damaged_gguf(draw: Random, content: bytes) -> bytes:
    """Bytes of the header, whole numbers in it, its texts, and the file's end."""
    end = min(len(content), draw.choice((64, 1024, 8192)))
    head, rest = content[:end], content[end:]
    what = draw.randrange(6)
    if what < 2:
        return flip(draw, head) + rest
    if what < 4:
        changed, start = bytearray(content), draw.randrange(end - 8)
        form, wrong = draw.choice(
            (
                ("<I", 0),
                ("<I", 1),
                ("<I", 2**31),
                ("<I", 2**32 - 1),
                ("<Q", 2**40),
                ("<Q", 2**64 - 1),
            )
        )
        struct.pack_into(form, changed, start, wrong)
        return bytes(changed)
    if what == 4:
        return draw.choice((leave_out, overwrite))(draw, head) + rest
    return draw.choice((cut, flip, become))(draw, content)
