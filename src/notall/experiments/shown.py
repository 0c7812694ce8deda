"""What a page shows of a results folder: each verb makes these of its records, and the page lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..inputs import Settings
from ..plan import Plan, several
from ..results.facts import Footprint, Quality, Similarity, Times
from ..results.record import is_number
from ..results.table import Table

Place = tuple[str, int]  # of a sublayer: kind (attention or mlp), layer


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
    def of_loss(cls, title: str, quality: Quality, text: str) -> Card:
        error = f"± {quality.delta_nll_se:.2f} " if is_number(quality.delta_nll_se) else ""
        return cls(title, f"{quality.delta_nll:+.2f}", f"{error}nats a token", text)


@dataclass(frozen=True)
class Step:
    """A plan that the page steps through, in the layer map, in bars of `times` and bytes, and in words."""

    name: str
    plan: Plan
    quality: Quality | None = None
    times: Times | None = None
    footprint: Footprint | None = None
    dense: Footprint | None = None
    order: tuple[Sequence[str], ...] = ()

    @property
    def told(self) -> str:
        skipped = len(self.plan)
        parts = [f"{several(skipped, 'sublayer')} skipped" if skipped else "nothing is skipped"]
        if skipped and self.quality:
            parts.append(in_nats(self.quality))
        if skipped and self.times:
            speedup = self.times.speedup_decode
            parts.append(f"decodes {speedup.median:.2f} times as fast [{speedup.low:.2f} to {speedup.high:.2f}]")
        elif self.times:
            parts.append(f"{self.times.decode_ms_per_token.median:.1f} ms a token")
        if self.order:
            parts.append("skipped in this order: " + ", ".join(map("+".join, self.order)))
        return f"{'; '.join(parts)}."


def in_nats(quality: Quality) -> str:
    """Such as `+0.20 ± 0.02 nats a token`, with three digits where the error needs them; one window has no error."""
    error = quality.delta_nll_se
    digits = 3 if is_number(error) and error < 0.005 else 2
    return f"{quality.nats_lost:+.{digits}f}{f' ± {error:.{digits}f}' if is_number(error) else ''} nats a token"


@dataclass(frozen=True)
class Figure:
    """A Vega-Lite spec as `charts.style.on_page` makes it; its param `plan`, if it has one, follows the step."""

    spec: Settings
    label: str  # what it is, to those who don't see it
    title: str = ""  # over it, where a section has several
    csv: str = ""  # its data, where that is not what the section's table has
    note: str = ""  # how to read it


@dataclass(frozen=True)
class Section:
    """A part of a page: figures, and a table of whose rows each may be about a step, by its number from 0."""

    name: str  # letters and dashes: ids and the names of files come from it
    title: str
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    steps: tuple[int | None, ...] = ()
    note: str = ""
    opens: bool = False  # before the layer map


@dataclass(frozen=True)
class Costs:
    """What leaving out each sublayer alone costs; `title` says what is counted, `measured_on` on how much text."""

    found: Mapping[Place, float]
    title: str
    measured_on: str


@dataclass(frozen=True)
class Sample:
    prompt: str
    said: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """All that a verb has to say of a folder; of several verbs a page has the first message, cards and steps."""

    message: Message | None = None
    cards: tuple[Card, ...] = ()
    steps: tuple[Step, ...] = ()
    first: int = 0  # the step to begin with
    sections: tuple[Section, ...] = ()
    similarity: tuple[Similarity, ...] = ()  # this and the costs shade the layer map
    costs: Costs | None = None
    samples: tuple[Sample, ...] = ()
