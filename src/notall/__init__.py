"""Leave attention, MLP and block sublayers out of a causal language model, and measure what it costs and saves.

The names listed here are public, and so are those of the modules that the documentation's page on the Python API names:
they change with the version. All else may change at any time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models.chatter import drop_chatter

if TYPE_CHECKING:
    from .choosing.choice import choose_plan
    from .choosing.space import Space
    from .errors import UnsupportedModel, UsageError
    from .evaluation.paper.grid import deepest
    from .exporters import export
    from .exporters.remote_code import register
    from .measuring.quality import evaluate
    from .measuring.similarity import measure_similarity
    from .records.plan import Plan
    from .repairing.healing import heal
    from .repairing.refitting import repair
    from .running.drafting import draft_model
    from .running.generating import generate_text
    from .running.opening import load
    from .running.repaired import RepairedPlan
    from .running.skipping import remove, skip
    from .structure.anatomy import Anatomy, Block, Sublayer
    from .structure.locating import locate

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "structure.anatomy",
    "Block": "structure.anatomy",
    "Plan": "records.plan",
    "RepairedPlan": "running.repaired",
    "Space": "choosing.space",
    "Sublayer": "structure.anatomy",
    "UnsupportedModel": "errors",
    "UsageError": "errors",
    "choose_plan": "choosing.choice",
    "deepest": "evaluation.paper.grid",
    "draft_model": "running.drafting",
    "evaluate": "measuring.quality",
    "export": "exporters",
    "generate_text": "running.generating",
    "heal": "repairing.healing",
    "load": "running.opening",
    "locate": "structure.locating",
    "measure_similarity": "measuring.similarity",
    "register": "exporters.remote_code",
    "remove": "running.skipping",
    "repair": "repairing.refitting",
    "skip": "running.skipping",
}

# as a literal, which type checkers read
__all__ = [
    "Anatomy",
    "Block",
    "Plan",
    "RepairedPlan",
    "Space",
    "Sublayer",
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

drop_chatter()


if not TYPE_CHECKING:  # which would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, so that `import notall` stays quick."""
        if name not in _HOMES:
            raise AttributeError(f"module 'notall' has no attribute {name!r}")
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return __all__
