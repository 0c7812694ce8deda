"""Write the plans of docs/results.md, where `--plan published:NAME` finds them, and
docs/plans.md: `make docs`.

Each is read from the committed record whose results the page shows; its note names the
record and the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from notall.plan import PUBLISHED, Plan

HERE = Path(__file__).parent
RECORDS = HERE.parent / "benchmarks"
TEXTS = {
    "mix": "the mix",
    "wiki+c4": "WikiText-2 and C4",
    "prose": "Python's documentation",
}
SMOLLM2, QWEN, GEMMA = "smollm2", "qwen2.5-coder-1.5b", "gemma-3-270m"
# The shape and the SHA-256 of the GGUF file of each model.
MODELS = {
    SMOLLM2: (
        "llama-30x576-f4c4294d",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    QWEN: (
        "qwen2-28x1536-e8a934d0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    GEMMA: (
        "gemma3_text-18x640-40cbec7b",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
CHOSEN = {
    "serving/mix-smollm2/kept.jsonl": (SMOLLM2, ("mix", "wiki+c4", "prose")),
    "serving/mix-qwen2.5-coder-1.5b/frontier.jsonl": (QWEN, ("mix",)),
}
COMPARED = {
    "comparison/comparison.jsonl": (
        SMOLLM2,
        ("attention 4", "attention 8", "block 4", "sublayer 16", "portable 8"),
    ),
    "comparison-gemma/comparison.jsonl": (GEMMA, ("attention 5", "block 2")),
}
PARETO = "pareto-llamacpp/pareto.jsonl"
HEAD = """# Published plans

<!-- Written by docs/plans.py from the records: run `make docs`. -->

Every plan of [the results](results.md) comes with notall and is taken by its name:

```sh title="needs the default model"
notall eval smollm2 --plan published:smollm2-attention-8-by-mix --text book.txt
```

In Python, `notall.Plan.load("published:smollm2-attention-8-by-mix")`. A plan is refused for a model of another shape.
Its note names the record of its results and the SHA-256 of the weights that it was measured on: other weights of that
shape have other losses.

| name | removes | chosen on |
| --- | --- | --- |
"""


def published() -> Iterator[tuple[str, Plan, str]]:
    """The name of each plan, the plan, and what it was chosen on."""
    for record, (model, texts) in CHOSEN.items():
        for asked, words in _lines(record)[0]["skipped"].items():
            what, _, text = asked.partition(" by ")
            if text in texts:
                name = f"{model}-{what.replace(':', '-')}-by-{text.replace('+', '-')}"
                yield name, _plan(model, record, **_indices(words)), TEXTS[text]
    for record, (model, amounts) in COMPARED.items():
        for row in _lines(record):
            amount = f"{row['space']} {row['count']}"
            if row["criterion"] == "search" and amount in amounts:
                name = f"{model}-{amount.replace(' ', '-')}-by-wiki"
                yield name, _plan(model, record, **row["plan"]), "WikiText-2"
    for row in _lines(PARETO):
        if (plan := row["provenance"]["what"]["subject"]["plan"])["attention"] and row[
            "type"
        ] == "F16":
            count, kind = row["model"].split()
            name = f"{SMOLLM2}-{kind.removesuffix('s')}-{count}-of-pareto"
            yield name, _plan(SMOLLM2, PARETO, **plan), "earlier searches"


def render() -> str:
    """The page, in Markdown."""
    rows = {
        name: f"| `{name}` | {plan} | {text} |\n" for name, plan, text in published()
    }
    return HEAD + "".join(rows.values())


def write() -> None:
    """The page, and a file for each plan."""
    (HERE / "plans.md").write_text(render(), encoding="utf-8")
    PUBLISHED.mkdir(exist_ok=True)
    for name, plan, _ in published():
        plan.save(PUBLISHED / f"{name}.json")


def _plan(model: str, record: str, attention: list[int], mlp: list[int]) -> Plan:
    shape, weights = MODELS[model]
    return Plan(
        attention,
        mlp,
        fingerprint=shape,
        note=f"of benchmarks/{record}; weights sha256:{weights}",
    )


def _indices(words: str) -> dict[str, list[int]]:
    """Of `block 3-5, 17; mlp 2`, as a plan tells itself."""
    found: dict[str, list[int]] = {"attention": [], "mlp": []}
    for kind, layers in re.findall(r"(block|attention|mlp) ([\d, -]+)", words):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", layers):
            for name in ("attention", "mlp") if kind == "block" else (kind,):
                found[name] += range(int(first), int(last or first) + 1)
    return found


def _lines(record: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (RECORDS / record).read_text(encoding="utf-8").splitlines()
    ]


if __name__ == "__main__":
    write()
