"""Whether engines lose on a text what notall says that a repaired model loses: the NLL
of its exports, token by token.

    python benchmarks/repairing/served.py --plan repaired [--windows 4] [--length 128]
    python benchmarks/repairing/served.py --skip attn.6 attn.7 attn.26 attn.29         # repaired on the way
    python benchmarks/repairing/served.py --plan repaired --vllm-python .venv-vllm/bin/python

Each engine runs in a process of its own, on the windows' token ids, with the original
and the repaired one: what it rounds (llama.cpp: activations to 8 bits, where a file has
few) shows in both. What an engine does not tell (llama.cpp: tokens that end within a
character) is left out on both sides. It ends with 1 where an NLL is off by more than
--most beyond the original model's, and says which engines are not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import notall
from notall.choosing.space import plan_of
from notall.engines import engine_named
from notall.engines.worker import call
from notall.measuring.speed import cores
from notall.models.texts import read_text
from notall.models.windows import token_batches
from notall.results.table import Column, number, table, words
from notall.results.terminal import print_table
from notall.running.repaired import RepairedPlan

ENGINES = ("transformers", "vllm", "llama.cpp")


@dataclass(frozen=True)
class Compared:
    """The NLL of a model in an engine and here: means over the tokens that are told,
    and the worst of one.
    """

    engine: str
    model: str
    nll: float
    ours: float
    worst: float
    tokens: int

    @property
    def off(self) -> float:
        return self.nll - self.ours


COLUMNS: tuple[Column[Compared], ...] = (
    words("engine", lambda row: row.engine),
    words("model", lambda row: row.model),
    number("NLL there", lambda row: row.nll, ".4f"),
    number("notall's", lambda row: row.ours, ".4f"),
    number("off by", lambda row: row.off, "+.4f"),
    number("of a token, at most", lambda row: row.worst),
    number("tokens", lambda row: row.tokens, ","),
)


def absent(engine: str, python: str) -> str:
    """Why an engine cannot be asked; empty where it can."""
    if engine == "vllm":
        there = (
            Path(python).is_file()
            and not subprocess.run(
                [python, "-c", "import vllm"], capture_output=True
            ).returncode
        )
        return "" if there else f"{python} has no vLLM: make test-engines installs it"
    if engine == "llama.cpp" and not importlib.util.find_spec("xllamacpp"):
        return "there is no xllamacpp: pip install 'notall[export]'"
    return ""


def asked_of(
    engine: str, python: str, folder: Path, windows: list[list[int]]
) -> list[list[float | None]]:
    """The NLL of each token but the first, by window. Raises `UsageError` with what the
    engine said last.
    """
    checkpoint = next(folder.glob("*.gguf")) if engine == "llama.cpp" else folder
    runs = engine_named(engine)(cores(), "float32")
    scores: list[list[float | None]] = call(
        runs, "score", python=python, checkpoint=checkpoint, windows=windows
    )
    return scores


@torch.no_grad()
def ours(model: Any, plan: notall.Plan, windows: list[list[int]]) -> list[list[float]]:
    """As `asked_of`, of the skipped model in memory."""
    found = []
    with notall.skip(model, plan):
        for window in windows:
            scores = (
                model(torch.tensor([window])).logits[0, :-1].float().log_softmax(-1)
            )
            found.append(
                [-float(score[token]) for score, token in zip(scores, window[1:])]
            )
    return found


def compared(
    engine: str, model: str, there: list[list[float | None]], here: list[list[float]]
) -> Compared:
    """A row of the table."""
    pairs = [
        (one, other) for told, own in zip(there, here, strict=True) for one, other in zip(told, own, strict=True)
        if one is not None
    ]  # fmt: skip
    if not pairs:
        raise RuntimeError(f"{engine} tells of no token what it thinks of it")
    nll, own = (sum(values) / len(pairs) for values in zip(*pairs))
    worst = max(abs(one - other) for one, other in pairs)
    return Compared(engine, model, nll, own, worst, len(pairs))


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", default="smollm2")
    options.add_argument("--plan", type=Path, help="a folder of notall repair or heal")
    options.add_argument(
        "--skip", nargs="+", help="else what to skip and repair, such as attn.6 mlp.5"
    )
    options.add_argument("--text", default="prose")
    options.add_argument("--windows", type=int, default=4)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options.add_argument("--vllm-python", default=".venv-vllm/bin/python")
    options.add_argument(
        "--most",
        type=float,
        default=0.01,
        help="nats a token that an NLL may be off by",
    )
    asked = options.parse_args()
    if bool(asked.plan) == bool(asked.skip):
        options.error("give --plan or --skip")
    model, tokenizer = notall.load(asked.model, dtype="float32", device="cpu")
    text, size = read_text(asked.text), {"length": asked.length, "batch_size": 1}
    batches = token_batches(
        tokenizer, text, sequences=asked.windows + (16 if asked.skip else 0), **size
    )
    if asked.plan:
        plan = RepairedPlan.load(asked.plan)
    else:
        plan = notall.repair(model, plan_of(asked.skip), batches[asked.windows :])
    windows = [batch[0].tolist() for batch in batches[: asked.windows]]
    plans = {"dense": notall.Plan(), "repaired": plan}
    here = {name: ours(model, one, windows) for name, one in plans.items()}
    rows: list[Compared] = []
    with tempfile.TemporaryDirectory() as scratch:
        for engine in asked.engines:
            target = engine_named(engine).target
            if why := absent(engine, asked.vllm_python):
                print(f"skipped: {engine}; {why}", file=sys.stderr)
                continue
            python = asked.vllm_python if engine == "vllm" else sys.executable
            for name, one in plans.items():
                folder = Path(scratch) / f"{name}-{target}"
                if not folder.exists():
                    dtype = (
                        "float32" if target == "hf" else None
                    )  # a GGUF file keeps its types
                    notall.export(
                        notall.Source(asked.model, dtype=dtype),
                        one,
                        target,
                        folder,
                        verify=False,
                    )
                there = asked_of(engine, python, folder, windows)
                rows.append(compared(engine, name, there, here[name]))
    title = (
        f"skip {plan}: {asked.windows} x {asked.length} tokens of {text.name}, nats a"
        " token"
    )
    print_table(table(title, COLUMNS, rows))
    if wrong := too_far(rows, asked.most):
        sys.exit(f"off by more than {asked.most}: {', '.join(wrong)}")


def too_far(rows: Sequence[Compared], most: float) -> list[str]:
    """The engines in which a repaired model's NLL is further off than the dense one's
    by more than `most`.
    """
    off = {(row.engine, row.model): abs(row.off) for row in rows}
    return [
        engine
        for engine, name in off
        if name == "repaired" and off[engine, name] > most + off[engine, "dense"]
    ]


if __name__ == "__main__":
    main()
