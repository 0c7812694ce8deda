"""Make a folder's records again, by their own commands, and compare the two figure by
figure.
"""

from __future__ import annotations

import logging
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from ..encodings import printable
from ..entry_points import PERMITTED, Permitted
from ..errors import UsageError, shortened
from ..options import AskedOption
from ..results.facts import SPEEDUPS
from ..results.ledger import AS_IT_WAS, RECORDED, check_same, read_records
from ..results.record import Fact, Record, RecordKey, Scalar
from ..results.repairs import MeasuredRecord
from .bench import BenchRecord
from .compare.records import ComparisonRecord
from .draft import DraftRecord
from .options.plan import read_plan
from .recovery import JudgedRecord
from .search.records import SearchRecord
from .similarity import SimilarityRecord
from .sweep import SweepRecord

logger = logging.getLogger(__name__)

RUN_AGAIN = (
    "compare",
    "sweep",
    "search",
    "eval",
    "repair",
    "heal",
    "bench",
    "draft",
)
REPRODUCIBLE = tuple(f"notall {name}" for name in RUN_AGAIN)
# records of a plan that is given, and of plans that are chosen
GIVEN_KINDS = (MeasuredRecord, JudgedRecord, BenchRecord, DraftRecord)
CHOSEN_KINDS = (ComparisonRecord, SweepRecord, SearchRecord)
# Without those of sublayers left out alone, whose errors are of two windows.
REPRODUCED_KINDS: tuple[type[Record], ...] = (
    *CHOSEN_KINDS,
    *GIVEN_KINDS,
    SimilarityRecord,
)
# The options that a record may ask for, by name. What is absent is refused: code and
# machines of others, such as trust_remote_code, attn_implementation, task_path and ray,
# and files elsewhere than in --out, such as offload.
ALLOWED = {
    "model", "revision", "dtype", "device", "device_map", "shape", "dummy_weights",
    "text", "sequences", "length", "batch_size", "held_out", "held_out_sequences",
    "prompts", "sample", "tokens",
    "skip", "keep_first", "keep_last", "phase", "last_tokens", "plan", "fractions",
    "criterion", "objective", "patience", "max_minutes",
    "params", "weights", "kv", "speedup", "max_nll", "max_kl", "recovery",
    "tasks", "limit", "num_fewshot", "truncate", "task_batch_size", "diagnostics",
    "repair", "repair_text", "repair_sequences",
    "train", "rank", "rate", "warm_up", "minutes",
    "prompt_tokens", "generation_tokens", "concurrency", "rounds", "most",
    "seed", "as_json", "out",
}  # fmt: skip
# among settings what a run chose or fitted, which is compared as figures are
FOUND = ("plan", "weights")
# No figures of a plan: times, what depends on which draft is the fastest, and what
# follows from other figures.
UNJUDGED = re.compile(
    r"(^|_)(ms|seconds|speedup|predicted|measured|same|peak|p_value)(_|$)"
)
# what depends on the rows made in the same run
OF_OTHERS = {"behind", "behind_se", "evaluations", "executions", "forwards"}
OF_ERROR = 0.5  # the tolerance: of a figure's standard error,
OF_VALUE = 0.05  # or of a figure without one
DTYPES = ("float32", "bfloat16", "float16")
Agreement = Literal["equal", "within tolerance", "differs", "not made"]
CommandOptions = tuple[str, tuple[AskedOption, ...]]  # a command and its options


class Remade(Fact):
    """A record and the same one made again, by the figure that differs most; a speedup
    is shown, and not judged.
    """

    row: str
    agreement: Agreement
    differs_most: str = ""
    recorded: str = ""
    made_again: str = ""
    speedup_recorded: str = ""
    speedup_again: str = ""


class CommandLine(NamedTuple):
    """What reads the words of a command, and what runs them."""

    read: Callable[[Sequence[str]], list[AskedOption]]
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
    swapped = _swapped_words(swaps)
    asked = [
        one
        for one in _records(folder)
        if not rows or _name(one).startswith(tuple(rows))
    ]
    if not asked:
        wanted = f"row {shortened(rows[0])}" if rows else "records"
        raise UsageError(f"{folder} has no {wanted} to make again")
    lines: dict[CommandOptions, list[Record]] = {}
    for record in asked:
        command, own = _line(
            record, folder, swapped, commands.read, narrowed=bool(rows)
        )
        place = str(out / "plan.json" if command == "search" else out)
        options = (*own, AskedOption("out", "--out", place))
        lines.setdefault((command, options), []).append(record)
    for (command, options), records in lines.items():
        line = [command, *(word for one in options for word in one.words)]
        logger.info("making again: %s", printable(shlex.join(["notall", *line])))
        with _made_again(records[0], folder, functions):
            _check_plans(options, records, folder)
            commands.run(line)
    made = {
        _identity(one): one
        for place in (out, out / "plan.search")
        for one in _records(place)
    }
    unfit = OF_OTHERS if rows else set[str]()
    return [
        _compared(record, made.get(_identity(record)), folder, unfit)
        for records in lines.values()
        for record in records
    ]


def _swapped_words(swaps: Sequence[str]) -> dict[str, str]:
    """By a word of the recorded command the other one. Raises `UsageError` for one
    without.
    """
    for swap in swaps:
        if "=" not in swap:
            raise UsageError(
                f"--replace {shortened(swap)} has no other word: write"
                " wiki.txt=data/wiki.txt"
            )
    return dict(swap.split("=", 1) for swap in swaps)


