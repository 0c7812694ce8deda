"""The public API of plug-ins: what a criterion, a repair, an engine, an export target
and a task of your own may rely on.

Import from here and from `notall` alone; docs/api.md has each name. `API_VERSION` goes
up when a name goes or changes its meaning, and stays when one is added. A plug-in that
sets `NOTALL_API` in its module (or at the top of its package) is refused by a notall of
another version. A name is imported when it is first used, so that this module is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .entry_points import API_VERSION as API_VERSION

if TYPE_CHECKING:
    from .choosing.budget import Budget as Budget, by_count as by_count
    from .choosing.criteria.setting import (
        Criterion as Criterion,
        Setting as Setting,
        UnitScores as UnitScores,
    )
    from .choosing.evaluator import Evaluator as Evaluator
    from .choosing.space import (
        Choice as Choice,
        Skipped as Skipped,
        Unit as Unit,
    )
    from .engines import (
        Engine as Engine,
        Timing as Timing,
        Tokens as Tokens,
        medians as medians,
        resident_bytes as resident_bytes,
    )
    from .evaluation.checks import MadeTask as Task
    from .exporters import Export as Export, Source as Source
    from .exporters.checkpoint import CheckpointExport as CheckpointExport
    from .exporters.config_cuts import (
        cut_settings as cut_settings,
        rope_names as rope_names,
    )
    from .exporters.dense import DenseModel as DenseModel
    from .exporters.layout import moved_tensors as moved_tensors
    from .exporters.manifest import (
        NotVerified as NotVerified,
        Origin as Origin,
        Verification as Verification,
        Verified as Verified,
    )
    from .exporters.tensors import (
        FLOATS as FLOATS,
        Weight as Weight,
        Weights as Weights,
        check_copies as check_copies,
    )
    from .measuring.quality import Passage as Passage, walk as walk
    from .models.load_errors import quiet as quiet
    from .models.texts import all_checked as all_checked
    from .progress import (
        Progress as Progress,
        silent as silent,
        tracked as tracked,
    )
    from .repairing.least_squares import Moments as Moments
    from .repairing.methods import (
        Repair as Repair,
        RepairFunction as RepairFunction,
        method as repair_named,
    )
    from .repairing.projections import features_of as features_of
    from .repairing.streams import (
        DenseStream as DenseStream,
        Line as Line,
        LiveStep as LiveStep,
        lines_of as lines_of,
        steps_of as steps_of,
    )
    from .running.regrouping import (
        Layer as Layer,
        layers_of as layers_of,
        sparse_layers as sparse_layers,
    )
    from .running.repaired import LinearMap as LinearMap
    from .strict_json import Settings as Settings
    from .structure.model_structure import base_model as base_model
    from .structure.proving import relative_error as relative_error

# Where each name is defined.
_HOMES = {
    "Budget by_count": "choosing.budget",
    "Criterion Setting UnitScores": "choosing.criteria.setting",
    "Evaluator": "choosing.evaluator",
    "Choice Skipped Unit": "choosing.space",
    "Engine Timing Tokens medians resident_bytes": "engines",
    "Task": "evaluation.checks",
    "Export Source": "exporters",
    "CheckpointExport": "exporters.checkpoint",
    "DenseModel": "exporters.dense",
    "cut_settings rope_names": "exporters.config_cuts",
    "moved_tensors": "exporters.layout",
    "NotVerified Origin Verification Verified": "exporters.manifest",
    "FLOATS Weight Weights check_copies": "exporters.tensors",
    "Settings": "strict_json",
    "Passage walk": "measuring.quality",
    "quiet": "models.load_errors",
    "all_checked": "models.texts",
    "Progress silent tracked": "progress",
    "Repair RepairFunction repair_named": "repairing.methods",
    "features_of": "repairing.projections",
    "Moments": "repairing.least_squares",
    "DenseStream Line LiveStep lines_of steps_of": "repairing.streams",
    "Layer layers_of sparse_layers": "running.regrouping",
    "LinearMap": "running.repaired",
    "base_model": "structure.model_structure",
    "relative_error": "structure.proving",
}
# under another name there, next to the harness's tasks or in a module on repairs
_DEFINED_AS = {"Task": "MadeTask", "repair_named": "method"}

if not TYPE_CHECKING:  # which would take any name for one of these
    _MODULES = {
        name: module for names, module in _HOMES.items() for name in names.split()
    }
    __all__ = sorted([*_MODULES, "API_VERSION"])

    def __getattr__(name: str) -> object:
        """Import a name when it is first used."""
        if name not in _MODULES:
            raise AttributeError(f"module 'notall.plugins' has no attribute {name!r}")
        module = import_module(f".{_MODULES[name]}", __package__)
        return getattr(module, _DEFINED_AS.get(name, name))

    def __dir__() -> list[str]:
        return __all__
