"""Leave attention, MLP and block sublayers out of a causal language model, and measure
what it costs and saves.

Names listed here are public, and those on the documentation's page on the Python API;
all else may change at any time.
"""

from importlib import import_module

from .version import __version__

# as type checkers know it; `typing` may be a file of the working folder under python -m
TYPE_CHECKING = False

if TYPE_CHECKING:
    from .choosing.choice import choose_plan as choose_plan
    from .choosing.criteria.data_free import deepest as deepest
    from .choosing.search_config import SearchConfig as SearchConfig
    from .choosing.space import Space as Space
    from .errors import UnsupportedModel as UnsupportedModel, UsageError as UsageError
    from .exporters import Source as Source, export as export
    from .exporters.remote_code import register as register
    from .measuring.quality import (
        evaluate as evaluate,
        measure_similarity as measure_similarity,
    )
    from .models.loading import load as load
    from .plan import Plan as Plan
    from .repairing.healing import heal as heal
    from .repairing.refitting import repair as repair
    from .repairing.train_config import TrainConfig as TrainConfig
    from .running.generating import generate_text as generate_text
    from .running.prefill import prompt as prompt
    from .running.repaired import RepairedPlan as RepairedPlan
    from .running.skipping import (
        draft_model as draft_model,
        remove as remove,
        skip as skip,
    )
    from .structure.locating import locate as locate
    from .structure.model_structure import (
        Block as Block,
        ModelStructure as ModelStructure,
        Sublayer as Sublayer,
    )

_HOMES = {
    "Block ModelStructure Sublayer": "structure.model_structure",
    "Plan": "plan",
    "RepairedPlan": "running.repaired",
    "SearchConfig": "choosing.search_config",
    "Source": "exporters",
    "Space": "choosing.space",
    "TrainConfig": "repairing.train_config",
    "UnsupportedModel UsageError": "errors",
    "choose_plan": "choosing.choice",
    "deepest": "choosing.criteria.data_free",
    "draft_model remove skip": "running.skipping",
    "evaluate": "measuring.quality",
    "export": "exporters",
    "generate_text": "running.generating",
    "heal": "repairing.healing",
    "load": "models.loading",
    "locate": "structure.locating",
    "measure_similarity": "measuring.quality",
    "prompt": "running.prefill",
    "register": "exporters.remote_code",
    "repair": "repairing.refitting",
}

if not TYPE_CHECKING:  # which would take any name for one of these
    _MODULES = {
        name: module for names, module in _HOMES.items() for name in names.split()
    }
    __all__ = sorted([*_MODULES, "__version__"])

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used, so that `import notall` stays
        quick.
        """
        if name not in _MODULES:
            raise AttributeError(f"module 'notall' has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)

    def __dir__() -> list[str]:
        return __all__
