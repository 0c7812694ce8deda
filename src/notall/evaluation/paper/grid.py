"""The paper's rule, skip the deepest, and the grid of configurations that it is tried at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import get_args

from ...errors import UsageError, expect
from ...records.plan import Plan, Skippable, Variant
from ...records.record import Configured
from ...structure.anatomy import Anatomy

SKIPPABLE: tuple[Skippable, ...] = get_args(Skippable)
FRACTIONS = (0.10, 0.25, 0.33)  # of the layers; the paper's


def deepest(anatomy: Anatomy, skip: Skippable, fraction: float, *, keep_last: bool = False) -> Plan:
    """The paper's rule: skip the last k = round(fraction x layers) of them; with `keep_last`, the k before the last.

    Where layers lack one of the two, as in hybrids, k is that part of those that have what is skipped.
    Source: arXiv 2407.15516, sections 2 and 3. Raises `UsageError` for an unknown kind, a fraction outside 0..1, or a
    fraction that leaves no attention.
    """
    expect(anatomy, Anatomy, "the anatomy of a model: notall.locate(model)")
    if skip not in SKIPPABLE:
        raise UsageError(f"cannot skip {skip!r}: choose one of {', '.join(SKIPPABLE)}")
    expect(fraction, Real, "the fraction to skip, a number from 0 to 1")
    if not 0 <= fraction <= 1:
        raise UsageError(f"fraction {fraction} is outside 0..1: 0.33 skips a third of the layers")
    layers = [block for block in anatomy.blocks if skip == "block" or skip in block.kinds]
    count = min(round(fraction * len(layers)), len(layers) - keep_last)
    last = len(layers) - keep_last
    chosen = layers[last - count : last]
    plan = Plan(
        attention=[block.index for block in chosen if skip != "mlp" and "attention" in block.kinds],
        mlp=[block.index for block in chosen if skip != "attention" and "mlp" in block.kinds],
        fingerprint=anatomy.fingerprint,
        note=f"deepest {count} of {len(layers)} {skip}{', last kept' if keep_last else ''}",
    )
    plan.check(anatomy)
    return plan


@dataclass(frozen=True)
class Configuration:
    """One row of the grid; `fraction` is what was asked for, and the plan holds round(fraction x layers) of them."""

    variant: Variant
    fraction: float
    keep_last: bool
    plan: Plan

    def describes(self, record: Configured) -> bool:
        """Whether a record is of this row, and of the plan that the row stands for in this model."""
        same = (self.variant, self.fraction, self.keep_last) == (record.variant, record.fraction, record.keep_last)
        return same and self.plan.indices == record.plan.indices

    @property
    def name(self) -> str:
        if self.variant == "dense":
            return "dense"
        return f"{self.variant} {self.fraction:.0%}{' keep last' if self.keep_last else ''}"


def paper_grid(anatomy: Anatomy, fractions: Sequence[float] = FRACTIONS) -> list[Configuration]:
    """Dense and {attention, mlp, block} x fractions x {keep last no, yes}. Source: arXiv 2407.15516, section 3."""
    rows = [Configuration("dense", 0.0, False, Plan(fingerprint=anatomy.fingerprint))]
    for variant in SKIPPABLE:
        for fraction in fractions:
            for keep_last in (False, True):
                plan = deepest(anatomy, variant, fraction, keep_last=keep_last)
                rows.append(Configuration(variant, fraction, keep_last, plan))
    return rows
