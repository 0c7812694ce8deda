"""Make a folder's records again, by their own commands, and compare the two figure by
figure.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ..encodings import printable
from ..entry_points import PERMITTED, Permitted
from ..errors import UsageError, shortened
from ..options import Asked
from ..plan import several
from ..results.facts import SPEEDUPS
from ..results.ledger import AS_IT_WAS, RECORDED, check_same, read
from ..results.record import Fact, Key, Record, Scalar
from ..results.repairs import MeasuredRecord
from ..results.table import Column, words
from . import bench, draft, driver, recovery, search, sweep
from .compare import ComparisonRecord
from .options import read_plan

COMMANDS = tuple(
    map(
        "notall {}".format,
        ("compare", "sweep", "search", "eval", "repair", "heal", "bench", "draft"),
    )
)
GIVEN = (
    MeasuredRecord,
    recovery.JudgedRecord,
    bench.BenchRecord,
    draft.DraftRecord,
)  # records of a plan that is given
CHOSEN = (ComparisonRecord, sweep.SweepRecord, search.SearchRecord)
# Without those of sublayers left out alone, whose errors are of two windows.
KINDS: tuple[type[Record], ...] = (*CHOSEN, *GIVEN, driver.SimilarityRecord)
# The options that a record may ask for, by name. What is absent is refused: code and
# machines of others, such as trust_remote_code, attn_implementation, task_path and ray,
# and files elsewhere than in --out, such as offload.
ALLOWED = {
    *("model", "revision", "dtype", "device", "device_map", "shape", "dummy_weights"),
    *(
        "text",
        "sequences",
        "length",
        "batch_size",
        "held_out",
        "held_out_sequences",
        "prompts",
    ),
    *(
        "sample",
        "tokens",
        "skip",
        "keep_first",
        "keep_last",
        "phase",
        "last_tokens",
        "plan",
    ),
    *("criterion", "objective", "patience", "max_minutes"),
    *("params", "weights", "kv", "speedup", "max_nll", "max_kl", "recovery"),
    *("tasks", "limit", "num_fewshot", "truncate", "task_batch_size", "diagnostics"),
    *(
        "repair",
        "repair_text",
        "repair_sequences",
        "train",
        "rank",
        "rate",
        "warm_up",
        "minutes",
    ),
    *("prompt_tokens", "generation_tokens", "concurrency", "rounds", "most"),
    *("seed", "as_json", "out"),
}
FOUND = (
    "plan",
    "weights",
)  # among settings what a run chose or fitted, which is compared as figures are
# No figures of a plan: times, what depends on which draft is the fastest, and what
# follows from other figures.
UNJUDGED = re.compile(
    r"(^|_)(ms|seconds|speedup|predicted|measured|same|peak|p_value)(_|$)"
)
OF_OTHERS = {
    "behind",
    "behind_se",
    "evaluations",
    "executions",
    "forwards",
}  # depend on the rows made in the same run
OF_ERROR, OF_VALUE = (
    0.5,
    0.05,
)  # the tolerance: of a figure's standard error, or of a figure without one
Agreement = Literal["equal", "within tolerance", "differs", "not made"]


class Remade(Fact):
    """A record and its like, by the figure that differs most; a speedup is shown, and
    not judged.
    """

    row: str
    agreement: Agreement
    differs_most: str = ""
    recorded: str = ""
    made_again: str = ""
    speedup_recorded: str = ""
    speedup_again: str = ""


COLUMNS: tuple[Column[Remade], ...] = tuple(
    words(name.replace("_", " "), attrgetter(name)) for name in Remade.model_fields
)


class CommandLine(NamedTuple):
    """What reads the words of a command, and what runs them."""

    read: Callable[[Sequence[str]], list[Asked]]
    run: Callable[[list[str]], object]


def reproduce(
    folder: Path,
    rows: Sequence[str],
    swaps: Sequence[str],
    out: Path,
    commands: CommandLine,
    functions: Path | None = None,
) -> list[Remade]:
    """Make `folder`, or these rows, again in `out`, and compare.

    `functions` is a folder with the modules that a command may name as module:function;
    without it none is run. Raises `UsageError` where the inputs changed, and where a
    record asks for what it may not.
    """
    if out.resolve() == folder.resolve():
        raise UsageError(
            f"{out} is what is to be made again: choose another folder (--out)"
        )
    if wrong := [swap for swap in swaps if "=" not in swap]:
        raise UsageError(
            f"--replace {shortened(wrong[0])} has no other word: write"
            " wiki.txt=data/wiki.txt"
        )
    asked = [
        one
        for one in _records(folder)
        if not rows or _name(one).startswith(tuple(rows))
    ]
    if not asked:
        raise UsageError(
            f"{folder} has no {f'row {shortened(rows[0])}' if rows else 'records'} to"
            " make again"
        )
    swapped = dict(swap.split("=", 1) for swap in swaps)
    lines: dict[tuple[str, tuple[Asked, ...]], list[Record]] = {}
    for record in asked:
        command, own = _line(
            record, folder, swapped, commands.read, narrowed=bool(rows)
        )
        place = str(out / "plan.json" if command == "search" else out)
        lines.setdefault((command, (*own, Asked("out", "--out", place))), []).append(
            record
        )
    for (command, options), records in lines.items():
        line = [command, *(word for one in options for word in one.words)]
        print(
            f"making again: {printable(shlex.join(['notall', *line]))}", file=sys.stderr
        )
        with _made_again(records[0], folder, functions):
            _check_plans(options, records, folder)
            commands.run(line)
    made = {
        _identity(one): one
        for place in (out, out / "plan.search")
        for one in _records(place)
    }
    every, unfit = (
        (one for records in lines.values() for one in records),
        (OF_OTHERS if rows else set()),
    )
    return [_compared(one, made.get(_identity(one)), folder, unfit) for one in every]


@contextmanager
def _made_again(record: Record, folder: Path, functions: Path | None) -> Iterator[None]:
    """Inside, a run of other settings than the record's is refused, and so are other
    functions.
    """
    known = record.provenance.functions if record.provenance else {}
    recorded, permitted = (
        RECORDED.set((record, folder)),
        PERMITTED.set(Permitted(functions, known)),
    )
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{error}; --replace WORD=OTHER changes a word of that command"
        ) from None
    finally:
        RECORDED.reset(recorded)
        PERMITTED.reset(permitted)


def conclusion(found: Sequence[Remade], folder: Path) -> str:
    counts = Counter(one.agreement for one in found)
    told = ", ".join(
        f"{counts[name]} {name}" for name in get_args(Agreement) if counts[name]
    )
    rule = (
        "Equal: to the last digit. Tolerance: half of a figure's standard error, or 5 %"
        " of a figure without one."
    )
    timed = (
        " Times are shown, and not judged."
        if any(one.speedup_recorded for one in found)
        else ""
    )
    return (
        f"{several(len(found), 'record')} of {folder}, made again: {told}."
        f" {rule}{timed}"
    )


def _records(folder: Path) -> list[Record]:
    return [one for kind in KINDS for one in read(folder / kind.file, kind)]


def _line(
    record: Record,
    folder: Path,
    swaps: Mapping[str, str],
    read: Callable[[Sequence[str]], list[Asked]],
    *,
    narrowed: bool,
) -> tuple[str, list[Asked]]:
    """Its command without --out, in its dtype, maybe `narrowed` to itself. Raises
    `UsageError` for one of others.
    """
    given = record.provenance.command if record.provenance else []
    if " ".join(given[:2]) not in COMMANDS:
        made = shortened(shlex.join(given), 60) or "what it does not say"
        raise UsageError(
            f"{folder} was made by {made}: give a folder of {', '.join(COMMANDS)}"
        )
    try:
        line = read(given[1:])
    except UsageError as error:
        raise UsageError(
            f"{folder} was made with what no record may ask for ({error}): run its"
            " command yourself"
        ) from None
    if unsafe := [one for one in line if one.name not in ALLOWED or one.is_ambiguous]:
        told = f"{folder} was made with {shortened(unsafe[0].flag or unsafe[0].value)}"
        raise UsageError(
            f"{told}, which no record may ask for: run its command yourself"
        )
    own = dict[str, str]()
    if record.what.get("dtype") in (
        "float32",
        "bfloat16",
        "float16",
    ):  # whatever suits this machine
        own["dtype"] = str(record.what["dtype"])
    if narrowed and isinstance(record, ComparisonRecord):
        own |= {"skip": f"{record.space}:{record.count}", "criterion": record.criterion}
        own |= {"objective": record.objective, "repair": record.repair}
    kept = [one for one in line if one.name not in {*own, "out"}]
    swapped = [
        one._replace(value=swaps.get(one.value or "", one.value)) for one in kept
    ]
    return given[1], swapped + [
        Asked(name, f"--{name}", value) for name, value in own.items()
    ]


def _check_plans(
    options: Sequence[Asked], records: Sequence[Record], folder: Path
) -> None:
    """Raise `UsageError` where a plan file of the command is missing, or not that of
    the records.
    """
    planned = [one for one in records if isinstance(one, GIVEN)]
    weights = {
        digest
        for one in planned
        for name in ("weights", "repair")
        if (digest := one.what.get(name))
    }
    for path in (
        Path(one.value) for one in options if one.name == "plan" and one.value
    ):
        plan = read_plan(path)
        if any(one.plan.indices != plan.indices for one in planned) or (
            weights and plan.digest not in weights
        ):
            raise UsageError(
                f"{path} skips {plan}, and {folder} holds records of another plan;"
                f" {AS_IT_WAS}"
            )


def _compared(
    held: Record, made: Record | None, folder: Path, unfit: set[str]
) -> Remade:
    """By all figures but times and those that are `unfit`. Raises `UsageError` for a
    record of other settings.
    """
    if made is None:
        return Remade(
            row=_name(held), agreement="not made", speedup_recorded=_speedup(held)
        )
    check_same(held, made, folder, AS_IT_WAS, FOUND)
    old, new = held.figures(), made.figures()
    fit = [name for name in old if not UNJUDGED.search(name) and name not in unfit]
    errors = {
        name: old.get(name if name.endswith("_se") else f"{name}_se") for name in fit
    }
    apart = {name: _tolerances(old[name], new.get(name), errors[name]) for name in fit}
    worst = max(apart, key=apart.__getitem__)
    agreement: Agreement = (
        "differs"
        if apart[worst] > 1
        else "within tolerance"
        if apart[worst]
        else "equal"
    )
    told = {
        "differs_most": worst,
        "recorded": str(old[worst]),
        "made_again": str(new.get(worst)),
    }
    speedups = {"speedup_recorded": _speedup(held), "speedup_again": _speedup(made)}
    return Remade(
        row=_name(held),
        agreement=agreement,
        **(told if apart[worst] else {}),
        **speedups,
    )


def _tolerances(old: Scalar, new: Scalar, error: Scalar) -> float:
    """How many of them two figures are apart: words and counts are the same, or
    infinitely far.
    """
    if old == new:
        return 0.0
    if not isinstance(old, float) or not isinstance(new, float):
        return math.inf
    tolerance = (
        OF_ERROR * error if isinstance(error, float) and error else OF_VALUE * abs(old)
    )
    return abs(new - old) / tolerance if tolerance else math.inf


def _identity(record: Record) -> Key:
    """What was asked for, and not what was found; drafts, which have no key, are told
    apart by two fields.
    """
    names = ["plan", "decoding", "drafted", *record.key_fields]
    given = (name for name in names if name != "plan" or isinstance(record, GIVEN))
    return (record.kind_name, *(getattr(record, name, None) for name in given))


def _name(record: Record) -> str:
    if isinstance(record, ComparisonRecord | sweep.SweepRecord):
        return record.name
    return " ".join(
        map(
            str,
            (record.kind_name, *(getattr(record, name) for name in record.key_fields)),
        )
    )


def _speedup(record: Record) -> str:
    """Of decoding; of a bench that of its plan."""
    times = getattr(getattr(record, "skipped", record), "times", None)
    return SPEEDUPS[0].text(times) if times else ""
