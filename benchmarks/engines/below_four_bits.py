"""Below four bits: fewer bits, or fewer sublayers? What each loses, and how fast each
is in llama.cpp.

    python benchmarks/engines/below_four_bits.py loss --model FILE.gguf --data DATA --out DIR [--plan NAME=PLAN ...]
    python benchmarks/engines/below_four_bits.py times --model FILE.gguf --out DIR [--plan NAME=PLAN ...]

A file of four bits can't tell what four bits cost: its numbers are rounded so already,
and `Q4_K` copies them. So the rivals have about three and two bits a weight. `Q3_K`
holds queries, keys, gates and ups in Q3_K, the other matrices of the blocks in Q4_K;
`Q2_K` holds those in Q2_K, values in Q4_K, the others in Q3_K; the head is in Q6_K.
Each is rounded plainly, and by importance: for each input of a matrix the mean of its
squares over calibration text (WikiText-2 train and C4), as llama.cpp's imatrix has it.
Losses are NLL added on WikiText-2 test and on other documents of C4, by weights that
are rounded and unpacked again. Speed does not depend on what the rounding goes by:
files are timed in turn, each in a process of its own. Called again with the same --out,
it goes on. DATA holds `wikitext2/wiki.test.raw`, `wikitext2/wiki.train.first1MB.txt`
and `c4/sample300.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from measure import Running
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

import notall
from notall.engines.llamacpp import _packed, pack
from notall.measuring.quality import score
from notall.measuring.speed import cores, interleaved, machine, speedup
from notall.measuring.statistics import mean_and_error
from notall.models.gguf_file import read_gguf, write_gguf
from notall.models.texts import Text, read_text
from notall.models.windows import token_batches
from notall.results.provenance import this_run
from notall.results.record import Count, Fact, Quartiles
from notall.results.table import (
    Column,
    number,
    size,
    table,
    with_error,
    with_quartiles,
    words,
)
from notall.results.terminal import print_table

# By the end of a matrix's name, in transformers and in GGUF files, what holds it; the
# first that is found.
RULES: dict[str, dict[str, Kind]] = {
    "Q4_K": {r".": Kind.Q4_K},
    "Q3_K": {r"(q|k|gate|up)(_proj)?$": Kind.Q3_K, r".": Kind.Q4_K},
    "Q2_K": {
        r"(q|k|gate|up)(_proj)?$": Kind.Q2_K,
        r"_v$|v_proj$": Kind.Q4_K,
        r".": Kind.Q3_K,
    },
}
HEAD = Kind.Q6_K
CALIBRATING, JUDGING, LENGTH = 8, 16, 512  # windows of each text, and their tokens


class Loss(Fact):
    """What one model loses on a text, paired with the original by window."""

    model: str
    importance: bool
    text: str
    nll: tuple[float, ...]
    delta: float
    delta_se: float


class Time(Fact):
    """What one file takes in llama.cpp; speedups are over the original, by round."""

    model: str
    file_bytes: Count
    prefill_ms: Quartiles
    decode_ms: Quartiles
    prefill_speedup: Quartiles
    decode_speedup: Quartiles


LOSSES: tuple[Column[Loss], ...] = (
    words("model", lambda one: one.model),
    words("by importance", lambda one: "yes" if one.importance else ""),
    words("text", lambda one: one.text),
    with_error("NLL added", lambda one: (one.delta, one.delta_se)),
    number("windows", lambda one: len(one.nll), "d"),
)
TIMES: tuple[Column[Time], ...] = (
    words("model", lambda one: one.model),
    size("file", lambda one: one.file_bytes),
    with_quartiles("prefill ms", lambda one: one.prefill_ms, ".0f"),
    with_quartiles("decode ms", lambda one: one.decode_ms, ".1f"),
    with_quartiles("prefill, original / it", lambda one: one.prefill_speedup),
    with_quartiles("decode, original / it", lambda one: one.decode_speedup),
)


def held_in(name: str, rules: Mapping[str, Kind]) -> Kind:
    return next(kind for ends, kind in rules.items() if re.search(ends, name))


def matrices(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Those of the blocks, by their paths."""
    head = model.get_output_embeddings()
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and one is not head
    }


