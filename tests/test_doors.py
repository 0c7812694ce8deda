"""Nothing runs unasked, nothing of the user's is lost, and what is not listed is
refused.

Each test plants what somebody else could have put there (in a results folder, a cache,
a working folder, a model) and looks at what notall does with it. Code that must not run
leaves a mark.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import py_compile
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import notall
import result_folders
from api import (
    Field,
    Provenance,
    TaskShelf,
    cache,
    cli,
    configs,
    exporters,
    files,
    gguf_copies,
    healing,
    methods,
    methods_folders,
    read_gguf,
    read_plan,
    records_lines,
    remote_code,
    sealed,
    tasks,
    weightless,
    write_gguf as write_fields,
    write_tensors,
)
from command_line import QUICK
from families import TRANSFORMERS, family
from notall import Plan, RepairedPlan, TrainConfig, UsageError
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf

pytestmark = pytest.mark.any_transformers  # it is about files and processes

Ended = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Ended]
MARK = "mark"  # what planted code writes, in the working folder


@pytest.fixture
def working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; modules that were imported from it are forgotten afterwards."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def marking(folder: Path, more: str = "") -> str:
    """Python that leaves a mark when it runs."""
    return f"open({str(folder / MARK)!r}, 'a').write('ran')\n{more}"


def ran(folder: Path) -> bool:
    return (folder / MARK).exists()


def refused(ended: Ended, *said: str) -> str:
    """Exit code 2 and one line, which holds these words; returns it."""
    code, out, err = ended
    *_, line = err.splitlines() or [""]
    assert (code, out) == (2, ""), ended
    assert line.startswith("error: "), err
    assert "Traceback" not in err
    for words in said:
        assert words in line, line
    return line


# --- reproduce: what a record may ask for
# ---------------------------------------------------------


def recorded(folder: Path, command: str, **where: Any) -> Path:
    """A results folder whose record says that this command made it."""
    about = Provenance(
        what=result_folders.ABOUT.what, where={"command": command, **where}
    )
    record = result_folders.measured("t", "skipped", 0.1, provenance=about)
    return result_folders.write(folder, record)


HIDDEN = (  # ways to write an option that a record may not have
    "--task-path r/evil",
    "--task-path=r/evil",
    "--json=--task-path=r/evil",  # at the first = it is a flag that takes no value
    "--json --task-path=r/evil",
    "--text=--task-path --task-path r/evil",
    "-- --task-path",
    "--trust-remote-code",
    "--json=--trust-remote-code",
    "--attn-implementation=someone/kernel",
    "--json=--attn-implementation=someone/kernel",
    "--offload=r/evil",
    "--help",
    "--version",
    "--ray",
    "--ray=local",
    "--unknown=1",
    "more words",
)


@pytest.mark.parametrize("words", HIDDEN)
def test_a_record_asks_for_nothing_but_what_is_listed(
    working, folder, run, own_tasks_only, words
):
    task = Path("r/evil/evil.yaml")
    task.parent.mkdir(parents=True)
    task.write_text("task: evil\ndataset_path: json\ndoc_to_text: !function utils.f\n")
    (task.parent / "utils.py").write_text(
        marking(working, "def f(document): return 'a'\n")
    )
    Path("t").write_text("a bird sings under the winter light of an old stone; " * 9)
    command = (
        f"notall eval {folder} --text t --skip attention:1 {' '.join(QUICK)} --tasks"
        " evil"
    )
    recorded(Path("r"), f"{command} {words}")
    refused(run("reproduce", "r", "--out", "again"), "no record may ask for")
    assert not ran(working)
    assert not Path("again").exists()


FUNCTIONS = (
    "--criterion r.mine:f",
    "--criterion=r.mine:f",
    "--repair r.mine:f",
    "--criterion shutil:rmtree",
)


@pytest.mark.parametrize("words", FUNCTIONS)
def test_a_record_runs_no_function(working, run, words):
    Path("r").mkdir()
    Path("r/mine.py").write_text(marking(working, "def f(*given): return {}\n"))
    recorded(Path("r"), f"notall compare tiny --skip attention:1 {words}")
    ended = run("reproduce", "r", "--out", "again")
    refused(ended, "a record does not run functions", "--functions DIR")
    assert not ran(working)
    assert "r.mine" not in sys.modules


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_record_runs_only_the_file_that_it_was_recorded_with(working, folder, run):
    """And only from the folder that the user names, not from the working folder."""
    for place in ("mine", "trusted"):
        Path(place).mkdir()
    Path("trusted/mine.py").write_text(marking(working, "def f(setting): return {}\n"))
    Path("mine.py").write_text(marking(working))
    name = "mine:f"
    command = f"notall search {folder} --skip mlp:1 --criterion {name}"
    recorded(Path("r"), command)
    recorded(Path("other"), command, functions={name: "0" * 64})
    recorded(Path("same"), command, functions={name: sha256(Path("trusted/mine.py"))})
    for results in ("r", "other"):
        ended = run("reproduce", results, "--functions", "trusted", "--out", "again")
        refused(ended, "trusted/mine.py is not the file")
    ended = run("reproduce", "same", "--functions", ".", "--out", "again")
    refused(ended, "mine.py is not the file")
    assert not ran(working)
    refused(
        run("reproduce", "same", "--functions", "trusted", "--out", "again"),
        "lower --length",
    )
    assert ran(working)
    assert str(working) not in sys.path
    assert str(working / "trusted") not in sys.path


def test_bytecode_beside_a_module_is_not_run(working, run):
    """Python takes it for the file's where its header says that nobody needs to
    compare.
    """
    source = Path("mine.py")
    source.write_text(marking(working))
    py_compile.compile(
        "mine.py", invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    source.write_text("def f(setting):\n    return {}\n")
    refused(
        run("search", "absent", "--skip", "mlp:1", "--criterion", "mine:f"), "absent"
    )
    assert "mine" in sys.modules
    assert not ran(working)


def test_the_working_folder_is_on_the_path_for_a_function_alone(working, run):
    """What libraries look for later, such as flash_attn, is not taken from there."""
    Path("mine.py").write_text("import helper\ndef f(setting):\n    return {}\n")
    Path("helper.py").write_text("")
    refused(
        run("search", "absent", "--skip", "mlp:1", "--criterion", "mine:f"), "absent"
    )
    assert "helper" in sys.modules
    assert not {"", ".", str(working)} & set(sys.path)
    Path("flash_attn_9.py").write_text(marking(working))
    with pytest.raises(ModuleNotFoundError):
        import_module("flash_attn_9")


# --- what the user has in a folder
# --------------------------------------------------------------------------------------


SEEDED = (torch.Generator().manual_seed(number) for number in range(2))
TEXTS = [
    torch.randint(3, 99, (2, 12), generator=one) for one in SEEDED
]  # (windows, tokens)


def healed(out: Path) -> None:
    notall.heal(
        family("llama").build(),
        Plan([1]),
        TEXTS[:1],
        TEXTS[1:],
        TrainConfig(evaluations=1),
        out=out,
    )


def contents_of(folder: Path) -> dict[str, bytes]:
    files_in = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_in}


THEIRS = [
    "step-100.pt",
    "last.safetensors",
    "best.safetensors/weights",
    "ray/state",
    ".mine",
]


@pytest.mark.parametrize("name", THEIRS)
def test_checkpoints_of_the_user_stay_and_are_named(working, name):
    theirs = Path("out/checkpoints") / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("of the user")
    said = "is there, and no healing wrote it: move it away, or choose another --out"
    with pytest.raises(UsageError, match=said):
        healed(Path("out"))
    assert theirs.read_text() == "of the user"


def test_a_link_in_place_of_checkpoints_is_not_followed(working):
    Path("elsewhere").mkdir()
    save_file({"w": torch.ones(2)}, "elsewhere/best.safetensors")
    Path("out").mkdir()
    Path("out/checkpoints").symlink_to(working / "elsewhere")
    before = contents_of(Path("elsewhere"))
    with pytest.raises(
        UsageError, match="checkpoints is there, and no healing wrote it"
    ):
        healed(Path("out"))
    assert contents_of(Path("elsewhere")) == before


def test_what_is_put_beside_checkpoints_stays_when_the_healing_ends(working):
    healed(Path("out"))
    Path("out/checkpoints").mkdir()
    Path("out/checkpoints/notes.txt").write_text("of the user")
    healed(Path("out"))  # it is finished, and cleans up
    assert Path("out/checkpoints/notes.txt").read_text() == "of the user"


def test_a_repair_with_minutes_refuses_others_checkpoints_before_it_repairs(
    working, monkeypatch
):
    monkeypatch.setattr(
        methods_folders, "repair_into", lambda *_: pytest.fail("it was repaired")
    )
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/step-100.pt").write_text("of the user")
    training = healing.Training(
        Plan([1]), TEXTS[:1], TEXTS[1:], TrainConfig(minutes=1.0)
    )
    model = family("llama").build()
    with pytest.raises(
        UsageError, match=r"step-100\.pt is there, and no healing wrote it"
    ):
        methods.recover(
            Path("out"), "refit", model, training, TEXTS, result_folders.ABOUT
        )
    assert Path("out/checkpoints/step-100.pt").read_text() == "of the user"


PARETO = ("--engine", "transformers", "--skip", "attention:1")


def test_pareto_refuses_others_checkpoints_before_it_reads_a_model(working, run):
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/dense-float32").mkdir()
    Path("out/checkpoints/dense-float32/mine").write_text("of the user")
    ended = run("pareto", "absent", *PARETO, "--out", "out")
    refused(ended, "dense-float32 is there, and notall did not write it")
    assert Path("out/checkpoints/dense-float32/mine").read_text() == "of the user"


# --- the cache
# --------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_code_in_a_cache_is_neither_run_nor_copied(working, own_cache, monkeypatch):
    """Where it cannot be written. `save_pretrained` copies a class's file beside the
    weights.
    """
    source = remote_code.source_of("llama")
    file = (
        own_cache / "modeling" / notall.__version__ / remote_code.modeling_file("llama")
    )
    file.parent.mkdir(parents=True)
    file.write_text(marking(working, source))
    monkeypatch.setattr(
        remote_code, "write_cached", lambda *_: None
    )  # root may write everywhere
    module = remote_code.load_modeling(remote_code._folder_with("llama"), "llama")
    assert not ran(working)
    assert Path(module.__file__).read_text() == source
    assert module.__file__ != str(file)


def test_code_that_lies_beside_a_checkpoint_is_not_run(working):
    Path(remote_code.modeling_file("llama")).write_text(marking(working))
    assert remote_code.load_modeling(Path(), "llama").NotallLlamaForCausalLM
    assert not ran(working)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777], ids=oct)
@pytest.mark.parametrize("part", ["", "answers"])
def test_a_cache_that_others_can_write_is_refused(own_cache, part, mode, monkeypatch):
    monkeypatch.setattr(cache, "_is_private_group", lambda *_: False)
    (own_cache / part).mkdir(parents=True)
    (own_cache / part).chmod(mode)
    said = r"others can write to the cache folder .*: take that right away \(chmod go-w"
    with pytest.raises(UsageError, match=said):
        cache.cache_folder("answers")


def test_a_cache_is_made_for_its_owner_alone(own_cache):
    before = os.umask(0)
    try:
        made = cache.cache_folder("modeling", "1") / "code.py"
        cache.write_cached(made, "")
    finally:
        os.umask(before)
    folders = [*made.parents][:3]
    assert folders[-1] == own_cache
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it looks up open files")
def test_a_file_is_on_disk_before_it_has_its_name(working, monkeypatch):
    """And its folder after that: no power cut leaves an empty file in place of an old
    one.
    """
    steps, sync, replace = [], os.fsync, os.replace

    def synced(number):
        steps.append(os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(
        os, "replace", lambda *names: steps.append("renamed") or replace(*names)
    )
    files.write_whole(Path("plan.json"), "{}")
    first, second, third = steps
    assert Path(first).name.startswith(".plan.json.")
    assert (second, third) == ("renamed", str(working))
    steps.clear()
    write_tensors(Path("w.safetensors"), {"w": torch.ones(2)})
    assert steps[1:] == ["renamed", str(working)]
    assert Path(steps[0]).parent.name.startswith(".w.safetensors.")


# --- files beside a manifest, and headers that count wrongly
# --------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(
        tmp_path_factory.mktemp("dense") / "tiny", num_hidden_layers=4
    )


@pytest.fixture(scope="module")
def export_of(tiny, tmp_path_factory):
    """An export in a form of its own, and one that is an ordinary checkpoint."""
    place = tmp_path_factory.mktemp("exports")
    plans = {"regrouped": Plan([1], [2]), "ordinary": Plan([1], [1])}
    for name, plan in plans.items():
        notall.export(tiny, plan, "hf", place / name, verify=False)
    return {name: place / name for name in plans}


PLANTED = {  # what transformers reads wherever it lies beside a model
    "added_tokens.json": '{"The": 5}',
    "special_tokens_map.json": '{"eos_token": "a"}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ messages }}",
    "vocab.json": "{}",
    "adapter_config.json": "{}",
    "pytorch_model.bin": "x",
    "model.safetensors.index.json": "{}",
    "processor_config.json": "{}",
    "tokenizer.model": "x",
    "tokenizer.5.0.0.json": "{}",
    "config.5.0.0.json": "{}",
    "ADDED_TOKENS.json": "{}",  # another name, but not where letters' case is none
}


@pytest.mark.parametrize("kind", ["regrouped", "ordinary"])
@pytest.mark.parametrize("name", PLANTED)
def test_a_file_that_a_manifest_does_not_list_is_refused(
    export_of, tmp_path, kind, name
):
    planted = copytree(export_of[kind], tmp_path / "export") / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(PLANTED[name])
    first = re.escape(Path(name).parts[0])
    said = f"holds {first}, which notall.json does not list: move that file away"
    for read in (notall.load, lambda folder: weightless.load_empty(folder, None)):
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "export")


UNREAD = [".gitattributes", "LICENSE", "README.md", "notes.md", ".cache/huggingface/x"]


@pytest.mark.parametrize("name", UNREAD)
def test_what_nothing_reads_may_lie_beside_an_export(export_of, tmp_path, name):
    mine = copytree(export_of["regrouped"], tmp_path / "export") / name
    mine.parent.mkdir(exist_ok=True, parents=True)
    mine.write_text("mine")
    notall.load(tmp_path / "export")


@pytest.mark.parametrize("listed", [[], ["config.json"], {"config.json": 5}, None, "x"])
def test_a_manifest_whose_files_are_no_table_is_damaged(
    export_of, tmp_path, listed, run
):
    manifest = copytree(export_of["regrouped"], tmp_path / "export") / "notall.json"
    told = json.loads(manifest.read_text())
    del told["sealed"]
    manifest.write_bytes(sealed(json.dumps(told | {"files": listed}).encode()))
    refused(
        run("inspect", tmp_path / "export"),
        "notall.json of ",
        "is damaged: export it anew",
    )


def gguf_of(layers: int, folder: Path) -> Path:
    model = family("llama").build(vocab_size=len(WORDS), num_hidden_layers=layers)
    return write_gguf(model, folder / "m.gguf")


def test_a_file_planted_in_the_copy_of_a_gguf_file_is_not_read(own_cache, tmp_path):
    gguf = gguf_of(2, tmp_path)
    folder = gguf_copies.convert_gguf(gguf)
    (folder / "added_tokens.json").write_text('{"the": 5}')
    assert gguf_copies.convert_gguf(gguf) == folder
    assert not (folder / "added_tokens.json").exists()


def test_records_planted_beside_a_repair_are_refused(working):
    """They would tell another history of the weights, which an export hands on."""
    RepairedPlan.of(Plan([1])).save("repair")
    records_lines.append(
        Path("repair/healing.jsonl"), {"record": "header", "of": "heal"}
    )
    with pytest.raises(
        UsageError, match=r"holds healing\.jsonl, which is no part of its repair"
    ):
        RepairedPlan.load("repair")


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("more", [{}, {"split.count": 2}, {"other.block_count": 4}])
def test_a_gguf_file_that_counts_too_few_layers_is_refused(
    tmp_path, run, own_cache, count, more
):
    whole = read_gguf(gguf_of(4, tmp_path))
    changed = {"llama.block_count": count, **more}
    fields = {
        **whole.fields,
        **{name: Field.of(value) for name, value in changed.items()},
    }
    short = tmp_path / "short.gguf"
    write_fields(short, whole, fields, whole.tensors)
    for words in (("inspect", short), ("generate", short, "a")):
        said = refused(run(*words), "short.gguf is no whole GGUF file: its header says")
        assert f"block_count {count}, and it has tensors of 4 layers" in said


# --- links, names, signals
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["measured.jsonl", ".lock"])
def test_a_link_in_a_results_folder_is_not_written_through(
    working, folder, run, there, name
):
    victim = Path("victim")
    if there:
        victim.touch()
    Path("out").mkdir()
    (Path("out") / name).symlink_to(working / victim)
    ended = run("eval", folder, "--skip", "attention:1", *QUICK, "--out", "out")
    refused(
        ended, f"{name} is a link: put the file itself there, or choose another folder"
    )
    assert victim.exists() == there
    assert not there or not victim.read_bytes()


def test_a_link_that_is_made_meanwhile_is_not_written_through(working, monkeypatch):
    monkeypatch.setattr(
        records_lines, "refuse_link", lambda _: None
    )  # it was none a moment ago
    Path("results.jsonl").symlink_to(working / "victim")
    with pytest.raises(UsageError, match=r"cannot write results\.jsonl"):
        records_lines.append(Path("results.jsonl"), {"a": 1})
    assert not Path("victim").exists()


def test_a_lock_of_the_user_is_not_emptied(working):
    """Releases of filelock before 4 do so."""
    Path(".lock").write_text("of the user")
    with pytest.raises(
        UsageError, match="lock is there, and notall did not write it: choose"
    ):
        records_lines.lock(Path(".")).__enter__()
    assert Path(".lock").read_text() == "of the user"


IMAGE, LINK = (
    '<img src=x onerror="alert(1)">',
    "[here](javascript:alert(1)) ![](http://t.example/x)",
)
HOSTILE = f"{IMAGE} {LINK} `a` **b** | &lt;script>"


def test_a_note_is_no_markup_in_a_card(tiny, tmp_path):
    plan = Plan([1], [1], note=HOSTILE)
    about = {"measured": {HOSTILE: HOSTILE}}
    notall.export(tiny, plan, "hf", tmp_path / "out", verify=False, **about)
    card = (tmp_path / "out" / "README.md").read_text()
    shown = re.sub(r"\\.", "", card)  # without what is escaped
    assert "alert" in card
    for markup in ("<img", "](", "![", "**b", "&lt", "<script"):
        assert markup not in shown, markup


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_partial_file(working, name):
    number = getattr(signal, name)
    before = signal.signal(
        number, signal.SIG_DFL
    )  # the tests themselves may run under nohup

    def work():
        with cli._own_manners(), files.temporary(Path("o")) as partial:
            partial.mkdir()
            os.kill(os.getpid(), number)
            time.sleep(5)

    try:
        with pytest.raises(SystemExit) as ended:
            work()
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert not [*working.iterdir()]


def test_under_nohup_a_run_goes_on_when_its_terminal_goes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._own_manners():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


LONG = "x" * 5_000
NAMED = {
    "plan": ("plan", "MODEL", "--skip", "mlp:1", "-o", "NAME"),
    "search": ("search", "MODEL", "--skip", "mlp:1", "-o", "NAME"),
    "eval": ("eval", "MODEL", "--plan", "NAME"),
    "heal": ("heal", "MODEL", "--plan", "NAME", "--out", "healed"),
    "text": ("eval", "MODEL", "--skip", "mlp:1", "--text", "NAME"),
    "held out": ("search", "MODEL", "--skip", "mlp:1", "--held-out", "NAME"),
    "tasks": (
        "eval",
        "MODEL",
        "--skip",
        "mlp:1",
        "--task-path",
        "NAME",
        "--tasks",
        "passkey",
    ),
    "prompts": ("compare", "MODEL", "--objective", "answers", "--prompts", "NAME"),
    "model": ("inspect", "NAME"),
    "shape": ("bench", "--shape", "NAME", "--dummy-weights"),
    "results": ("report", "NAME"),
    "page": ("report", "results", "-o", "NAME"),
    "again": ("reproduce", "NAME"),
    "functions": ("reproduce", "results", "--functions", "NAME"),
    "offload": (
        "repair",
        "MODEL",
        "--skip",
        "mlp:1",
        "--offload",
        "NAME",
        "--text",
        "t",
    ),
    "export": ("export", "MODEL", "--plan", "plan.json", "--to", "hf", "--out", "NAME"),
    "out": ("sweep", "MODEL", "--out", "NAME"),
    "also": (
        "pareto",
        "MODEL",
        "--engine",
        "transformers",
        "--also",
        "NAME",
        "--skip",
        "mlp:1",
    ),
    "join": ("report", "results", "--join", "NAME"),
    "criterion": ("search", "MODEL", "--skip", "mlp:1", "--criterion", "NAME:f"),
}


@pytest.mark.parametrize("given", NAMED)
@pytest.mark.parametrize(
    "name", [LONG, f"{LONG}/x", "half \udcff"], ids=["long", "in it", "odd"]
)
def test_names_of_no_file_are_one_line(
    working, folder, run, own_tasks_only, given, name
):
    recorded(Path("results"), f"notall search {folder} --skip mlp:1 --criterion mine:f")
    Plan([1]).save("plan.json")
    Path("t").write_text("a bird sings under the winter light of an old stone; " * 9)
    words = [
        word.replace("NAME", name).replace("MODEL", str(folder))
        for word in NAMED[given]
    ]
    said = refused(run(*words))
    assert len(said) < 700
    assert name.isascii() or "is not UTF-8: rename" in said


# --- a model's folder
# --------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tiny, working):
    """A model's folder, to plant in."""
    return copytree(tiny, working / "theirs")


