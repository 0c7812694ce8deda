"""Programs beside the package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def program(path: str) -> ModuleType:
    """The program at `path`, such as benchmarks/scoring; skips where these tests stand
    without it.
    """
    file = ROOT / f"{path}.py"
    if not file.is_file():
        pytest.skip(f"there is no {path} beside these tests", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(f"program {path}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up
    before = set(sys.modules)
    spec.loader.exec_module(module)
    # two folders may have files of one name, and each program means those beside it
    for name in set(sys.modules) - before:
        file_of_it = getattr(sys.modules[name], "__file__", None)
        if file_of_it and Path(file_of_it).is_relative_to(ROOT / "benchmarks"):
            del sys.modules[name]
    return module