@torch.inference_mode()
def importances(
    model: PreTrainedModel, batches: list[Tensor]
) -> dict[str, NDArray[np.float32]]:
    """By matrix the mean square of each of its inputs, (inputs,)."""
    sums: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + given[
            0
        ].float().square().flatten(0, -2).mean(0)

    hooks = [
        one.register_forward_pre_hook(partial(look, name))
        for name, one in matrices(model).items()
    ]
    for batch in batches:
        model.model(batch)
    for hook in hooks:
        hook.remove()
    return {
        name: (total / len(batches)).numpy().astype(np.float32)
        for name, total in sums.items()
    }


def rounded(
    weight: Tensor, kind: Kind, importance: NDArray[np.float32] | None
) -> Tensor:
    """The same matrix as it comes out of `kind`."""
    values = np.ascontiguousarray(weight.float().numpy())
    unpacked = dequantize(pack(values, kind, importance), kind)
    return torch.from_numpy(unpacked.reshape(values.shape)).to(weight.dtype)


@contextmanager
def quantised(
    model: PreTrainedModel, kind: str, by: Mapping[str, NDArray[np.float32]]
) -> Iterator[None]:
    """The model with its matrices rounded, in their places, for the time of the
    `with`.
    """
    weights = {name: one.weight.data for name, one in matrices(model).items()}
    kinds = {name: held_in(name, RULES[kind]) for name in weights} | {"head": HEAD}
    weights["head"] = model.get_output_embeddings().weight.data
    before = {name: weight.clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.copy_(rounded(before[name], kinds[name], by.get(name)))
    try:
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])


