"""Render docs/engines.md from docs/engines.jsonl, which the tests write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from notall.exporters.gguf_cut import HYBRIDS, ORDINARY

HERE = Path(__file__).parent
HEAD = """# Engines

<!-- Rendered by docs/engines.py from what the tests found: run `make engines`. -->

`notall export MODEL --plan plan.json --to TARGET --out DIR` writes files that engines load. Which target?

| target | what it is | for |
| --- | --- | --- |
| `hf` | a portable plan or one of whole blocks: an ordinary checkpoint of the same architecture, with fewer layers | everything that loads the original model |
| `hf` | any other plan: the regrouped form, one attention per layer, under a model type of its own | transformers; vLLM |
| `hf` | a plan that skips in the prompt alone: the whole model, and what its prompts skip, under a model type of its own | transformers; vLLM with notall |
| `nemotron-nas` | a DeciLM checkpoint, whose layers may lack a sublayer | vLLM, MLX-LM; made for SGLang, TensorRT-LLM and ExLlamaV3 too, which are not run here |
| `gguf` | the GGUF file of the original model, rewritten; other plans than portable ones as `deci` | llama.cpp and its derivatives; turn flash attention on |
| `executorch`, `executorch-8da4w` | a program (`.pte`) for XNNPACK, of ExecuTorch's own Llama with layers that may lack a sublayer | ExecuTorch on CPUs |
| `swiftkv` | SwiftKV's checkpoint, of a plan whose prompt skips the last blocks, Llama and Qwen2 | made for ArcticInference, which needs a GPU and was not run |

A plan is *portable* when the remaining sublayers alternate attention, MLP, attention, MLP. vLLM's nemotron-nas cannot run a
model whose first layer has an MLP and no attention: export to `hf` then.

`gguf` writes portable plans and whole blocks for every architecture that llama.cpp builds of blocks of one attention and
one MLP: <ordinary>. It writes hybrids by whole layers, and by portable plans where a layer has two sublayers: <hybrid>. Only those
in the table below were run. llama.cpp derives the kinds of Qwen3-Next's layers from their position, so plans keep its
periods; for Qwen3.5 the file lists them, which llama.cpp reads since 2026.

## Works

Each was run on tiny models: the engine's outputs equal those of the pruned model in memory (float32; logits, or log-probabilities of
the likeliest tokens). GGUF files of hybrids and of Gemma 4 are compared with llama.cpp's own outputs for the original file, in which
the skipped sublayers add nothing.

| engine | release | target | plans | how | architectures |
| --- | --- | --- | --- | --- | --- |
"""
QUANTISED = """
## Quantised checkpoints

Checkpoints with quantised weights. Each is tiny; where its kind allows, a rule that names one layer keeps the MLP of that layer
unquantised, and an export renumbers such rules.

- *exact*: the outputs equal, to the last bit, those of hooks that silence the same sublayers (in memory), or those of the
  pruned model (exports).
- *copied*: transformers does not run the original checkpoint either, so the export was not run. Its tensors are the
  original's, bit for bit, its settings are renumbered, and the manifest says so.

| checkpoint | transformers | in memory | `hf`, portable | `hf`, any plan |
| --- | --- | --- | --- | --- |
"""
AFTER_QUANTISED = """
transformers unpacks fp8, mxfp4 and compressed-tensors on a CPU. Another kind is exported where its settings do not distinguish
layers, and refused otherwise. nemotron-nas takes plain weights alone. `gguf` rewrites a GGUF file whatever its quantisation. None of these exports was run
in vLLM, SGLang or TensorRT-LLM.
"""
REFUSED = """
## Refused

| target | architecture | plans | reason |
| --- | --- | --- | --- |
"""


def render(lines: list[dict[str, str]]) -> str:
    """The page, in Markdown."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for line in lines:
        if line["verdict"] == "works":
            key = tuple(
                line[name] for name in ("engine", "version", "target", "plans", "how")
            )
            groups.setdefault(key, []).append(line["architecture"])
    works = [
        _row(*key, ", ".join(sorted(found, key=str.lower)))
        for key, found in sorted(groups.items())
    ]
    refused = [
        _row(
            line["target"],
            line["architecture"],
            line["plans"],
            line["reason"].replace("|", "/"),
        )
        for line in sorted(
            lines, key=lambda line: (line["target"], line["architecture"].lower())
        )
        if line["verdict"] == "refused" and line["target"] != "quantised"
    ]
    head = HEAD.replace("<ordinary>", ", ".join(sorted(ORDINARY))).replace(
        "<hybrid>", ", ".join(sorted(HYBRIDS))
    )
    quantised = "".join(
        _quantised([line for line in lines if line["target"] == "quantised"])
    )
    return (
        head
        + "".join(works)
        + QUANTISED
        + quantised
        + AFTER_QUANTISED
        + REFUSED
        + "".join(refused)
    )


def _quantised(lines: list[dict[str, str]]) -> Iterator[str]:
    """A row for each kind of checkpoint and release of transformers."""
    found = {
        (line["architecture"], line["version"], line["plans"]): line for line in lines
    }
    for kind, release in sorted({(kind, release) for kind, release, _ in found}):
        cells = (
            found.get((kind, release, plans), {})
            for plans in ("in memory", "portable", "any")
        )
        yield _row(kind, release, *(_verdict(line) for line in cells))


def _verdict(line: dict[str, str]) -> str:
    return ": ".join(
        part for part in (line.get("verdict", ""), line.get("reason", "")) if part
    )


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def read() -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (HERE / "engines.jsonl").read_text(encoding="utf-8").splitlines()
    ]


if __name__ == "__main__":
    (HERE / "engines.md").write_text(render(read()), encoding="utf-8")
