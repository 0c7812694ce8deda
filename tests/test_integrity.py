"""What notall wrote and is no longer so is refused, in a line that names the file and
the way out.

Each kind of folder, each of its files, each damage: a byte flipped, cut off, deleted,
or taken from another folder.
"""

from __future__ import annotations

import json
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
import torch

import notall
import result_folders
from api import (
    SEAL,
    Provenance,
    RefitRecord,
    gguf_copies,
    kept_repair,
    manifest_plan_of,
    read,
    records_lines as lines,
    sealed,
    silent,
    texts_mix,
    unsealed,
    write_report,
)
from command_line import QUICK
from families import family
from notall import Plan, RepairedPlan, UsageError, export, heal, repair
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf
from tiny_tokenizer import byte_tokenizer

pytestmark = pytest.mark.any_transformers  # it looks at files

PLAN, OTHER_PLAN = Plan([0, 3], [1]), Plan([2], [1, 3])
TEXTS = [
    torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(n))
    for n in range(2)
]
HELD = [torch.randint(3, 99, (8, 12), generator=torch.Generator().manual_seed(2))]
FIXES = ("delete", "again", "export it anew", "move that file away", "move it away")
SEAL_ALONE = (
    "deleted",
    "another's",
)  # then it was never finished, and all others are no part of it
FLIPS = 12  # of a file, each in another place


def model():
    return family("llama").build()


