"""Results as lines of JSON, append-only: what is written stays, whatever happens next."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import UsageError


class Record(BaseModel):
    """One configuration, measured. `_se`: standard error over sequences; `_low` and `_high`: quartiles.

    What came out as no finite number is None: the error of a single sequence, for example.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Literal["dense", "attention", "mlp", "block"] = Field(description="what is skipped")
    fraction: float = Field(ge=0, le=1, description="share of the layers that was asked for, 0 to 1")
    keep_last: bool = Field(description="whether the last layer is preserved")
    plan: dict[Literal["attention", "mlp"], list[int]] = Field(description="indices of the skipped layers, from 0")

    nll: float | None = Field(description="negative log-likelihood, nats per token")
    nll_se: float | None = Field(description="nats per token")
    delta_nll: float | None = Field(description="nll less the dense model's on the same sequences, nats per token")
    delta_nll_se: float | None = Field(description="of the paired differences, nats per token")
    perplexity: float | None = Field(description="exp(nll)")
    kl: float | None = Field(description="KL(dense || skipped) of the next token, nats per token")
    kl_se: float | None = Field(description="nats per token")
    top1_agreement: float | None = Field(description="share of tokens with the dense model's first choice, 0 to 1")
    top1_agreement_se: float | None = Field(description="0 to 1")
    sequences: int = Field(description="how many sequences the quality was measured on")

    prefill_ms: float = Field(description="milliseconds from the prompt to the first new token, median")
    prefill_ms_low: float = Field(description="milliseconds")
    prefill_ms_high: float = Field(description="milliseconds")
    decode_ms_per_token: float = Field(description="milliseconds a decode step, for the whole batch, median")
    decode_ms_per_token_low: float = Field(description="milliseconds")
    decode_ms_per_token_high: float = Field(description="milliseconds")
    speedup_prefill: float = Field(
        description="dense prefill_ms / this one's, paired by round, median; above 1: faster"
    )
    speedup_prefill_low: float = Field(description="ratio")
    speedup_prefill_high: float = Field(description="ratio")
    speedup_decode: float = Field(description="dense decode_ms_per_token / this one's, likewise")
    speedup_decode_low: float = Field(description="ratio")
    speedup_decode_high: float = Field(description="ratio")
    peak_bytes: int | None = Field(description="most CUDA memory allocated while timing; None without CUDA")

    params: int = Field(description="parameters that are left")
    weight_bytes: int = Field(description="bytes of the weights that are left")
    kv_bytes_per_token: int = Field(description="bytes of KV cache a token of one sequence takes")

    provenance: dict[str, Any] = Field(
        description="model, text, dtype, machine, versions, seed: what to repeat it with"
    )


def append(path: Path, *records: dict[str, Any]) -> None:
    """Add `records` to the file, a line each, on disk when this returns; a torn last line is cut off first.

    Numbers that are not finite become null. Raises `UsageError` when the file can't be written, and leaves it
    as it was. Only one process may append to a file at a time: see `lock`.
    """
    lines = b"".join(json.dumps(finite(record), allow_nan=False).encode() + b"\n" for record in records)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            _write(file, lines)
    except OSError as error:
        raise _cannot_write(path, error) from None


def append_new(path: Path, record: dict[str, Any], names: Sequence[str]) -> None:
    """`append` unless the file holds a record that says the same under `names`. Raises as `append` and `lock` do."""
    wanted = finite({name: record[name] for name in names})
    with lock(path.parent):
        if not any({name: held.get(name) for name in names} == wanted for held in read(path)):
            append(path, record)


def read(path: Path, kind: type[BaseModel] | None = None) -> list[dict[str, Any]]:
    """The records of a file in their order, each checked to be of `kind` if given; [] without a file.

    A torn last line, the most that an interrupted `append` leaves, is dropped with a warning. Raises
    `UsageError` that names the line where another one is malformed or not of `kind`.
    """
    try:
        with open(path, "rb") as file:
            lines = _contents(file).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give another file or folder") from None
    if _parse(lines[-1]) is None and lines.pop():
        warnings.warn(f"the last line of {path} was torn by an interruption and is dropped", stacklevel=2)
    return [_check(path, number, line, kind) for number, line in enumerate(lines, 1) if line.strip()]


def check_same(held: Mapping[str, Any], wanted: Mapping[str, Any], out: Path, ignoring: Sequence[str] = ()) -> None:
    """Raise `UsageError` when `out` holds results of other settings; on another machine they may go on."""
    for name, value in wanted.items():
        if name not in ("machine", *ignoring) and held.get(name) != value:
            raise UsageError(
                f"{out} holds results of another {name} ({held.get(name)}, not {value}); choose another --out, "
                "or give the same settings to go on with it"
            )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep `folder`, made where it is missing, for this process; a killed process leaves no lock behind.

    Raises `UsageError` when another one has it, and when it can't be written.
    """
    held = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise UsageError(f"another run is working in {folder}; wait for it, or choose another folder") from None
    except OSError as error:
        raise _cannot_write(folder, error) from None
    try:
        yield
    finally:
        held.release()


def _contents(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(os.fstat(file.fileno()).st_size)  # bounded: a device such as /dev/full never ends


def _last_line(file: IO[bytes]) -> tuple[int, bytes]:
    """Where the line that no newline ends starts, and what is in it: nothing, unless writing was interrupted."""
    start = os.fstat(file.fileno()).st_size
    tail = b""
    while start and b"\n" not in tail:
        step = min(start, 65536)
        start -= step
        file.seek(start)
        tail = file.read(step) + tail
    newline = tail.rfind(b"\n") + 1
    return start + newline, tail[newline:]


def _write(file: IO[bytes], lines: bytes) -> None:
    end, last = _last_line(file)
    if _parse(last) is not None:  # whole, only its newline is missing
        lines, end = b"\n" + lines, end + len(last)
    elif last:
        file.truncate(end)
    try:
        while lines:
            lines = lines[file.write(lines) :]
        os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            file.truncate(end)
        raise


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none. Part of a record is never one: a torn line shows."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _check(path: Path, number: int, line: bytes, kind: type[BaseModel] | None) -> dict[str, Any]:
    record = _parse(line)
    if record is None:
        raise UsageError(f"line {number} of {path} is no JSON record; repair or delete that line")
    try:
        if kind:
            kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"line {number} of {path}: {field}: {first['msg']}; repair or delete that line") from None
    return record


def finite(value: Any) -> Any:
    """`value` as it is written: JSON has no nan and no infinity, and no tuples."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cannot_write(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot write {path}: {error.strerror}; make room or give access, or choose another folder")
