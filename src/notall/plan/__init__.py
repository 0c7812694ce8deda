"""What to leave out of a model: plans, the names in them, and the shape that they fit."""

from .fingerprint import Fingerprint
from .layers import MOST_LAYERS, Layers
from .model_shape import ModelShape, SublayerShape
from .plan import FOR_THIS_MODEL, Plan, refuse_nothing_to_train, refuse_prefill
from .plan_file import PUBLISHED, PUBLISHED_AS
from .prompt_skips import PromptSkips, bound_to_prompt
from .words import (
    KIND_NAMES,
    SET_NAMES,
    Kind,
    Phase,
    Skippable,
    in_ranges,
    several,
    several_of,
)

__all__ = [
    "FOR_THIS_MODEL",
    "KIND_NAMES",
    "MOST_LAYERS",
    "PUBLISHED",
    "PUBLISHED_AS",
    "SET_NAMES",
    "Fingerprint",
    "Kind",
    "Layers",
    "ModelShape",
    "Phase",
    "Plan",
    "PromptSkips",
    "Skippable",
    "SublayerShape",
    "bound_to_prompt",
    "in_ranges",
    "refuse_nothing_to_train",
    "refuse_prefill",
    "several",
    "several_of",
]