def texts_of(data: Path) -> tuple[list[Text], dict[str, Text]]:
    """To calibrate on, and to judge by: of C4 one half of the documents each."""
    c4 = read_text(data / "c4/sample300.jsonl")
    half = c4.content.find("\n\n", len(c4.content) // 2)
    parts = [
        Text("C4", c4.sha256, part) for part in (c4.content[:half], c4.content[half:])
    ]
    train, test = (
        read_text(data / "wikitext2" / name)
        for name in ("wiki.train.first1MB.txt", "wiki.test.raw")
    )
    return [train, parts[0]], {"WikiText-2": test, "C4": parts[1]}


def losses(given: argparse.Namespace) -> list[Loss]:
    model, tokenizer = notall.load(given.model, dtype=given.dtype, device="cpu")
    calibrating, judging = texts_of(given.data)

    def windows(text: Text, count: int) -> list[Tensor]:
        return token_batches(
            tokenizer, text, sequences=count, length=LENGTH, batch_size=2
        )

    by = importances(
        model, [batch for text in calibrating for batch in windows(text, CALIBRATING)]
    )
    batches = {name: windows(text, given.windows) for name, text in judging.items()}
    found = [
        row
        for row in losses_in(given.out / "losses.jsonl")
        if len(row.nll) == given.windows
    ]
    dense = {row.text: list(row.nll) for row in found if row.model == "original"}

    def lacking(name: str, importance: bool = False) -> list[str]:
        known = {(row.model, row.importance, row.text) for row in found}
        return [text for text in batches if (name, importance, text) not in known]

    def add(name: str, plan: notall.Plan, importance: bool = False) -> None:
        for text in lacking(name, importance):
            some = batches[text]
            of_plan = [
                score(model, [plan] if plan else [], batch)[-1].nll for batch in some
            ]
            nll = [float(value) for values in of_plan for value in values]
            base = dense.setdefault(text, nll)
            delta, error = mean_and_error(
                [ours - theirs for ours, theirs in zip(nll, base)]
            )
            row = Loss(
                model=name,
                importance=importance,
                text=text,
                nll=tuple(nll),
                delta=delta,
                delta_se=error,
            )
            found.append(row)
            print(
                f"{name} {'by importance ' * importance}{text}: {delta:+.3f} ±"
                f" {error:.3f}",
                file=sys.stderr,
            )
            keep(given, "losses", found)

    add("original", notall.Plan())
    for name, plan in given.plans.items():
        add(name, plan)
    for kind in RULES:
        for importance in (False, True):
            if not lacking(kind, importance):
                continue
            with quantised(model, kind, by if importance else {}):
                add(kind, notall.Plan(), importance)
    return found


def losses_in(path: Path) -> list[Loss]:
    """What an earlier run came to, which is not done again."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    return [Loss.model_validate_json(line) for line in lines]


def write_rounded(source: Path, kind: str, out: Path) -> None:
    """The file with its matrices in other types."""
    model = read_gguf(source)
    tensors = dict(model.tensors)
    for name, tensor in model.tensors.items():
        stem = name.removesuffix(".weight")
        if name in ("token_embd.weight", "output.weight"):
            tensors[name] = _packed(tensor, HEAD)
        elif (
            len(tensor.shape) == 2
            and name.startswith("blk.")
            and name.endswith(".weight")
        ):
            tensors[name] = _packed(tensor, held_in(stem, RULES[kind]))
    write_gguf(out, model, model.fields, tensors)


def times(given: argparse.Namespace) -> list[Time]:
    folder = given.out / "files"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"original": given.model}
    for name, plan in given.plans.items():
        place = folder / name.replace(" ", "-")
        if not place.exists():
            notall.export(str(given.model), plan, "gguf", place, verify=False)
        files[name] = next(place.glob("*.gguf"))
    for kind in RULES:
        files[kind] = folder / f"{kind}.gguf"
        if not files[kind].exists():
            write_rounded(given.model, kind, files[kind])
    context = 64 * (1 + (given.prompt + given.new + 1) // 64)
    running = {
        name: Running.start(sys.executable, "llama.cpp", file, context)
        for name, file in files.items()
    }
    taken = interleaved(
        {
            name: partial(one.ask, given.prompt, given.new)
            for name, one in running.items()
        },
        given.rounds,
    )
    for one in running.values():
        one.stop()
    columns = {
        name: [[one[what] for one in some] for what in ("prefill_ms", "decode_ms")]
        for name, some in taken.items()
    }
    dense = columns["original"]
    return [
        Time(
            model=name,
            file_bytes=files[name].stat().st_size,
            prefill_ms=Quartiles.of(prefill),
            decode_ms=Quartiles.of(decode),
            prefill_speedup=speedup(dense[0], prefill),
            decode_speedup=speedup(dense[1], decode),
        )
        for name, (prefill, decode) in columns.items()
    ]


def keep(given: argparse.Namespace, name: str, rows: list[Loss] | list[Time]) -> None:
    """The rows behind a line on where they come from."""
    about: dict[str, object] = {
        **this_run("python", "benchmarks/engines/below_four_bits.py"),
        "machine": machine("cpu"),
        "threads": cores(),
        "model": given.model.name,
    }
    about |= (
        {"dtype": given.dtype, "length": LENGTH, "calibration": CALIBRATING}
        if name == "losses"
        else {}
    )
    about |= (
        {"prompt": given.prompt, "new": given.new, "rounds": given.rounds}
        if name == "times"
        else {}
    )
    lines = [json.dumps(about), *(row.model_dump_json() for row in rows)]
    (given.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("loss", "times"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--plan", action="append", default=[], metavar="NAME=PLAN")
    parser.add_argument(
        "--windows", type=int, default=JUDGING, help="of each text, to judge by"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the model whose matrices are rounded"
    )
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    given.plans = {
        name: notall.Plan.load(Path(path))
        for name, _, path in (one.partition("=") for one in given.plan)
    }
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part == "loss":
        found = losses(given)
        print_table(table("NLL added, in nats a token", LOSSES, found))
    else:
        timed = times(given)
        keep(given, "times", timed)
        print_table(table(f"llama.cpp, {given.rounds} rounds", TIMES, timed))


if __name__ == "__main__":
    main()
