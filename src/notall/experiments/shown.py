"""What a page shows of a results folder: each verb makes these of its records, and the page lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import Plan, several
from ..results.facts import Footprint, Quality, Similarity, Times
from ..results.record import is_number
from ..results.table import Table

Place = tuple[str, int]  # of a sublayer: kind (attention or mlp), layer


@dataclass(frozen=True)
class Message:
    """The first thing that a page says: a sentence, whether what it tells of is usable, and the command to type next.

    `usable` is None where that is not known; `end` says what the command is for.
    """

    said: str
    usable: bool | None
    end: str
    command: str


@dataclass(frozen=True)
class Card:
    """A figure to see first, with its unit, and a sentence."""

    title: str
    figure: str
    unit: str
    text: str

    @classmethod
    def of_loss(cls, title: str, quality: Quality, text: str) -> Card:
        """What a plan loses, with its standard error."""
        error = f"± {quality.delta_nll_se:.2f} " if is_number(quality.delta_nll_se) else ""
        return cls(title, f"{quality.delta_nll:+.2f}", f"{error}nats a token", text)


@dataclass(frozen=True)
class Step:
    """A plan that the page steps through: the layer map shows it, bars its `times` and bytes, and figures mark it.

    Bytes are drawn as shares of those of `dense`. `quality` and `order` (of skipping) are told in words.
    """

    name: str
    plan: Plan
    quality: Quality | None = None
    times: Times | None = None
    footprint: Footprint | None = None
    dense: Footprint | None = None
    order: tuple[Sequence[str], ...] = ()

    @property
    def told(self) -> str:
        """In a sentence."""
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
    """A Vega-Lite spec as `charts.style.on_page` makes it; its param `plan`, if it has one, follows the step.

    `title` stands over it where a section has several; `label` says what it is to those who don't see it; `note` how to
    read it; `csv` is its data, where that is not what the section's table has.
    """

    spec: Mapping[str, Any]
    label: str
    title: str = ""
    csv: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page: figures, and a table of whose rows each may be about a step, by its number from 0.

    `name` is a word of its own, of letters and dashes, from which ids and the names of files come. `opens`: it stands
    before the layer map.
    """

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    table: Table | None = None
    steps: tuple[int | None, ...] = ()
    note: str = ""
    opens: bool = False


@dataclass(frozen=True)
class Costs:
    """What leaving out each sublayer alone costs; `title` says what is counted, `measured_on` on how much text."""

    found: Mapping[Place, float]
    title: str
    measured_on: str


@dataclass(frozen=True)
class Sample:
    """How plans, by name, continue a prompt."""

    prompt: str
    said: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """All that a verb has to say of a folder.

    Of what several verbs say a page has the first message, the first cards and the first steps, and all else.
    `similarity` and `costs` shade the layer map.
    """

    message: Message | None = None
    cards: tuple[Card, ...] = ()
    steps: tuple[Step, ...] = ()
    first: int = 0  # the step to begin with
    sections: tuple[Section, ...] = ()
    similarity: tuple[Similarity, ...] = ()
    costs: Costs | None = None
    samples: tuple[Sample, ...] = ()
