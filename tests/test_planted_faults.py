"""Faults about devices, planted one by one in a copy of the package: the tests see each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "notall"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.devices,  # skipped where none can be simulated
    pytest.mark.any_transformers,
]

PROGRAM = """
import sys

import pytest
import torch
from simulated_devices import simulate

if not torch.cuda.is_available():
    simulate()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Fault:
    file: str  # below the package
    right: str  # a piece of it, once
    wrong: str
    seen_by: str  # tests of test_devices.py, as for pytest -k

    def __str__(self) -> str:
        return f"{self.file}: {self.seen_by}"


REPLAY, SKIPPING = "running/replay.py", "running/skipping.py"
MLP_AHEAD = "hidden = holder(scaled(hidden), call){}\n        hidden = scaled(hidden)\n        if"
FAULTS = [
    Fault("models/texts.py", "yield batch.to(device=device)", "yield batch", "one-similarity"),
    Fault(REPLAY, "hidden.to(recording.devices[step.block.index])", "hidden", "llama-two-evaluate"),
    Fault(REPLAY, "value.to(inputs_device(inner))", "value", "llama-one-score"),
    Fault(REPLAY, "step.map = step.map.like(hidden)", "pass", "matrices"),
    Fault("measuring/token_scores.py", "expected.to(found.device)", "expected", "two-evaluate"),
    Fault("measuring/token_scores.py", "one.to(here)", "one.to(likely.device)", "two and guesses"),
    Fault("structure/observation.py", "self.sharing.hand_on(args[0], result)", "pass", "two-locate"),
    Fault(SKIPPING, MLP_AHEAD.format(".to(here)"), MLP_AHEAD.format(""), "llama-two-skip"),
    Fault(SKIPPING, " and runs_on(one) == runs_on(other)", "", "llama-two-remove"),
    Fault("running/generating.py", "inputs_device(model)", "model.device", "embedding"),
    Fault("running/generating.py", "fork_rng(seeded)", "fork_rng(())", "random_numbers"),
    Fault("measuring/speed.py", 'if device.type != "cpu"]', "if False]", "llama-one-times"),
    Fault("engines/__init__.py", "not torch.cuda.is_initialized()", "torch", "engine_tells"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_is_seen(fault, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "notall", ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / "notall" / fault.file
    content = file.read_text(encoding="utf-8")
    assert content.count(fault.right) == 1, "it is written in another way now: plant the fault there"
    file.write_text(content.replace(fault.right, fault.wrong), encoding="utf-8")
    command = [sys.executable, "-c", PROGRAM, str(TESTS / "test_devices.py"), "-k", fault.seen_by]
    path = os.pathsep.join(map(str, (tmp_path, TESTS)))
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, run.stdout[-2000:] + run.stderr[-2000:]
    assert "1 failed" in run.stdout
