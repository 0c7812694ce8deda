"""Tables at the terminal, read back: at every width they hold each number, first column
and heading whole.
"""

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
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path

import pytest

import result_folders
from api import (
    BENCH_COLUMNS,
    CLAIM_COLUMNS,
    MEASURED,
    PLAN_CHECKS,
    PLAN_SCORES,
    QUALITIES,
    SEARCH_COLUMNS,
    SIMILARITY,
    SWEEP_COLUMNS,
    Fact,
    Footprint,
    ModelQuality,
    PlanCheck,
    PlanScore,
    Similarity,
    Table,
    bench_rows,
    cli,
    comparison_columns,
    latency,
    number,
    print_in_any_encoding,
    print_table,
    printable,
    progress_bar,
    table,
    with_error,
    words,
    write_similarity,
)
from notall import Plan, UsageError
from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.any_transformers  # it lays out what a tiny Llama gave

WIDTHS = (60, 80, 120, 200)
QUICK = [
    "--sequences",
    "2",
    "--length",
    "16",
    "--batch-size",
    "2",
    "--dtype",
    "float32",
]
TIMED = [
    "--prompt-tokens",
    "4",
    "--generation-tokens",
    "2",
    "--rounds",
    "1",
    "--dtype",
    "float32",
]


# --- facts with as many digits as there may be
# --------------------------------------------------------------------------------------

LARGE = Footprint(
    params=68_976_648_192,
    weight_bytes=137_953_296_384,
    kv_bytes_per_token=327_680,
    state_bytes=18_874_368,
)
LOST = result_folders.quality(
    15.8701, perplexity=156_789_012.3, kl=15.2118, top1_agreement=0.6212, sequences=1024
)
SLOW = result_folders.times(0.0123).model_copy(update={"peak_bytes": 150_000_000_000})
COMPARED = {
    "value": 0.4213,
    "value_se": 0.0141,
    "delta": -0.1234,
    "delta_se": 0.0101,
    "p_value": 0.0001,
}
COMPARED |= {"higher_is_better": True}
STATES = ("skipped", "repaired", "skipped")
TASKS = ("arc_challenge", "mmlu_high_school_european_history", "truthfulqa_mc2")
METRICS = ("acc_norm,none", "exact_match,strict-match", "acc,none")


def large(*records):
    """Records with figures of a large model."""
    parts = {"quality": LOST, "times": SLOW, "footprint": LARGE}
    return [
        one.model_copy(
            update={name: part for name, part in parts.items() if hasattr(one, name)}
        )
        for one in records
    ]


def benched():
    (record,) = large(result_folders.benched("block"))
    models = {
        name: getattr(record, name).model_copy(update={"times": SLOW})
        for name in ("dense", "skipped")
    }
    return bench_rows([record.model_copy(update=models)])


def compared():
    asked = (
        ("leave-one-out", "kl"),
        ("first-order", "0.5*kl+task:arc_easy"),
        ("search", "answers"),
    )
    spaces = (("attention", 4), ("sublayer", 5), ("portable", 6))
    rows = [
        result_folders.compared(way, space, count, 0.1, objective=aim)
        for (way, aim), (space, count) in zip(asked, spaces)
    ]
    return large(*rows)


