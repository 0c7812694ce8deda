"""Nothing runs unasked, nothing of the user's is lost, and what is not listed is refused.

Each test plants what somebody else could have put there (in a results folder, a cache, a working folder, a model) and
looks at what notall does with it. Code that must not run leaves a mark.
"""

from __future__ import annotations

import hashlib
import json
import os
import py_compile
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import notall
import result_folders
from api import (
    Field,
    Provenance,
    cli,
    files,
    gguf_copies,
    healing,
    loading,
    methods,
    read_gguf,
    records_lines,
    remote_code,
    sealed,
    write_gguf as write_fields,
    write_tensors,
)
from command_line import QUICK
from families import family
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


# --- reproduce: what a record may ask for ----------------------------------------------------------------------------


def recorded(folder: Path, command: str, **where: Any) -> Path:
    """A results folder whose record says that this command made it."""
    about = Provenance(what=result_folders.ABOUT.what, where={"command": command, **where})
    return result_folders.write(folder, result_folders.measured("t", "skipped", 0.1, provenance=about))


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
def test_a_record_asks_for_nothing_but_what_is_listed(working, folder, run, own_tasks_only, words):
    task = Path("r/evil/evil.yaml")
    task.parent.mkdir(parents=True)
    task.write_text("task: evil\ndataset_path: json\noutput_type: multiple_choice\ndoc_to_text: !function utils.f\n")
    (task.parent / "utils.py").write_text(marking(working, "def f(document): return 'a'\n"))
    Path("t").write_text("a bird sings under the winter light of an old stone; " * 9)
    recorded(Path("r"), f"notall eval {folder} --text t --skip attention:1 {' '.join(QUICK)} --tasks evil {words}")
    refused(run("reproduce", "r", "--out", "again"), "no record may ask for")
    assert not ran(working)
    assert not Path("again").exists()


FUNCTIONS = ("--criterion r.mine:f", "--criterion=r.mine:f", "--repair r.mine:f", "--criterion shutil:rmtree")


@pytest.mark.parametrize("words", FUNCTIONS)
def test_a_record_runs_no_function(working, run, words):
    Path("r").mkdir()
    Path("r/mine.py").write_text(marking(working, "def f(*given): return {}\n"))
    recorded(Path("r"), f"notall compare tiny --skip attention:1 {words}")
    refused(run("reproduce", "r", "--out", "again"), "a record does not run functions", "--functions DIR")
    assert not ran(working)
    assert "r.mine" not in sys.modules


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_record_runs_only_the_file_that_it_was_recorded_with(working, folder, run):
    """And only from the folder that the user names: not the one of that name in the working folder."""
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
        said = refused(run("reproduce", results, "--functions", "trusted", "--out", "again"), "is not the file")
        assert "trusted/mine.py" in said
    refused(run("reproduce", "same", "--functions", ".", "--out", "again"), "mine.py is not the file")
    assert not ran(working)
    refused(run("reproduce", "same", "--functions", "trusted", "--out", "again"), "lower --length")
    assert ran(working)
    assert str(working) not in sys.path
    assert str(working / "trusted") not in sys.path


def test_bytecode_beside_a_module_is_not_run(working, run):
    """Python takes it for the file's, whatever that holds, where its header says that nobody needs to compare."""
    source = Path("mine.py")
    source.write_text(marking(working))
    py_compile.compile("mine.py", invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text("def f(setting):\n    return {}\n")
    refused(run("search", "absent", "--skip", "mlp:1", "--criterion", "mine:f"), "absent")
    assert "mine" in sys.modules
    assert not ran(working)


def test_the_working_folder_is_on_the_path_for_a_function_alone(working, run):
    """What libraries look for later, such as flash_attn, is not taken from there."""
    Path("mine.py").write_text("import helper\ndef f(setting):\n    return {}\n")
    Path("helper.py").write_text("")
    refused(run("search", "absent", "--skip", "mlp:1", "--criterion", "mine:f"), "absent")
    assert "helper" in sys.modules
    assert not {"", ".", str(working)} & set(sys.path)
    Path("flash_attn_9.py").write_text(marking(working))
    with pytest.raises(ModuleNotFoundError):
        import_module("flash_attn_9")


# --- what the user has in a folder -----------------------------------------------------------------------------------


TEXTS = [torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(number)) for number in range(2)]


