"""notall inspect, similarity, generate and tasks: what one looks at first."""

import io
import json
import re
import shutil
import sys

import pytest
from gguf import GGMLQuantizationType as Kind

from api import in_bytes, read_gguf, side_by_side
from command_line import MLPS, QUICK
from families import family
from tiny_gguf import WORDS, write_gguf as write_tiny
from tiny_tasks import TASKS, write_tasks

pytestmark = pytest.mark.usefixtures("short_prose")


def test_inspect_needs_only_a_config(run, folder, tmp_path):
    alone = tmp_path / "config.json"
    alone.write_text((folder / "config.json").read_text())
    code, out, _ = run("inspect", alone, "--json")
    parts = json.loads(out)["sublayers"]
    assert code == 0
    assert [part["sublayer"] for part in parts[:4]] == [
        "attn.0",
        "mlp.0",
        "attn.1",
        "mlp.1",
    ]
    model = family("llama").build(num_hidden_layers=6)
    assert parts[1]["parameters"] == sum(
        p.numel()
        for p in (
            *model.model.layers[0].mlp.parameters(),
            model.model.layers[0].post_attention_layernorm.weight,
        )
    )


def test_sizes_of_a_gguf_file_are_shown_with_those_of_the_unpacked_model(run, tmp_path):
    """Its types, its bytes, and a head that a model of tied embeddings does not
    count.
    """
    file, (code, out, _) = inspected(run, tmp_path)
    held = sum(tensor.size for tensor in file.tensors.values())
    shown = " ".join(out.split())
    assert code == 0
    assert (
        f"m.gguf holds {in_bytes(held)} of weights in F32, Q8_0; the table has the"
        " sizes" in shown
    )
    assert f"{len(WORDS) * 64:,} of the parameters are the output head's" in shown
    shown = " ".join(
        run("plan", file.path, "--skip", "block:1", "-o", tmp_path / "plan.json")[
            1
        ].split()
    )
    block = sum(tensor.size for tensor in file.block(3).values())
    assert (
        f"{in_bytes(held)} of weights in F32, Q8_0, and {in_bytes(held - block)}"
        " without what is skipped" in shown
    )
    assert "sublayers" in json.loads(run("inspect", file.path, "--json")[1])


def test_a_head_that_is_the_embeddings_counts_once(run, tmp_path):
    file, (_, out, _) = inspected(run, tmp_path, without="output.weight")
    assert "output.weight" not in file.tensors
    assert "output head's" not in " ".join(out.split())


def inspected(run, tmp_path, **how):
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
    }
    path = write_tiny(
        family("llama").build(**sizes), tmp_path / "m.gguf", kind=Kind.Q8_0, **how
    )
    return read_gguf(path), run("inspect", path)


def test_similarity_prints_and_draws(run, folder, tmp_path):
    code, out, _ = run(
        "similarity", folder, *QUICK, "--out", tmp_path / "absent" / "fig1", "--json"
    )
    assert code == 0
    assert len(json.loads(out)["similarity"]) == 18
    assert (tmp_path / "absent" / "fig1.png").exists()


def test_tasks_are_listed_by_a_word_of_their_name(run, tmp_path, own_tasks_only):
    path = ["--task-path", write_tasks(tmp_path / "tasks")]
    code, out, err = run("tasks", "CHOICE", *path, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tasks"] == [
        {"task": "tiny_choice", "kind": "task", "num_fewshot": None}
    ]
    rows = {
        row["task"]: row
        for row in json.loads(run("tasks", *path, "--json")[1])["tasks"]
    }
    assert rows["openllm"]["kind"] == rows["tiny_group"]["kind"] == "group"
    assert set(TASKS) < set(rows)
    code, out, _ = run("tasks", "tiny_w", *path)
    assert (code, "1 name for --tasks" in out, "tiny_words" in out) == (0, True, True)
    code, _, err = run("tasks", "tiny_chioce", *path)
    assert (code, err) == (
        2,
        (
            "error: no task's name holds 'tiny_chioce' (did you mean tiny_choice?):"
            " give a shorter word, or none\n"
        ),
    )


# --- generate
# --------------------------------------------------------------------------------------


def test_generate_shows_both_answers_side_by_side(run, folder):
    """In a pipe one below the other; at a terminal in columns, as they come."""
    command = ["generate", folder, "abc", "--max-new-tokens", "12"]
    dense, skipped = (run(*command, *more)[1].strip("\n") for more in ([], MLPS))
    assert dense != skipped
    code, out, err = run(*command, *MLPS, "--beside")
    assert (code, err) == (0, "")
    shown = re.fullmatch("dense:\n(.*)\n\nskipped:\n(.*)\n\n", out, re.S)
    assert shown.groups() == tuple(
        side_by_side._printable_lines(text, side_by_side.Console())
        for text in (dense, skipped)
    )
    code, _, err = run(*command, "--beside")
    assert (code, "say what to leave out" in err) == (2, True)


def test_what_a_model_says_steers_no_terminal(run, folder, tmp_path):
    steering = tmp_path / "steering"
    shutil.copytree(folder, steering)
    known = json.loads((steering / "tokenizer.json").read_text())
    vocab = known["model"]["vocab"]
    # what byte-level tokenizers write for the byte of an escape stands before each
    # letter but those of the prompt
    known["model"]["vocab"] = {
        name if name in "abc" else f"\u011b[{name}": at for name, at in vocab.items()
    }
    (steering / "tokenizer.json").write_text(json.dumps(known))
    code, out, err = run("generate", steering, "abc", "--max-new-tokens", "12")
    assert code == 0, err
    assert r"\x1b[" in out
    assert "\x1b" not in out


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_columns_grow_as_they_are_written_to(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    with side_by_side.side_by_side(["dense", "skipped"]) as write:
        write("dense", "the \x1b[31mriver")
        assert "river" in screen.getvalue()
        write("skipped", "a stone\n[bold]x")
    last = screen.getvalue().rpartition("dense")[2]
    assert re.search("\\\\x1b\\[31mriver +│ a stone", last)
    assert re.search(r"│ +│ \[bold\]x", last)


@pytest.mark.slow
def test_bytes_are_counted_in_the_checkpoint_s_own_dtype_or_another(
    run, folder, tmp_path
):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    settings = json.loads((half / "config.json").read_text())
    own = next(name for name in ("dtype", "torch_dtype") if name in settings)
    (half / "config.json").write_text(json.dumps(settings | {own: "bfloat16"}))

    def counted(model, *options):
        plan = json.loads(
            run("plan", model, *options, "-o", tmp_path / "plan.json", "--json")[1]
        )["plan"]
        parts = json.loads(run("inspect", model, *options, "--json")[1])["sublayers"]
        weighed = [*(one["footprint"] for one in plan), *parts]
        return [
            one[name]
            for one in weighed
            for name in ("weight_bytes", "kv_bytes_per_token")
        ]

    whole = counted(folder)
    assert (
        counted(half)
        == counted(folder, "--dtype", "float16")
        == [count // 2 for count in whole]
    )
    assert (
        counted(half, "--dtype", "float32")
        == whole
        == counted(folder, "--dtype", "auto")
    )
    assert "in bfloat16" in " ".join(
        run("plan", half, "-o", tmp_path / "plan.json")[1].split()
    )
    assert run("inspect", folder, "--dtype", "float13")[0] == 2
