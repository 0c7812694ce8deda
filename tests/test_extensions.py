"""Criteria and repairs of others: by an entry point of an installed package, and as
module:function.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import notall
from api import by_count, criteria, entry_points, kl, methods
from families import family
from notall import Plan, UsageError
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it looks up names

MINE = '''
import torch

from notall import RepairedPlan
from notall.choosing.criteria import Choice, Criterion
from notall.running.repaired import LinearMap

def by_depth(setting):
    """The seventh wonder.

    More of it."""
    return {unit: abs(int(unit[0].partition(".")[2]) - 2) for unit in setting.space.units}

def choose_first(setting, budget):
    unit = setting.space.units[0]
    return Choice(frozenset(unit), (unit,))

def chooses_too_few(setting, budget):
    return Choice(frozenset({"mlp.1"}), (("mlp.1",),))

def chooses_what_is_not_there(setting, budget):
    return Choice(frozenset({"mlp.99"}), (("mlp.99",),))

def spells(setting):
    return dict.fromkeys(setting.space.units, "low")

def of_three(setting, budget, more):
    return None

def of_two(model, plan):
    return plan

def silently(model, plan, batches):
    return RepairedPlan.of(plan)

def strongly(model, plan, batches, strength=1.5):
    assert strength == 1.5
    return RepairedPlan.of(plan)

def mapped(model, plan, batches):
    return RepairedPlan.of(plan, maps={"attn.1": LinearMap(torch.eye(model.config.hidden_size))})

def halved(model, plan, batches, progress=None):
    """Half of an MLP."""
    path = "model.layers.0.mlp.down_proj.weight"
    return RepairedPlan.of(plan, weights={path: model.get_parameter(path).detach() / 2})

def elsewhere(model, plan, batches, progress=None):
    path = "model.layers.0.mlp.down_proj.weight"
    return RepairedPlan.of(plan, weights={path: model.get_parameter(path).detach()[:1]})

def exits(setting):
    raise SystemExit(0)

def raises(setting):
    raise RuntimeError("boom")

def deep_inside(setting):
    import torch
    return torch.nn.Linear(2, 2)(torch.zeros(3))

def lists(setting):
    return [1, 2]

def says_none(setting, budget):
    return None

def breaks(model, plan, batches, progress=None):
    return 1 / 0

def forgets(model, plan, batches, progress=None):
    return plan

def lacks_one(setting):
    return {unit: 0.0 for unit in setting.space.units[1:]}

def says_nan(setting):
    return dict.fromkeys(setting.space.units, float("nan"))

FIRST = Criterion("first", "the first unit", choose=choose_first, kinds=("mlp",))
NUMBER = 7
'''
BATCHES = [torch.arange(24).view(2, 12)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module, in which one is; what was imported there is forgotten
    afterwards.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(MINE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def package(mine, monkeypatch):
    """An installed package that adds a criterion and a repair, under names of its own
    and under one of notall's.
    """
    site = mine / "site"
    info = site / "wonders-1.0.dist-info"
    info.mkdir(parents=True)
    (mine / "mine.py").rename(site / "wonders.py")
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wonders\nVersion: 1.0\n"
    )
    (info / "entry_points.txt").write_text(
        "[notall.criteria]\nwonder = wonders:by_depth\nrandom = wonders:by_depth\n"
        "[notall.repair_methods]\nhalf = wonders:halved\n"
    )
    monkeypatch.syspath_prepend(site)
    return site


def chosen(name, kind="mlp", count=2):
    model = family("llama").build(num_hidden_layers=5)
    space = notall.Space(notall.locate(model), kind)
    return notall.choose_plan(
        model, name, space, by_count(space, count), BATCHES, kl(BATCHES)
    )


def test_a_function_is_a_criterion_by_its_place(mine):
    assert chosen("mine:by_depth", count=3).plan.mlp == (1, 2, 3)
    one = criteria.criterion("mine:by_depth")
    assert (one.name, one.description) == ("mine:by_depth", "The seventh wonder")


def test_an_object_that_chooses_is_one_too(mine):
    assert chosen("mine:FIRST", count=1).plan.mlp == (0,)
    assert criteria.criterion("mine:FIRST").kinds == ("mlp",)


def test_what_an_unknown_criterion_takes_is_guessed(mine):
    space = notall.Space(notall.locate(family("llama").build()), "mlp")
    scores, chooses = (
        criteria.criterion("mine:by_depth"),
        criteria.criterion("mine:choose_first"),
    )
    assert scores.cost(space, 2) == 1
    assert chooses.cost(space, 2) == criteria.CRITERIA["search"].cost(space, 2) > 1


def test_a_package_adds_a_criterion_and_a_repair(package):
    assert chosen("wonder", count=3).plan.mlp == (1, 2, 3)
    every = criteria.every_criterion()
    assert [*every] == [*criteria.CRITERIA, "wonder"]
    assert every["random"] is criteria.CRITERIA["random"]
    model = family("llama").build(num_hidden_layers=5)
    repaired = methods.method("half").repair(model, Plan([2]), BATCHES)
    ((path, weight),) = repaired.weights.items()
    assert torch.equal(weight * 2, model.get_parameter(path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "mine:by_deth",
            "there is no mine:by_deth: mine has no by_deth (did you mean by_depth?)",
        ),
        (
            "yours:by_depth",
            (
                "there is no yours:by_depth: no module is called yours; put its file"
                " into this folder"
            ),
        ),
        (
            "mine.more:by_depth",
            "there is no mine.more:by_depth: no module is called mine.more",
        ),
        ("mine:", "mine: names nothing: write module:function"),
        ("mi ne:x", "mi ne:x names nothing: write module:function"),
        (
            "raises:x",
            (
                "raises:x fails as it is imported: ZeroDivisionError: division by zero"
                " (raises.py, line 2)"
            ),
        ),
        (
            "needs:x",
            (
                "needs:x fails as it is imported: ModuleNotFoundError: No module named"
                " 'lost' (needs.py, line 1)"
            ),
        ),
        ("broken:x", "broken:x fails as it is imported: SyntaxError"),
        (
            "exits:x",
            "exits:x fails as it is imported: SystemExit: 0 (exits.py, line 2)",
        ),
        ("mine:NUMBER", "mine:NUMBER is no "),
        (
            "mine:zzz",
            (
                "there is no mine:zzz: mine has no zzz; it has by_depth, choose_first,"
                " chooses_too_few, chooses_"
            ),
        ),
    ],
)
@pytest.mark.parametrize("found_by", [criteria.criterion, methods.method])
def test_a_name_that_is_none_is_told_in_a_line(mine, name, said, found_by):
    Path("raises.py").write_text("\n1 / 0\n")
    Path("needs.py").write_text("import lost\n")
    Path("broken.py").write_text("def x(:\n")
    Path("exits.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UsageError) as raised:
        found_by(name)
    assert str(raised.value).startswith(said)
    assert len(str(raised.value)) < 240


def test_a_name_like_that_of_a_package_is_told(package):
    with pytest.raises(
        UsageError,
        match=(
            r"no criterion 'wonders' \(did you mean wonder\?\).*or give module:function"
        ),
    ):
        criteria.criterion("wonders")
    with pytest.raises(UsageError, match=r"no repair 'halb' \(did you mean half\?\)"):
        methods.method("halb")


@pytest.mark.parametrize("name", ["mine:lacks_one", "mine:says_nan"])
def test_a_criterion_that_leaves_a_unit_without_a_number_is_refused(mine, name):
    with pytest.raises(
        UsageError, match=r"gives no number to \('mlp.0',\): score every unit"
    ):
        chosen(name)


@pytest.mark.parametrize("ways", [{}, {"score": math.fsum, "choose": math.fsum}])
def test_a_criterion_has_one_way_to_choose(ways):
    with pytest.raises(UsageError, match="needs one of score and choose"):
        criteria.Criterion("size", "parameters", **ways)


def test_a_module_of_the_folder_hides_no_library(mine):
    Path("fractions.py").write_text("x = 1 / 0")
    sys.modules.pop("fractions", None)
    with pytest.raises(UsageError, match="fractions has no x"):
        criteria.criterion("fractions:x")


def undated(records):
    """Without when and where they were told."""
    return [one | {"provenance": one["provenance"]["what"]} for one in records]


@contextmanager
def changed_mine():
    """The file of `mine` is another one, for a while."""
    file = Path(sys.modules["mine"].__file__)
    before = file.read_text()
    file.write_text(f"{before}\nCHANGED = True\n")
    yield
    file.write_text(before)


def test_the_command_line_takes_them_too(mine, run, tmp_path, short_prose):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--text",
        "text.txt",
    ]
    Path("text.txt").write_text(
        "a bird sings under the winter light of an old stone; " * 9
    )
    code, _, err = run(
        "search", model, "--criterion", "mine:by_depth", "--skip", "mlp:3", *small
    )
    assert (code, err) == (0, "")
    assert Plan.load("plan.json").mlp == (1, 2, 3)
    named = [
        "--criterion",
        "mine:by_depth",
        "--repair",
        "mine:halved",
        "--skip",
        "mlp:2",
    ]
    code, out, err = run("compare", model, *named, *small, "--out", "c", "--json")
    assert (code, err) == (0, "")
    assert '"mine:halved"' in out
    again = json.loads(
        run("compare", model, *named, *small, "--out", "c", "--json")[1]
    )  # from what it wrote
    assert undated(again["comparison"]) == undated(json.loads(out)["comparison"])
    repaired = ["--criterion", "deepest", *named[2:]]
    assert run("compare", model, *repaired, *small, "--out", "d")[0] == 0
    with changed_mine():
        for words, out, said in (
            (named, "c", "c holds results with function_sha256 "),
            (
                repaired,
                "d",
                (
                    "d/repairs has repairs by mine:halved as it was before it changed:"
                    " choose another --out"
                ),
            ),
        ):
            code, _, err = run("compare", model, *words, *small, "--out", out)
            assert (code, err.count("\n")) == (2, 1)
            assert said in err
    (kept,) = Path("c/plans").iterdir()
    assert Plan.load(kept).fingerprint == Plan.load("plan.json").fingerprint is not None
    assert len(list(Path("c/repairs").glob("mine-halved-*.safetensors"))) == 1
    code, _, err = run(
        "search", model, "--criterion", "mine:by_deth", "--skip", "mlp:1"
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean by_depth?" in err


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (
            "raises",
            (
                r"the criterion mine:raises failed: RuntimeError: boom \(mine.py, line"
                r" \d+\)"
            ),
        ),
        (
            "exits",
            r"the criterion mine:exits failed: SystemExit: 0 \(mine.py, line \d+\)",
        ),  # not as if it had worked
        (
            "deep_inside",
            r"the criterion mine:deep_inside failed: .* \(mine.py, line \d+\)",
        ),
        (
            "lists",
            (
                "give back a score for each unit, a dict, from the criterion"
                " mine:lists, not list"
            ),
        ),
        (
            "chooses_too_few",
            (
                r"mine:chooses_too_few saves 1 of 2, and the budget is 2 MLPs: go on"
                r" until budget.met"
            ),
        ),
        (
            "chooses_what_is_not_there",
            "skips mlp.99, which may not be: choose of setting.space.names",
        ),
        ("spells", r"gives no number to \('mlp.0',\)"),
        (
            "of_three",
            (
                "mine:of_three is no criterion: let it take a Setting, and a Budget if"
                " it chooses itself"
            ),
        ),
        (
            "says_none",
            "give back a Choice from the criterion mine:says_none, not NoneType",
        ),
    ],
)
def test_a_criterion_that_fails_is_one_line(mine, way, said):
    model = family("llama").build()
    space = notall.Space(notall.locate(model), "mlp")
    with pytest.raises(UsageError, match=said):
        notall.choose_plan(model, f"mine:{way}", space, by_count(space, 2), BATCHES)


@pytest.mark.parametrize("found_by", [criteria.criterion, methods.method])
def test_an_interrupt_in_the_code_of_others_is_one(mine, found_by):
    """As the module is imported, or as it runs: what is finished is kept, and nothing
    is called a failure.
    """
    Path("stopped.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        found_by("stopped:x")
    with pytest.raises(KeyboardInterrupt), entry_points.explained_plugin("mine"):
        raise KeyboardInterrupt


def test_a_criterion_may_choose_less_than_the_budget_when_the_time_is_up(mine):
    model = family("llama").build()
    space = notall.Space(notall.locate(model), "mlp")
    budget, config = by_count(space, 2), notall.SearchConfig(max_minutes=0)
    found = notall.choose_plan(
        model, "mine:chooses_too_few", space, budget, BATCHES, config=config
    )
    assert (found.plan.mlp, found.in_time) == ((1,), False)


def test_a_set_that_the_space_does_not_allow_is_refused(mine):
    model = family("llama").build()
    space = notall.Space(notall.locate(model), portable=True)
    with pytest.raises(
        UsageError,
        match=r"skips mlp\.1, which portable does not allow: ask space\.moves",
    ):
        notall.choose_plan(
            model, "mine:chooses_too_few", space, by_count(space, 2), BATCHES
        )


def test_a_repair_is_also_a_function_and_needs_no_progress(mine):
    model = family("llama").build()
    for name in ("silently", "strongly"):  # whose fourth argument is something else
        assert methods.method(f"mine:{name}").repair(
            model, Plan([1]), BATCHES
        ).attention == (1,)
    assert methods.method(methods.refit).description == "What `notall repair` does"
    with pytest.raises(
        UsageError,
        match=(
            r"mine:of_two is no repair: let it take \(model, plan, batches\) or"
            r" progress too"
        ),
    ):
        methods.method("mine:of_two")


def test_a_repair_that_fails_is_one_line(mine):
    model = family("llama").build()
    with pytest.raises(
        UsageError,
        match=(
            r"the repair mine:breaks failed: ZeroDivisionError: .* \(mine.py, line"
            r" \d+\)"
        ),
    ):
        methods.method("mine:breaks").repair(model, Plan([2]), BATCHES)
    with pytest.raises(
        UsageError,
        match=(
            r"RepairedPlan \(docs/add-repair.md\) from the repair mine:forgets, not"
            r" Plan"
        ),
    ):
        methods.method("mine:forgets").repair(model, Plan([2]), BATCHES)


def test_a_package_that_is_broken_hides_no_other(package):
    (Path(package) / "wonders.py").write_text("1 / 0")
    with pytest.warns(
        UserWarning, match="an installed criterion is left out: .* of wonders"
    ):
        assert set(criteria.every_criterion()) == set(criteria.CRITERIA)


def test_a_plan_is_repaired_by_a_method_and_exported(mine, run, tmp_path, short_prose):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    Plan([2]).save("plan.json")
    Path("text.txt").write_text(
        "a bird sings under the winter light of an old stone; " * 9
    )
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--text",
        "text.txt",
        "--plan",
        "plan.json",
    ]
    command = [
        "repair",
        model,
        *small,
        "--repair",
        "mine:halved",
        "--out",
        "made",
        "--json",
    ]
    code, shown, err = run(*command)
    assert (code, err) == (0, "")
    modes = {
        (Path("made") / name).stat().st_mode
        for name in ("plan.json", "weights.safetensors")
    }
    assert len(modes) == 1  # who may read the plan may read its weights
    found = json.loads(shown)
    assert [*found] == ["quality", "verdict"]
    assert [row["model"] for row in found["quality"]] == ["skipped", "repaired"]
    held = notall.RepairedPlan.load(Path("made"))
    ((path, weight),) = held.weights.items()
    dense = notall.load(str(model), dtype="float32")[0].get_parameter(path)
    assert torch.equal(weight, dense / 2)
    assert "repaired by mine:halved" in str(held.history[0])
    before = {file.name: file.read_bytes() for file in Path("made").iterdir()}
    with (
        pytest.MonkeyPatch.context() as patched
    ):  # it is there, and nothing is made again
        patched.setattr(
            sys.modules["mine"], "halved", lambda *_, **__: pytest.fail("made again")
        )
        assert run(*command)[:2] == (0, shown)
    with changed_mine():
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "made holds results with function_sha256 " in err
    assert {file.name: file.read_bytes() for file in Path("made").iterdir()} == before
    code, _, err = run(
        "export",
        model,
        "--plan",
        "made",
        "--to",
        "hf",
        "--out",
        "fast",
        "--dtype",
        "float32",
    )
    assert code == 0, err
    exported = load_file("fast/model.safetensors")
    assert torch.equal(exported[path], dense / 2)
    assert "repaired by mine:halved" in Path("fast/README.md").read_text()


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["--repair", "nbl"], "nbl keeps a matrix and a bias each at run time"),
        (["--repair", "refitt"], "did you mean refit?"),
        (["--repair", "mine:mapped"], "or give back weights: docs/add-repair.md"),
        (
            ["--repair", "mine:elsewhere"],
            "the repaired model.layers.0.mlp.down_proj.weight is (1, ",
        ),
        (
            ["--repair", "replaceme", "--offload", "s"],
            "--offload goes with --repair refit",
        ),
    ],
)
def test_a_method_that_no_plan_can_keep_is_one_line(
    mine, run, tmp_path, short_prose, named, message
):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=3)
    Plan([1]).save("plan.json")
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--plan",
        "plan.json",
    ]
    code, _, err = run("repair", model, *small, *named, "--out", "made")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert not Path("made/plan.json").exists()


def test_a_folder_of_one_method_is_not_taken_for_another(
    mine, run, tmp_path, short_prose
):
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=3)
    Plan([1]).save("plan.json")
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--plan",
        "plan.json",
        "--out",
        "made",
    ]
    assert run("repair", model, *small, "--repair", "replaceme")[0] == 0
    for other in ("prune-and-comp", "refit"):
        code, _, err = run("repair", model, *small, "--repair", other)
        assert (code, err.count("\n")) == (2, 1)
        assert "made holds results with" in err


def test_the_list_of_criteria_has_those_of_packages(package, run):
    code, out, _ = run("criteria")
    assert code == 0
    assert "The seventh wonder" in out


@pytest.mark.slow
def test_the_template_installs_as_a_package_of_its_own_and_is_in_every_table(
    tmp_path, short_prose
):
    """With no line of notall changed: it is built, installed, listed, compared, and
    ranked on the report's page.
    """
    site, template = (
        tmp_path / "site",
        Path(__file__).parent.parent / "docs" / "template",
    )
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--target",
        site,
    ]
    subprocess.run(
        [sys.executable, *install, shutil.copytree(template, tmp_path / "template")],
        check=True,
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"}
    model = save_tiny_checkpoint(tmp_path / "tiny", num_hidden_layers=5)
    Path(tmp_path / "text.txt").write_text(
        "a bird sings under the winter light of an old stone; " * 9
    )

    def notall_says(*words):
        command = [sys.executable, "-m", "notall", *map(str, words)]
        return subprocess.run(
            command,
            env=environment,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    listed = notall_says("criteria")
    assert "lightest" in listed
    assert "Mean square of the weights" in listed
    small = [
        "--sequences",
        "2",
        "--length",
        "16",
        "--dtype",
        "float32",
        "--text",
        "text.txt",
    ]
    ways = [
        "--criterion",
        "lightest",
        "--criterion",
        "cosine",
        "--skip",
        "mlp:2",
        "--repair",
        "scaled",
    ]
    out = json.loads(
        notall_says("compare", model, *ways, *small, "--out", "c", "--json")
    )
    assert {(row["criterion"], row["repair"]) for row in out["comparison"]} >= {
        ("lightest", "scaled"),
        ("cosine", "scaled"),
    }
    notall_says("report", "c", "-o", "c.html")
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "lightest" in page
    assert "scaled" in page
