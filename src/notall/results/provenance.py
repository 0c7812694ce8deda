"""Where a record comes from: what was asked for, which decides whether a run goes on,
and where it ran.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel, Field

from ..entry_points import functions_in
from ..errors import shortened
from ..plan import several
from ..strict_json import Settings

# The words of the command that a step of another one is, where it is one.
STEP_COMMAND = ContextVar[Sequence[str] | None]("of a step", default=None)
# What is reported, and never compared.
PLACES = ("machine", "device", "threads", "versions", "command", "functions", "date")


class Provenance(BaseModel, frozen=True, extra="forbid"):
    """`what` decides whether a folder's records belong to a run; `where` is told beside
    them, and never compared.
    """

    what: Settings = Field(
        description="model, text, dtype, seed, settings: what to repeat it with"
    )
    where: Settings = Field(
        {}, description="machine, versions, command and its functions, date"
    )

    @classmethod
    def of(
        cls, about: "Provenance | Mapping[str, object]", **more: object
    ) -> "Provenance":
        """`about` with what `more` says; of a flat mapping, the names in `PLACES` are
        where it ran.
        """
        if isinstance(about, Provenance):
            return (
                about.model_copy(update={"what": {**about.what, **more}})
                if more
                else about
            )
        what = {name: value for name, value in about.items() if name not in PLACES}
        return cls(
            what=what | more,
            where={name: about[name] for name in PLACES if name in about},
        )

    @property
    def key(self) -> str:
        """`what` as one text, to compare."""
        return json.dumps(self.what, sort_keys=True)

    @property
    def command(self) -> list[str]:
        """The words of the command; [] where that is not known."""
        try:
            return shlex.split(str(self.where.get("command", "")))
        except ValueError:
            return []

    @property
    def functions(self) -> dict[str, str]:
        """Each `module:function` that the command named, with the SHA-256 of its
        file.
        """
        known = self.where.get("functions")
        return known if isinstance(known, dict) else {}

    @property
    def in_words(self) -> str:
        """The model in its dtype, and where it ran: what a table says above itself."""
        model = self.what.get("model", "the model")
        dtype = self.what.get("dtype", "a dtype that is not told")
        return (
            f"{model}, {dtype}, on"
            f" {place_of(self.where.get('machine'), versions=False)}"
        )


def this_run(*program: str) -> Settings:
    """The command as it was typed, without the folders of a machine, its functions, and
    the date.

    `program` is what was typed before its words: `python` and a file; by default
    `notall`. The SHA-256 of the functions' files is by `module:function`; the date is
    in UTC, to the minute.
    """
    words = [
        re.sub(r"(^|=)/(.*/)?(?=[^/])", r"\1", word)  # files by their names
        for word in STEP_COMMAND.get() or sys.argv[1:]
    ]
    functions = functions_in(words)
    return {
        "command": shlex.join([*(program or ["notall"]), *words]),
        **({"functions": functions} if functions else {}),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def behind(prompt_tokens: int | None) -> str:
    """In words that only what follows a prompt is scored; nothing where all of a text
    is.
    """
    return f", behind a prompt of {prompt_tokens:,} tokens" if prompt_tokens else ""


def windows_in_words(described: Settings) -> str:
    """Such as `16 windows of 128 tokens of wikitext2`."""
    return (
        f"{several(described['sequences'], 'window')} of {described['length']} tokens"
        f" of {shortened(described['text'])}"
    )


def place_of(machine: Any, *, versions: bool = True) -> str:
    """Where it was measured, in words, as far as that was written down."""
    try:
        place = (
            f"{machine['device_name']}, {several(machine['cores'], 'core')}, threads:"
            f" {machine['threads']}"
        )
        listed = ", ".join(
            f"{name} {number}" for name, number in machine["versions"].items()
        )
        return f"{place}; {listed}" if versions else place
    except (TypeError, ValueError, KeyError, AttributeError):
        return "a machine that is not told"