def healed(out: Path) -> None:
    notall.heal(family("llama").build(), Plan([1]), TEXTS[:1], TEXTS[1:], TrainConfig(evaluations=1), out=out)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["step-100.pt", "last.safetensors", "best.safetensors/weights", "ray/state", ".mine"])
def test_checkpoints_of_the_user_stay_and_are_named(working, name):
    theirs = Path("out/checkpoints") / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text("of the user")
    with pytest.raises(UsageError, match=r"is there, and no healing wrote it: move it away, or choose another --out"):
        healed(Path("out"))
    assert theirs.read_text() == "of the user"


def test_a_link_in_place_of_checkpoints_is_not_followed(working):
    Path("elsewhere").mkdir()
    save_file({"w": torch.ones(2)}, "elsewhere/best.safetensors")
    Path("out").mkdir()
    Path("out/checkpoints").symlink_to(working / "elsewhere")
    before = contents_of(Path("elsewhere"))
    with pytest.raises(UsageError, match="checkpoints is there, and no healing wrote it"):
        healed(Path("out"))
    assert contents_of(Path("elsewhere")) == before


def test_what_is_put_beside_checkpoints_stays_when_the_healing_ends(working):
    healed(Path("out"))
    Path("out/checkpoints").mkdir()
    Path("out/checkpoints/notes.txt").write_text("of the user")
    healed(Path("out"))  # it is finished, and cleans up
    assert Path("out/checkpoints/notes.txt").read_text() == "of the user"


def test_a_repair_with_minutes_refuses_others_checkpoints_before_it_repairs(working, monkeypatch):
    monkeypatch.setattr(methods, "repair_into", lambda *_: pytest.fail("it was repaired"))
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/step-100.pt").write_text("of the user")
    training = healing.Training(Plan([1]), TEXTS[:1], TEXTS[1:], TrainConfig(minutes=1.0))
    with pytest.raises(UsageError, match=r"step-100\.pt is there, and no healing wrote it"):
        methods.recover(Path("out"), "refit", family("llama").build(), training, TEXTS, result_folders.ABOUT)
    assert Path("out/checkpoints/step-100.pt").read_text() == "of the user"


PARETO = ("--engine", "transformers", "--skip", "attention:1")


def test_pareto_refuses_others_checkpoints_before_it_reads_a_model(working, run):
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/dense-float32").mkdir()
    Path("out/checkpoints/dense-float32/mine").write_text("of the user")
    said = refused(run("pareto", "absent", *PARETO, "--out", "out"), "is there, and notall did not write it")
    assert "dense-float32" in said
    assert Path("out/checkpoints/dense-float32/mine").read_text() == "of the user"


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


UNWRITABLE = """
import notall.files
def fail(*_):
    raise PermissionError
notall.files.write_whole = fail
"""
REGISTERED = """
import sys
import notall
notall.register("llama")
from transformers import AutoConfig
config = AutoConfig.for_model("notall_llama")
config.save_pretrained(sys.argv[1])
"""


def test_code_in_a_cache_that_cannot_be_written_is_neither_run_nor_copied(working, own_cache, monkeypatch):
    """Root may write everywhere, so writing is made to fail."""
    source = remote_code.source_of("llama")
    file = own_cache / "modeling" / notall.__version__ / remote_code.modeling_file("llama")
    file.parent.mkdir(parents=True)
    file.write_text(marking(working, source))
    subprocess.run([sys.executable, "-c", f"{UNWRITABLE}{REGISTERED}", "saved"], check=True)
    assert not ran(working)
    assert Path("saved", file.name).read_text() == source


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777], ids=oct)
@pytest.mark.parametrize("part", ["", "answers"])
def test_a_cache_that_others_can_write_is_refused(own_cache, part, mode, monkeypatch):
    monkeypatch.setattr(files, "_is_private_group", lambda *_: False)
    (own_cache / part).mkdir(parents=True)
    (own_cache / part).chmod(mode)
    with pytest.raises(UsageError, match=r"others can write to the cache folder .*: take that right away \(chmod go-w"):
        files.cache_folder("answers")


