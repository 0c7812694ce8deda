"""A GGUF file as fields and tensors: read without loading it, written a tensor at a
time. No torch.
"""

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFEndian,
    GGUFReader,
    GGUFValueType,
    GGUFWriter,
    quant_shape_from_byte_shape,
)

from ..errors import UsageError, shortened
from ..plan import several
from ..progress import Progress, silent

BLOCK, ARCHITECTURE = "blk.", "general.architecture"
BLOCK_NUMBER = re.compile(r"blk\.([0-9]{1,9})\.")
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
KV_ONLY = (  # the deepest blocks, of which a prompt's tokens have keys and values alone
    "prefill_kv_only_block_count"
)
# What readers raise over a damaged file.
DAMAGED = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RecursionError,
)
MOST_READS = 1 << 23  # of one header: a vocabulary has a quarter of a million words


@dataclass(frozen=True)
class Field:
    """A value of the header; `kind` is of its elements where it is a list."""

    value: Any
    kind: GGUFValueType

    @classmethod
    def of(cls, value: Any) -> "Field":
        """A count, a text, or a list of counts."""
        return cls(
            value,
            GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32,
        )


@dataclass(frozen=True)
class GGUFTensor:
    """`data` are its bytes, a row a row, or plain numbers; rows of quantised tensors
    are independent of each other.
    """

    data: np.ndarray[Any, Any]
    quantization: GGMLQuantizationType

    @property
    def size(self) -> int:
        """In bytes, as stored."""
        return self.data.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its values, packed or not, as numpy has it: the length of a row last."""
        packed = self.data.dtype == np.uint8
        return (
            tuple(quant_shape_from_byte_shape(self.data.shape, self.quantization))
            if packed
            else self.data.shape
        )


Fields = dict[str, Field]
GGUFTensors = dict[str, GGUFTensor]


@dataclass(frozen=True)
class GGUF:
    """A file as it is mapped into memory."""

    path: Path
    fields: Fields
    tensors: GGUFTensors
    endianness: GGUFEndian

    @property
    def architecture(self) -> str:
        """Such as llama, as llama.cpp names it."""
        return str(self.fields[ARCHITECTURE].value)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return self.count("block_count")

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the architecture, such as `embedding_length`. Raises
        `UsageError` without it or a default.
        """
        field = self.fields.get(f"{self.architecture}.{name}")
        if field is None and default is None:
            raise UsageError(
                f"{self.path.name} lacks {self.architecture}.{name}; convert the model"
                " again"
            )
        return default if field is None else field.value

    def count(self, name: str, default: int | None = None) -> int:
        """A setting that counts something. Raises `UsageError` where it does not."""
        value = self.setting(name, default)
        if not isinstance(value, int) or not 0 < value < 2**31:
            raise UsageError(
                f"{self.path.name} has {value!r} for {self.architecture}.{name};"
                " download it again"
            )
        return value

    def block(self, index: int) -> GGUFTensors:
        """The tensors of one block, by their names in it."""
        start = f"{BLOCK}{index}."
        return {
            name.removeprefix(start): t
            for name, t in self.tensors.items()
            if name.startswith(start)
        }

    def attention(self, index: int) -> GGUFTensors:
        """Those of a block that are its mixer's, with the norms of that."""
        mlp = self.mlp(index)
        return {
            name: tensor
            for name, tensor in self.block(index).items()
            if name not in mlp
        }

    def mlp(self, index: int) -> GGUFTensors:
        """Those of a block that are its MLP's, with the norms of that."""
        block = self.block(index)
        starts = [
            "ffn_",
            "pre_ffw_norm",
            "post_ffw_norm",
            "exp_probs_b",
            "layer_output_norm",
        ]
        if not any(name.startswith(("ffn_norm.", "post_ffw_norm.")) for name in block):
            starts.append(
                "post_attention_norm."
            )  # the only norm before the MLP, and not the one after the attention
        return {
            name: tensor
            for name, tensor in block.items()
            if name.startswith(tuple(starts))
        }

    @property
    def outside_blocks(self) -> GGUFTensors:
        """The tensors of no block: embedding, last norm and head."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(BLOCK)
        }


class _Reader(GGUFReader):
    """Ends where the file does, and is quick: the library's own goes on behind the end
    for hours, on a wrong count.
    """

    reads = 0

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray[Any, Any]:
        self.reads += 1
        if self.reads > MOST_READS:
            raise EOFError("its header has no end")
        kind = np.dtype(dtype).newbyteorder(override_order or self.byte_order)
        return np.frombuffer(self.data, kind, int(count), int(offset))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        reason = shortened(str(error) or type(error).__name__)
        raise UsageError(
            f"{path.name} is no whole GGUF file: {reason}; download it again"
        ) from None


def open_gguf(path: Path) -> GGUFReader:
    """A GGUF file, mapped into memory. Raises `UsageError` when it is truncated or
    damaged.
    """
    with _whole(path):
        reader = _Reader(path)
        scalars = {
            name: one.contents()
            for name, one in reader.fields.items()
            if len(one.types) == 1
        }
        if scalars.get("split.count", 1) == 1:  # a part may hold no tensors
            _check_room(reader, scalars)
        _check_depth(reader, scalars)
    return reader


def _check_room(reader: GGUFReader, scalars: Mapping[str, Any]) -> None:
    """Raise `EOFError` for more layers or experts than there can be: readers would
    build each.
    """
    longest = max(
        (int(size) for tensor in reader.tensors for size in tensor.shape), default=0
    )
    rooms = {
        ".block_count": ("layers", len(reader.tensors)),
        ".expert_count": ("experts", longest),
    }
    for ending, (what, room) in rooms.items():
        count = max(
            (value for name, value in scalars.items() if name.endswith(ending)),
            default=0,
        )
        if count > room:
            problem = f"its header counts {count} {what}"
            raise EOFError(f"{problem}, and its tensors have room for {room}")


def _check_depth(reader: GGUFReader, scalars: Mapping[str, Any]) -> None:
    """Raise `ValueError` for fewer layers than there are tensors of: readers would skip
    those.
    """
    numbers = (
        match for tensor in reader.tensors if (match := BLOCK_NUMBER.match(tensor.name))
    )
    held = max((int(match[1]) + 1 for match in numbers), default=0)
    count = scalars.get(f"{scalars.get(ARCHITECTURE)}.block_count", held)
    if not isinstance(count, int) or count < held:
        raise ValueError(
            f"its header says block_count {count}, and it has tensors of"
            f" {several(held, 'layer')}"
        )


def refuse_kv_only(path: Path, fields: Iterable[str]) -> None:
    """Raise `UsageError` for an export that skips in the prompt alone, which others
    would run whole.
    """
    if any(name.endswith(f".{KV_ONLY}") for name in fields):
        problem = (
            f"{path.name} skips blocks in the prompt alone, and only a patched"
            " llama.cpp runs it"
        )
        raise UsageError(f"{problem}; give the original model's file and the plan")


def read_gguf(path: Path) -> GGUF:
    """Map a GGUF file into memory. Raises `UsageError` as `open_gguf` does, and for one
    part of several.
    """
    reader = open_gguf(path)
    with _whole(path):
        fields = {
            name: Field(field.contents(), field.types[-1])
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
    if ARCHITECTURE not in fields:
        raise UsageError(f"{path.name} names no architecture; it is no model")
    if fields.get("split.count", Field.of(1)).value != 1:
        raise UsageError(
            f"{path.name} is a part of several: merge them first with `llama-gguf-split"
            " --merge`"
        )
    tensors = {
        tensor.name: GGUFTensor(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    return GGUF(path, fields, tensors, reader.endianess)


def write_gguf(
    path: Path,
    source: GGUF,
    fields: Fields,
    tensors: GGUFTensors,
    progress: Progress = silent,
) -> None:
    """Write a GGUF file, in the byte order of `source`."""
    writer = GGUFWriter(
        path, str(fields[ARCHITECTURE].value), endianess=source.endianness
    )
    for name, field in fields.items():
        if name == ARCHITECTURE:  # the writer has written it
            continue
        if isinstance(field.value, list):
            writer.add_key_value(
                name, field.value, GGUFValueType.ARRAY, sub_type=field.kind
            )
        else:
            writer.add_key_value(name, field.value, field.kind)
    for name, tensor in tensors.items():
        data = tensor.data
        writer.add_tensor_info(
            name, data.shape, data.dtype, data.nbytes, tensor.quantization
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, tensor in enumerate(tensors.values()):
            progress(number, len(tensors), "copying weights")
            writer.write_tensor_data(tensor.data)
    except OSError as error:
        if error.errno is None:  # numpy's word for a full disk
            raise OSError(errno.ENOSPC, str(error)) from None
        raise
    finally:
        writer.close()
