"""What a results folder holds, whichever command wrote it, and what a page shows of it:
each verb makes these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from ..plan import Fingerprint, Plan, several
from ..results import lines
from ..results.facts import Footprint, Quality, Similarity, Times
from ..results.ledger import refuse_foreign
from ..results.provenance import Provenance
from ..results.record import Command, Quartiles, Record, is_number
from ..results.table import Table
from ..strict_json import Settings

R = TypeVar("R", bound=Record)
Place = tuple[str, int]  # of a sublayer: kind (attention or mlp), layer


@dataclass(frozen=True)
class Folder:
    """A results folder: the records that commands of notall wrote."""

    path: Path
    files: dict[str, tuple[Record, ...]]  # by their kind

    def of(self, kind: type[R]) -> tuple[R, ...]:
        """The records of a kind, each with its provenance; none where there is no such
        file.
        """
        return tuple(
            record
            for record in self.files.get(kind.kind_name, ())
            if isinstance(record, kind)
        )

    def __contains__(self, kind: type[Record]) -> bool:
        return bool(self.files.get(kind.kind_name))

    @cached_property
    def provenance(self) -> Provenance:
        return next(self._provenances(), Provenance(what={}))

    @property
    def model(self) -> str:
        return str(self.provenance.what.get("model", "the model"))

    @cached_property
    def layers(self) -> int:
        """How many the model has; 0 where its shape is nowhere told."""
        shapes = (
            Fingerprint.parse(about.what.get("fingerprint"))
            for about in self._provenances()
        )
        return next((shape.layers for shape in shapes if shape), 0)

    @property
    def plan_options(self) -> list[str]:
        words = self.provenance.command
        pairs = [
            words[at : at + 2]
            for at, word in enumerate(words[:-1])
            if word in ("--skip", "--plan")
        ]
        pairs += [
            words[at : at + 2]
            for at, word in enumerate(words[:-1])
            if word in ("--phase", "--last-tokens")
        ]
        kept = ["--keep-last"] if "--keep-last" in words else []
        return [word for pair in pairs for word in pair] + kept or [
            "--plan",
            "plan.json",
        ]

    def _provenances(self) -> Iterator[Provenance]:
        for records in self.files.values():
            yield from (record.provenance for record in records if record.provenance)


def check_folder(folder: Path | None, command: Command) -> None:
    """Raise `UsageError` where `command` could not write to `folder`: another's results
    are there, or it may not.
    """
    if folder is None:
        return
    lines.refuse_unwritable(folder)
    refuse_foreign(folder, command)


@dataclass(frozen=True)
class Message:
    said: str
    usable: bool | None  # what it tells of; None where that is not known
    end: str  # what the command is for
    command: str  # to type next


@dataclass(frozen=True)
class Card:
    """A figure to see first, with its unit, and a sentence."""

    title: str
    figure: str
    unit: str
    text: str

    @classmethod
    def of_loss(cls, title: str, quality: Quality, text: str) -> "Card":
        digits = _digits(quality)
        error = (
            f"± {quality.delta_nll_se:.{digits}f} "
            if is_number(quality.delta_nll_se)
            else ""
        )
        return cls(
            title, f"{quality.delta_nll:+.{digits}f}", f"{error}nats a token", text
        )


@dataclass(frozen=True)
class Step:
    """A plan that the page steps through, in the layer map, in bars of `times` and
    bytes, and in words.
    """

    name: str
    plan: Plan
    quality: Quality | None = None
    times: Times | None = None
    footprint: Footprint | None = None
    dense: Footprint | None = None
    order: tuple[Sequence[str], ...] = ()
    again: str = ""  # the command that makes its figures again

    @property
    def faster(self) -> tuple[str, Quartiles]:
        """What its times say of the plan, of one that skips in the prompt alone of
        reading it.
        """
        assert self.times
        reads = self.plan.prefill and not len(self.plan)
        return (
            ("reads a prompt", self.times.speedup_prefill)
            if reads
            else ("decodes", self.times.speedup_decode)
        )

    @property
    def told(self) -> str:
        counts = (
            [f"{several(len(self.plan), 'sublayer')} skipped"] if len(self.plan) else []
        )
        if self.plan.prefill:
            counts.append(
                f"{several(len(self.plan.prefill), 'sublayer')} skipped in the prompt"
            )
        parts = [" and ".join(counts) or "nothing is skipped"]
        if self.plan and self.quality:
            parts.append(in_nats(self.quality))
        if self.plan and self.times:
            verb, speedup = self.faster
            parts.append(
                f"{verb} {speedup.median:.2f} times as fast [{speedup.low:.2f} to"
                f" {speedup.high:.2f}]"
            )
        elif self.times:
            parts.append(f"{self.times.decode_ms_per_token.median:.1f} ms a token")
        if self.order:
            parts.append(
                "skipped in this order: " + ", ".join(map("+".join, self.order))
            )
        return f"{'; '.join(parts)}.{f' Reproduce with: {self.again}' if self.again else ''}"


def in_nats(quality: Quality) -> str:
    """Such as `+0.20 ± 0.02 nats a token`, with three digits where the error needs
    them; one window has no error.
    """
    error = quality.delta_nll_se
    digits = _digits(quality)
    return (
        f"{quality.nats_lost:+.{digits}f}{f' ± {error:.{digits}f}' if is_number(error) else ''}"
        " nats a token"
    )


def _digits(quality: Quality) -> int:
    """Behind the point of a loss: as many as its error needs."""
    return 3 if is_number(quality.delta_nll_se) and quality.delta_nll_se < 0.005 else 2


@dataclass(frozen=True)
class Figure:
    """A Vega-Lite spec as `charts.style.on_page` makes it; its param `plan`, if it has
    one, follows the step.
    """

    spec: Settings
    label: str  # what it is, to those who don't see it
    title: str = ""  # over it, where a section has several
    csv: str = ""  # its data, where that is not what the section's table has
    note: str = ""  # how to read it
    # what follows is the page's: its name there, as which CSV it is copied, if it marks
    # the step
    id: str = ""
    copied: str = ""
    follows: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page: figures, and a table of whose rows each may be about a step, by
    its number from 0.
    """

    name: str  # letters and dashes: ids and the names of files come from it
    title: str
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    steps: tuple[int | None, ...] = ()
    note: str = ""
    opens: bool = False  # before the layer map


@dataclass(frozen=True)
class Costs:
    """What leaving out each sublayer alone costs; `title` says what is counted,
    `measured_on` on how much text.
    """

    found: Mapping[Place, float]
    title: str
    measured_on: str


@dataclass(frozen=True)
class Sample:
    prompt: str
    said: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """All that a verb has to say of a folder; of several verbs a page has the first
    message, cards and steps.
    """

    message: Message | None = None
    cards: tuple[Card, ...] = ()
    steps: tuple[Step, ...] = ()
    first: int = 0  # the step to begin with
    sections: tuple[Section, ...] = ()
    similarity: tuple[Similarity, ...] = ()  # this and the costs shade the layer map
    costs: Costs | None = None
    samples: tuple[Sample, ...] = ()
