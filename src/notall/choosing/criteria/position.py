"""By place alone: the deepest, as the paper has it, the shallowest, and any."""

from __future__ import annotations

import random
from typing import get_args

from ...anatomy import Anatomy
from ...errors import UsageError
from ...plan import Plan, Skippable
from .setting import Scores, Setting

SKIPPABLE: tuple[Skippable, ...] = get_args(Skippable)


def deepest(anatomy: Anatomy, skip: Skippable, fraction: float, *, keep_last: bool = False) -> Plan:
    """The paper's rule: skip the last k = round(fraction x layers) of them; with `keep_last`, the k before the last.

    Source: arXiv 2407.15516, sections 2 and 3. Raises `UsageError` for an unknown kind, a fraction outside 0..1, or a
    fraction that leaves no attention.
    """
    if skip not in SKIPPABLE:
        raise UsageError(f"cannot skip {skip!r}: choose one of {', '.join(SKIPPABLE)}")
    if not 0 <= fraction <= 1:
        raise UsageError(f"fraction {fraction} is outside 0..1: 0.33 skips a third of the layers")
    layers = len(anatomy.blocks)
    count = min(round(fraction * layers), layers - keep_last)
    last = layers - 1 if keep_last else layers
    indices = range(last - count, last)
    plan = Plan(
        attention=indices if skip != "mlp" else (),
        mlp=indices if skip != "attention" else (),
        fingerprint=anatomy.fingerprint,
        note=f"deepest {count} of {layers} {skip}{', last kept' if keep_last else ''}",
    )
    plan.check(anatomy)
    return plan


def score_deepest(setting: Setting) -> Scores:
    """The deepest first (arXiv 2407.15516); for one kind the same sets as `deepest`."""
    return {unit: -float(place) for place, unit in enumerate(setting.space.units)}


def score_shallowest(setting: Setting) -> Scores:
    """The shallowest first."""
    return {unit: float(place) for place, unit in enumerate(setting.space.units)}


def score_random(setting: Setting) -> Scores:
    """In an order drawn with the setting's seed: what any criterion must beat."""
    draw = random.Random(setting.seed)
    return {unit: draw.random() for unit in setting.space.units}
