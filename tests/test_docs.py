"""Every command and snippet of the README and the documentation runs, on a tiny model
and smaller sizes.
"""

import inspect
import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer

import notall
from api import CRITERIA, METHODS, TaskShelf, cli, entry_points, latency, repair_texts
from families import family
from notall import Plan
from programs import program
from tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent
GENERATED = {"architectures.md", "commands.md", "engines.md", "notebook.md"}
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").glob("*.md"))
        if page.name not in GENERATED
    ),
]
LONG = {
    "README.md",
    "add-criterion.md",
    "add-engine.md",
    "add-repair.md",
    "add-target.md",
    "choosing.md",
    "drafting.md",
    "evaluating.md",
    "exporting.md",
    "fine-tuning.md",
    "first-run.md",
    "how-exports-work.md",
    "how-repair-works.md",
    "index.md",
    "repairing.md",
    "reproducing.md",
    "sharing.md",
}  # come with `make test-engines`
FENCE = re.compile(r"^```(\w+)(?: title=\"(.*?)\")?\n(.*?)^```$", re.M | re.S)
SMALL = {
    "sweep": (
        "--sequences 2 --length 32 --batch-size 2 --prompt-tokens 4 --generation-tokens"
        " 2 --rounds 1"
    ),
    "bench": "--prompt-tokens 4 --generation-tokens 2 --rounds 1",
    "draft": (
        "--sequences 2 --prompt-tokens 8 --generation-tokens 4 --most 2 --rounds 1"
    ),
    "eval": "--sequences 2 --length 32",
    "similarity": "--sequences 2 --length 32",
    "generate": "--max-new-tokens 4",
    "search": "--sequences 2 --length 32 --batch-size 1",
    "repair": "--sequences 4 --length 32 --batch-size 2",
    "heal": "--tokens 128 --length 32 --batch-size 2",
    "compare": (
        "--sequences 2 --length 32 --batch-size 1 --criterion cosine --criterion search"
    ),
}


def blocks(page):
    """(language, title, text) of each fenced block."""
    return [
        match.groups() for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=16
    )


@pytest.fixture
def workplace(tiny, tmp_path, monkeypatch, short_prose):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repair_texts, "SEQUENCES", 4)
    monkeypatch.setattr(repair_texts, "LENGTH", 32)
    Path("book.txt").write_text("The quick brown fox jumps over the lazy dog. " * 99)
    Path(tiny.name).symlink_to(tiny)  # as records name it
    names = [f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(16)]

    def times(_: object, workload: object, **__: object) -> latency.SublayerTimes:
        return latency.SublayerTimes(workload, 100, dict.fromkeys(names, 2))

    monkeypatch.setattr(
        latency, "measure_times", times
    )  # what so small a model saves is hard to time
    monkeypatch.setattr(latency.SpeedBudget, "reached", lambda *_: True)
    path, loaded = list(sys.path), set(sys.modules)
    yield {"smollm2": tiny, "MODEL": tiny, "DIR": "results", "FILE": "book.txt"}
    sys.path[:] = path  # the folder is added where a page names a module of its own
    for name in {file.stem for file in Path().glob("*.py")} - loaded:
        sys.modules.pop(name, None)


def run_line(line, words, monkeypatch):
    name, *arguments = shlex.split(line, comments=True)
    arguments = [str(words.get(argument, argument)) for argument in arguments]
    small = shlex.split(SMALL.get(arguments[0], "")) if arguments else []
    if "--speedup" in arguments:
        small += ["--prompt-tokens", "4", "--generation-tokens", "2"]
    if arguments[:1] == ["search"] and "--repair" in arguments:
        small += ["--sequences", "4", "--patience", "0"]
    monkeypatch.setattr(sys, "argv", [name, *arguments, *small])
    try:
        cli.main()
    except SystemExit as leaving:
        if leaving.code:
            pytest.fail(f"{line}: exit code {leaving.code}")