def settings_of(file: Path, **more: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | more))


class Marks:
    """What leaves a mark when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.command = f"touch {folder / MARK}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def plant_config(folder: Path, working: Path) -> None:
    (folder / "evil.py").write_text(marking(working))
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    settings_of(folder / "config.json", auto_map=classes)


def plant_model_type(folder: Path, working: Path) -> None:
    plant_config(folder, working)
    settings_of(folder / "config.json", model_type="evil")


def plant_tokenizer(folder: Path, working: Path) -> None:
    (folder / "evil.py").write_text(marking(working))
    classes = {"AutoTokenizer": ["evil.T", None]}
    settings_of(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="T")


def plant_generation(folder: Path, working: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(marking(working))


def plant_pickle(folder: Path, working: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(working)))


def plant_index(folder: Path, working: Path) -> None:
    plant_pickle(folder, working)
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def plant_named_weights(folder: Path, working: Path) -> None:
    plant_pickle(folder, working)
    settings_of(folder / "config.json", transformers_weights="pytorch_model.bin")


def plant_adapter(folder: Path, working: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Marks(working)))
    settings_of(folder / "adapter_config.json", peft_type="LORA")


def plant_tokenizer_pickle(folder: Path, working: Path) -> None:
    (folder / "vocab.pkl").write_bytes(pickle.dumps(Marks(working)))
    how = {"tokenizer_class": "TransfoXLTokenizer", "vocab_file": "vocab.pkl"}
    settings_of(folder / "tokenizer_config.json", **how)


def plant_quantisation(folder: Path, working: Path) -> None:
    how = {"default": {"_type": "os.system", "_data": f"touch {working / MARK}"}}
    method = {"quant_method": "torchao", "quant_type": how}
    settings_of(folder / "config.json", quantization_config=method)


def plant_template(folder: Path, working: Path) -> None:
    """Jinja's ways out of a template."""
    command = f"touch {working / MARK}"
    ways = [
        f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}",
        f"{{{{ lipsum.__globals__['os'].popen('{command}').read() }}}}",
        (
            f"{{{{ ''.__class__.__mro__[1].__subclasses__()[-1]('{command}',"
            " shell=True) }}"
        ),
    ]
    settings_of(folder / "tokenizer_config.json", chat_template="".join(ways))