def test_a_cache_is_made_for_its_owner_alone(own_cache):
    before = os.umask(0)
    try:
        made = files.cache_folder("modeling", "1") / "code.py"
        files.keep(made, "")
    finally:
        os.umask(before)
    folders = [*made.parents][:3]
    assert folders[-1] == own_cache
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it looks up open files")
def test_a_file_is_on_disk_before_it_has_its_name(working, monkeypatch):
    """And its folder after that: no power cut leaves an empty file in place of an old one."""
    steps, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: steps.append(os.readlink(f"/proc/self/fd/{number}")) or sync(number)
    )
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("renamed") or replace(*names))
    files.write_whole(Path("plan.json"), "{}")
    first, second, third = steps
    assert Path(first).name.startswith(".plan.json.")
    assert (second, third) == ("renamed", str(working))
    steps.clear()
    write_tensors(Path("w.safetensors"), {"w": torch.ones(2)})
    assert steps[1:] == ["renamed", str(working)]
    assert Path(steps[0]).name.startswith(".w.safetensors.")


# --- files beside a manifest, and headers that count wrongly ---------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("dense") / "tiny", num_hidden_layers=4)


@pytest.fixture(scope="module")
def export_of(tiny, tmp_path_factory):
    """An export in a form of its own, and one that is an ordinary checkpoint."""
    place = tmp_path_factory.mktemp("exports")
    plans = {"regrouped": Plan([1], [2]), "ordinary": Plan([1], [1])}
    return {name: notall.export(tiny, plan, "hf", place / name, verify=False) for name, plan in plans.items()}


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
def test_a_file_that_a_manifest_does_not_list_is_refused(export_of, tmp_path, kind, name):
    planted = copytree(export_of[kind], tmp_path / "export") / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text(PLANTED[name])
    said = (
        re.escape(f"holds {Path(name).parts[0].strip()}") + ".*, which notall.json does not list: move that file away"
    )
    for read in (notall.load, lambda folder: loading.load_empty(folder, None)):
        with pytest.raises(UsageError, match=said):
            read(tmp_path / "export")


@pytest.mark.parametrize("name", [".gitattributes", "LICENSE", "README.md", "notes.md", ".cache/huggingface/x"])
def test_what_nothing_reads_may_lie_beside_an_export(export_of, tmp_path, name):
    mine = copytree(export_of["regrouped"], tmp_path / "export") / name
    mine.parent.mkdir(exist_ok=True, parents=True)
    mine.write_text("mine")
    notall.load(tmp_path / "export")


@pytest.mark.parametrize("listed", [[], ["config.json"], {"config.json": 5}, None, "x"])
def test_a_manifest_whose_files_are_no_table_is_damaged(export_of, tmp_path, listed, run):
    manifest = copytree(export_of["regrouped"], tmp_path / "export") / "notall.json"
    told = json.loads(manifest.read_text())
    del told["sealed"]
    manifest.write_bytes(sealed(json.dumps(told | {"files": listed}).encode()))
    refused(run("inspect", tmp_path / "export"), "notall.json of ", "is damaged: export it anew")


def test_a_file_planted_in_the_copy_of_a_gguf_file_is_not_read(own_cache, tmp_path):
    gguf = write_gguf(family("llama").build(vocab_size=len(WORDS), num_hidden_layers=2), tmp_path / "m.gguf")
    folder = gguf_copies.convert_gguf(gguf)
    (folder / "added_tokens.json").write_text('{"the": 5}')
    assert gguf_copies.convert_gguf(gguf) == folder
    assert not (folder / "added_tokens.json").exists()


def test_records_planted_beside_a_repair_are_refused(working):
    """They would tell another history of the weights, which an export hands on."""
    RepairedPlan.of(Plan([1])).save("repair")
    records_lines.append(Path("repair/healing.jsonl"), {"record": "header", "of": "heal"})
    with pytest.raises(UsageError, match=r"holds healing\.jsonl, which is no part of its repair: move that file away"):
        RepairedPlan.load("repair")


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("more", [{}, {"split.count": 2}, {"other.block_count": 4}])
def test_a_gguf_file_that_counts_fewer_layers_than_it_holds_is_refused(tmp_path, run, own_cache, count, more):
    gguf = write_gguf(family("llama").build(vocab_size=len(WORDS), num_hidden_layers=4), tmp_path / "m.gguf")
    whole = read_gguf(gguf)
    fields = {**whole.fields, "llama.block_count": Field.of(count), **{n: Field.of(value) for n, value in more.items()}}
    write_fields(tmp_path / "short.gguf", whole, fields, whole.tensors)
    for command in (("inspect",), ("generate",)):
        said = refused(run(*command, tmp_path / "short.gguf", *(["a"] if command == ("generate",) else [])))
        assert "short.gguf is no whole GGUF file: its header says block_count" in said
        assert f"block_count {count}, and it has tensors of 4 layers" in said


