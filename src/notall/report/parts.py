"""The parts of a page, which the report of each command makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..experiments.verdict import Verdict, digits_of, in_nats
from ..plan import Plan, several
from ..results.facts import Footprint, Quality, Similarity, Times
from ..results.record import Quartiles, is_number
from ..results.table import Table
from ..strict_json import Settings

CellPlace = tuple[str, int]  # of a sublayer: kind (attention or mlp), layer


@dataclass(frozen=True)
class Message:
    """The first sentence of a page, and the command that comes next."""

    sentence: str
    usable: bool | None  # whether the plan is; None where that is not known
    purpose: str  # of the command
    command: str

    @classmethod
    def of(cls, verdict: Verdict, purpose: str, command: str) -> "Message":
        """What is known of a plan, and the command to type next."""
        return cls(verdict.sentence, verdict.usable, purpose, command)


@dataclass(frozen=True)
class Card:
    """A figure to see first, with its unit, and a sentence."""

    title: str
    figure: str
    unit: str
    text: str

    @classmethod
    def of_loss(cls, title: str, quality: Quality, text: str) -> "Card":
        """The NLL that a plan adds, in nats per token ± its standard error."""
        digits, unit = digits_of(quality), "nats a token"
        if is_number(quality.delta_nll_se):
            unit = f"± {quality.delta_nll_se:.{digits}f} {unit}"
        return cls(title, f"{quality.delta_nll:+.{digits}f}", unit, text)


@dataclass(frozen=True)
class PageStep:
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
        """The verb and the speedup: of decoding, or of reading the prompt where that
        alone skips.
        """
        assert self.times
        reads = self.plan.prefill and not len(self.plan)
        return (
            ("reads a prompt", self.times.speedup_prefill)
            if reads
            else ("decodes", self.times.speedup_decode)
        )

    @property
    def description(self) -> str:
        """What is skipped, what it costs, and how fast it is, in a sentence."""
        parts = [self._counts() or "nothing is skipped"]
        if self.plan and self.quality:
            parts.append(in_nats(self.quality))
        if self.plan and self.times:
            verb, speedup = self.faster
            quartiles = f"[{speedup.low:.2f} to {speedup.high:.2f}]"
            parts.append(f"{verb} {speedup.median:.2f} times as fast {quartiles}")
        elif self.times:
            parts.append(f"{self.times.decode_ms_per_token.median:.1f} ms a token")
        if self.order:
            order = ", ".join("+".join(unit) for unit in self.order)
            parts.append(f"skipped in this order: {order}")
        again = f" Reproduce with: {self.again}" if self.again else ""
        return f"{'; '.join(parts)}.{again}"

    def _counts(self) -> str:
        """How many sublayers are skipped, and how many in the prompt alone."""
        counts = []
        if len(self.plan):
            counts.append(f"{several(len(self.plan), 'sublayer')} skipped")
        if in_prompt := self.plan.prefill:
            counts.append(
                f"{several(len(in_prompt), 'sublayer')} skipped in the prompt"
            )
        return " and ".join(counts)


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
    # the page sets these, and no command
    id: str = ""  # of its element
    copied: str = ""  # the name of the CSV that its button copies
    follows: bool = False  # whether it marks the step that is chosen


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

    found: Mapping[CellPlace, float]
    title: str
    measured_on: str


@dataclass(frozen=True)
class Sample:
    """A prompt, and how each plan continues it: pairs of its name and a text."""

    prompt: str
    continuations: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PageParts:
    """What the records of one command add to a page; of several commands a page has the
    first message, cards and steps.
    """

    message: Message | None = None
    cards: tuple[Card, ...] = ()
    steps: tuple[PageStep, ...] = ()
    first: int = 0  # the step to begin with
    sections: tuple[Section, ...] = ()
    similarity: tuple[Similarity, ...] = ()  # this and the costs shade the layer map
    costs: Costs | None = None
    samples: tuple[Sample, ...] = ()
