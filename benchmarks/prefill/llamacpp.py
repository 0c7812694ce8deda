"""Times of prompts and of decoding in llama.cpp, of which a prompt skips the deepest
blocks, by its own `llama-bench`.

    make test-llamacpp   # builds llama.cpp with the patches of docs/upstream
    python benchmarks/prefill/llamacpp.py --out OUT.jsonl [--model FILE.gguf] [--blocks 8 10] [--repairs FOLDER]
        [--prompts 512 2048 8192] [--new 64] [--rounds 5] [--threads 2] [--bin build/llama.cpp/build/bin]

The original's file and one of each depth are timed in turn, a process each, in every
round; ratios are the rounds' own. FOLDER holds repairs, `8-refit` and so on, as
`measure.py` leaves them; without one keys and values are not refit, which saves no
time. Nothing else may run then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

from notall import Plan, RepairedPlan, export
from notall.engines.llamacpp import dense_gguf
from notall.measuring.speed import cores, machine, speedup
from notall.models.gguf_file import read_gguf
from notall.results.provenance import this_run
from notall.results.record import Fact, Quartiles

Times = dict[
    str, float
]  # milliseconds by test: of a prompt, pp512; of a token that is generated, tg


class Timed(Fact):
    """One test of one file: `blocks` are skipped in the prompt, of the original
    none.
    """

    blocks: int
    test: str
    ms: Quartiles
    speedup: Quartiles


def written(asked: argparse.Namespace, folder: Path) -> dict[int, Path]:
    """The files to time, by how many blocks a prompt skips."""
    dense = dense_gguf(asked.model)
    depth = read_gguf(dense).depth
    files = {0: dense}
    for count in asked.blocks:
        repaired = asked.repairs / f"{count}-refit" if asked.repairs else None
        tail = range(depth - count, depth)
        plan = (
            RepairedPlan.load(repaired)
            if repaired
            else Plan(prefill={"attention": tail, "mlp": tail})
        )
        out = export(dense, plan, "gguf", folder / str(count), verify=False)
        (files[count],) = out.glob("*.gguf")
    return files


def timed(file: Path, asked: argparse.Namespace) -> Times:
    prompts = ",".join(map(str, asked.prompts))
    lengths = ["-p", prompts, "-n", str(asked.new)]
    how = ["-r", "1", "-t", str(asked.threads), "-fa", "1", "-o", "json"]
    done = subprocess.run(
        [asked.bin / "llama-bench", "-m", file, *lengths, *how],
        check=True,
        capture_output=True,
        text=True,
    )
    found: Times = {}
    for one in json.loads(done.stdout):
        if one["n_gen"]:
            found["tg"] = one["avg_ns"] / 1e6 / one["n_gen"]
        else:
            found[f"pp{one['n_prompt']}"] = one["avg_ns"] / 1e6
    return found


def summary(taken: dict[int, list[Times]]) -> list[Timed]:
    lines = []
    for blocks, rounds in taken.items():
        for test in rounds[0]:
            dense, own = ([one[test] for one in taken[which]] for which in (0, blocks))
            times = {"ms": Quartiles.of(own), "speedup": speedup(dense, own)}
            lines.append(Timed(blocks=blocks, test=test, **times))
    return lines


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2", help="a .gguf file")
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 10])
    parser.add_argument("--repairs", type=Path)
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--bin", type=Path, default=Path("build/llama.cpp/build/bin"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        files = written(asked, Path(scratch))
        taken: dict[int, list[Times]] = {blocks: [] for blocks in files}
        for number in range(asked.rounds):
            for blocks in list(files)[:: -1 if number % 2 else 1]:
                taken[blocks].append(timed(files[blocks], asked))
    header = {
        "machine": machine() | {"threads": asked.threads},
        "model": Path(asked.model).name,
        "llama.cpp": f"of xllamacpp {version('xllamacpp')}, patched",
        **this_run("python", "benchmarks/prefill/llamacpp.py"),
    }
    lines = summary(taken)
    records = [json.dumps(header), *(one.model_dump_json() for one in lines)]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text("\n".join(records) + "\n", encoding="utf-8")
    for one in lines:
        ratio = (
            f"{one.speedup.median:.3f} [{one.speedup.low:.3f}, {one.speedup.high:.3f}]"
        )
        print(f"{one.blocks:3} blocks  {one.test:7} {one.ms.median:9.2f} ms  {ratio}")


if __name__ == "__main__":
    main()