@contextmanager
def _made_again(record: Record, folder: Path, functions: Path | None) -> Iterator[None]:
    """Inside, a run of other settings than the record's is refused, and so are other
    functions.
    """
    known = record.provenance.functions if record.provenance else {}
    recorded = RECORDED.set((record, folder))
    permitted = PERMITTED.set(Permitted(functions, known))
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"{error}; --replace WORD=OTHER changes a word of that command"
        ) from None
    finally:
        RECORDED.reset(recorded)
        PERMITTED.reset(permitted)


def _records(folder: Path) -> list[Record]:
    return [
        one
        for kind in REPRODUCED_KINDS
        for one in read_records(folder / kind.file, kind)
    ]


def _line(
    record: Record,
    folder: Path,
    swaps: Mapping[str, str],
    read: Callable[[Sequence[str]], list[AskedOption]],
    *,
    narrowed: bool,
) -> tuple[str, list[AskedOption]]:
    """Its command without --out, in its dtype, maybe `narrowed` to itself. Raises
    `UsageError` for one of others.
    """
    given = record.provenance.command if record.provenance else []
    if " ".join(given[:2]) not in REPRODUCIBLE:
        made = shortened(shlex.join(given), 60) or "what it does not say"
        raise UsageError(
            f"{folder} was made by {made}: give a folder of {', '.join(REPRODUCIBLE)}"
        )
    try:
        line = read(given[1:])
    except UsageError as error:
        raise UsageError(
            f"{folder} was made with what no record may ask for ({error}): run its"
            " command yourself"
        ) from None
    if unsafe := [one for one in line if one.name not in ALLOWED or one.is_ambiguous]:
        word = shortened(unsafe[0].flag or unsafe[0].value)
        raise UsageError(
            f"{folder} was made with {word}, which no record may ask for: run its"
            " command yourself"
        )
    own = dict[str, str]()
    if record.what.get("dtype") in DTYPES:  # whatever suits this machine
        own["dtype"] = str(record.what["dtype"])
    if narrowed and isinstance(record, ComparisonRecord):
        own["skip"] = f"{record.space}:{record.count}"
        own["criterion"] = record.criterion
        own["objective"] = record.objective
        own["repair"] = record.repair
    kept = [one for one in line if one.name not in {*own, "out"}]
    swapped = [
        one._replace(value=swaps.get(one.value or "", one.value)) for one in kept
    ]
    added = [AskedOption(name, f"--{name}", value) for name, value in own.items()]
    return given[1], swapped + added


def _check_plans(
    options: Sequence[AskedOption], records: Sequence[Record], folder: Path
) -> None:
    """Raise `UsageError` where a plan file of the command is missing, or not that of
    the records.
    """
    planned = [one for one in records if isinstance(one, GIVEN_KINDS)]
    digests = [one.what.get(name) for one in planned for name in ("weights", "repair")]
    weights = {digest for digest in digests if digest}
    for option in options:
        if option.name != "plan" or not option.value:
            continue
        plan = read_plan(path := Path(option.value))
        others = any(one.plan.indices != plan.indices for one in planned)
        if others or (weights and plan.digest not in weights):
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
    apart = {
        name: _tolerances(value, new.get(name), _error_of(name, old))
        for name, value in old.items()
        if not UNJUDGED.search(name) and name not in unfit
    }
    worst = max(apart, key=apart.__getitem__)
    found = Remade(
        row=_name(held),
        agreement=_agreement(apart[worst]),
        speedup_recorded=_speedup(held),
        speedup_again=_speedup(made),
    )
    if not apart[worst]:
        return found
    return found.model_copy(
        update={
            "differs_most": worst,
            "recorded": str(old[worst]),
            "made_again": str(new.get(worst)),
        }
    )


def _error_of(name: str, figures: Mapping[str, Scalar]) -> Scalar:
    """The standard error of a figure, where it has one; of an error itself that."""
    return figures.get(name if name.endswith("_se") else f"{name}_se")


def _agreement(tolerances: float) -> Agreement:
    if tolerances > 1:
        return "differs"
    return "within tolerance" if tolerances else "equal"


def _tolerances(old: Scalar, new: Scalar, error: Scalar) -> float:
    """How many of them two figures are apart: words and counts are the same, or
    infinitely far.
    """
    if old == new:
        return 0.0
    if not isinstance(old, float) or not isinstance(new, float):
        return math.inf
    tolerance = OF_VALUE * abs(old)
    if isinstance(error, float) and error:
        tolerance = OF_ERROR * error
    return abs(new - old) / tolerance if tolerance else math.inf


def _identity(record: Record) -> RecordKey:
    """What was asked for, and not what was found; drafts, which have no key, differ by
    two fields.
    """
    names = ["plan", "decoding", "drafted", *record.key_fields]
    given = (
        name for name in names if name != "plan" or isinstance(record, GIVEN_KINDS)
    )
    return (record.kind_name, *(getattr(record, name, None) for name in given))


def _name(record: Record) -> str:
    if isinstance(record, ComparisonRecord | SweepRecord):
        return record.name
    key = (getattr(record, name) for name in record.key_fields)
    return " ".join(map(str, (record.kind_name, *key)))


def _speedup(record: Record) -> str:
    """Of decoding; of a bench that of its plan."""
    times = getattr(getattr(record, "skipped", record), "times", None)
    return SPEEDUPS[0].text(times) if times else ""
