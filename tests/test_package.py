"""The package as people install it: what is in it, that it works on its own, and what
it does without its extras.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import result_folders
from command_line import TIMED
from notall import Plan, __version__ as version
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it packs and installs files

ROOT = Path(__file__).parent.parent
OPTIONAL = (
    "altair",
    "vl_convert",
    "jinja2",
    "lm_eval",
    "datasets",
    "ray",
    "zensical",
    "playwright",
)
QUICK = ("--sequences", "1", "--length", "16", *TIMED, "--dtype", "float32")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = {
        str(file.relative_to(ROOT / "src"))
        for file in (ROOT / "src" / "notall").rglob("*")
        if file.is_file()
    }
    source = {name for name in source if "__pycache__" not in name}
    assert {
        "notall/py.typed",
        "notall/report/page.html",
        "notall/report/page.js",
    } <= source
    assert {name for name in names if ".dist-info/" not in name} == source
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_tests_need(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "tests/test_package.py",
        "docs/commands.py",
    } <= names
    assert "benchmarks/engines/load.py" in names
    assert "hatch_build.py" in names
    assert not any(name.startswith((".venv", "results", "site")) for name in names)


RELATIVE = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")


def described(folder, **variables):
    """The metadata of a wheel that is built with these variables: fields, and the
    page.
    """
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    environment = os.environ | variables
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        (name,) = (one for one in wheel.namelist() if one.endswith("/METADATA"))
        fields, _, page = wheel.read(name).decode().partition("\n\n")
    return fields, page


def test_links_of_the_package_page_lead_to_the_files_of_the_release(tmp_path):
    address = "https://example.org/notall"
    fields, page = described(tmp_path, NOTALL_REPOSITORY=address)
    assert f"Project-URL: Source, {address}\n" in fields
    assert RELATIVE.findall(page) == []
    for name in set(RELATIVE.findall((ROOT / "README.md").read_text())):
        kind = "raw" if name.endswith(".svg") else "blob"
        assert f"]({address}/{kind}/v{version}/{name}" in page
        assert (ROOT / name).is_file()


def test_without_an_address_the_package_page_is_the_readme(tmp_path):
    fields, page = described(tmp_path, NOTALL_REPOSITORY="")
    assert "Project-URL" not in fields
    assert page == (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_3_10_reads_the_annotations_of_each_class():
    """It has no `ClassVar` without a type in what `get_type_hints` reads."""
    bare = [
        f"{file.name}:{node.lineno}"
        for file in (ROOT / "src" / "notall").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.annotation) in ("ClassVar", "Final")
    ]
    assert bare == []


BROUGHT = {
    "pydantic_core": "pydantic",
    "datasets": "lm_eval",
}  # what is never without the other
ENGINES = {
    "vllm",
    "executorch",
    "torchao",
    "mlx",
    "mlx_lm",
}  # imported where a user has them


def imported(file):
    """The packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]


def test_what_is_imported_is_declared():
    project = pytest.importorskip("tomllib").loads(
        (ROOT / "pyproject.toml").read_text()
    )["project"]
    words = [
        *project["dependencies"],
        *(
            word
            for extra in project["optional-dependencies"].values()
            for word in extra
        ),
    ]
    declared = {
        re.split(r"[^A-Za-z0-9_-]", word)[0].replace("-", "_").lower() for word in words
    }
    files = [*(ROOT / "src" / "notall").rglob("*.py")]
    found = {BROUGHT.get(name, name) for file in files for name in imported(file)}
    names = {name.removesuffix("_python") for name in declared} | ENGINES | {"notall"}
    assert found - sys.stdlib_module_names - names == set()


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(dist, tmp_path):
    """Its dependencies are those of this environment; notall itself is the wheel's."""
    (wheel,) = dist.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True
    )
    python = tmp_path / "env" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(install, check=True)
    inside = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (inside / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def run(*command):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(inside) in run(python, "-c", "import notall; print(notall.__file__)")
    notall = tmp_path / "env" / "bin" / "notall"
    assert "notall sweep" in run(notall)
    result_folders.write_sweep(tmp_path / "results")
    run(notall, "report", "results", "-o", "report.html")
    assert (tmp_path / "report.html").stat().st_size > 500_000


BLOCKED = """
import importlib.util, sys
sys.modules.update(dict.fromkeys({optional}))
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {optional} else find_spec(name, *rest)
sys.argv = {arguments}
from notall.cli import main
main()
"""


def blocked(arguments):
    """Run notall as if none of its extras were installed."""
    code = BLOCKED.format(optional=OPTIONAL, arguments=["notall", *map(str, arguments)])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_without_extras_the_main_job_runs_and_the_rest_says_what_to_install(tmp_path):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    swept = blocked(["sweep", model, "--out", tmp_path / "results", *QUICK])
    assert swept.returncode == 0, swept.stderr
    assert (tmp_path / "results" / "samples.jsonl").exists()
    assert not (tmp_path / "results" / "tradeoff.png").exists()
    report = blocked(["report", tmp_path / "results", "-o", tmp_path / "report.html"])
    assert (report.returncode, len(report.stderr.strip().splitlines())) == (2, 1)
    assert "pip install 'notall[report]'" in report.stderr


@pytest.mark.slow
def test_without_extras_a_search_and_a_comparison_need_no_figures(tmp_path):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=4)
    (tmp_path / "text.txt").write_text(
        "a bird sings under the winter light of an old stone; " * 4
    )
    asked = [
        "--sequences",
        "1",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--text",
        tmp_path / "text.txt",
    ]
    searched = blocked(
        ["search", model, "--skip", "attention:1", "-o", tmp_path / "plan.json", *asked]
    )
    assert searched.returncode == 0, searched.stderr
    assert len(Plan.load(tmp_path / "plan.json").attention) == 1
    criteria = [
        "--criterion",
        "cosine",
        "--criterion",
        "search",
        "--skip",
        "attention:1",
    ]
    compared = blocked(["compare", model, *criteria, "-o", tmp_path / "c", *asked])
    assert compared.returncode == 0, compared.stderr
    assert (tmp_path / "c" / "comparison.jsonl").read_text().count("\n") == 2
    assert (tmp_path / "c" / "table.md").read_text().count("###") == 1
    assert not (tmp_path / "c" / "front.png").exists()


IMPORTS = """
import sys
from api import quality, skipping
assert "lm_eval" not in sys.modules
from api import cli, harness, paper_module
assert "ray" not in sys.modules
"""


@pytest.mark.slow
def test_the_harness_and_ray_are_imported_only_where_they_are_asked_for():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=environment)


def test_importing_notall_takes_less_than_a_third_of_a_second():
    code = (
        "import time; start = time.perf_counter(); import notall;"
        " print(time.perf_counter() - start)"
    )
    seconds = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(seconds) < 0.3