def check_line(line):
    """Its options exist, though it needs more than is here to run."""
    _, command, *arguments = shlex.split(line, comments=True)
    typer.main.get_command(cli.app).commands[command].loaded().make_context(
        command, arguments
    )


def _marks(page):
    """Of the long pages two have every command and function, and are run on both lines
    of transformers.
    """
    slow = [pytest.mark.slow] if page in LONG else []
    return (
        [*slow, pytest.mark.any_transformers]
        if slow and page not in ("README.md", "first-run.md")
        else slow
    )


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.name, marks=_marks(p.name)) for p in PAGES]
)
def test_what_a_page_tells_to_type_works(page, workplace, monkeypatch, capsys):
    type_page(page, workplace, monkeypatch)


# Trainer splits a batch over devices by torch._C._scatter, which a CPU build lacks.
NOT_SIMULATED = {"fine-tuning.md"}
ON_DEVICES = [page for page in PAGES if page.name not in NOT_SIMULATED]


@pytest.mark.devices
@pytest.mark.slow
@pytest.mark.parametrize("page", ON_DEVICES, ids=[page.name for page in ON_DEVICES])
def test_it_works_on_a_device_too(page, workplace, monkeypatch, capsys):
    """Commands and snippets name no device, so that models are loaded onto the one that
    is here.
    """
    type_page(page, workplace, monkeypatch)


WITH_SNIPPETS = [
    page
    for page in ON_DEVICES
    if any(language == "python" for language, *_ in blocks(page))
]


@pytest.mark.slow
@pytest.mark.devices
@pytest.mark.parametrize(
    "page", WITH_SNIPPETS, ids=[page.name for page in WITH_SNIPPETS]
)
def test_snippets_run_on_a_device(page, workplace):
    namespace = {}
    for language, title, text in blocks(page):
        if language == "python":
            run_snippet(page, title, text, workplace, namespace)


def run_snippet(page, title, text, workplace, namespace):
    if title:
        Path(title).write_text(text)
    text = re.sub(
        "smollm2(?!-)", str(workplace["smollm2"]), text
    )  # and no folder that it writes, such as smollm2-pruned
    exec(compile(text, str(page), "exec"), namespace)


def type_page(page, workplace, monkeypatch):
    """All that the page tells to type, one block after the other."""
    namespace = {}
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    for language, title, text in blocks(page):
        if language == "python":
            run_snippet(page, title, text, workplace, namespace)
        elif language == "toml":
            (value,) = re.findall('^\\w+ = "(\\w+:\\w+)"$', text, re.M)
            assert (
                entry_points.find(value, "of no package").__name__
                == value.partition(":")[2]
            )
        elif language == "yaml":
            question = {
                "question": "What is it?",
                "choices": ["a", "bird", "of", "stone"],
                "label": 1,
            }
            Path("questions.jsonl").write_text(
                "".join(f"{json.dumps(question)}\n" for _ in range(4))
            )
            Path(title).parent.mkdir(exist_ok=True)
            Path(title).write_text(text.replace("/path/to", str(Path.cwd())))
            assert TaskShelf(Path(title).parent).build(Path(title).stem, 1, 2).tasks
        elif language == "json":
            Path("read.json").write_text(text)
            assert Plan.load("read.json")
        elif language == "sh":
            for line in filter(str.strip, text.splitlines()):
                word = line.split()[0]
                if word == "notall" and title:
                    assert title.startswith("needs "), title
                    check_line(line)
                elif word == "notall":
                    run_line(line, workplace, monkeypatch)
                elif word == "make":
                    assert line.split()[1] in targets
                else:
                    assert word == "pip", line
                    assert set(re.findall(r"notall\[(\w+)\]", line)) <= set(extras)
        else:  # what other programs take
            # test_readme runs a console's
            assert language in (
                "text",
                "bibtex",
                "console",
            ), f"{page.name} has a block of {language}, run by nothing"


@pytest.mark.any_transformers
def test_the_command_reference_is_of_this_code():
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == program("docs/commands").render(), "run: make docs"