def plant_card(folder: Path, working: Path) -> None:
    command = f"!!python/object/apply:os.system ['touch {working / MARK}']"
    (folder / "README.md").write_text(f"---\nlicense: {command}\n---\n")


PLANTS = [
    plant_config,
    plant_model_type,
    plant_tokenizer,
    plant_generation,
    plant_pickle,
    plant_index,
    plant_named_weights,
    plant_adapter,
    plant_tokenizer_pickle,
    plant_quantisation,
    plant_template,
    plant_card,
]


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_no_code_of_a_model_runs(theirs, working, run, plant):
    plant(theirs, working)
    Plan([1], [1]).save("plan.json")
    answers = ("--text", "answers:prompts.txt", "--sequences", "1", "--length", "8")
    Path("prompts.txt").write_text("Who sings?\n")
    for words in (
        ("inspect", theirs),
        (
            "eval",
            theirs,
            "--skip",
            "attention:1",
            *answers,
        ),  # asks by the chat template
        (
            "export",
            theirs,
            "--plan",
            "plan.json",
            "--to",
            "hf",
            "--out",
            "out",
            "--no-verify",
        ),
    ):
        code, _, err = run(*words)
        assert code in (0, 2), err
        assert not ran(working), words
    assert not [*Path("out").glob("*.py")]