def finetuned():
    """Another of the same shape, whose numbers are a little other ones."""
    other = model()
    for weight in other.parameters():
        weight.data.mul_(1.01)
    return other


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of each kind one, and another of that kind."""
    place = tmp_path_factory.mktemp("folders")
    dense = save_tiny_checkpoint(place / "dense", num_hidden_layers=4)
    for number, plan in (("one", PLAN), ("two", OTHER_PLAN)):
        repaired = repair(model(), plan, TEXTS, out=place / "repair" / number)
        heal(model(), repaired, TEXTS, HELD, out=place / "heal" / number)
        for target in ("hf", "nemotron-nas"):
            export(dense, plan, target, place / target / number, verify=False)
        kept_repair(
            place / "kept" / number, "replaceme", model(), Plan(mlp=plan.mlp), TEXTS
        )
    return place


OPENED = {
    "repair": RepairedPlan.load,
    "heal": RepairedPlan.load,
    "hf": notall.load,
    "nemotron-nas": notall.load,
    "kept": lambda folder: kept_repair(
        folder, "replaceme", model(), Plan(mlp=PLAN.mlp), TEXTS
    ),
}
UNREAD = (".py", ".md")  # code that is never run, and a card


def damaged(path, other):
    """What may become of a file: its damage in a word, and its bytes, or None."""
    sound = path.read_bytes()
    for place in range(0, len(sound), -(-len(sound) // FLIPS)):
        yield (
            f"byte {place}",
            sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :],
        )
    yield "cut off", sound[: len(sound) // 2]
    yield "deleted", None
    if other.is_file() and other.read_bytes() != sound:
        yield "another's", other.read_bytes()


@pytest.mark.parametrize("kind", OPENED)
def test_a_folder_that_is_damaged_is_not_believed(folders, tmp_path, kind):
    folder, other = (
        shutil.copytree(folders / kind / "one", tmp_path / "copy"),
        folders / kind / "two",
    )
    OPENED[kind](folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in UNREAD or path.name.startswith("."):
            continue
        theirs = next(iter(other.glob("*"))) if kind == "kept" else other / path.name
        sound = path.read_bytes()
        for damage, content in damaged(path, theirs):
            if damage == "deleted" and (path.name == "notall.json" or kind == "kept"):
                # a checkpoint like any other; and what is not kept is made anew
                continue
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(UsageError) as refusal:
                OPENED[kind](folder)
            said = str(refusal.value)
            assert path.name in said or (path.name == SEAL and damage in SEAL_ALONE), (
                path.name,
                damage,
                said,
            )
            assert "\n" not in said
            assert any(fix in said for fix in FIXES), (path.name, damage, said)
            path.write_bytes(sound)
    OPENED[kind](folder)


def test_commands_end_with_one_line_and_code_2(run, folders, tmp_path):
    dense = folders / "dense"
    for kind, name in (("hf", "notall.json"), ("repair", "plan.json")):
        folder = shutil.copytree(folders / kind / "one", tmp_path / kind)
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"3", b"2", 1))
        code, _, err = run("eval", dense, "--plan", folder, *QUICK)
        assert (code, err.count("\n")) == (2, 1), err
        assert f"error: {name} of " in err


def test_what_is_inspected_is_what_was_written(run, folders, tmp_path):
    """Weights apart, which it does not read."""
    folder = shutil.copytree(folders / "hf" / "one", tmp_path / "copy")
    config, weights = folder / "config.json", folder / "model.safetensors"
    sound = config.read_bytes()
    config.write_bytes(sound.replace(b"10000", b"10001", 1))
    code, _, err = run("inspect", folder)
    assert (code, "config.json of " in err, "is damaged" in err) == (2, True, True), err
    config.write_bytes(sound)
    weights.unlink()
    code, _, err = run("inspect", folder)
    assert (code, "lacks model.safetensors" in err) == (2, True), err


def test_results_of_another_model_are_not_told_beside_these(tmp_path):
    other = Provenance(
        what=result_folders.ABOUT.what | {"revision": "another"}, where={}
    )
    write_report(result_folders.write_repair(tmp_path), tmp_path / "page.html")
    (tmp_path / "refits.jsonl").unlink()
    result_folders.write(tmp_path, *result_folders.refits(), about=other)
    with pytest.raises(
        UsageError,
        match=r"measured\.jsonl is of tiny, none; refits\.jsonl is of tiny, another",
    ):
        write_report(tmp_path, tmp_path / "page.html")


def test_an_export_is_what_it_says_also_as_a_plan(folders, tmp_path):
    folder = shutil.copytree(folders / "hf" / "one", tmp_path / "copy")
    assert manifest_plan_of(folder) == PLAN
    manifest = folder / "notall.json"
    theirs = shutil.copytree(folder, tmp_path / "swapped")
    shutil.copy(folders / "hf" / "two" / "notall.json", theirs)
    with pytest.raises(
        UsageError, match=r"of .*swapped is damaged \(it is not what was written\)"
    ):
        manifest_plan_of(theirs)
    for content in (
        manifest.read_text().replace("1", "2", 1),
        manifest.read_text()[:-9],
    ):
        manifest.write_text(content)
        with pytest.raises(
            UsageError,
            match=(
                r"notall\.json of .* is damaged: export it anew, or delete notall\.json"
            ),
        ):
            manifest_plan_of(folder)
    manifest.unlink()
    (folder / "generation_config.json").write_text("{}")
    notall.load(folder)  # as it is


def test_a_line_that_was_changed_is_named(folders, tmp_path):
    path = Path(shutil.copy(folders / "repair" / "one" / "refits.jsonl", tmp_path))
    _, start, end = accumulate(
        map(len, ["", *path.read_text().splitlines(keepends=True)[:2]])
    )
    sound, held = path.read_bytes(), read(path, RefitRecord)
    for place in range(start, end - 1):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with pytest.raises(
            UsageError, match=r"line 2 of .*refits\.jsonl\b.*delete that line"
        ):
            read(path, RefitRecord)
    path.write_bytes(sound[:start] + sound[end:])  # as a person deletes one
    assert read(path, RefitRecord) == held[1:]


def test_lines_of_before_and_by_hand_are_read(tmp_path):
    path, line = (
        tmp_path / "any.jsonl",
        {
            "text": 'a, "sealed": "b"}',
            "of": {"x": None},
        },
    )
    lines.append(path, line)
    with path.open("a") as file:
        file.write('{"number": 3}\n')
    assert lines.read_lines(path) == [line, {"number": 3}]
    assert unsealed(b'{"a": 1}\n') == b'{"a": 1}\n'
    assert json.loads(sealed(b'{\n "a": [1]\n}\n')).keys() == {"a", "sealed"}


def test_what_the_cache_keeps_is_made_anew_where_it_is_damaged(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("NOTALL_CACHE", str(tmp_path / "cache"))
    author = texts_mix._Author(model(), byte_tokenizer(), silent)
    assert author._written("writing", ["of"], 8, lambda *_: "a b") == ["a b"]
    (kept,) = (tmp_path / "cache" / "answers").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"a b", b"a c"))
    for wanted in ("a d", "not written again"):
        assert author._written(
            "writing", ["of"], 8, lambda *_, wanted=wanted: wanted
        ) == ["a d"]
    gguf = write_gguf(
        family("llama").build(vocab_size=len(WORDS), num_hidden_layers=2),
        tmp_path / "m.gguf",
    )
    folder = gguf_copies.convert_gguf(gguf)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "notall.json"):
        sound = (folder / name).read_bytes()
        (folder / name).write_bytes(sound[:99] + bytes([sound[99] ^ 1]) + sound[100:])
        assert gguf_copies.convert_gguf(gguf) == folder
        assert (folder / name).read_bytes() == sound
        assert f"{name} of " in caplog.text
        caplog.clear()


def test_weights_know_what_they_replace(folders):
    """Of another model of the same shape they are refused; in another dtype it is the
    same model.
    """
    other = finetuned()
    plan = RepairedPlan.load(folders / "repair" / "one")
    for way in (
        lambda: notall.skip(other, plan).__enter__(),
        lambda: notall.evaluate(other, [plan], TEXTS),
        lambda: notall.remove(other, plan),
        lambda: heal(other, plan, TEXTS, HELD),
        lambda: repair(other, PLAN, TEXTS, out=folders / "repair" / "one"),
    ):
        with pytest.raises(
            UsageError,
            match=(
                r"another model of the same shape; give that model, or repair"
                r" this one"
            ),
        ):
            way()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with notall.skip(model().to(dtype), plan):
            pass
    with (
        pytest.raises(UsageError, match="another model of the same shape"),
        notall.skip(finetuned().to(torch.bfloat16), plan),
    ):
        pass


def test_an_export_has_no_weights_for_another_model(folders, tmp_path):
    plan = RepairedPlan.load(folders / "heal" / "one")
    with pytest.raises(UsageError, match="another model of the same shape"):
        export(finetuned(), plan, "hf", tmp_path / "out", verify=False)
    export(model(), plan, "hf", tmp_path / "out", verify=False)
