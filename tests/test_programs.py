"""Programs outside of the package import what exists."""

import ast
import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_transformers  # it reads programs
ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(
    path for folder in ("benchmarks", "docs") for path in (ROOT / folder).rglob("*.py")
)


def missing(source: str) -> list[str]:
    """What a program imports from notall and notall has not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if (node.module or "").split(".")[0] != "notall":
            continue
        module = importlib.import_module(node.module)
        found += [
            f"{node.module}.{name.name}"
            for name in node.names
            if not hasattr(module, name.name) and not is_module(node.module, name.name)
        ]
    return found


def is_module(package: str, name: str) -> bool:
    try:
        return importlib.util.find_spec(f"{package}.{name}") is not None
    except ModuleNotFoundError:  # what should hold it is no package
        return False


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_imports_what_exists(path):
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_name_that_moved_is_seen():
    source = "from notall.structure.locating import forget, locate"
    assert missing(source) == ["notall.structure.locating.forget"]
