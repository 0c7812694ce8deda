"""Kills of every command that writes, from seeds: `python tests/killing.py --count 500
--seed 0`.

A command is killed as it opens, makes, renames or removes a file, or at some time; it
is then run again. It must come to what it comes to undisturbed: no file more or less,
no line lost, doubled or changed, the same weights.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import fuzzing
from fuzzing import EXPORT, PLAIN, SMALL, TIMED, made_by, run
from tiny_checkpoint import save_tiny_checkpoint
from tiny_tasks import write_tasks

Make = Callable[[Path], None]
Files = dict[str, bytes]


def nothing(folder: Path) -> None:
    """For commands that need no more than the model, the text and the plan beside the
    folder.
    """


RAY = "--ray local --ray-workers 2"
COMMANDS: dict[str, tuple[Make, str]] = {
    "sweep": (nothing, fuzzing.SWEEP),
    "compare": (nothing, fuzzing.COMPARE),
    "search": (nothing, fuzzing.SEARCH),
    "bench": (nothing, fuzzing.BENCH),
    "draft": (nothing, fuzzing.DRAFT),
    "eval": (nothing, fuzzing.EVAL),
    "repair": (nothing, fuzzing.REPAIR),
    "heal": (nothing, fuzzing.HEAL),
    "pareto": (nothing, fuzzing.PARETO),
    "paper": (nothing, fuzzing.PAPER),
    "similarity": (nothing, f"similarity ../model --out r {SMALL}"),
    "plan": (nothing, "plan ../model -o r.json --skip attention:1"),
    "sweep by Ray": (nothing, f"{fuzzing.SWEEP} {RAY}"),
    "paper by Ray": (nothing, f"{fuzzing.PAPER} {RAY}"),
    "heal by Ray": (nothing, f"{fuzzing.HEAL} {RAY}"),
    "report": (made_by(f"sweep ../model --out r {SMALL} {TIMED}"), fuzzing.REPORT),
    "reproduce": (
        made_by(f"eval ../model --plan ../plan.json --out r {SMALL}"),
        "reproduce r --out again",
    ),
    "export hf": (fuzzing.checkpoint, f"{EXPORT} hf --dtype float32 --device cpu"),
    "export nemotron-nas": (fuzzing.checkpoint, f"{EXPORT} nemotron-nas {PLAIN}"),
    "export gguf": (
        fuzzing.gguf,
        f"{EXPORT.replace(' m ', ' m.gguf ')} gguf --no-verify",
    ),
}
TWICE = 0.3  # of the cases are killed as they go on, too
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
EVENTS = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
}
# What has ended, or a round that has not, is measured again, and both are kept.
AGAIN = ("bench.jsonl", "drafts.jsonl", "engine_times.jsonl")
TABLES = (".html", ".svg", ".png", ".md", ".tex")  # hold times
TIMED_TOO = {
    "sealed",
    "predicted",
    "same_texts",
    "measured",
    "memory_bytes",
    "best",
    "figure",
    "here",
    "high",
    "low",
    "verdict",
}
SHARE = {"pareto": 0.1} | {
    f"{name} by Ray": 0.1 for name in ("sweep", "paper", "heal")
}  # workers start slowly


# --- a run in a process of its own


@dataclass(frozen=True)
class Run:
    """How it ended, None where it was killed, what it said, and how many events it came
    by.
    """

    code: int | str | None
    said: str
    events: int
    seconds: float


def in_child(
    command: str, folder: Path, *, event: int = 0, after: float | None = None
) -> Run:
    """The command, killed before the event of this number, counted from one, or after
    so many seconds.
    """
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        _be_child(command, folder, event, writing)
    os.close(writing)
    if not select.select([reading], [], [], after)[0]:
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    said = json.loads(told) if told else [None, "", 0]
    return Run(*said, time.monotonic() - start)


def _be_child(command: str, folder: Path, event: int, writing: int) -> None:
    events = 0

    def look(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if name in EVENTS or (
            name == "open"
            and arguments[2] & WRITING
            and isinstance(arguments[0], str | Path)
        ):
            events += 1
            if events == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    ended = run(command.split(), folder)
    with open(writing, "wb") as pipe:
        pipe.write(json.dumps([ended.code, ended.err + ended.trace, events]).encode())
    os._exit(0)


# --- what is the same


def files_in(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.endswith(".lock")
        and "cache" not in path.relative_to(folder).parts
    }


def without_times(value: Any) -> Any:
    """Without what is measured anew, and its digests."""
    if isinstance(value, dict):
        return fuzzing.untimed(
            {n: without_times(held) for n, held in value.items() if n not in TIMED_TOO}
        )
    return [without_times(held) for held in value] if isinstance(value, list) else value


def content(name: str, held: bytes) -> Any:
    """What is to be the same of a file, in a form that can be compared."""
    if name.endswith(".jsonl"):
        lines = [
            json.dumps(without_times(json.loads(line)), sort_keys=True)
            for line in held.splitlines()
        ]
        return sorted(set(lines) if name.endswith(AGAIN) else lines)
    if name.endswith(".csv"):
        return [
            without_times(row) for row in csv.DictReader(held.decode().splitlines())
        ]
    if name.endswith(".json"):
        document = without_times(json.loads(held))
        return (
            sorted(document["files"]) if name.endswith("finished.json") else document
        )  # has digests of what is timed
    if name.endswith(".safetensors"):
        # once fuzzing has said how many threads: a child can't use those of its parent
        import torch
        from safetensors.torch import load

        return {
            path: tensor.view(torch.uint8).numpy().tobytes()
            for path, tensor in load(held).items()
        }
    return bool(held) if name.endswith(TABLES) else held


def difference(found: Files, expected: Files, killed: Files) -> str | None:
    """What is wrong with the files of a run that went on, beside those of one
    undisturbed and those at the kill.
    """
    if more := found.keys() - expected.keys():
        return f"more files: {', '.join(sorted(more))}"
    if less := expected.keys() - found.keys():
        return f"lost files: {', '.join(sorted(less))}"
    for name, held in found.items():
        if content(name, held) != content(name, expected[name]):
            return f"another content: {name}"
        whole = [
            line
            for line in killed.get(name, b"").splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
        if (
            name.endswith(".jsonl")
            and held.splitlines(keepends=True)[: len(whole)] != whole
        ):
            return f"lines changed: {name}"
    return None


# --- cases


@dataclass(frozen=True)
class Outcome:
    name: str
    kills: tuple[str, ...]
    offence: str | None
    said: str = ""


@dataclass
class Place:
    """A folder with a model, a text, a plan and tasks; how each command ends there,
    undisturbed.
    """

    folder: Path
    whole: dict[str, tuple[Run, Files]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        save_tiny_checkpoint(
            self.folder / "model",
            num_hidden_layers=fuzzing.LAYERS,
            max_position_embeddings=512,
        )
        (self.folder / "text.txt").write_text(fuzzing.TEXT * 20)
        (self.folder / "plan.json").write_text('{"attention": [1], "mlp": []}')
        write_tasks(self.folder / "tasks", 6)
        with self.case(
            nothing
        ) as case:  # imports what each child would import, and loads the model
            for command in (fuzzing.EVAL, fuzzing.BENCH.replace("--out r", "--out b")):
                ended = run(command.split(), case)
                assert ended.code == 0, (command, ended.err, ended.trace)

    @contextlib.contextmanager
    def case(self, make: Make) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(
            dir=self.folder, ignore_cleanup_errors=True
        ) as made:
            folder = Path(made)
            make(folder)
            (folder / "cache").mkdir(exist_ok=True)
            yield folder

    def undisturbed(self, name: str) -> tuple[Run, Files]:
        if name not in self.whole:
            make, command = COMMANDS[name]
            with self.case(make) as folder:
                ended = in_child(command, folder)
                assert ended.code in (0, fuzzing.MISSED), (name, ended.said)
                self.whole[name] = ended, files_in(folder)
        return self.whole[name]


def try_kill(name: str, number: int, seed: int, place: Place) -> Outcome:
    """Kill the command once or twice, run it to its end, and look at what it left."""
    draw = Random(f"{seed} {name} {number}")
    make, command = COMMANDS[name]
    whole, expected = place.undisturbed(name)
    kills: list[str] = []
    killed: Files = {}
    with place.case(make) as folder:
        for turn in range(1 + (draw.random() < TWICE)):
            at: dict[str, Any] = {"event": draw.randint(1, whole.events)}
            if (number + turn) % 2:  # the first is surely killed
                at = {"after": draw.random() * whole.seconds}
            ended = in_child(command, folder, **at)
            if ended.code is not None:  # it came to its end before
                break
            kills.append(str(at))
            killed = files_in(folder)
        if ended.code is None:
            ended = in_child(command, folder)
        found = files_in(folder)
    if (
        ended.code == 2 and "exists already" in ended.said
    ):  # it was killed when it had ended
        ended = whole
    if ended.code != whole.code or "Traceback" in ended.said:
        return Outcome(name, tuple(kills), f"exit code {ended.code}", ended.said)
    return Outcome(name, tuple(kills), difference(found, expected, killed), ended.said)


def cases(names: list[str], count: int) -> list[tuple[str, int]]:
    """About so many cases in all, shared out over the commands: one at least for
    each.
    """
    whole = sum(SHARE.get(name, 1) for name in names)
    counts = {name: max(1, round(count * SHARE.get(name, 1) / whole)) for name in names}
    return [(name, number) for name, many in counts.items() for number in range(many)]


@contextlib.contextmanager
def made_ready(scratch: Path) -> Iterator[Place]:
    with fuzzing.once(), fuzzing.models_once():
        os.environ["HF_DATASETS_CACHE"] = str(scratch / "datasets")
        yield Place(scratch)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--count", type=int, default=500)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument(
        "--command",
        action="append",
        choices=sorted(COMMANDS),
        help="again for more; else all",
    )
    words.add_argument(
        "--only", type=int, help="one case of the command, and all that it says"
    )
    asked = words.parse_args()
    names = asked.command or list(COMMANDS)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    start, kills = time.monotonic(), 0
    with (
        tempfile.TemporaryDirectory(prefix="notall-kills-") as scratch,
        made_ready(Path(scratch)) as place,
    ):
        for name, number in (
            cases(names, asked.count)
            if asked.only is None
            else [(names[0], asked.only)]
        ):
            found = try_kill(name, number, asked.seed, place)
            kills += len(found.kills)
            counts[name][found.offence or "as undisturbed"] += 1
            if found.offence or asked.only is not None:
                print(
                    f"{name} {number}: {found.kills}:"
                    f" {found.offence}\n{found.said[-2000:]}",
                    flush=True,
                )
    for name, by in counts.items():
        print(
            f"{name:20} "
            + ", ".join(f"{offence}: {many}" for offence, many in sorted(by.items()))
        )
    print(f"{kills} kills in {time.monotonic() - start:.0f} s")
    sys.exit(any(by.keys() - {"as undisturbed"} for by in counts.values()))


if __name__ == "__main__":
    main()
