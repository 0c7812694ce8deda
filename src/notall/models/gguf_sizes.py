"""What a GGUF file holds, compared with the unpacked model that notall computes with.
No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..plan import Plan
from ..results.table import in_bytes
from .gguf_file import EMBEDDING, GGUF, HEAD, GGUFTensors, read_gguf
from .names import named_gguf


@dataclass(frozen=True)
class StoredSizes:
    """Bytes of weights in the types of a file, of the original model and without what a
    plan skips.
    """

    name: str
    whole: int
    left: int
    types: tuple[str, ...]
    head: int = 0  # parameters of a head that the file holds apart from the embeddings


def gguf_stored_sizes(spec: str | Path, plan: Plan) -> StoredSizes | None:
    """Of the GGUF file that a spec names; None of another model. Raises `UsageError` as
    `read_gguf` does.
    """
    file = named_gguf(spec)
    if file is None:
        return None
    source = read_gguf(file)
    kinds = sorted({tensor.quantization.name for tensor in source.tensors.values()})
    head = (
        prod(source.tensors[HEAD].shape)
        if {EMBEDDING, HEAD} <= source.tensors.keys()
        else 0
    )
    return StoredSizes(
        file.name, _bytes_of(source.tensors), _left(source, plan), tuple(kinds), head
    )


def size_notes(spec: str | Path, plan: Plan) -> list[str]:
    """Why the sizes of a model are others than its file's; nothing where no GGUF file
    was unpacked.
    """
    stored = gguf_stored_sizes(spec, plan)
    return [*_notes(stored, plan)] if stored else []


def _notes(stored: StoredSizes, plan: Plan) -> Iterator[str]:
    left = f", and {in_bytes(stored.left)} without what is skipped" if plan else ""
    problem = (
        f"{stored.name} holds {in_bytes(stored.whole)} of weights in"
        f" {', '.join(stored.types)}{left}"
    )
    yield f"{problem}; the table has the sizes of its numbers unpacked."
    if stored.head:
        yield (
            f"{stored.head:,} of the parameters are the output head's, which the file"
            " holds apart from the embeddings: a model that shares them is counted"
            " without."
        )


def _left(source: GGUF, plan: Plan) -> int:
    gone = [source.attention(index) for index in plan.attention if index < source.depth]
    gone += [source.mlp(index) for index in plan.mlp if index < source.depth]
    return _bytes_of(source.tensors) - sum(map(_bytes_of, gone))


def _bytes_of(tensors: GGUFTensors) -> int:
    return sum(tensor.size for tensor in tensors.values())