# --- links, names, signals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("name", ["measured.jsonl", ".lock"])
def test_a_link_in_a_results_folder_is_not_written_through(working, folder, run, there, name):
    victim = Path("victim")
    if there:
        victim.touch()
    Path("out").mkdir()
    (Path("out") / name).symlink_to(working / victim)
    refused(
        run("eval", folder, "--skip", "attention:1", *QUICK, "--out", "out"), f"{name} is a link: ", "choose another"
    )
    assert victim.exists() == there
    assert not there or not victim.read_bytes()


def test_a_link_that_is_made_meanwhile_is_not_written_through(working, monkeypatch):
    monkeypatch.setattr(records_lines, "refuse_link", lambda _: None)  # it was none a moment ago
    Path("results.jsonl").symlink_to(working / "victim")
    with pytest.raises(UsageError, match=r"cannot write results\.jsonl"):
        records_lines.append(Path("results.jsonl"), {"a": 1})
    assert not Path("victim").exists()


def test_a_lock_of_the_user_is_not_emptied(working):
    """Releases of filelock before 4 do so."""
    Path(".lock").write_text("of the user")
    with pytest.raises(UsageError, match="lock is there, and notall did not write it: choose another folder"):
        records_lines.lock(Path(".")).__enter__()
    assert Path(".lock").read_text() == "of the user"


HOSTILE = '<img src=x onerror="alert(1)"> [here](javascript:alert(1)) ![](http://t.example/x) `a` **b** | &lt;script>'


def test_a_note_is_no_markup_in_a_card(tiny, tmp_path):
    plan = Plan([1], [1], note=HOSTILE)
    about = {"measured": {HOSTILE: HOSTILE}}
    card = (notall.export(tiny, plan, "hf", tmp_path / "out", verify=False, **about) / "README.md").read_text()
    shown = re.sub(r"\\.", "", card)  # without what is escaped
    assert "alert" in card
    for markup in ("<img", "](", "![", "**b", "&lt", "<script"):
        assert markup not in shown, markup


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_partial_file(working, name):
    number = getattr(signal, name)

    def work():
        with cli._own_manners(), files.beside(Path("o")) as partial:
            partial.mkdir()
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        work()
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
    "tasks": ("eval", "MODEL", "--skip", "mlp:1", "--task-path", "NAME", "--tasks", "passkey"),
    "prompts": ("search", "MODEL", "--skip", "mlp:1", "--objective", "answers", "--prompts", "NAME"),
    "model": ("inspect", "NAME"),
    "shape": ("bench", "--shape", "NAME", "--dummy-weights"),
    "results": ("report", "NAME"),
    "page": ("report", "results", "-o", "NAME"),
    "again": ("reproduce", "NAME"),
    "functions": ("reproduce", "results", "--functions", "NAME"),
    "offload": ("repair", "MODEL", "--skip", "mlp:1", "--offload", "NAME", "--text", "t"),
    "export": ("export", "MODEL", "--plan", "plan.json", "--to", "hf", "--out", "NAME"),
    "out": ("sweep", "MODEL", "--out", "NAME"),
    "also": ("pareto", "MODEL", "--engine", "transformers", "--also", "NAME", "--skip", "mlp:1"),
    "join": ("report", "results", "--join", "NAME"),
    "criterion": ("search", "MODEL", "--skip", "mlp:1", "--criterion", "NAME:f"),
}


@pytest.mark.parametrize("given", NAMED)
@pytest.mark.parametrize("name", [LONG, f"{LONG}/x", "half \udcff"], ids=["long", "long folder", "no UTF-8"])
def test_names_that_no_file_can_have_are_one_line(working, folder, run, own_tasks_only, given, name):
    recorded(Path("results"), f"notall search {folder} --skip mlp:1 --criterion mine:f")
    Plan([1]).save("plan.json")
    Path("t").write_text("a bird sings under the winter light of an old stone; " * 9)
    words = [word.replace("NAME", name).replace("MODEL", str(folder)) for word in NAMED[given]]
    said = refused(run(*words))
    assert len(said) < 700
    assert name.isascii() or "is not UTF-8: rename" in said
