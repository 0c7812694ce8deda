"""The command to type next."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..models.names import DEFAULT_TEXT, USAGE_MIX
from ..options import Option
from ..plan import Plan
from ..results.provenance import STEP_COMMAND, Provenance
from .options.plan import PlanOptions
from .verdict import Verdict

logger = logging.getLogger(__name__)
LITTLE_NATS = 0.1  # nats to ask for where nothing was usable
REFITTING = "refit the keys and values of the prompt"


def next_command(name: str, *words: object, **options: object) -> str:
    """A command line of notall; an option that is True has no value, and one that is
    None is left out.
    """
    line = ["notall", name, *map(str, words)]
    for option, value in options.items():
        if value is not None:
            line.append(f"--{option.replace('_', '-')}")
            if value is not True:
                line.append(str(value))
    return shlex.join(line)


def mending(model: str, plan: object, repaired: bool) -> str:
    """The command that makes up for what the plan in a file, or the folder of a repair,
    leaves out.
    """
    name, out = ("heal", "healed") if repaired else ("repair", "repaired")
    return next_command(name, model, plan=plan, out=out)


def asking_for_less(model: str, plan: Plan | None = None) -> tuple[str, str]:
    """What to type where a plan costs too much; of one that skips in the prompt alone
    likewise there.
    """
    phase = "prefill" if plan and plan.prefill and not len(plan) else None
    command = next_command(
        "search", model, max_nll=LITTLE_NATS, phase=phase, out="plan.json"
    )
    return "ask for what costs little", command


def what_next(
    verdict: Verdict, model: str, made: Path, repair_text: str | None = None
) -> tuple[str, str]:
    """What to do with the plan that is in `made`, and the command; `repair_text` is
    what a repair would fit it to.
    """
    if verdict.usable is None:
        return "see what that costs", next_command("eval", model, plan=made)
    if verdict.usable and verdict.plan.prefill:
        return _after_prefill(verdict, model, made)
    if verdict.usable:
        return _write(verdict, model, made, repair_text)
    if verdict.state == "healed":
        return asking_for_less(model, verdict.plan)
    return "make up for what is lost", mending(model, made, verdict.state == "repaired")


def _after_prefill(verdict: Verdict, model: str, made: Path) -> tuple[str, str]:
    """Of a usable plan that skips in the prompt: no released engine runs it but
    transformers.
    """
    if verdict.state == "skipped" and verdict.plan.prefill.attention:
        return REFITTING, mending(model, made, repaired=False)
    if verdict.speedup and not model.endswith(".gguf"):
        out = made.with_name(f"{made.stem}-pruned")
        export = next_command("export", model, plan=made, to="hf", out=out)
        return "write that model", export
    return "see what that saves", next_command("bench", model, plan=made)


def _write(
    verdict: Verdict, model: str, made: Path, repair_text: str | None
) -> tuple[str, str]:
    """The export of a usable plan, repaired first unless it is repaired already."""
    # a file in few bits is no checkpoint of transformers
    form = "gguf" if model.endswith(".gguf") else "hf"
    out = made.with_name(f"{made.stem}-pruned")
    if verdict.state != "skipped":
        export = next_command("export", model, plan=made, to=form, out=out)
        return "write that model", export
    export = next_command(
        "export",
        model,
        plan=made,
        repair="refit",
        repair_text=repair_text,
        to=form,
        out=out,
    )
    return "repair it, and write that model", export


def on_the_text(about: Provenance, *sizes: str) -> dict[str, object]:
    """The options that name the text of a run, where it is not what commands read by
    default; with it its `sizes`.
    """
    what = about.what
    if what.get("text", USAGE_MIX) in (DEFAULT_TEXT, USAGE_MIX):
        return {}
    return {name: what[name] for name in ("text", *sizes) if name in what}


def mend_of(spec: str, asked: PlanOptions, plan: Plan) -> str:
    """The command that may find something better than what was asked for."""
    if asked.skip:
        words = {**asked.words, "keep_last": None}
        return next_command("search", spec, **words, out="better.json")
    return mending(spec, asked.plan, plan.state == "repaired")


@contextmanager
def as_step(
    verb: str, *of: object, given: Sequence[tuple[Any, Any]] = (), **named: object
) -> Iterator[None]:
    """Inside, a step of another command is done: the command of `verb` that does the
    same is logged, and recorded.

    It is `of` some arguments, and `given` pairs of options and of those that `verb` has
    by default.
    """
    words = [verb, *map(str, of)]
    for options, usual in given:
        words += typed(options, usual)
    for name, value in named.items():
        words += [f"--{name}", str(value)] if value is not None else []
    logger.info("doing: %s", shlex.join(["notall", *words]))
    before = STEP_COMMAND.set(words)
    try:
        yield
    finally:
        STEP_COMMAND.reset(before)


def typed(options: Any, usual: Any) -> Iterator[str]:
    """Options of a command as one types them, but for its argument, and for those that
    are as `usual`.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        among = (field.metadata.get("option"), *get_args(hints[field.name]))
        asked = next(one for one in among if isinstance(one, Option))
        if asked.argument or value == getattr(usual, field.name):
            continue
        names = (*asked.flags, f"--{field.name.replace('_', '-')}")
        flag = next(one for one in names if one.startswith("--"))
        for one in value if isinstance(value, tuple) else (value,):
            words = f"{one:g}" if isinstance(one, float) else str(one)
            yield from (flag,) if one is True else (flag, words)