@pytest.mark.parametrize("names", ["pytorch_model.bin", "model.pt", "weights"])
def test_an_index_of_safetensors_names_no_pickles(theirs, working, run, names):
    plant_index(theirs, working)
    index = theirs / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("pytorch_model.bin", names))
    said = f"names {re.escape(names)}, and only safetensors are read: save the model"
    with pytest.raises(UsageError, match=said):
        notall.load(theirs)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "value", ["a/kernel", "kernels-community/flash-attn", {"": "a/kernel"}]
)
def test_a_config_does_not_choose_attention_code_of_the_hub(theirs, key, value):
    """transformers would fetch it, where kernels is installed, without
    trust_remote_code. From 5.25 on it reads the public key alone.
    """
    if key.startswith("_") and TRANSFORMERS >= (5, 25):
        settings_of(theirs / "config.json", **{key: value})
        model, _ = notall.load(theirs)
        assert "/" not in str(model.config._attn_implementation)
        return
    settings_of(theirs / "config.json", **{key: value})
    said = r"asks for attention code of the hub \(.*\), which is not run: take attn_"
    for read in (
        notall.load,
        lambda folder: weightless.load_empty(folder, None),
        configs.load_config,
    ):
        with pytest.raises(UsageError, match=said):
            read(theirs)