CHOSEN = result_folders.chosen(
    3,
    chosen="leave-one-out by 0.5*kl+task:arc_easy: 13 sublayer",
    missed="1.16 ± 0.02 is",
)
CLAIMS = [
    one.model_copy(
        update={
            "claim": (
                "skipping the deepest 33% of the attentions loses no more than 1.8"
                " points of it"
            )
        }
    )
    for one in result_folders.claims()[:3]
]
# What commands show, and the headings that carry its answer.
TABLES: dict[str, tuple[Table, tuple[str, ...]]] = {
    "sweep": (
        table("title", SWEEP_COLUMNS, large(*result_folders.all_records()[:5])),
        ("skipped", "fraction", "last layer", "NLL added", "decode speedup"),
    ),
    "similarity": (
        table(
            "title",
            SIMILARITY,
            [
                Similarity(
                    layer=layer,
                    kind=kind,
                    cosine=0.98765,
                    cosine_se=0.00123,
                    mixer=mixer,
                )
                for layer, kind, mixer in (
                    (0, "attention", "linear_attention"),
                    (78, "mlp", None),
                    (126, "block", None),
                )
            ],
        ),
        ("layer", "kind", "cosine"),
    ),
    "eval": (
        table(
            "title",
            QUALITIES,
            [ModelQuality(model=name, quality=LOST) for name in ("dense", "skipped")],
        ),
        ("model", "NLL added", "KL"),
    ),
    "bench": (
        table("title", BENCH_COLUMNS, benched()),
        ("skipped", "decode speedup", "weights", "KV/token"),
    ),
    "repair": (
        table("title", MEASURED, large(*result_folders.all_measured()[:2])),
        ("text", "model", "NLL added"),
    ),
    "tasks": (
        table(
            "title",
            PLAN_SCORES,
            [
                PlanScore(
                    **COMPARED,
                    task=task,
                    metric=metric,
                    num_fewshot=25,
                    documents=14_042,
                    model=model,
                )
                for task, metric, model in zip(TASKS, METRICS, STATES)
            ],
        ),
        ("task", "model", "difference"),
    ),
    "diagnostics": (
        table(
            "title",
            PLAN_CHECKS,
            [
                PlanCheck(**COMPARED, check=check, model=model)
                for check, model in zip(
                    ("passkey at 1024", "calibration error", "repetition"), STATES
                )
            ],
        ),
        ("check", "model", "difference", "worse"),
    ),
    "paper": (table("title", CLAIM_COLUMNS, CLAIMS), ("claim", "verdict")),
    "compare": (
        table("title", comparison_columns(compared()), compared()),
        ("criterion", "by", "among", "count", "NLL added"),
    ),
    "search": (
        table(
            "title",
            SEARCH_COLUMNS,
            [CHOSEN.model_copy(update={"quality": None, "check": None})],
        ),
        (
            "chosen",
            "objective on its text",
            "original model's objective",
            "search finished",
        ),
    ),
    "search --speedup": (
        table("title", SEARCH_COLUMNS, large(CHOSEN)),
        ("chosen", "NLL added", "measured speedup"),
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


def on_screen(table, width, monkeypatch):
    return printed(Screen(), lambda: print_table(table), monkeypatch, width)


def piped(table, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    return printed(io.StringIO(), lambda: print_table(table), monkeypatch)


def cells_of(line):
    return [cell.strip() for cell in re.split("[┃│]", line)[1:-1]]


def joined(lines):
    """One row of the cells of several lines."""
    return [" ".join(filter(None, column)) for column in zip(*map(cells_of, lines))]


def read_back(text, told, count):
    """What a reader sees of `count` rows below the headings `told`, and the headings of
    what was left out.
    """
    lines = text.splitlines()
    left_out = re.search(
        r"also measured: (.*); see --json", " ".join(" ".join(lines).split())
    )
    names = left_out[1].split(", ") if left_out else []
    head = [line for line in lines if line.startswith("┃")]
    if not head:
        blocks = text.partition("\n")[2].rstrip("\n").split("\n\n")
        return [
            dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks
        ], names
    headings = joined(head)
    body = [line for line in lines if line[:1] in "│├"]
    ruled = any(line.startswith("├") for line in body)
    groups = (
        [group.splitlines() for group in re.split(r"├.*\n", "\n".join(body))]
        if ruled
        else [[b] for b in body]
    )
    table = [joined(group) for group in groups]
    if headings == [*told][: len(headings)]:
        table = [joined(body)] if count == 1 else table
        return [dict(zip(headings, row)) for row in table], names
    turned = [[headings[0], *(row[0] for row in table)]]
    turned += [
        [headings[place], *(row[place] for row in table)]
        for place in range(1, len(headings))
    ]
    return [dict(zip(turned[0], row)) for row in turned[1:]], names


def seen(text, table):
    """What `read_back` says, after each cell was found to say what the row says,
    whole.
    """
    records, left_out = read_back(text, table.headings, len(table.rows))
    assert len(records) == len(table.rows)
    for record, row in zip(records, table.rows):
        assert (*record, *left_out) == table.headings
        for heading, cell in zip(table.headings, row):
            if heading in record:
                assert record[heading] == str(cell)
    return records, left_out


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_terminal_shows_is_whole_and_the_answer_is_there(
    name, width, monkeypatch
):
    table, answer = TABLES[name]
    text = on_screen(table, width, monkeypatch)
    records, _ = seen(text, table)
    assert set(answer) <= set(records[0])
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_however_narrow_nothing_is_cut(name, monkeypatch):
    table = replace(TABLES[name][0], title="t")
    for width in (1, 10, 25, 40, 50, 70, 100, 150):
        text = on_screen(table, width, monkeypatch)
        seen(text, table)
        if "┃" in text:
            assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_a_pipe_gets_everything_a_row_a_line(name, monkeypatch):
    table, _ = TABLES[name]
    table = replace(table, rows=(*table.rows, table.rows[0]))
    if name == "paper":  # of however long a cell
        first, *rest = table.rows[0]
        table = replace(
            table, rows=(*table.rows, (replace(first, text="x" * 3000), *rest))
        )
    for setting, value in {"FORCE_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(setting, value)
    text = piped(table, monkeypatch)
    assert seen(text, table)[1] == []
    assert text.count("\n") == len(table.rows) + 5
    widest = max(map(len, text.splitlines()))
    assert text == on_screen(table, widest, monkeypatch)
    assert text != on_screen(table, widest - 1, monkeypatch)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("width", [40, *WIDTHS])
def test_a_pipe_keeps_to_columns_if_set_and_still_gets_everything(
    name, width, monkeypatch
):
    table = replace(TABLES[name][0], title="t")
    title, *parts = printed(
        io.StringIO(), lambda: print_table(table), monkeypatch, width
    ).split("┏")
    assert all(len(line) <= width for part in parts for line in part.splitlines())
    if len(parts) < 2:
        assert seen("┏".join([title, *parts]), table)[1] == []
        return
    headings = [
        joined(line for line in part.splitlines() if line.startswith("┃"))
        for part in parts
    ]
    shown = [
        read_back(f"t\n┏{part}", names, len(table.rows))[0]
        for part, names in zip(parts, headings)
    ]
    for place, row in enumerate(table.rows):
        whole = {
            heading: cell
            for records in shown
            for heading, cell in records[place].items()
        }
        assert whole == dict(zip(table.headings, map(str, row)))


def test_a_long_table_in_a_pipe_is_parts_below_each_other_that_each_name_the_rows(
    monkeypatch,
):
    found = replace(TABLES["sweep"][0], title="t")
    text = printed(io.StringIO(), lambda: print_table(found), monkeypatch, 100)
    assert 1 < text.count("┏") < 4
    assert text.count("fraction") == text.count("┏")


@pytest.mark.parametrize("count", [1, 2])
def test_a_long_name_above_a_column_takes_the_room_that_there_is(count, monkeypatch):
    long = (
        "search by kl: at most 0.3 more of the objective; the first 1 of 6, as far as"
        " recovery is kept"
    )
    table_ = table(
        "t", SEARCH_COLUMNS, [CHOSEN.model_copy(update={"chosen": long})] * count
    )
    text = on_screen(table_, 100, monkeypatch)
    seen(text, table_)
    assert sum(line.startswith("┃") for line in text.splitlines()) <= 3 * count
    assert "├" not in text  # numbers stand with their errors


class Named(Fact):
    """A row of a table of our own."""

    model: str = "a"
    nll: float = 18.871
    kl: float = 15.2118


MODEL = words("model", lambda one: one.model)


def test_headings_give_way_first_then_errors_then_the_last_columns(monkeypatch):
    loss = with_error("loss on the text", lambda one: (one.nll, 0.123))
    found = table(
        "title",
        [MODEL, loss, number("completely", lambda one: one.kl)],
        [Named(model=m) for m in "abc"],
    )
    full = [len(line) for line in piped(found, monkeypatch).splitlines()][1]
    shown = {
        width: on_screen(found, width, monkeypatch) for width in range(full, 18, -1)
    }

    def broken(width):
        """Headings and cells that take several lines, and columns left out."""
        text = shown[width]
        ruled = "├" in text
        return (
            text.count("\n┃") > 1,
            ruled,
            "also measured: completely" in " ".join(text.split()),
        )

    steps = list(dict.fromkeys(map(broken, shown)))
    assert steps == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (False, False, True),
        (True, False, True),
        (True, True, True),
    ]
    assert (
        on_screen(found, 18, monkeypatch).count("loss on the text: 18.871 ± 0.123") == 3
    )


def test_names_are_data_not_markup_nor_commands(monkeypatch):
    name, spelt = (
        "[red]a[/b]\x1b[2J\u202e\r\nb :smile: \x9b",
        r"[red]a[/b]\x1b[2J\u202e  b :smile: \x9b",
    )
    columns = [
        replace(MODEL, heading=f"{name} heading"),
        number("KL", lambda one: one.kl),
    ]
    found = table(
        f"title {name}", columns, [Named(model=one) for one in (name, "b", "c")]
    )
    for width in (200, 40):
        text = on_screen(found, width, monkeypatch)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert (
            text.count("[red]")
            == text.count("[/b]")
            == text.count(r"\x1b[2J")
            == text.count(":smile:")
            == 3
        )
    assert piped(found, monkeypatch).count(spelt) == 3


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


@pytest.mark.parametrize(
    ("encoding", "sign", "delta"),
    [("cp1252", "±", "delta "), ("ascii", "+-", "delta ")],
)
def test_what_an_encoding_lacks_is_put_in_words(encoding, sign, delta, monkeypatch):
    more = number("ΔNLL – × 中", lambda one: one.quality.kl)
    found = table(
        "title", [*QUALITIES, more], [ModelQuality(model="dense", quality=LOST)]
    )
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", file)
    print_table(found)
    file.flush()
    text = file.buffer.getvalue().decode(encoding)
    assert f"15.870 {sign} 1.587" in text
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
        "from api import number, print_table, table, words\nname, one = words('name',"
        " lambda _: 'n' * 40), number('first', lambda _: 1.5)\ncolumns = [name, one,"
        " number('second', lambda _: 2.5)]\nprint_table(table('t', columns, [1, 2,"
        " 3]))\n"
    )
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    environment = {
        name: value for name, value in os.environ.items() if name != "COLUMNS"
    } | {"TERM": "xterm"}
    command = [sys.executable, "-c", program]
    subprocess.run(
        command,
        cwd=Path(__file__).parent,
        stdin=theirs,
        stdout=theirs,
        env=environment,
        check=True,
    )
    os.close(theirs)
    text = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "also measured: second;" in text
    assert text.count("n" * 40) == text.count("1.500") == 3


# --- the commands
# --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6
    )
    Plan(attention=(1, 2), mlp=(4,)).save(path / "plan.json")
    (path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    return path


def run(given, stream, monkeypatch, width=None):
    """What `notall` prints for the words `given`."""

    def work():
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, given)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code

    return printed(stream, work, monkeypatch, width)


def command(name, folder, tmp_path):
    """A command whose rows are the same each time, and the name of its rows in JSON."""
    plan, text = (
        ["--plan", folder / "plan.json"],
        [
            *QUICK,
            "--text",
            folder / "text.txt",
        ],
    )
    return {
        "inspect": (["inspect", folder], "sublayers"),
        "plan": (["plan", folder, "-o", tmp_path / "plan.json"], "plan"),
        "similarity": (["similarity", folder, *text], "similarity"),
        "eval": (["eval", folder, *plan, *text], "quality"),
        "criteria": (["criteria"], "criteria"),
    }[name]


def numbers_of(value):
    """Every number in JSON."""
    if isinstance(value, dict | list):
        return [
            number
            for one in (value.values() if isinstance(value, dict) else value)
            for number in numbers_of(one)
        ]
    return (
        [value]
        if isinstance(value, int | float) and not isinstance(value, bool)
        else []
    )


@pytest.mark.parametrize("name", ["inspect", "plan", "similarity", "eval", "criteria"])
def test_a_command_s_table_says_what_its_json_says(name, folder, tmp_path, monkeypatch):
    given, part = command(name, folder, tmp_path)
    found = json.loads(run([*given, "--json"], io.StringIO(), monkeypatch))[part]
    text = run(given, io.StringIO(), monkeypatch)
    rows = [cells_of(line) for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == len(found)
    for row, fact in zip(rows, found):
        written = {f"{one:.3f}" for one in numbers_of(fact)} | {
            f"{one:,}" for one in numbers_of(fact)
        }
        assert {*written, *map(str, fact.values())} & {
            word for cell in row for word in (cell, *cell.split())
        }
    heads = [cells_of(line) for line in text.splitlines() if line.startswith("┃")]
    narrow = run(given, Screen(), monkeypatch, 60)
    assert all(
        word in narrow for word in (heads[0][0], *(row[0].split()[0] for row in rows))
    )


def test_commands_that_time_show_their_answer(folder, tmp_path, monkeypatch):
    names = [f"{kind}.{layer}" for kind in ("attn", "mlp") for layer in range(6)]
    monkeypatch.setattr(
        latency,
        "measure_times",
        lambda _, what, **__: latency.SublayerTimes(what, 100, dict.fromkeys(names, 5)),
    )
    monkeypatch.setattr(
        latency.SpeedBudget, "reached", lambda *_: True
    )  # what so small a model saves is hard to time
    text = folder / "text.txt"
    search = [
        "search",
        folder,
        "--speedup",
        "1.05",
        *TIMED[:4],
        *QUICK,
        "--text",
        text,
        "--held-out",
        text,
    ]
    search += ["-o", tmp_path / "p.json"]
    bench = ["bench", folder, "--plan", folder / "plan.json", *TIMED]
    for given, columns, count, answer in (
        (search, SEARCH_COLUMNS, 1, {"chosen", "NLL added", "measured speedup"}),
        (bench, BENCH_COLUMNS, 2, {"skipped", "decode speedup", "weights"}),
    ):
        records, _ = read_back(
            run(given, Screen(), monkeypatch, 80),
            [one.heading for one in columns],
            count,
        )
        assert answer <= set(records[0])
        assert all(
            re.search(r"\d", record[heading])
            for record in records
            for heading in answer - {"skipped"}
        )


def test_a_terminal_of_ascii_gets_the_table_and_what_the_model_says(
    folder, monkeypatch
):
    for given, says in (
        (
            [
                "eval",
                folder,
                "--plan",
                folder / "plan.json",
                *QUICK,
                "--text",
                folder / "text.txt",
            ],
            b"+-",
        ),
        (["generate", folder, "abc", "--max-new-tokens", "20"], b"\\"),
    ):
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", file)
        monkeypatch.setattr(sys, "argv", ["notall", *map(str, given)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code
        file.flush()
        assert says in file.buffer.getvalue()


def test_files_are_utf8_wherever_they_are_written(tmp_path):
    write_similarity(result_folders.similarity(), tmp_path / "similarity", "modèle")
    assert "modèle" in (tmp_path / "similarity.tex").read_text(encoding="utf-8")
