"""Damage to every file that notall reads, from seeds: `python tests/fuzzing.py --count
10000 --seed 0`.

A damaged file must end in one clear line and exit code 2, or work as what it says.
Kinds of files are listed in `KINDS`, with the commands that read them; `offences` says
what is wrong with how a command ended.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer.main

import result_folders
from api import MISSED
from families import family
from mutations import (
    Mutation,
    damaged_gguf,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_text,
)
from notall import Plan
from tiny_checkpoint import save_tiny_checkpoint
from tiny_gguf import WORDS, write_gguf
from tiny_tasks import write_tasks

MOST_LETTERS = 300  # of a message, but for the paths in it
MOST_SECONDS = 30  # of the processor
MOST_WAITING = 600  # of the clock, where nothing is computed
MOST_BYTES = 2 << 30  # of memory, beyond what the process had
DAMAGE: dict[str, Mutation] = {
    ".json": damaged_json,
    ".jsonl": damaged_lines,
    ".safetensors": damaged_safetensors,
    ".gguf": damaged_gguf,
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, or the exception that it let pass."""

    code: int | str
    out: str
    err: str
    seconds: float
    grown: int  # bytes
    trace: str = ""


@dataclass(frozen=True)
class Seen:
    """A command that worked in `folder`: with `damaged` in place of `sound`, and
    `before`, with the sound file.
    """

    command: str
    folder: Path
    file: str
    sound: bytes
    damaged: bytes
    ended: Ended
    before: Ended


def no_matter(seen: Seen) -> None:
    """Of what is only shown or handed on to transformers, whatever it says is taken."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind, made in an empty folder, which ones are damaged, and the
    commands that read them there.

    `judge` answers what is wrong with a command that worked all the same. `model` says
    that it is loaded once for all cases, since it is not what is damaged.
    """

    make: Callable[[Path], None]
    damaged: tuple[str, ...]
    commands: tuple[str, ...]
    judge: Callable[[Seen], str | None] = no_matter
    model: bool = True
    share: float = 1.0  # of the cases; less where one takes long


# --- running a command in this process


class Hangs(BaseException):
    pass


def run(words: list[str], folder: Path) -> Ended:
    """The command line in `folder`, in this process."""
    from api import cli

    def late(*_: Any) -> None:
        raise Hangs

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code: int | str = "returned"
    trace = ""
    before, memory, start = (
        signal.signal(signal.SIGPROF, late),
        _memory(),
        time.process_time(),
    )
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    faulthandler.dump_traceback_later(
        MOST_WAITING, exit=True
    )  # where no signal gets through
    try:
        with (
            _working_in(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            mock.patch.object(sys, "argv", ["notall", *words]),
            _own_tasks_only() if "--tasks" in words else contextlib.nullcontext(),
        ):
            warnings.simplefilter("always")
            warnings.showwarning = _say
            cli.main()
    except SystemExit as error:
        code = (
            error.code
            if isinstance(error.code, int)
            else 0
            if error.code is None
            else str(error.code)
        )
    except BaseException as error:  # whatever it is, it is an offence
        code, trace = type(error).__name__, traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return Ended(code, *texts, time.process_time() - start, _memory() - memory, trace)


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    """In `folder`, with its own cache where it has one."""
    before = Path.cwd()
    cache = (
        {"NOTALL_CACHE": str(folder / "cache")} if (folder / "cache").exists() else {}
    )
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, cache):
            yield
    finally:
        os.chdir(before)


def _say(said: Warning | str, kind: type[Warning], *_: Any) -> None:
    print(f"{kind.__name__}: {said}", file=sys.stderr)


@contextlib.contextmanager
def _own_tasks_only() -> Iterator[None]:
    """The harness's own fifteen thousand task files take seconds to read, each time."""
    from lm_eval.tasks import TaskManager

    from api import tasks

    with mock.patch.object(
        tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False)
    ):
        yield


