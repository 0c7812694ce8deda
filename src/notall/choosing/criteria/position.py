"""By place alone: the deepest, as the paper has it, the shallowest, and any."""

from __future__ import annotations

import random

from .setting import Setting, UnitScores


def score_deepest(setting: Setting) -> UnitScores:
    """The deepest first (arXiv 2407.15516); for one kind the same sets as `deepest`."""
    return {unit: -float(place) for place, unit in enumerate(setting.space.units)}


def score_shallowest(setting: Setting) -> UnitScores:
    """The shallowest first."""
    return {unit: float(place) for place, unit in enumerate(setting.space.units)}


def score_random(setting: Setting) -> UnitScores:
    """In an order drawn with the setting's seed: what any criterion must beat."""
    draw = random.Random(setting.seed)
    return {unit: draw.random() for unit in setting.space.units}