def test_a_config_with_a_doubled_key_is_refused(theirs, run):
    """Of which transformers takes the last, and who reads it the first."""
    config = theirs / "config.json"
    config.write_text(config.read_text().replace("{", '{"num_hidden_layers": 2,', 1))
    for words in (("inspect", theirs), ("generate", theirs, "a")):
        refused(
            run(*words), "config.json of ", '"num_hidden_layers" twice: take one away'
        )


# --- the working folder
# --------------------------------------------------------------------------------------


def test_a_distribution_in_the_working_folder_adds_nothing(working, folder, run):
    """Its entry points are found where that folder is on the path, as for
    `module:function`.
    """
    Path("mine.py").write_text("def f(setting):\n    return {}\n")
    Path("planted.py").write_text(marking(working, "def g(setting):\n    return {}\n"))
    about = Path("planted-1.0.dist-info")
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n"
    )
    (about / "entry_points.txt").write_text("[notall.criteria]\nplanted = planted:g\n")
    named = ("--criterion", "mine:f", "--criterion", "planted")
    ended = run("compare", folder, "--skip", "mlp:1", *named, "--out", "out")
    refused(ended, "there is no criterion 'planted'")
    assert not ran(working)


def test_a_published_plan_is_that_of_the_package(working, export_of, run):
    name = "published:smollm2-attention-8-by-mix"
    copytree(export_of["ordinary"], name)
    assert read_plan(Path(name)) == Plan.load(name) != Plan([1], [1])


