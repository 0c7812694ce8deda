"""A program that uses notall, as `make lint` reads its types: strictly, and with names that are misspelt.

It is never run. mypy says where an `ignore` is of no use, so each misspelt name must be found.
"""
# mypy: disallow-any-generics, disallow-untyped-calls, disallow-untyped-decorators, warn-return-any, strict-equality

import torch

import notall
from notall import Plan, skipp  # type: ignore[attr-defined]  # noqa: F401

model, tokenizer = notall.load("smollm2")
plan: Plan = notall.deepest(notall.locate(model), "mlp", 0.1)
with notall.skip(model, plan) as skipped:
    tokens = skipped.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=4)
    same = model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=4)
nats: float = notall.evaluate(model, [plan], [torch.zeros(1, 2, dtype=torch.long)])[0].nll
notall.choose_pln()  # type: ignore[attr-defined]
