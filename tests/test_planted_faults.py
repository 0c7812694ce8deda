"""Faults about devices, planted one by one in a copy of the package: the tests see
each. `plant_faults.py` does so with those of all else.
"""

from __future__ import annotations

import shutil

import pytest

import forked
from planted_faults import FAULTS as OTHERS, SOURCE, TESTS, Fault

pytestmark = pytest.mark.any_transformers

# In a fork of a process that has imported the package as it is, and all that is slow to
# import.
PROGRAM = """
import sys

sys.path.insert(0, sys.argv[1])
for name in [*sys.modules]:
    if name.partition(".")[0] == "notall":
        del sys.modules[name]

import pytest
import torch
from simulated_devices import simulate

if not torch.cuda.is_available():
    simulate()
quick = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", ""]
sys.exit(pytest.main([*quick, *sys.argv[2:]]))
"""


def of_devices(file, right, wrong, seen_by, tests="test_devices.py"):
    return Fault(file, right, wrong, tests, seen_by)


REPLAY, RECORDING = "running/replay.py", "running/recording.py"
MLP_AHEAD = "in self.before:\n            hidden = holder(scaled(hidden), call){}"
FAULTS = [
    of_devices(
        "models/texts.py",
        "yield batch.to(device=device)",
        "yield batch",
        "one-similarity",
    ),
    of_devices(
        REPLAY,
        "hidden.to(recording.devices[step.block.index])",
        "hidden",
        "llama-two-evaluate",
    ),
    of_devices(RECORDING, "value.to(inputs_device(inner))", "value", "llama-one-score"),
    of_devices(REPLAY, "step.map = step.map.like(hidden)", "pass", "matrices"),
    of_devices(
        "measuring/heads.py",
        "expected.to(found.device)",
        "expected",
        "two-evaluate",
    ),
    of_devices(
        "measuring/token_scores.py",
        "one.to(here)",
        "one.to(likely.device)",
        "two and guesses",
    ),
    of_devices(
        "structure/observation.py",
        "self.sharing.hand_on(args[0], result)",
        "pass",
        "two-locate",
    ),
    of_devices(
        "running/regrouped.py",
        MLP_AHEAD.format(".to(here)"),
        MLP_AHEAD.format(""),
        "llama-two-skip",
    ),
    of_devices(
        "running/cutting.py",
        " and runs_on(one) == runs_on(other)",
        "",
        "llama-two-remove",
    ),
    of_devices(
        "running/generating.py", "inputs_device(model)", "model.device", "embedding"
    ),
    of_devices(
        "running/generating.py", "fork_rng(devices)", "fork_rng(())", "random_numbers"
    ),
    of_devices(
        "measuring/speed.py", 'if device.type != "cpu"]', "if False]", "llama-one-times"
    ),
    of_devices(
        "engines/__init__.py",
        "not torch.cuda.is_initialized()",
        "torch",
        "engine_tells",
    ),
]

STREAMS, SOLVING = "repairing/streams.py", "repairing/solving.py"
PROJECTIONS, PUBLISHED = "repairing/projections.py", "repairing/methods/published.py"
LOOP, TRAINING = "repairing/training_loop.py", "repairing/training.py"
AT_LAYER = "(stream.at_layer(step, states) for states in both)"
ON_DEVICE, LIKE_FEATURES = (
    "torch.empty(0, dtype=self.exact, device=self.device)",
    "self.features[0].new_empty(0)",
)
FAULTS += [
    of_devices(file, right, wrong, seen_by, "test_repair_devices.py")
    for file, right, wrong, seen_by in (
        (STREAMS, "hidden.to(recording.devices[index])", "hidden", "llama-two-repair"),
        (
            STREAMS,
            "scaled(behind, self.scale).to(hidden.device)",
            "scaled(behind, self.scale)",
            "llama-two-by",
        ),
        (STREAMS, "one.embedded.to(one.device)", "one.embedded", "no_layer"),
        (SOLVING, ON_DEVICE, LIKE_FEATURES, "one-repair"),
        (
            SOLVING,
            "stream.to(self.device, self.exact)",
            "stream.to(self.exact)",
            "one-repair",
        ),
        (
            SOLVING,
            "self.metric.to(self.device, self.exact)",
            "self.metric.to(self.exact)",
            "llama-two-repair",
        ),
        (
            SOLVING,
            "dtype=self.before[0].dtype, device=self.device",
            "dtype=self.before[0].dtype",
            "gemma3-two-repair",
        ),
        (
            PROJECTIONS,
            "self.probe.embedded.to(self.probe.devices[part.index])",
            "self.probe.embedded",
            "two-repair",
        ),
        (PROJECTIONS, "gain.to(ones.device)", "gain", "llama-two-repair"),
        (
            PROJECTIONS,
            "device=inputs_device(model)",
            "device=next(layers[0].parameters()).device",
            "no_layer",
        ),
        (PUBLISHED, AT_LAYER, "both", "llama-two-by"),
        (
            "repairing/methods/registry.py",
            "[*checked(batches, model)]",
            "[*batches]",
            "one-repair",
        ),
        (
            LOOP,
            "torch.stack(sums).to(student.device)",
            "torch.stack(sums)",
            "llama-two-heal",
        ),
        (
            LOOP,
            "seeded(self.config.seed)",
            "torch.random.fork_rng([self.teacher.device])",
            "random_numbers",
        ),
        (
            TRAINING,
            "any(one.is_meta for one in model.parameters())",
            "False",
            "offloaded",
        ),
    )
]


def copied(folder):
    """The package in a folder of its own, which comes first on the path."""
    return shutil.copytree(
        SOURCE, folder / "notall", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.mark.parametrize("fault", [*FAULTS, *OTHERS], ids=str)
def test_is_planted_where_it_is_written_once(fault):
    content = (SOURCE / fault.file).read_text(encoding="utf-8")
    assert fault.planted(content) != content


def test_one_that_is_written_in_another_way_now_is_told():
    with pytest.raises(AssertionError, match="0 times"):
        OTHERS[0].planted("")


@pytest.mark.slow
@pytest.mark.devices  # skipped where none can be simulated
@pytest.mark.parametrize("tests", ["test_devices.py", "test_repair_devices.py"])
def test_without_a_fault_the_same_tests_pass(tests, tmp_path):
    copied(tmp_path)
    select = "llama-two-evaluate or llama-two-repair or llama-two-heal or no_layer"
    run = forked.run(PROGRAM, tmp_path, TESTS / tests, "-k", select)
    assert run.returncode == pytest.ExitCode.OK, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.devices
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_is_seen(fault, tmp_path):
    file = copied(tmp_path) / fault.file
    content = file.read_text(encoding="utf-8")
    file.write_text(fault.planted(content), encoding="utf-8")
    run = forked.run(PROGRAM, tmp_path, TESTS / fault.tests, "-k", fault.seen_by)
    assert run.returncode == pytest.ExitCode.TESTS_FAILED, (
        run.stdout[-2000:] + run.stderr[-2000:]
    )
    assert "1 failed" in run.stdout
