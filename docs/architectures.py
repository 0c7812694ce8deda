"""Render docs/architectures.md from docs/architectures.jsonl, which the tests write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """# Architectures

<!-- Rendered by docs/architectures.py from what the tests found: run `make architectures`. -->

`notall` has no table of architectures: it traces each layer's operations on its hidden states, and verifies the result
by running every layer again from its parts, or alone and with stubs. An architecture that is not listed here works if
that check succeeds, and is refused with a reason if not.
"""
PROVED = """
## Verified

For each family a tiny random model, with 8 plans, equals the model in which plain hooks make the same sublayers add
nothing: logits to 1e-5 of the largest, in float32; without a cache, with one, and in `generate`, for padded and
unpadded batches. Models with other mixers (linear attentions, state spaces, convolutions) are tried with plans by kind:
all of one kind, all but one attention, whole layers, MLPs; where the original model differs with a
cache and without, like is compared with like. `a / b`: some layers have one, some the other; `-`: a layer has only
one sublayer; `the whole layer`: it cannot be split. *Static cache*: also with one (else the original model has
none). Sublayers are named by the modules that run, in order; `+` joins the terms of a sum.

| family | block | attention | MLP | implementations | static cache | transformers |
| --- | --- | --- | --- | --- | --- | --- |
"""
REFUSED = """
## Refused

| family | reason | transformers |
| --- | --- | --- |
"""
NOT_TRIED = """
## Not tried

Types that transformers can load as causal language models, without a tiny model here.

| type | reason | transformers |
| --- | --- | --- |
"""


def render(lines: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    families = {
        line["family"]: [other for other in lines if other["family"] == line["family"]]
        for line in lines
    }
    proved, refused, not_tried = [], [], []
    for name, found in families.items():
        exact = [line for line in found if line["verdict"] == "exact"]
        against = [line for line in found if line["verdict"] == "refused"]
        not_tried += [
            _row(name, line["reason"], _versions([line]))
            for line in found
            if line["verdict"] == "not tried"
        ]
        if exact:
            proved.append(_row(name, *_facts(exact[-1]), _versions(exact)))
        if against:
            refused.append(
                _row(name, against[-1]["reason"].replace("|", "/"), _versions(against))
            )
    tables = ((PROVED, proved), (REFUSED, refused), (NOT_TRIED, not_tried))
    return HEAD + "".join(
        f"{head}{''.join(rows)}\n{len(rows)} families and variants.\n"
        for head, rows in tables
    )


def _facts(line: dict[str, Any]) -> tuple[str, ...]:
    sublayers = (f"`{sublayer}`" for sublayer in line["sublayers"])
    return (
        line["block"],
        *sublayers,
        line["attention"],
        "yes" if line["static_cache"] else "no",
    )


def _versions(lines: list[dict[str, Any]]) -> str:
    return ", ".join(line["transformers"] for line in lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def read() -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (
            (HERE / "architectures.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]


if __name__ == "__main__":
    (HERE / "architectures.md").write_text(render(read()), encoding="utf-8")
