"""The public API of plug-ins: its names, its version, who is written with it alone, and
a package of a stranger.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import notall
from api import criteria, entry_points, made, target_named
from notall import Plan, UsageError, plugins
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it looks up names

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "notall"
WRITTEN_WITH_IT = [
    SOURCE / "exporters" / "executorch.py",
    SOURCE / "exporters" / "nemotron_nas.py",
    SOURCE / "repairing" / "methods" / "published.py",
    ROOT / "docs" / "template" / "notall_mine.py",
]
PAGES = [
    ROOT / "docs" / f"add-{kind}.md"
    for kind in ("criterion", "repair", "engine", "target", "task")
]


def imports_of_notall(source):
    """The modules of notall that code imports from, wherever in it; `.` for a relative
    import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names]
            yield from (one for one in names if one.partition(".")[0] == "notall")
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "."
            elif str(node.module).partition(".")[0] == "notall":
                yield str(node.module)


@pytest.mark.parametrize("file", WRITTEN_WITH_IT, ids=lambda file: file.stem)
def test_what_few_need_is_written_with_the_public_api_alone(file):
    assert {*imports_of_notall(file.read_text())} <= {"notall", "notall.plugins"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_on_adding_import_the_public_api_alone(page):
    blocks = re.findall(r"^```python.*?\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks
    modules = {name for code in blocks for name in imports_of_notall(code)}
    assert modules <= {"notall", "notall.plugins"}


def test_the_page_of_the_python_api_lists_its_names_and_no_other():
    page = (ROOT / "docs" / "api.md").read_text()
    section = page.partition("\n## Plug-ins\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| (`.+?`) \|", section, re.M)
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(plugins.__all__) == dir(plugins)
    assert len(names) == len(set(names))
    assert all(getattr(plugins, name) is not None for name in names)
    assert f"now {plugins.API_VERSION}." in section
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = plugins.Nothing


def test_importing_it_imports_no_library():
    code = (
        "import sys, notall.plugins;"
        " print({'torch', 'transformers', 'numpy', 'lm_eval'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


STRANGER = '''
from notall import Plan, UsageError
from notall.plugins import (
    CheckpointExport, DenseModel, NotVerified, Setting, Task, UnitScores, Verification,
    check_copies, cut_settings, layers_of, moved_tensors,
)

NOTALL_API = 1

def evens(setting: Setting) -> UnitScores:
    """Even layers first."""
    return {unit: int(unit[0].partition(".")[2]) % 2 for unit in setting.space.units}

def parrots(name: str, items: int, seed: int) -> Task:
    docs = [{"prompt": f"a bird {seed % 7} {n}", "answer": " sings"} for n in range(items)]
    return Task(name, docs, "loglikelihood", {"nats": False}, lambda _, said: {"nats": -said[0]})

class Bodies(CheckpointExport):
    @classmethod
    def of(cls, dense: DenseModel, plan: Plan) -> "Bodies":
        layers = layers_of(dense.structure, plan)
        if not all(layer.is_ordinary for layer in layers):
            raise UsageError("bodies have whole blocks only; skip blocks")
        tensors = {
            name.replace("model.", "body.", 1): tensor
            for name, tensor in moved_tensors(dense, layers)
        }
        settings = cut_settings(dense, layers) | {"model_type": "bodies"}
        return cls(dense, plan, settings, tensors, use="Bodies run it.", files={}, notes={})

    def verify(self, folder) -> Verification:
        check_copies(folder, self.tensors, self.texts)
        return NotVerified("no body is here")
'''
POINTS = """[notall.criteria]
evens = strangers.plugin:evens
[notall.targets]
bodies = strangers.plugin:Bodies
[notall.tasks]
parrots = strangers.plugin:parrots
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """An installed package outside of the repository, found by its entry points."""
    monkeypatch.chdir(tmp_path)
    site = tmp_path / "site"
    info = site / "strangers-2.0.dist-info"
    package = site / "strangers"
    for folder in (info, package):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: strangers\nVersion: 2.0\n"
    )
    (info / "entry_points.txt").write_text(POINTS)
    (package / "__init__.py").touch()
    (package / "plugin.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(site)
    yield package
    for name in [name for name in sys.modules if name.startswith("strangers")]:
        del sys.modules[name]


SMALL = [
    "--sequences",
    "2",
    "--length",
    "16",
    "--dtype",
    "float32",
    "--text",
    "text.txt",
]


def test_a_package_of_a_stranger_chooses_and_exports(stranger, run, short_prose):
    model = save_tiny_checkpoint(Path("tiny"), num_hidden_layers=4)
    Path("text.txt").write_text("a bird sings under the light of an old stone; " * 9)
    code, out, _ = run("criteria")
    assert (code, "Even layers first" in out) == (0, True)
    words = ["--criterion", "evens", "--skip", "block:2"]
    code, _, err = run("search", model, *words, *SMALL, "-o", "plan.json")
    assert (code, err) == (0, "")
    assert Plan.load("plan.json").indices == {"attention": [0, 2], "mlp": [0, 2]}
    words = ["--plan", "plan.json", "--to", "bodies", "--out", "bodies"]
    code, _, err = run("export", model, *words)
    assert (code, err) == (0, "")
    tensors = load_file("bodies/model.safetensors")
    assert "body.layers.1.mlp.down_proj.weight" in tensors
    assert "body.layers.2.mlp.down_proj.weight" not in tensors
    assert json.loads(Path("bodies/config.json").read_text())["num_hidden_layers"] == 2
    Plan([1]).save("other.json")
    words = ["--plan", "other.json", "--to", "bodies", "--out", "refused"]
    code, _, err = run("export", model, *words)
    assert (code, "bodies have whole blocks only" in err) == (2, True)


@pytest.mark.slow
def test_a_package_of_a_stranger_asks_the_model(stranger, run, short_prose):
    model = save_tiny_checkpoint(Path("tiny"), num_hidden_layers=4)
    Path("text.txt").write_text("a bird sings under the light of an old stone; " * 9)
    words = ["--skip", "block:1", "--tasks", "parrots", "--limit", "6", "--json"]
    code, out, err = run("eval", model, *words, *SMALL)
    assert code == 0, err
    (row,) = [row for row in json.loads(out)["tasks"] if row["metric"] == "nats,none"]
    assert (row["task"], row["documents"]) == ("parrots", 6)
    code, out, _ = run("tasks", "parrots")
    assert (code, "check" in out) == (0, True)


def test_a_task_that_is_none_is_refused(stranger):
    (stranger / "plugin.py").write_text("def parrots(name, items, seed):\n    return 3")
    with pytest.raises(UsageError, match=r"give back a notall\.plugins\.Task"):
        made("parrots")


@pytest.mark.parametrize("in_package", [False, True])
@pytest.mark.parametrize(
    ("version", "fix"),
    [("2", "update notall"), ("0", "update what it is in"), ("'x'", "update what")],
)
def test_a_plug_in_of_another_version_is_refused_by_name(
    stranger, version, fix, in_package
):
    file = stranger / ("__init__.py" if in_package else "plugin.py")
    old = STRANGER.replace("NOTALL_API = 1", "")
    (stranger / "plugin.py").write_text(old)
    file.write_text(f"{file.read_text()}\nNOTALL_API = {version}\n")
    wanted = version.strip("'")
    said = (
        rf"^evens \(strangers\.plugin:evens of strangers\) is written for version"
        rf" {wanted} of notall\.plugins, and this notall has version 1: {fix}"
    )
    with pytest.raises(UsageError, match=said):
        criteria.criterion("evens")
    with pytest.raises(UsageError, match=r"^bodies \(.* is written for version"):
        target_named("bodies")


def test_a_plug_in_that_names_no_version_or_this_one_is_taken(stranger):
    assert criteria.criterion("evens").description == "Even layers first"
    (stranger / "plugin.py").write_text(STRANGER.replace("NOTALL_API = 1", ""))
    for name in [name for name in sys.modules if name.startswith("strangers")]:
        del sys.modules[name]
    assert criteria.criterion("evens").description == "Even layers first"
    assert entry_points.API_VERSION == notall.plugins.API_VERSION