def test_the_notebook_runs_and_shows_what_its_cells_say(workplace):
    run_notebook(workplace)


@pytest.mark.devices
def test_the_notebook_runs_on_a_device(workplace):
    run_notebook(workplace)


def run_notebook(workplace):
    notebook = program("docs/notebook")
    namespace = {}
    cells = [cell for cell in notebook.cells() if cell["cell_type"] == "code"]
    for cell in cells:
        shown = notebook.run(
            "".join(cell["source"]).replace("smollm2", str(workplace["smollm2"])),
            namespace,
        )
        kept = "".join(line for output in cell["outputs"] for line in output["text"])
        assert (shown == "") == (kept == ""), "run: make notebook"
        assert shown or "print(" not in cell["source"][-1]


@pytest.mark.any_transformers
def test_the_page_of_the_notebook_is_of_it():
    notebook = program("docs/notebook")
    written = (ROOT / "docs" / "notebook.md").read_text(encoding="utf-8")
    assert written == notebook.render(notebook.cells()), "run: make notebook"
    assert {"nbformat", "nbformat_minor", "metadata", "cells"} == json.loads(
        notebook.NOTEBOOK.read_text()
    ).keys()


def test_the_page_of_the_python_api_has_every_public_name_and_no_other():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    own = {name.removeprefix("notall.") for name in named if name.count(".") == 1}
    assert own == set(notall.__all__) - {"__version__"}
    for path in named:
        assert inspect.getdoc(pkgutil.resolve_name(path)), path


@pytest.mark.any_transformers
def test_every_paper_that_the_code_names_is_a_reference_with_bibtex():
    page = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    sources = [
        path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")
    ]
    named = {
        number for text in sources for number in re.findall(r"\b\d{4}\.\d{5}\b", text)
    }
    assert len(named) >= 20
    for number in named:
        assert f"](https://arxiv.org/abs/{number})" in page, number
        assert f"eprint = {{{number}}}" in page, number
    for name in (*CRITERIA, *set(METHODS) - {"none"}):
        assert f"`{name}`" in page, name
    entries = re.findall(
        r"^@misc{(\w+),\n  title = {.+},\n  author = {.+},\n  year = {\d{4}},$",
        page,
        re.M,
    )
    assert len(set(entries)) == page.count("@misc{") == page.count("eprint = ")


@pytest.mark.any_transformers
def test_the_faq_quotes_messages_that_notall_prints():
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    source = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")
    )
    whole = re.sub(
        r"\"\s*\n\s*f?\"", "", source
    )  # a literal that goes on in the next line
    quoted = re.findall(r"^Message: `(.+)`\.$", page, re.M)
    assert len(quoted) >= 15
    asked = re.findall(r"^\*\*(.+?)\*\*", page, re.M)
    assert all(question.endswith("?") for question in asked)
    for message in quoted:
        for part in message.split("…"):
            assert part.strip(" ;:,") in whole, message


@pytest.mark.any_transformers
def test_links_lead_somewhere():
    logs = sorted((ROOT / "benchmarks").rglob("*.md"))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *logs]:
        for link, anchor in re.findall(
            r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", page.read_text(encoding="utf-8")
        ):
            target = page.parent / link if link else page
            assert link.startswith("https://") or target.exists(), (page.name, link)
            assert (
                not anchor or link.startswith("https://") or anchor in anchors(target)
            ), (page.name, link, anchor)


def anchors(page):
    """Of the headings of a page, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in titles
    }


def test_the_documentation_counts_shared_sublayer_runs_right():
    from api import Replay, paper_grid
    from notall import locate

    model = family("llama").build(num_hidden_layers=30)
    plans = [row.plan for row in paper_grid(locate(model))]
    replay, alone = (
        Replay(model, plans),
        sum(len(locate(model).running(plan)) for plan in plans),
    )
    told = (ROOT / "docs" / "how-it-works.md").read_text()
    assert f"{replay.executions} of the {alone} sublayer runs" in " ".join(told.split())
