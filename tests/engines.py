"""Engines beside transformers: skip or demand them, and keep what their tests found.

llama.cpp comes with the development tools; others have an environment of their own, in
which `make test-engines` runs their tests. What worked is kept in docs/engines.jsonl,
from which docs/engines.md is rendered: a test fails when its line is absent or
different, and writes it instead with NOTALL_RECORD=1 (`make engines`).
"""

import importlib.util
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

# the target of lines that are not of an engine but of a kind of checkpoint
QUANTISED = "quantised"
KEPT = Path(__file__).parent.parent / "docs" / "engines.jsonl"


def needs(module: str, command: str = "make test-engines") -> pytest.MarkDecorator:
    """Skip where `module` is absent; raise instead where NOTALL_ENGINE says that this
    run is for it.
    """
    absent = importlib.util.find_spec(module) is None
    if absent and os.environ.get("NOTALL_ENGINE") == module:
        raise RuntimeError(
            f"{module} should have been tested here, and is not installed"
        )
    return pytest.mark.skipif(absent, reason=f"no {module} here: {command}")


def works(
    engine: str, package: str, target: str, architecture: str, plans: str, how: str = ""
) -> None:
    """This engine runs such an export of this architecture, and answers as the skipped
    model does.
    """
    key = {
        "engine": engine,
        "target": target,
        "how": how,
        "plans": plans,
        "architecture": architecture,
    }
    _compare_or_record(key, {"verdict": "works"}, version(package))


def quantised(kind: str, plans: str, verdict: str, reason: str = "") -> None:
    """What became of a quantised checkpoint: `exact` where it ran, `copied` where only
    its tensors were compared.
    """
    key = {
        "engine": "transformers",
        "target": QUANTISED,
        "how": "",
        "plans": plans,
        "architecture": kind,
    }
    _compare_or_record(
        key, {"verdict": verdict}, version("transformers"), reason=reason
    )


def refused(target: str, architecture: str, plans: str, reason: str) -> None:
    """There is no such export of this architecture."""
    key = {
        "engine": "",
        "target": target,
        "how": "",
        "plans": plans,
        "architecture": architecture,
    }
    reason = re.sub(
        r"\d\.\de-\d\d", "...", reason
    )  # such numbers differ from machine to machine
    _compare_or_record(key, {"verdict": "refused"}, "", reason=reason)


def refusing(target: str, plans: str) -> set[str]:
    """The architectures of which there is no such export."""
    asked = {"verdict": "refused", "target": target, "plans": plans}
    return {line["architecture"] for line in read() if asked.items() <= line.items()}


def read() -> list[dict[str, str]]:
    return (
        [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
        if KEPT.exists()
        else []
    )


def _compare_or_record(
    key: dict[str, str], found: dict[str, str], release: str, **more: str
) -> None:
    if os.environ.get("NOTALL_RECORD"):
        line = key | found | more | {"version": release}
        with FileLock(f"{KEPT}.lock"):
            lines = [
                other
                for other in read()
                if {name: other[name] for name in key} != key or _is_other(other, line)
            ]
            lines = sorted([*lines, line], key=json.dumps)
            KEPT.write_text(
                "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
            )
        return
    expected = key | found
    assert any(expected.items() <= line.items() for line in read()), (
        "docs/engines.jsonl is out of date: make engines"
    )


def _is_other(line: dict[str, str], new: dict[str, str]) -> bool:
    """transformers is tested on two lines, which are kept beside each other."""
    return (
        line["engine"] == "transformers"
        and line["version"].split(".")[0] != new["version"].split(".")[0]
    )
