"""Tables at the terminal, read back: at every width they hold each number, first column and heading whole."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pandas as pd
import pytest

from api import (
    CRITERIA,
    BenchRecord,
    ClaimRecord,
    ComparisonRecord,
    MeasuredRecord,
    Provenance,
    SearchRecord,
    SimilarityRecord,
    SweepRecord,
    cli,
    given,
    latency,
    number,
    print_in_any_encoding,
    printable,
    progress_bar,
    show,
    speedups,
    with_error,
)
from api import cli_columns as lists
from api import columns_plain as plain
from api import paper_running as running
from api import paper_scoreboard as scoreboard
from notall import Plan, UsageError
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it lays out what a tiny Llama gave

WIDTHS = (60, 80, 120, 200)
QUICK = ["--sequences", "2", "--length", "16", "--batch-size", "2", "--dtype", "float32"]
TIMED = ["--prompt", "4", "--new", "2", "--rounds", "1", "--dtype", "float32"]


def error(name, value, of):
    return {name: value, f"{name}_se": of}


def spread(name, value):
    return {name: value, f"{name}_low": 0.91 * value, f"{name}_high": 1.13 * value}


MEASURED = {
    **error("nll", 18.8712, 0.1234),
    **error("delta_nll", 15.8701, 0.1042),
    **error("kl", 15.2118, 0.0931),
    **error("top1_agreement", 0.6212, 0.0112),
    **error("value", 0.4213, 0.0141),
    **error("delta", -0.1234, 0.0101),
    **error("cosine", 0.98765, 0.00123),
    **spread("prefill_ms", 123_456.7),
    **spread("decode_ms_per_token", 1234.5),
    **spread("speedup_prefill", 1.234),
    **spread("speedup_decode", 11.444),
    **spread("speedup", 1.3142),
    "perplexity": 156_789_012.3,
    "params": 68_976_648_192,
    "weight_bytes": 137_953_296_384,
    "kv_bytes_per_token": 327_680,
    "state_bytes": 18_874_368,
    "read_by": "attn.7 attn.9",
    "peak_bytes": 150_000_000_000,
    "sequences": 1024,
    "evaluations": 123_456,
    "forwards": 34_567.8,
    "forwards_in_full": 345_678.9,
    "calibration_delta": 0.1234,
    "calibration_tokens": 8192,
    "prompt_tokens": 2048,
    "new_tokens": 128,
    "batch_size": 16,
    "seconds": 43_210,
    "predicted_ms": 12_345,
    "measured_ms": 12_543,
    "predicted_speedup": 1.3001,
    "off": -0.0123,
    "cost": 15.8701,
    "dense_cost": 3.0011,
    "in_time": True,
    "missed": "1.16 ± 0.02 times as fast is what was reached",
    "num_fewshot": 25,
    "documents": 14_042,
    "dense": 0.5447,
    "p_value": 0.0001,
    "worse": True,
    "parameters": 135_266_304,
    "share": 0.0123,
}


def rows(**names):
    """A row for each value in turn of the lists `names`, with everything that may be measured."""
    return [MEASURED | dict(zip(names, values)) for values in zip(*names.values())]


TWO = {"model": ["dense", "skipped"]}
CHOSEN = {"chosen": ["leave-one-out by 0.5*kl+task:arc_easy: 13 sublayer"]}
PLANS = {"plan": [{}, {"attention": [*range(40)], "mlp": [*range(12)]}]}
UNMEASURED = ("chosen", "cost", "dense_cost", "in_time", "evaluations", "forwards", "seconds")
TASKS = ["arc_challenge", "mmlu_high_school_european_history", "truthfulqa_mc2"]
STATES = ["skipped", "repaired", "skipped"]
CLAIMS = {
    "claim": [
        "Fig. 1: features grow more similar to the previous layer's with depth (but for the last layer)",
        "skipping the deepest 33% of the attentions loses no more than 1.8 points of the average (13B)",
        "keeping the last layer lowers quality when 33% are skipped: block",
    ],
    "here": [
        "rank correlation of cosine and depth +0.91",
        "-12.3 ± 1.2 points of the average",
        "1.23× [1.20, 1.31] against 1.10× [1.05, 1.11]",
    ],
    "verdict": ["holds", "does not hold", "within error"],
}
# What each command shows: its rows, its columns, and the headings that carry its answer.
TABLES = {
    "sweep": (
        rows(
            variant=["dense", "attention", "mlp", "block"], fraction=[0, 0.1, 0.25, 0.33], keep_last=[False, True] * 2
        ),
        SweepRecord.columns,
        ("skipped", "fraction", "last layer", "NLL added", "decode speedup"),
    ),
    "names of tasks": (
        rows(task=["arc_challenge", "openllm"], kind=["task", "group"], num_fewshot=[25, None]),
        lists.TASKS_COLUMNS,
        ("task", "kind", "shots"),
    ),
    "inspect": (
        rows(sublayer=[f"attn+mlp.{layer}" for layer in (7, 78, 126)], mixer=["linear_attention", None, None]),
        lists.INSPECT_COLUMNS,
        ("sublayer", "parameters", "share"),
    ),
    "similarity": (
        rows(layer=[0, 78, 126], kind=["attention", "mlp", "block"], mixer=["linear_attention", None, None]),
        SimilarityRecord.columns,
        ("layer", "kind", "cosine"),
    ),
    "plan": (rows(**TWO), lists.FOOTPRINT_COLUMNS, ("model", "weights", "KV/token", "parameters")),
    "eval": (rows(**TWO), lists.QUALITY_COLUMNS, ("model", "NLL added", "KL")),
    "bench": (rows(**PLANS), BenchRecord.columns, ("skipped", "decode speedup", "weights", "KV/token", "peak memory")),
    "repair": (
        rows(text=["wiki.test.raw, other windows"] * 2, model=["skipped", "repaired"], plan=PLANS["plan"][1:] * 2),
        MeasuredRecord.columns,
        ("text", "model", "NLL added"),
    ),
    "tasks": (
        rows(task=TASKS, model=STATES, metric=["acc_norm,none", "exact_match,strict-match", "acc,none"]),
        lists.TASK_COLUMNS,
        ("task", "model", "difference"),
    ),
    "battery": (
        rows(check=["passkey at 1024", "calibration error", "repetition"], model=STATES),
        lists.CHECK_COLUMNS,
        ("check", "model", "difference", "worse"),
    ),
    "paper": (rows(**CLAIMS), ClaimRecord.columns, ("claim", "verdict")),
    "export": (
        rows(file=["config.json", "model-00001-of-00002.safetensors", "m.gguf"], bytes=[7, 5_368_709_120, 1]),
        lists.FILE_COLUMNS,
        ("file", "size"),
    ),
    "compare": (
        rows(
            space=["attention", "sublayer", "portable"],
            count=[4, 12, 128],
            criterion=["leave-one-out", "first-order", "search"],
            aim=["kl", "0.5*kl+task:arc_easy", "answers"],
        ),
        [
            column
            for column in ComparisonRecord.columns
            if column.heading not in ("repair", "added", "behind the best")
        ],  # without --repair, and of one choice each
        ("criterion", "by", "among", "count", "NLL added"),
    ),
    "search": (
        [{name: value for name, value in row.items() if name in UNMEASURED} for row in rows(**CHOSEN)],
        [column for column in SearchRecord.columns if column.fields[0] in UNMEASURED],
        ("chosen", "objective on its text", "dense model's objective", "search finished"),
    ),
    "search --speedup": (rows(**CHOSEN), SearchRecord.columns, ("chosen", "NLL added", "measured speedup")),
    "criteria": (
        [{"criterion": one.name, "of": ", ".join(one.kinds), "goes by": one.description} for one in CRITERIA.values()],
        lists.CRITERIA_COLUMNS,
        ("criterion", "of", "goes by"),
    ),
}


class Screen(io.StringIO):
    def isatty(self):
        return True


def printed(stream, work, monkeypatch, width=None):
    """What `work()` writes to a stdout that is `stream`, so many columns wide."""
    monkeypatch.setenv("NO_COLOR", "1")
    if width:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(width))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        work()
        sys.stdout.flush()
    return re.sub(r"\x1b\[[01]m", "", stream.getvalue())  # bold


def on_screen(table, width, monkeypatch, title="title"):
    return printed(Screen(), lambda: show(*table, title=title), monkeypatch, width)


def piped(table, monkeypatch, title="title"):
    return printed(io.StringIO(), lambda: show(*table, title=title), monkeypatch)


def cells_of(line):
    return [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]


def joined(lines):
    """One row of the cells of several lines."""
    return [" ".join(filter(None, column)) for column in zip(*map(cells_of, lines))]


def read_back(text, columns, count):
    """What a reader sees of `count` rows: the cells of each by heading; and the headings of what was left out."""
    lines = text.splitlines()
    left_out = re.search(r"also measured: (.*); see --json", " ".join(" ".join(lines).split()))
    names = left_out[1].split(", ") if left_out else []
    head = [line for line in lines if line.startswith("┃")]
    if not head:
        blocks = text.partition("\n")[2].rstrip("\n").split("\n\n")
        return [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks], names
    headings = joined(head)
    body = [line for line in lines if line[:1] in "│├"]
    ruled = any(line.startswith("├") for line in body)
    groups = [group.splitlines() for group in re.split(r"├.*\n", "\n".join(body))] if ruled else [[b] for b in body]
    table = [joined(group) for group in groups]
    told = [column.heading for column in columns]
    if headings == told[: len(headings)]:
        table = [joined(body)] if count == 1 else table
        return [dict(zip(headings, row)) for row in table], names
    turned = [[headings[0], *(row[0] for row in table)]]
    turned += [[headings[place], *(row[place] for row in table)] for place in range(1, len(headings))]
    return [dict(zip(turned[0], row)) for row in turned[1:]], names


def seen(text, table, columns):
    """What `read_back` says, after each cell was found to say what the row says, whole."""
    records, left_out = read_back(text, columns, len(table))
    assert len(records) == len(table)
    for record, row in zip(records, table):
        assert [*record, *left_out] == [column.heading for column in columns]
        for column in columns:
            if column.heading in record:
                assert record[column.heading] == column.text(row)
    return records, left_out


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_terminal_shows_is_whole_and_the_answer_is_there(name, width, monkeypatch):
    table, columns, answer = TABLES[name]
    text = on_screen((table, columns), width, monkeypatch)
    records, _ = seen(text, table, columns)
    assert set(answer) <= set(records[0])
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_however_narrow_nothing_is_cut(name, monkeypatch):
    table, columns, _ = TABLES[name]
    for width in (1, 10, 25, 40, 50, 70, 100, 150):
        text = on_screen((table, columns), width, monkeypatch, title="t")
        seen(text, table, columns)
        if "┃" in text:
            assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_a_pipe_gets_everything_a_row_a_line(name, monkeypatch):
    table, columns, _ = TABLES[name]
    long_one = {columns[0].heading: "x" * 3000} if name == "criteria" else {}
    table = [*table, table[0] | long_one]
    for name, value in {"COLUMNS": "60", "FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    text = piped((table, columns), monkeypatch)
    assert seen(text, table, columns)[1] == []
    assert text.count("\n") == len(table) + 5
    widest = max(map(len, text.splitlines()))
    assert text == on_screen((table, columns), widest, monkeypatch)
    assert text != on_screen((table, columns), widest - 1, monkeypatch)


def test_every_list_of_columns_is_tried():
    tried = [columns for _, columns, _ in TABLES.values()]
    assert all(value in tried for name, value in vars(lists).items() if name.endswith("_COLUMNS"))


def test_headings_give_way_first_then_errors_then_the_last_columns(monkeypatch):
    table = rows(model=["a", "b", "c"])
    columns = [plain("model"), with_error("nll", "loss on the text"), number("kl", "completely")]
    full = [len(line) for line in piped((table, columns), monkeypatch).splitlines()][1]
    shown = {width: on_screen((table, columns), width, monkeypatch) for width in range(full, 18, -1)}

    def broken(width):
        """Headings and cells that take several lines, and columns left out."""
        text = shown[width]
        ruled = "├" in text
        return text.count("\n┃") > 1, ruled, "also measured: completely" in " ".join(text.split())

    steps = list(dict.fromkeys(map(broken, shown)))
    assert steps == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (False, False, True),
        (True, False, True),
        (True, True, True),
    ]
    assert on_screen((table, columns), 18, monkeypatch).count("loss on the text: 18.871 ± 0.123") == 3


def test_names_are_data_not_markup_nor_commands(monkeypatch):
    name, spelt = "[red]a[/b]\x1b[2J\u202e\r\nb :smile: \x9b", r"[red]a[/b]\x1b[2J\u202e  b :smile: \x9b"
    columns = [plain("model", f"{name} heading"), number("kl", "KL")]
    table = rows(model=[name, "b", "c"])
    for width in (200, 40):
        text = on_screen((table, columns), width, monkeypatch, title=f"title {name}")
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert text.count("[red]") == text.count("[/b]") == text.count(r"\x1b[2J") == text.count(":smile:") == 3
    assert piped((table, columns), monkeypatch).count(spelt) == 2


def test_complaints_and_progress_show_names_as_they_are(monkeypatch, capsys):
    def complain(**_):
        raise UsageError("no plan a[/b]\x1b[2J")

    monkeypatch.setattr(cli, "app", complain)
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert r"a[/b]\x1b[2J" in said
    assert "\x1b" not in said
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar() as progress:
        progress(1, 2, "task [/b]\x1b[2J")
    assert r"task [/b]\x1b[2J" in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()


@pytest.mark.parametrize(("encoding", "sign", "delta"), [("cp1252", "±", "delta "), ("ascii", "+-", "delta ")])
def test_what_an_encoding_lacks_is_put_in_words(encoding, sign, delta, monkeypatch):
    table, columns, _ = TABLES["eval"]
    columns = [*columns, number("kl", "ΔNLL – × 中")]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", file)
    show(table, columns, title="title")
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    assert f"15.870 {sign} 0.104" in text
    assert f"{delta}NLL" in text
    assert r"\u4e2d" in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1  # as wide as before
    assert printable("ΔNLL", "utf-8") == "ΔNLL"


def test_any_text_goes_to_any_stream(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    print_in_any_encoding()
    for stream in (sys.stdout, sys.stderr):
        print("1.2× … \udc80", file=stream, flush=True)
        assert stream.buffer.getvalue().split() == [b"1.2x", b"...", rb"\udc80"]


def test_a_real_terminal_says_how_wide_it_is():
    program = (
        "from api import columns_plain as plain, number, show\n"
        "rows = [{'name': 'n' * 40, 'first': 1.5, 'second': 2.5}] * 3\n"
        "show(rows, [plain('name'), number('first', 'first'), number('second', 'second')], title='t')\n"
    )
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    command = [sys.executable, "-c", program]
    subprocess.run(command, cwd=Path(__file__).parent, stdin=theirs, stdout=theirs, env=environment, check=True)
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "also measured: second;" in text
    assert text.count("n" * 40) == text.count("1.500") == 3


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6)
    Plan(attention=(1, 2), mlp=(4,)).save(path / "plan.json")
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    return path


def run(words, stream, monkeypatch, width=None):
    """What `notall WORDS...` prints."""

    def work():
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code

    return printed(stream, work, monkeypatch, width)


def command(name, folder, tmp_path):
    """A command whose rows are the same each time, its columns, and the name of its rows in JSON."""
    plan, text = ["--plan", folder / "plan.json"], [*QUICK, "--text", folder / "text.txt"]
    return {
        "inspect": (["inspect", folder], lists.INSPECT_COLUMNS, None),
        "plan": (["plan", folder, "-o", tmp_path / "plan.json"], lists.FOOTPRINT_COLUMNS, None),
        "similarity": (["similarity", folder, *text], SimilarityRecord.columns, None),
        "eval": (["eval", folder, *plan, *text], lists.QUALITY_COLUMNS, "quality"),
        "criteria": (["criteria"], lists.CRITERIA_COLUMNS, None),
    }[name]


@pytest.mark.parametrize("name", ["inspect", "plan", "similarity", "eval", "criteria"])
def test_a_command_s_table_says_what_its_json_says(name, folder, tmp_path, monkeypatch):
    words, columns, part = command(name, folder, tmp_path)
    found = json.loads(run([*words, "--json"], io.StringIO(), monkeypatch))
    table = found[part] if part else found
    columns = given(columns, table)  # a model that has no states has no column for them
    assert seen(run(words, io.StringIO(), monkeypatch), table, columns)[1] == []
    seen(run(words, Screen(), monkeypatch, 60), table, columns)


def test_commands_that_time_show_their_answer(folder, tmp_path, monkeypatch):
    names = [f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(6)]
    monkeypatch.setattr(
        latency, "measure_times", lambda _, what, **__: latency.Times(what, 100, dict.fromkeys(names, 5))
    )
    monkeypatch.setattr(speedups.SpeedBudget, "reached", lambda *_: True)  # what so small a model saves is hard to time
    text = folder / "text.txt"
    search = ["search", folder, "--speedup", "1.05", *TIMED[:4], *QUICK, "--text", text, "--held-out", text]
    search += ["-o", tmp_path / "p.json"]
    bench = ["bench", folder, "--plan", folder / "plan.json", *TIMED]
    for words, columns, count, answer in (
        (search, SearchRecord.columns, 1, {"chosen", "NLL added", "measured speedup"}),
        (bench, BenchRecord.columns, 2, {"skipped", "decode speedup", "weights"}),
    ):
        records, _ = read_back(run(words, Screen(), monkeypatch, 80), columns, count)
        assert answer <= set(records[0])
        assert all(re.search(r"\d", record[heading]) for record in records for heading in answer - {"skipped"})


def test_a_terminal_of_ascii_gets_the_table_and_what_the_model_says(folder, monkeypatch):
    for words, says in (
        (["eval", folder, "--plan", folder / "plan.json", *QUICK, "--text", folder / "text.txt"], b"+-"),
        (["generate", folder, "abc", "--max-new-tokens", "20"], b"\\"),
    ):
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, words)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
        file.flush()
        assert says in file.buffer.getvalue()


def test_files_are_utf8_wherever_they_are_written(tmp_path, monkeypatch):
    write = Path.write_text

    def of_an_old_machine(path, text, encoding="ascii", **more):
        return write(path, text, encoding=encoding, **more)

    monkeypatch.setattr(Path, "write_text", of_an_old_machine)
    machine = {"device_name": "cpu", "cores": 1, "threads": 1, "versions": {}}
    about = {"model": "modèle", "dtype": "float32", "revision": "", "machine": machine}
    depth = SimilarityRecord(layer=0, kind="block", cosine=0.5, cosine_se=0.1, provenance=Provenance.of(about))
    running.write_paper(tmp_path, [depth], [], [])
    frame = pd.DataFrame({"tâche": ["1.0"]}, index=pd.Index(["dense"], name="skipped"))
    scoreboard.write_tables([scoreboard.PaperTable("times", "Times.", frame)], tmp_path)
    assert "modèle" in (tmp_path / "paper.md").read_text(encoding="utf-8")
    assert "tâche" in (tmp_path / "times.tex").read_text(encoding="utf-8")
