"""notall makes language models leave out what they don't need. See `notall --help` and the README."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import Anatomy, Block, Sublayer, locate
    from .choosing.one_plan import choose_plan
    from .errors import UnsupportedModel, UsageError
    from .exporters import export
    from .exporters.remote_code import register
    from .models import load
    from .plan import Plan, deepest
    from .quality import evaluate
    from .similarity import measure_similarity
    from .skipping import remove, skip
    from .space import Space

__version__ = "0.1.0"

_HOMES = {
    "Anatomy": "anatomy",
    "Block": "anatomy",
    "Plan": "plan",
    "Space": "space",
    "Sublayer": "anatomy",
    "UnsupportedModel": "errors",
    "UsageError": "errors",
    "choose_plan": "choosing.one_plan",
    "deepest": "plan",
    "evaluate": "quality",
    "export": "exporters",
    "load": "models",
    "locate": "anatomy",
    "measure_similarity": "similarity",
    "register": "exporters.remote_code",
    "remove": "skipping",
    "skip": "skipping",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import notall` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'notall' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