def stock_task(
    working: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> TaskShelf:
    """A shelf of the harness's own tasks, one of which, `stock`, reads data of the
    hub.
    """
    from lm_eval.tasks import TaskManager

    about = {"task": "stock", "dataset_path": "someone/data", "test_split": "test"}
    about |= {"output_type": "multiple_choice"}
    about |= {
        "doc_to_text": "{{q}}",
        "doc_to_target": "0",
        "doc_to_choice": "{{['a', 'b']}}",
    }
    (working.parent / "harness").mkdir()
    (working.parent / "harness" / "stock.yaml").write_text(json.dumps(about | more))
    own = partial(
        TaskManager,
        include_path=str(working.parent / "harness"),
        include_defaults=False,
    )
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path=None: own())
    return TaskShelf()


def test_data_of_a_task_of_the_harness_is_not_taken_from_the_working_folder(
    working, monkeypatch
):
    Path("someone/data").mkdir(parents=True)
    Path("someone/data/test.jsonl").write_text('{"q": "planted"}\n' * 4)
    with pytest.raises(
        UsageError, match="cannot read the data of stock: the hub is out of reach"
    ):
        stock_task(working, monkeypatch).build("stock")
    assert Path.cwd() == working


def test_a_metric_of_a_task_of_the_harness_is_not_run_from_the_working_folder(
    working, monkeypatch
):
    Path("planted").mkdir()
    Path("planted/planted.py").write_text(marking(working))
    metric = {"metric": "planted", "hf_evaluate": True}
    shelf = stock_task(working, monkeypatch, metric_list=[metric])
    with pytest.raises(UsageError, match="of stock"):
        shelf.build("stock")
    assert not ran(working)


