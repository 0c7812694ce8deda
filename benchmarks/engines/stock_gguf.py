"""An export without some blocks beside a stock file of as many layers, in llama.cpp, at
each type: bytes and times.

    python benchmarks/engines/stock_gguf.py [--model FILE.gguf] [--blocks 4,8] [--rounds 7] [--threads 1]

The stock file holds the first layers of the dense one and is written by the package
`gguf`; both are then held in the type. Each is asked in a process of its own, all in
turn; ratios are the rounds' own: median [quartiles]. It ends with 1 where tensors do
not come to the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from notall import Plan
from notall.engines.llamacpp import FILE_TYPES, PLAIN_TYPE, LlamaCpp
from notall.engines.worker import call
from notall.experiments.pareto.checkpoints import write_plain
from notall.measuring.speed import cores, machine, speedup
from notall.results.record import Quartiles
from notall.results.table import Column, number, size, table, words
from notall.results.terminal import print_table

PROMPT = [3 + (7 * place) % 250 for place in range(128)]


@dataclass(frozen=True)
class Held:
    """A model in a file: its bytes and times; of an export also the stock file's bytes,
    and the times' ratios.
    """

    type: str
    blocks: int
    model: str
    tensor_bytes: int
    file_bytes: int
    decode_ms: Quartiles
    prefill_ms: Quartiles
    decode_ratio: Quartiles | None = None
    prefill_ratio: Quartiles | None = None
    stock_bytes: int | None = None


COLUMNS: tuple[Column[Held], ...] = (
    words("type", lambda one: one.type),
    number("blocks left out", lambda one: one.blocks, "d"),
    words("model", lambda one: one.model),
    number("bytes of tensors", lambda one: one.tensor_bytes, ","),
    size("file", lambda one: one.file_bytes),
    words("decode ms/token", lambda one: in_words(one.decode_ms, ".2f")),
    words("prefill ms", lambda one: in_words(one.prefill_ms, ".2f")),
    words("decode, export / stock", lambda one: in_words(one.decode_ratio, ".3f")),
    words("prefill, export / stock", lambda one: in_words(one.prefill_ratio, ".3f")),
)


def write_stock(dense: Path, layers: int, out: Path) -> None:
    """The first layers of a plain GGUF file, field by field and tensor by tensor."""
    reader = GGUFReader(dense)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = layers if name == f"{architecture}.block_count" else field.contents()
        of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], of)
    for tensor in reader.tensors:
        place = re.match(r"blk\.(\d+)\.", tensor.name)
        if place is None or int(place[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def depth_of(file: Path) -> int:
    reader = GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    return int(reader.fields[f"{architecture}.block_count"].contents())


def tensor_bytes(file: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def written(
    engine: LlamaCpp, model: str, counts: Sequence[int], folder: Path
) -> dict[tuple[str, int, str], Path]:
    """By type, blocks left out and model."""
    dense = folder / "dense.gguf"
    write_plain(engine, model, Plan(), dense)
    depth = depth_of(dense)
    plain_files = {(0, "dense"): dense}
    for count in counts:
        middle = range((depth - count) // 2, (depth - count) // 2 + count)
        for name in ("export", "stock"):
            plain_files[count, name] = folder / f"{name}-{count}.gguf"
        write_plain(
            engine,
            model,
            Plan(attention=middle, mlp=middle),
            plain_files[count, "export"],
        )
        write_stock(dense, depth - count, plain_files[count, "stock"])
    found = {}
    for kind in FILE_TYPES:
        for (count, name), path in plain_files.items():
            found[kind, count, name] = path
            if kind != PLAIN_TYPE:
                found[kind, count, name] = path.with_name(f"{path.stem}-{kind}.gguf")
                engine.quantise(path, kind, found[kind, count, name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a .gguf file")
    parser.add_argument("--blocks", default="4,8", help="how many to leave out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores())
    given = parser.parse_args()
    engine = LlamaCpp(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = written(
            engine, given.model, [*map(int, given.blocks.split(","))], Path(scratch)
        )
        taken: dict[tuple[str, int, str], list[dict[str, float]]] = {
            key: [] for key in files
        }
        for number_of in range(given.rounds):
            for key in list(files)[:: -1 if number_of % 2 else 1]:
                taken[key].append(
                    call(
                        engine,
                        "time",
                        checkpoint=files[key],
                        prompt=PROMPT,
                        new=given.new,
                    )
                )
        rows = [held(key, files, taken) for key in files]
    about = machine("cpu")
    title = f"llama.cpp, {about['cpu']}, {given.threads} threads, {given.rounds} rounds"
    print_table(table(title, COLUMNS, rows))
    unlike = {
        row.type
        for row in rows
        if row.model == "export" and row.tensor_bytes != row.stock_bytes
    }
    sys.exit(
        f"other bytes than a stock file's: {', '.join(sorted(unlike))}" if unlike else 0
    )


def held(
    key: tuple[str, int, str], files: dict[Any, Path], taken: dict[Any, Any]
) -> Held:
    kind, count, name = key

    def samples(model: str, field: str) -> list[float]:
        return [one[field] for one in taken[kind, count, model]]

    more: dict[str, Any] = {}
    if name == "export":
        for ratio, field in (
            ("decode_ratio", "decode_ms_per_token"),
            ("prefill_ratio", "prefill_ms"),
        ):
            more[ratio] = speedup(samples(name, field), samples("stock", field))
        more["stock_bytes"] = tensor_bytes(files[kind, count, "stock"])
    decode, prefill = (
        Quartiles.of(samples(name, field))
        for field in ("decode_ms_per_token", "prefill_ms")
    )
    size_of = files[key].stat().st_size
    return Held(
        kind, count, name, tensor_bytes(files[key]), size_of, decode, prefill, **more
    )


def in_words(found: Quartiles | None, form: str) -> str:
    return (
        f"{found.median:{form}} [{found.low:{form}}, {found.high:{form}}]"
        if found
        else ""
    )


if __name__ == "__main__":
    main()
