"""What a command takes, in a process of its own."""

import pytest

from programs import program
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it looks at processes

costs = program("benchmarks/costs")


@pytest.mark.slow
def test_a_command_has_its_time_its_memory_and_no_path(tmp_path):
    found = costs.cost(f"plan {save_tiny_checkpoint(tmp_path / 'tiny')} -o plan.json")
    assert found.command == "notall plan tiny -o plan.json"
    assert 0 < found.cpu_seconds < 10 * found.seconds
    assert found.peak_bytes > 10**7


def test_a_command_that_fails_ends_the_program():
    with pytest.raises(SystemExit, match="exit code 2: notall plan --no-such-option"):
        costs.cost("plan --no-such-option")