# --- what is written, and where
# --------------------------------------------------------------------------------------


OURS = {
    "sweep": (
        "out/similarity.csv",
        "out/similarity.html",
        "out/table.md",
        "out/results.jsonl",
    ),
    "compare": ("out/table.csv", "out/front.svg", "out/comparison.jsonl"),
    "similarity": ("out.csv", "out.tex", "out.png", "out.svg", "out.html"),
    "paper": (
        "out/paper.md",
        "out/claims.csv",
        "out/similarity.png",
        "out/claims.jsonl",
    ),
    "pareto": (
        "out/table.md",
        "out/checkpoints/dense",
        "out/checkpoints/written.jsonl",
    ),
    "report": ("out.html",),
    "export": ("out", "out.repaired/plan.json"),
}
ASKED = {
    "compare": ("--skip", "mlp:1"),
    "pareto": PARETO,
    "report": ("-o", "out.html"),
    "export": ("--plan", "plan.json", "--to", "hf", "--repair", "refit"),
}


PAIRS = [(command, name) for command, names in OURS.items() for name in names]


@pytest.mark.parametrize(("command", "name"), PAIRS)
def test_a_file_of_the_user_is_not_replaced(
    working, tiny, run, own_tasks_only, command, name
):
    """It is refused before any work: there is no such model."""
    Plan([1]).save("plan.json")
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("of the user\n")
    model = "absent" if command not in ("report", "export") else tiny
    words = ("out",) if command == "report" else (model, "--out", "out")
    said = refused(run(command, *words, *ASKED.get(command, ())))
    assert "absent" not in said
    assert Path(name).read_text() == "of the user\n"


