"""Safetensors files, read and written as bytes: a tensor is a range of a file, and copying it takes no memory.

The format (https://github.com/huggingface/safetensors) is eight bytes of header length, a JSON header of names, dtypes,
shapes and ranges, and the data. Whatever the dtype, the bytes are carried over as they are.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from ..errors import UsageError, shortened
from ..models.folders import INDEX
from ..progress import Progress, silent
from ..records.strict_json import read_json

CHUNK = 1 << 22  # bytes held in memory at a time
LARGEST_HEADER = 100 << 20  # what the safetensors library accepts
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensor(Protocol):
    """A tensor to write: its kind, its shape, its size in bytes, and its bytes, a chunk at a time."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    def chunks(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in a safetensors file, `size` bytes from `start` on."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def chunks(self, most: int = CHUNK) -> Iterator[bytes]:
        with open(self.file, "rb") as source:
            source.seek(self.start)
            left = self.size
            while left:
                chunk = source.read(min(most, left))
                if not chunk:
                    raise UsageError(f"{self.file.name} ends before its tensors do; download the file again")
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that no file holds, such as a bias of zeros."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True)
class LiveTensor:
    """A tensor in memory, on the CPU, in place of a stored one."""

    dtype: str
    shape: tuple[int, ...]
    values: torch.Tensor

    @property
    def size(self) -> int:
        return self.values.numel() * self.values.element_size()

    def chunks(self, most: int = CHUNK) -> Iterator[bytes]:
        flat = self.values.contiguous().flatten().view(torch.uint8)
        yield from (part.numpy().tobytes() for part in flat.split(most))


@dataclass(frozen=True)
class CastTensor:
    """A tensor of floats in another dtype than its `source`."""

    dtype: str
    source: StoredTensor | LiveTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8

    def chunks(self, most: int = CHUNK) -> Iterator[bytes]:
        before, after = FLOATS[self.source.dtype], FLOATS[self.dtype]
        for chunk in self.source.chunks(max(1, most // after.itemsize) * before.itemsize):
            values = torch.frombuffer(bytearray(chunk), dtype=before).to(after)
            yield values.view(torch.uint8).numpy().tobytes()


Source = StoredTensor | LiveTensor | CastTensor  # of the model that is exported


def read_header(path: Path) -> dict[str, Source]:
    """The tensors of one safetensors file, by name. Raises `UsageError` when the file is truncated or damaged."""
    size = path.stat().st_size
    header, _, data = _header(path)
    tensors = {name: _entry(path, name, entry, data, size) for name, entry in header.items()}
    position = data
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != position:
            raise _damaged(path, "its tensors overlap, or leave gaps")
        position += tensor.size
    if position != size:
        raise _damaged(path, "it goes on behind its tensors")
    try:
        with safe_open(path, framework="pt"):
            pass  # what transformers reads it with may be stricter
    except SafetensorError:
        raise _damaged(path, "the safetensors library cannot open it") from None
    return dict(tensors)


def read_notes(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors. Raises as `read_header` does."""
    return _header(path)[1]


def _header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries of the tensors, what is said beside them, and where the data begins."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise _damaged(path, "its header is cut off")
        try:
            header = read_json(file.read(length))
        except ValueError:
            raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no table")
    told = header.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(word, str) for word in told.values()):
        raise _damaged(path, "its metadata is no table of texts")
    return header, told, 8 + length


def _entry(path: Path, name: str, entry: Any, data: int, end: int) -> StoredTensor:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, first, last))
        fits = whole and (last - first) * 8 == math.prod(shape) * BITS[dtype]
    except (TypeError, KeyError, ValueError):
        raise _damaged(path, f"its entry for {shortened(name)} is malformed") from None
    if not fits:
        raise _damaged(path, f"the size of {shortened(name)} is not that of its shape")
    if data + last > end:
        raise _damaged(path, f"it ends before {shortened(name)} does")
    return StoredTensor(dtype, shape, path, data + first, last - first)


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path.name} is no whole safetensors file: {reason}; download the file again")


def write_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    wrote: Callable[[int], None] = lambda size: None,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write one safetensors file, a chunk at a time; `wrote` is told the bytes of each, `notes` go into its header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **notes}}
    position = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for chunk in tensor.chunks():
                file.write(chunk)
                wrote(len(chunk))


def write_shards(
    folder: Path,
    tensors: Mapping[str, Tensor],
    shard_bytes: int,
    progress: Progress = silent,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a checkpoint as transformers does: `model.safetensors`, or shards of about `shard_bytes` and an index.

    `notes` go into the header of each file.
    """
    total, done = total_bytes(tensors), 0

    def wrote(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total, "copying weights")

    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names}, wrote, notes)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.size for tensor in tensors.values())
