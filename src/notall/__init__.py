"""Leave attention, MLP and block sublayers out of a causal language model, and measure what it costs and saves.

The names listed here are public, and so are those of the modules that the documentation's page on the Python API names:
they change with the version. All else may change at any time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choosing.choice import choose_plan
    from .choosing.criteria.data_free import deepest
    from .choosing.space import Space
    from .errors import UnsupportedModel, UsageError
    from .exporters import export
    from .exporters.remote_code import register
    from .measuring.quality import evaluate
    from .measuring.similarity import measure_similarity
    from .models.loading import load
    from .plan import Plan
    from .repairing.healing import heal
    from .repairing.refitting import repair
    from .repairing.students import TrainConfig
    from .running.generating import generate_text
    from .running.repaired import RepairedPlan
    from .running.skipping import draft_model, remove, skip
    from .structure.locating import locate
    from .structure.model_structure import Block, ModelStructure, Sublayer

__version__ = "0.1.0"

_HOMES = {
    "Block": "structure.model_structure",
    "ModelStructure": "structure.model_structure",
    "Plan": "plan",
    "RepairedPlan": "running.repaired",
    "Space": "choosing.space",
    "Sublayer": "structure.model_structure",
    "TrainConfig": "repairing.students",
    "UnsupportedModel": "errors",
    "UsageError": "errors",
    "choose_plan": "choosing.choice",
    "deepest": "choosing.criteria.data_free",
    "draft_model": "running.skipping",
    "evaluate": "measuring.quality",
    "export": "exporters",
    "generate_text": "running.generating",
    "heal": "repairing.healing",
    "load": "models.loading",
    "locate": "structure.locating",
    "measure_similarity": "measuring.similarity",
    "register": "exporters.remote_code",
    "remove": "running.skipping",
    "repair": "repairing.refitting",
    "skip": "running.skipping",
}

# as a literal, which type checkers read
__all__ = [
    "Block",
    "ModelStructure",
    "Plan",
    "RepairedPlan",
    "Space",
    "Sublayer",
    "TrainConfig",
    "UnsupportedModel",
    "UsageError",
    "__version__",
    "choose_plan",
    "deepest",
    "draft_model",
    "evaluate",
    "export",
    "generate_text",
    "heal",
    "load",
    "locate",
    "measure_similarity",
    "register",
    "remove",
    "repair",
    "skip",
]

if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that `import notall` stays quick."""
        if name not in _HOMES:
            raise AttributeError(f"module 'notall' has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return __all__