WEIGHTS = {
    "weights.safetensors": lambda out: methods.repair_into(
        out, "replaceme", *plainly()
    ),
    "attn.2.safetensors": lambda out: methods.repair_into(out, "refit", *plainly()),
    "healed.safetensors": healed,
}


def plainly() -> tuple[Any, ...]:
    return family("llama").build(), Plan([1]), TEXTS, result_folders.ABOUT


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_user_are_not_replaced(working, name):
    Path("out").mkdir()
    save_file({"w": torch.ones(2)}, f"out/{name}")
    before = contents_of(working)
    said = (
        f"{re.escape(name)} is there, and notall did not write it: move it away, or"
        " choose"
    )
    with pytest.raises(UsageError, match=said):
        WEIGHTS[name](Path("out"))
    assert contents_of(working)[f"out/{name}"] == before[f"out/{name}"]


def test_a_link_that_is_made_while_an_export_is_written_is_not_followed(
    tiny, working, monkeypatch
):
    Path("elsewhere").mkdir()

    def late(*_: Any) -> None:
        Path("out").symlink_to(working / "elsewhere")

    monkeypatch.setattr(exporters, "describe", late)
    with pytest.raises(
        UsageError, match="out was made by someone else meanwhile; choose another"
    ):
        notall.export(tiny, Plan([1], [1]), "hf", "out", verify=False)
    assert {path.name for path in working.iterdir()} == {"elsewhere", "out"}
    assert not [*Path("elsewhere").iterdir()]


def test_a_link_in_place_of_a_partial_file_is_not_written_through(working, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0a1b2c")
    Path("victim").write_text("of the user")
    with files.temporary(Path("plan.json")) as partial:
        partial.symlink_to("victim")
        monkeypatch.setattr(files, "temporary", lambda _: nullcontext(partial))
        with pytest.raises(FileExistsError):
            files.write_whole(Path("plan.json"), "{}")
    assert Path("victim").read_text() == "of the user"


@pytest.mark.parametrize(
    "process", ["9" * 20, "4294967297", "\u0663\u0664", "-1", "0x1"]
)
def test_names_that_are_like_partial_files_stay(working, process):
    theirs = Path(f".plan.json.{files._numbering()}.{process}.0a1b2c")
    theirs.write_text("of the user")
    Plan([1]).save("plan.json")
    assert theirs.read_text() == "of the user"


ELSEWHERE = [
    "../plan.json",
    "/etc/hostname",
    "a/b.safetensors",
    "x\0y",
    "." * 300,
    "..",
    "",
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_repair_names_no_file_elsewhere(working, name):
    Plan([1]).save("plan.json")
    RepairedPlan.of(Plan([1])).save("repair")
    seal = Path("repair/finished.json")
    told = json.loads(seal.read_text())
    del told["sealed"]
    told["files"][name] = sha256(Path("plan.json"))
    seal.write_bytes(sealed(json.dumps(told).encode()))
    with pytest.raises(
        UsageError, match=r"download it again|delete the folder, and repair"
    ):
        RepairedPlan.load("repair")


def test_a_page_runs_no_function_that_a_record_names(working, run):
    Path("mine.py").write_text(marking(working, "def f(setting):\n    return {}\n"))
    record = result_folders.compared("mine:f", "mlp", 1, 0.1, repair="mine:f")
    result_folders.write(Path("r"), record)
    assert run("report", "r", "-o", "page.html")[0] == 0
    assert not ran(working)