def _memory() -> int:
    """The most that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def message(ended: Ended) -> str:
    """The line that says what is wrong, without the paths in it."""
    return re.sub(
        r"[^\s;:()]*/[^\s;:()]*", "PATH", ended.err.rstrip("\n").rpartition("\n")[2]
    )


def offence(ended: Ended) -> str | None:
    """What is wrong with how a command ended, whatever it read."""
    if ended.code not in (0, 2, MISSED):
        return "hang" if ended.code == "Hangs" else "traceback"
    if ended.grown > MOST_BYTES:
        return "memory"
    if ended.code == 2:
        said = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if len(said) != 1 or not ended.err.rstrip("\n").endswith(said[0]):
            return "not one line"
        if len(message(ended)) >= MOST_LETTERS:
            return "long line"
    if "Traceback" in ended.err:
        return "traceback"
    return None


# --- what is right of a command that worked


def strict_json(content: bytes) -> Any:
    """JSON as its grammar has it: each key once, only finite numbers. Raises ValueError
    for anything else.
    """

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def never(name: str) -> None:
        raise ValueError(name)

    def number(text: str) -> float:
        if abs(value := float(text)) == float("inf"):
            raise ValueError(text)
        return value

    try:
        return json.loads(
            content.decode(),
            object_pairs_hook=each_once,
            parse_constant=never,
            parse_float=number,
        )
    except RecursionError:
        raise ValueError("deep") from None


FREE = {
    "provenance",
    "what",
    "where",
    "settings",
    "versions",
    "machine",
    "tasks",
    "about",
}  # hold any keys
ANY_SIGN = re.compile(
    r"delta|cosine$|cost$|value|^figure$|off$|answers|kl|^(attn|mlp)\."
)  # a time saved is a difference, too


def alike(value: Any, model: Any, name: str = "") -> bool:
    """Whether a value has the form of another: the same keys, kinds and signs; lists
    hold what is alike.
    """
    if isinstance(model, dict):
        if not isinstance(value, dict):
            return False
        if name in FREE or (
            model
            and not model.keys() & {"record"}
            and all(" " in key or len(key) > 20 for key in model)
        ):
            return True
        known = (
            value.keys() <= model.keys()
            if name == "scores"
            else value.keys() == model.keys()
        )
        return known and all(
            alike(value[key], model[key], key) for key in value
        )  # scores that lack are made anew
    if isinstance(model, list):
        return isinstance(value, list) and all(
            not model or any(alike(one, it, name) for it in model) for one in value
        )
    if (
        name == "batches" and type(value) is int
    ):  # "all", or how many: then it is of a part that is not asked for
        return value >= 0
    if isinstance(model, bool | str):
        return type(value) is type(model)
    if value is None or model is None:
        return True  # None stands for what is no finite number
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(model, int) and isinstance(value, float):
        return False
    return (
        abs(value) < 1e19 or isinstance(model, float)
        if value >= 0 or ANY_SIGN.search(name)
        else False
    )


def page_is_read(seen: Seen) -> str | None:
    """A browser reads what the page draws."""
    page = (seen.folder / "page.html").read_text(encoding="utf-8")
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL
    )
    try:
        strict_json(found[1].encode() if found else b"")
    except ValueError as error:
        return f"wrote a page that no browser reads: {error}"
    return None


def if_page_is_read(seen: Seen) -> str | None:
    """Of a report that; of other commands, whatever they say is taken."""
    return page_is_read(seen) if seen.command.startswith("report") else None


# Files of which a command reads no more than the first line: those behind the figures,
# and what is not asked anew.
UNREAD = {
    "report": (
        "scores.jsonl",
        "choices.jsonl",
        "held_out.jsonl",
        "times.jsonl",
        "plan_times.jsonl",
        "answers.jsonl",
    ),
    "compare": ("r/evaluations/", "r/results.jsonl", "r/times.jsonl"),
    "paper": ("r/answers.jsonl", "r/claims.jsonl"),
    "pareto": ("r/pareto.jsonl",),  # is written anew from the scores and times
}


TIMES = {
    "paper": "r/times.jsonl",
    "pareto": "r/engine_times.jsonl",
}  # measured anew, and what comes out goes by them


def _is_read(seen: Seen) -> bool:
    name, _, _ = seen.command.partition(" ")
    again = name == "compare" and (seen.folder / "asked anew").exists()
    return again or not any(words in seen.file for words in UNREAD.get(name, ()))


def lines_alike(seen: Seen) -> str | None:
    """Each line that was taken has the form of one that was there; the last one may be
    torn, which is told.

    Where lines only lack, what comes out is what came out before.
    """
    if seen.command.startswith("report") and (said := page_is_read(seen)):
        return said
    if not _is_read(seen):
        return None
    models = [json.loads(line) for line in seen.sound.splitlines()]
    lines = seen.damaged.split(b"\n")
    values = []
    if lines[-1]:
        try:
            json.loads(lines[-1])
        except (ValueError, RecursionError):
            if "torn" in seen.ended.err:
                lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = strict_json(line)
        except ValueError as error:
            return f"took line {number}: {error}"
        if not _is_a_line(value, models, seen.command):
            return f"took line {number}"
        values.append(value)
    times = TIMES.get(seen.command.partition(" ")[0]) == seen.file
    if (
        "--json" in seen.command
        and not times
        and all(value in models for value in values)
    ):
        found, expected = (
            untimed(json.loads(each.out)) for each in (seen.ended, seen.before)
        )
        if found != expected:
            return "other figures from the same lines"
    return None


def _is_a_line(value: Any, models: list[dict[str, Any]], command: str) -> bool:
    """Whether it has the form of one of them, but for its kind, as before there were
    kinds, and where it is from.
    """
    optional = {"sealed", "record"} | (
        {"provenance"} if command.startswith(("report", "bench", "draft")) else set()
    )
    if isinstance(value, dict) and {"chosen", "in_time"} <= value.keys():
        optional |= {
            "quality",
            "check",
            "provenance",
        }  # a search may have measured less, and only adds its own line
    if isinstance(value, dict) and {"kind", "layer", "delta_nll"} <= value.keys():
        optional |= {"delta_nll_se", "sequences"}  # older lines are without
    optional |= {
        name
        for one in models
        if isinstance(one, dict)
        for name, held in one.items()
        if held is None
    }
    lacking = {
        name
        for name in optional
        if not isinstance(value, dict) or value.get(name) is None
    }
    found, *forms = ({n: i for n, i in one.items() if n not in lacking} if isinstance(one, dict) else one
                     for one in (value, *models))  # fmt: skip
    return any(alike(found, form) for form in forms)


MEASURED = re.compile(
    "ms|speedup|seconds|evaluations|executions|forwards|off$|provenance"
)


def untimed(value: Any) -> Any:
    """Without what is measured, or counted, anew each time."""
    if isinstance(value, dict):
        return {
            name: untimed(item)
            for name, item in value.items()
            if not MEASURED.search(name)
        }
    return [untimed(item) for item in value] if isinstance(value, list) else value


def plan_as_it_says(seen: Seen) -> str | None:
    """A plan that was taken says what is skipped in plain JSON, and just that was
    skipped.
    """
    try:
        fields = strict_json(seen.damaged.decode("utf-8-sig").encode())
    except ValueError as error:
        return f"took a plan: {error}"
    if not isinstance(fields, dict) or not fields.keys() <= {
        "attention",
        "mlp",
        "fingerprint",
        "note",
    }:
        return "took what is no plan"
    skipped = {}
    for kind in ("attention", "mlp"):
        layers = fields.get(kind, [])
        if not isinstance(layers, list) or not all(
            type(layer) is int and 0 <= layer < LAYERS for layer in layers
        ):
            return "took a plan with wrong layers"
        if len(set(layers)) < len(layers):
            return "took a plan with a layer twice"
        skipped[kind] = layers
    if f" {Plan(**skipped)}\n" not in seen.ended.out.replace(" \n", "\n"):
        return "skipped something else"
    return None


def times_as_kept(seen: Seen) -> str | None:
    """Times are of the form that they are kept in, else they are measured anew, which
    is told.
    """
    if "measured anew" in seen.ended.err:
        return None
    try:
        value = strict_json(seen.damaged)
    except ValueError as error:
        return f"took times: {error}"
    return None if alike(value, json.loads(seen.sound)) else "took times"


def weights_as_read(seen: Seen) -> str | None:
    """What was exported without a check is read by transformers, but for one with code,
    and so is what it is of.
    """
    if "export" not in seen.command:
        return None
    for model in ("m",) if "nemotron-nas" in seen.command else ("m", "e"):
        ended = run(
            f"generate {model} river --max-new-tokens 1 --device cpu".split(),
            seen.folder,
        )
        if ended.code != 0:
            return f"exported though {model} cannot be read: {ended.err}"
    return None


# --- seeds

LAYERS = 4
TEXT = (
    "The river runs under the old stone bridge, and a green bird sings in the winter"
    " light. "
)
SMALL = (
    "--text ../text.txt --sequences 2 --length 24 --batch-size 2 --dtype float32"
    " --device cpu --json"
)
TASKS = (
    "--text ../text.txt --sequences 2 --length 24 --tasks tiny_choice,tiny_words"
    " --task-path ../tasks --limit 3"
)
TASKS += " --num-fewshot 0 --dtype float32 --device cpu --json"
BY_ANSWERS = (
    f"search ../model -o chosen.json --criterion deepest --skip attention:1 {SMALL}"
)


def write_plan(folder: Path) -> None:
    from api import Plan

    Plan([1, 2], [2], fingerprint="llama-4x32-48d1233b", note="by hand").save(
        folder / "plan.json"
    )


def made_by(*commands: str) -> Callable[[Path], None]:
    """What commands leave that are run once, on the tiny model."""

    def make(folder: Path) -> None:
        for command in commands:
            ended = run(command.split(), folder)
            assert ended.code == 0, (command, ended.err, ended.trace)

    return make


def asked_anew(folder: Path) -> None:
    """A comparison whose evaluations are all that is left."""
    made_by(COMPARE)(folder)
    for name in ("choices", "comparison"):
        (folder / "r" / f"{name}.jsonl").unlink()
    (folder / "asked anew").touch()


def swept(folder: Path) -> None:
    result_folders.write_sweep(folder / "r")
    result_folders.write(folder / "r", *result_folders.alone())


def compared(folder: Path) -> None:
    result_folders.write_comparison(folder / "r")


def searched(folder: Path) -> None:
    result_folders.write_search(folder / "r")


def benched(folder: Path) -> None:
    result_folders.write(folder / "r", *result_folders.all_benched())


def lines_of_others(folder: Path) -> None:
    """A file that no command of ours wrote: it is shown as it is."""
    rows = [
        {"name": "a", "value": 1.5, "many": [1, 2], "in": {"x": 1}},
        {"name": "b", "value": None, "variant": "mlp"},
    ]
    result_folders.write(folder / "r", result_folders.benched(), others=rows)


def kept_times(folder: Path) -> None:
    """Times of a search by speedup, with figures that every machine agrees on."""
    (folder / "cache").mkdir()
    ended = run(BY_SPEED.split(), folder)
    (kept,) = (folder / "cache" / "times").glob("*.json")
    times = {
        name: value
        for name, value in json.loads(kept.read_text()).items()
        if name != "sealed"
    }
    kept.write_text(
        json.dumps(
            times
            | {
                "dense_ms": 100.0,
                "sublayer_ms": dict.fromkeys(times["sublayer_ms"], 9.0),
            }
        )
    )
    shutil.rmtree(folder / "r.search", ignore_errors=True)
    assert ended.code in (
        0,
        2,
        MISSED,
    ), ended.trace  # a speedup may be out of reach as it was measured


def texts(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT * 3)
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3))
    )
    (folder / "prompts.txt").write_text("The river\nA bird\n")
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "The river"}\n{"prompt": "A bird", "id": 2}\n'
    )


def tasks(folder: Path) -> None:
    write_tasks(folder / "tasks", 6)
    for path in (folder / "tasks").glob("*.yaml"):  # wherever it is copied to
        path.write_text(path.read_text().replace(f"{folder}/", ""))


def checkpoint(folder: Path) -> None:
    from api import Plan

    save_tiny_checkpoint(folder / "m", num_hidden_layers=2)
    (folder / "m" / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\n---\n\n# A model\n"
    )
    (folder / "m" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    Plan([1], [1]).save(folder / "plan.json")


def half_repaired(folder: Path) -> None:
    """As if it had been killed before its end."""
    made_by(REPAIR)(folder)
    for name in ("plan.json", "finished.json"):
        (folder / "r" / name).unlink()


def shards(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "m")
    (folder / "m" / "model.safetensors").unlink()
    model.save_pretrained(folder / "m", max_shard_size="40KB")


def own_exports(folder: Path) -> None:
    """Of both forms, in place of the model that they were made from."""
    from api import Plan

    checkpoint(folder)
    (folder / "m").rename(folder / "dense")
    Plan([1]).save(folder / "plan.json")
    for form, name in (("hf", "m"), ("nemotron-nas", "n")):
        words = f"export dense --plan plan.json --out {name} --to {form} --no-verify"
        assert run(words.split(), folder).code == 0
    shutil.rmtree(folder / "dense")
    Plan([], [0]).save(folder / "plan.json")


def gguf(folder: Path) -> None:
    from api import Plan

    (folder / "cache").mkdir()
    write_gguf(
        family("llama").build(vocab_size=len(WORDS), num_hidden_layers=2),
        folder / "m.gguf",
    )
    Plan([1], [1]).save(folder / "plan.json")


TOKENS = "--prompt-tokens 4 --generation-tokens 2"
TIMED = f"{TOKENS} --rounds 1"
PLAIN = "--dtype float32 --device cpu"
SWEEP = f"sweep ../model --out r {SMALL} {TIMED}"
COMPARE = (
    f"compare ../model --out r {SMALL} --skip attention:1 --skip portable:2 --criterion"
    f" search --criterion deepest --criterion leave-one-out {TIMED}"
)
SEARCH = (
    "search ../model -o r.json --skip attention:2 --patience 1 --held-out ../text.txt"
    f" {SMALL}"
)
BY_SPEED = (
    f"search ../model -o r.json --skip attention --speedup 1.05 {TOKENS} --patience 0"
    f" {SMALL}"
)
BENCH = f"bench ../model --skip block:0.5 --out r {TIMED} {PLAIN}"
DRAFT = (
    "draft ../model --skip attention:0.25 --out r --text ../text.txt --sequences 1 "
    f"--prompt-tokens 4 --generation-tokens 4 --most 2 --rounds 1 {PLAIN}"
)
EVAL = f"eval ../model --plan ../plan.json --out r {TASKS}"
REPAIR = f"repair ../model --plan ../plan.json --out r {SMALL}".replace(
    "--sequences 2", "--sequences 4"
)
HEAL = (
    "heal ../model --plan ../plan.json --out r --text ../text.txt --tokens 32 --length"
    " 8 --batch-size 2 --device cpu"
)
PARETO = (
    "pareto ../model --engine transformers --plan ../plan.json --repair none --types"
    " float32 --out r --text ../text.txt --sequences 4 --held-out-sequences 2 --length"
    f" 16 {TIMED} --threads 1 --json --dtype float32"
)
PAPER = f"paper ../model --out r {TASKS} {TIMED} --generate-all"
REPORT, REPORT_SEARCH = (
    f"report {folder} -o page.html" for folder in ("r", "r.search")
)
GENERATE = "generate m river --max-new-tokens 2 --device cpu"
EXPORT = "export m --plan plan.json --out e --to"

LINES = ("r/*.jsonl", "r/evaluations/*.jsonl")
SEARCHED = ("r.search/*.jsonl",)

KINDS: dict[str, Kind] = {
    "plan": Kind(
        write_plan,
        ("plan.json",),
        (
            (
                "eval ../model --plan plan.json --text ../text.txt --sequences 1"
                f" --length 8 {PLAIN}"
            ),
            "export ../model --plan plan.json --out e --to hf --no-verify",
        ),
        plan_as_it_says,
        share=3,
    ),
    "a sweep's lines": Kind(swept, LINES, (REPORT,), lines_alike),
    "a comparison's lines": Kind(compared, LINES, (REPORT,), lines_alike),
    "a search's lines": Kind(searched, LINES, (REPORT,), lines_alike),
    "a bench's lines": Kind(benched, LINES, (REPORT,), lines_alike),
    "lines of others": Kind(
        lines_of_others, ("r/others.jsonl",), (REPORT,), page_is_read
    ),
    "sweep": Kind(made_by(SWEEP), LINES, (REPORT, SWEEP, SWEEP), lines_alike, share=2),
    "compare": Kind(
        made_by(COMPARE), LINES, (REPORT, COMPARE, COMPARE), lines_alike, share=2
    ),
    "compare asked anew": Kind(
        asked_anew, ("r/evaluations/*.jsonl",), (COMPARE,), lines_alike
    ),
    "search": Kind(
        made_by(SEARCH), SEARCHED, (REPORT_SEARCH, SEARCH, SEARCH), lines_alike, share=2
    ),
    "times kept": Kind(kept_times, ("cache/times/*.json",), (BY_SPEED,), times_as_kept),
    "bench": Kind(made_by(BENCH, BENCH), LINES, (REPORT, BENCH), lines_alike),
    "draft": Kind(made_by(DRAFT, DRAFT), LINES, (REPORT, DRAFT), lines_alike),
    "repair": Kind(
        made_by(REPAIR),
        (
            "r/*.jsonl",
            "r/*.safetensors",
            "r/*.safetensors",
            "r/plan.json",
            "r/finished.json",
        ),
        (
            REPORT,
            REPAIR,
            f"eval ../model --plan r {SMALL}",
            "export ../model --plan r --out e --to hf --no-verify",
        ),
        if_page_is_read,
    ),
    "half a repair": Kind(
        half_repaired,
        ("r/*.jsonl", "r/*.safetensors"),
        (REPORT, REPAIR),
        if_page_is_read,
    ),
    "heal": Kind(
        made_by(HEAL),
        ("r/*.jsonl", "r/*.safetensors", "r/plan.json"),
        (
            REPORT,
            HEAL,
            f"eval ../model --plan r {SMALL}",
            "export ../model --plan r --out e --to hf --no-verify",
        ),
        if_page_is_read,
    ),
    "eval": Kind(made_by(EVAL), LINES, (EVAL,), lines_alike, share=0.5),
    "pareto": Kind(made_by(PARETO), LINES, (REPORT, PARETO), lines_alike, share=0.2),
    "paper": Kind(made_by(PAPER), LINES, (REPORT, REPORT, PAPER), lines_alike),
    "texts": Kind(
        texts,
        ("text.txt",),
        (
            (
                "eval ../model --skip mlp --text text.txt --sequences 1 --length 8"
                " --device cpu"
            ),
        ),
    ),
    "lines of text": Kind(
        texts,
        ("text.jsonl",),
        (
            (
                "eval ../model --skip mlp --text text.jsonl --sequences 1 --length 8"
                " --device cpu"
            ),
        ),
    ),
    "prompts": Kind(
        texts,
        ("prompts.txt",),
        (f"{BY_ANSWERS} --objective answers --prompts prompts.txt",),
    ),
    "lines of prompts": Kind(
        texts,
        ("prompts.jsonl",),
        (f"{BY_ANSWERS} --objective answers --prompts prompts.jsonl",),
    ),
    "tasks": Kind(
        tasks,
        ("tasks/*",),
        (f"eval ../model --plan ../plan.json {TASKS.replace('../tasks', 'tasks')}",),
        share=0.5,
    ),
    "config": Kind(
        checkpoint,
        ("m/config.json", "m/generation_config.json"),
        (
            "inspect m",
            "inspect m/config.json",
            GENERATE,
            f"{EXPORT} hf",
            f"{EXPORT} nemotron-nas --no-verify",
        ),
        model=False,
    ),
    "tokenizer": Kind(
        checkpoint,
        ("m/tokenizer*", "m/special_tokens_map.json", "m/*.jinja", "m/README.md"),
        (GENERATE, f"{GENERATE} --chat", f"{EXPORT} hf --no-verify"),
        model=False,
    ),
    "safetensors": Kind(
        checkpoint,
        ("m/*.safetensors",),
        (GENERATE, f"{EXPORT} hf", f"{EXPORT} hf --no-verify"),
        weights_as_read,
        model=False,
    ),
    "shards": Kind(
        shards,
        ("m/*.index.json", "m/*.index.json", "m/*-00001-*"),
        (
            GENERATE,
            f"{EXPORT} hf",
            f"{EXPORT} hf --no-verify",
            f"{EXPORT} nemotron-nas --no-verify",
        ),
        weights_as_read,
        model=False,
    ),
    "own exports": Kind(
        own_exports,
        (
            "[mn]/config.json",
            "[mn]/config.json",
            "[mn]/*.safetensors",
            "[mn]/notall*.json",
        ),
        (
            GENERATE,
            GENERATE.replace(" m ", " n "),
            "inspect m",
            "inspect n",
            f"eval m --plan plan.json {SMALL}",
        ),
        model=False,
    ),
    "gguf": Kind(
        gguf,
        ("m.gguf",),
        (
            "inspect m.gguf",
            "generate m.gguf river --max-new-tokens 2 --device cpu",
            "export m.gguf --plan plan.json --out e --to gguf",
            "export m.gguf --plan plan.json --out e --to gguf --no-verify",
        ),
        model=False,
    ),
}


# --- cases


@dataclass
class Seeds:
    """Sound files of each kind, made when they are first asked for, and how their
    commands end with them.
    """

    folder: Path
    ended: dict[tuple[str, str], Ended] = field(default_factory=dict)

    def __post_init__(self) -> None:
        save_tiny_checkpoint(
            self.folder / "model", num_hidden_layers=LAYERS, max_position_embeddings=512
        )
        (self.folder / "text.txt").write_text(TEXT * 20)
        (self.folder / "plan.json").write_text('{"attention": [1], "mlp": []}')

    def of(self, name: str) -> Path:
        place = self.folder / f"of-{name.replace(' ', '-')}"
        if not place.exists():
            place.mkdir()
            if "../tasks" in " ".join(KINDS[name].commands):
                write_tasks(self.folder / "tasks", 6)
            with models_once():
                KINDS[name].make(place)
            for lock in place.rglob("*.lock"):
                lock.unlink()
        return place

    def sound(self, name: str, command: str) -> Ended:
        """How a command ends with the sound files."""
        if (name, command) not in self.ended:
            with self.copied(name) as folder:
                ended = run(command.split(), folder)
            assert ended.code in (0, MISSED), (name, command, ended.err, ended.trace)
            self.ended[name, command] = ended
        return self.ended[name, command]

    @contextlib.contextmanager
    def copied(self, name: str) -> Iterator[Path]:
        case = (
            self.folder / "case"
        )  # beside the model and the text, which commands find there
        shutil.copytree(self.of(name), case)
        try:
            yield case
        finally:
            shutil.rmtree(case, ignore_errors=True)


_loaded: dict[Any, Any] = {}


@contextlib.contextmanager
def once() -> Iterator[None]:
    """What is the same in every case is made once: the command line, and charts' schema
    is not held against them.
    """
    from altair.utils.schemapi import debug_mode

    with (
        mock.patch("typer.main.get_command", functools.cache(typer.main.get_command)),
        debug_mode(False),
    ):
        yield


@contextlib.contextmanager
def models_once() -> Iterator[None]:
    """Load each model once: it is the same in every case. Charts are built, but not
    drawn.
    """
    from api import charts_style, loading

    load = loading.load

    def load_once(spec: Any = "smollm2", **options: Any) -> Any:
        key = Path(spec).resolve(), *sorted(options.items())
        if key not in _loaded:
            _loaded[key] = load(spec, **options)
        return _loaded[key]

    with (
        mock.patch.object(loading, "load", load_once),
        mock.patch.object(charts_style, "save", lambda chart, path: chart.to_dict()),
    ):
        yield


@dataclass(frozen=True)
class Case:
    kind: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True)
class Outcome:
    case: Case
    command: str
    file: str
    content: bytes
    ended: Ended
    offence: str | None


def try_case(case: Case, seeds: Seeds) -> Outcome:
    """Damage a file, run a command that reads it, and see how it ends."""
    kind, draw = KINDS[case.kind], Random(f"{case.seed} {case.name}")
    command = draw.choice(kind.commands)
    with models_once() if kind.model else contextlib.nullcontext():
        before = seeds.sound(case.kind, command)
        with seeds.copied(case.kind) as folder:
            files = sorted(
                path for pattern in kind.damaged for path in folder.glob(pattern)
            )
            file = draw.choice(files)
            sound = file.read_bytes()
            damaged = DAMAGE.get(file.suffix, damaged_text)(draw, sound)
            file.write_bytes(damaged)
            ended = run(command.split(), folder)
            wrong = offence(ended)
            if wrong is None and ended.code == 0 and damaged != sound:
                said = kind.judge(
                    Seen(
                        command,
                        folder,
                        str(file.relative_to(folder)),
                        sound,
                        damaged,
                        ended,
                        before,
                    )
                )
                wrong = said and f"silent: {said}"
    return Outcome(case, command, str(file.relative_to(folder)), damaged, ended, wrong)


def cases(count: int, seed: int, kinds: list[str]) -> list[Case]:
    """So many cases in all, shared out over the kinds."""
    whole = sum(KINDS[kind].share for kind in kinds)
    return [
        Case(kind, number, seed)
        for kind in kinds
        for number in range(round(count * KINDS[kind].share / whole))
    ]


# --- the long run


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--count", type=int, default=10_000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument(
        "--kind",
        action="append",
        choices=sorted(KINDS),
        help="again for more; else all",
    )
    words.add_argument(
        "--only", type=int, help="one case of the kind, and all that it says"
    )
    words.add_argument(
        "--out",
        type=Path,
        default=Path(tempfile.gettempdir()) / "notall-fuzz",
        help="for what offends",
    )
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(prefix="notall-fuzz-") as scratch, once():
        work = Path(scratch)
        os.environ["NOTALL_CACHE"] = str(work / "cache")
        os.environ["HF_DATASETS_CACHE"] = str(work / "datasets")
        seeds = Seeds(work)
        kinds = asked.kind or list(KINDS)
        if asked.only is not None:
            found = try_case(Case(kinds[0], asked.only, asked.seed), seeds)
            print(
                found.command,
                found.file,
                found.content[:2000],
                found.ended.code,
                found.offence,
                sep="\n",
            )
            print(
                found.ended.out[-3000:],
                found.ended.err[-3000:],
                found.ended.trace,
                sep="\n",
            )
            return
        asked.out.mkdir(parents=True, exist_ok=True)
        sys.exit(
            tell(
                (
                    try_case(case, seeds)
                    for case in cases(asked.count, asked.seed, kinds)
                ),
                asked.out,
            )
        )


def tell(outcomes: Iterator[Outcome], out: Path) -> bool:
    """Counts by kind, offending files in `out`; whether there are some."""
    counts: dict[str, Counter[str]] = {}
    longest, start, slowest = "", time.monotonic(), 0.0
    for found in outcomes:
        counts.setdefault(found.case.kind, Counter())[
            found.offence or f"exit code {found.ended.code}"
        ] += 1
        slowest = max(slowest, found.ended.seconds)
        if found.ended.code == 2:
            longest = max(longest, message(found.ended), key=len)
        if found.offence:
            place = out / found.case.name.replace(" ", "-")
            place.mkdir(parents=True, exist_ok=True)
            (place / Path(found.file).name).write_bytes(found.content)
            told = (
                found.command,
                found.file,
                found.offence,
                found.ended.err,
                found.ended.trace,
            )
            (place / "what.txt").write_text("\n".join(told), encoding="utf-8")
            last = (
                (found.ended.trace or found.ended.err).strip().rpartition("\n")[2][:160]
            )
            print(
                f"{found.case.name} seed {found.case.seed}: {found.offence}:"
                f" {found.file}: {last}",
                flush=True,
            )
    for kind, by in counts.items():
        print(
            f"{kind:24} {sum(by.values()):6}  "
            + ", ".join(f"{name}: {many}" for name, many in sorted(by.items()))
        )
    print(f"longest message, {len(longest)} letters: {longest}")
    print(f"{time.monotonic() - start:.0f} s in all, at most {slowest:.1f} s a case")
    return any(
        name not in ("exit code 0", "exit code 2", f"exit code {MISSED}")
        for by in counts.values()
        for name in by
    )


if __name__ == "__main__":
    main()
