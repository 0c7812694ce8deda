"""An export without some blocks beside a stock file of as many layers, in llama.cpp, at each type: bytes and times.

    python benchmarks/engines/stock_gguf.py [--model FILE.gguf] [--blocks 4,8] [--rounds 7] [--threads 1]

The stock file holds the first layers of the dense one and is written by the package `gguf`; both are then held in the
type. Each is asked in a process of its own, all in turn; ratios are the rounds' own: median [quartiles]. It ends with 1
where tensors do not come to the same bytes.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from notall import Plan
from notall.exporters.engines.asking import ask
from notall.exporters.engines.gguf_types import FILE_TYPES, PLAIN
from notall.exporters.engines.llamacpp import LlamaCpp
from notall.measuring.speed import Spread, cores, machine, speedup
from notall.records.columns import number, plain, size
from notall.reporting.console import show

PROMPT = [3 + (7 * place) % 250 for place in range(128)]
COLUMNS = (
    *(plain("type"), number("blocks", "blocks left out", "d"), plain("model")),
    number("tensor_bytes", "bytes of tensors", ","),
    size("file_bytes", "file"),
    *(plain("decode", "decode ms/token"), plain("prefill", "prefill ms")),
    plain("decode_ratio", "decode, export / stock"),
    plain("prefill_ratio", "prefill, export / stock"),
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


def written(engine: LlamaCpp, model: str, counts: Sequence[int], folder: Path) -> dict[tuple[str, int, str], Path]:
    """By type, blocks left out and model."""
    dense = folder / "dense.gguf"
    engine.write(model, Plan(), dense)
    depth = depth_of(dense)
    plain_files = {(0, "dense"): dense}
    for count in counts:
        middle = range((depth - count) // 2, (depth - count) // 2 + count)
        for name in ("export", "stock"):
            plain_files[count, name] = folder / f"{name}-{count}.gguf"
        engine.write(model, Plan(attention=middle, mlp=middle), plain_files[count, "export"])
        write_stock(dense, depth - count, plain_files[count, "stock"])
    found = {}
    for kind in FILE_TYPES:
        for (count, name), path in plain_files.items():
            found[kind, count, name] = path
            if kind != PLAIN:
                found[kind, count, name] = path.with_name(f"{path.stem}-{kind}.gguf")
                engine.quantise(path, kind, found[kind, count, name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a .gguf file")
    parser.add_argument("--blocks", default="4,8", help="how many to leave out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=cores())
    given = parser.parse_args()
    engine = LlamaCpp(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        files = written(engine, given.model, [*map(int, given.blocks.split(","))], Path(scratch))
        taken: dict[tuple[str, int, str], list[dict[str, float]]] = {key: [] for key in files}
        for number_of in range(given.rounds):
            for key in list(files)[:: -1 if number_of % 2 else 1]:
                taken[key].append(ask(engine, "time", checkpoint=str(files[key]), prompt=PROMPT, new=given.new))
        rows = [row(key, files, taken) for key in files]
    about = machine("cpu")
    show(rows, COLUMNS, title=f"llama.cpp, {about['cpu']}, {given.threads} threads, {given.rounds} rounds")
    unlike = {row["type"] for row in rows if row["model"] == "export" and row["tensor_bytes"] != row["stock_bytes"]}
    sys.exit(f"other bytes than a stock file's: {', '.join(sorted(unlike))}" if unlike else 0)


def row(key: tuple[str, int, str], files: dict[Any, Path], taken: dict[Any, Any]) -> dict[str, Any]:
    kind, count, name = key
    found = {"type": kind, "blocks": count, "model": name, "file_bytes": files[key].stat().st_size}
    found["tensor_bytes"] = tensor_bytes(files[key])
    for what, field in (("decode", "decode_ms_per_token"), ("prefill", "prefill_ms")):
        own = [one[field] for one in taken[key]]
        found[what] = in_words(Spread.of(own), ".2f")
        if name == "export":
            stock = [one[field] for one in taken[kind, count, "stock"]]
            found[f"{what}_ratio"] = in_words(speedup(own, stock), ".3f")
    if name == "export":
        found["stock_bytes"] = tensor_bytes(files[kind, count, "stock"])
    return found


def in_words(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} [{spread.low:{form}}, {spread.high:{form}}]"


if __name__ == "__main__":
    main()
