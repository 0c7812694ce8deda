"""What a plan comes to, in words: what is left out, what that costs and brings, if it is of use, what comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..errors import shortened
from ..plan import Plan
from ..results.facts import Footprint, Quality, Times
from ..results.record import Count, Fact, Number, Quartiles, Share, is_number
from ..results.table import in_bytes
from .shown import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_NATS = math.log(2)  # above, perplexity has more than doubled
LEAST_AGREEMENT = 0.5  # below, most of what the model would say first has changed
LEAST_SAVED = 0.005  # what rounds to 0% is no saving
LITTLE = 0.1  # nats to ask for where nothing was usable
NAME_LETTERS = 120  # of a name in a sentence; the tables' CSV and the provenance have all of them

Named = TypeVar("Named")


# --- a quality in words -----------------------------------------------------------------------------------------------


def faults_of(quality: Quality) -> list[str]:
    """Why a model of this quality is of no use; nothing where it is usable."""
    agreement = quality.top1_agreement
    faults = {
        "perplexity has more than doubled": quality.nats_lost > MOST_NATS,
        "over half of its first choices have changed": not agreement >= LEAST_AGREEMENT,  # nan too
    }
    return [fault for fault, found in faults.items() if found]


def is_usable(quality: Quality) -> bool:
    return not faults_of(quality)


def in_nats(quality: Quality, digits: int | None = None) -> str:
    """What was lost, with its standard error, which one window alone has not; by default to two or three digits."""
    lost, error = quality.nats_lost, quality.delta_nll_se
    digits = digits or (3 if is_number(error) and error < 0.005 else 2)
    return f"{lost:+.{digits}f}" + (f" ± {error:.{digits}f}" if is_number(error) else "")


def perplexity_factor(nats: float) -> float:
    """What so many nats a token more multiply perplexity by."""
    return math.exp(nats) if nats < 700 else math.inf


def loss_in_words(quality: Quality) -> str:
    """Such as `+0.39 ± 0.02 nats a token (perplexity × 1.48; 70% of its first choices stay)`."""
    agreement = quality.top1_agreement
    stays = f"; {agreement:.0%} of its first choices stay" if is_number(agreement) else ""
    return f"{in_nats(quality)} nats a token (perplexity × {perplexity_factor(quality.nats_lost):.3g}{stays})"


def speed_in_words(speedup: Quartiles, verb: str = "decodes") -> str:
    """Such as `decodes 1.20× as fast (quartiles 1.18 to 1.22)`; about as fast where 1 is among the quartiles."""
    spread = f"quartiles {speedup.low:.2f} to {speedup.high:.2f}"
    if speedup.low <= 1 <= speedup.high:
        return f"{verb} about as fast ({speedup.median:.2f}×, {spread})"
    return f"{verb} {speedup.median:.2f}× as fast ({spread})"


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = parts or ("",)
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class Outcome:
    """What is known of a plan on a model: what a page's first sentence is made of.

    `state` is repaired or healed, where it is; `named` says how the plan came to be; `verb` what was timed.
    """

    plan: Plan
    quality: Quality | None = None
    speedup: Quartiles | None = None
    footprint: Footprint | None = None
    dense: Footprint | None = None
    state: str = ""
    named: str = ""
    layers: int = 0
    verb: str = "decodes"

    def sentence(self, model: str) -> str:
        among = (f" of its {self.layers} layers" if self.layers else "") + (
            f" ({shortened(self.named, NAME_LETTERS)})" if self.named else ""
        )
        state = f"the {self.state} " if self.state in ("repaired", "healed") else ""
        faster = speed_in_words(self.speedup, self.verb) if self.speedup else ""
        does = " with ".join(filter(None, (faster, joined([*self._smaller()]))))
        if does and not faster:
            does = f"has {does}"
        return f"Without {self.plan.in_words()}{among}, {state}{shortened(model, NAME_LETTERS)} {self._ending(does)}."

    def _ending(self, does: str) -> str:
        if self.quality is None:
            return f"{does or 'is smaller'}; what that costs was not measured"
        if is_usable(self.quality):
            return f"{does or 'is still usable'}, at {loss_in_words(self.quality)}"
        return f"{f'{does}, but ' if does else ''}is no longer usable: {loss_in_words(self.quality)}"

    def _smaller(self) -> Iterator[str]:
        if self.footprint is None or self.dense is None:
            return
        for what, left, dense in (
            ("weights", self.footprint.weight_bytes, self.dense.weight_bytes),
            ("a KV cache", self.footprint.kv_bytes_per_token, self.dense.kv_bytes_per_token),
        ):
            if dense and 1 - left / dense >= LEAST_SAVED:
                yield f"{what} smaller by {1 - left / dense:.0%}"


# --- which of several -------------------------------------------------------------------------------------------------


class MeasuredPlan(Protocol):
    """A record of one of a folder's plans; `times` is None where it was not timed."""

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def quality(self) -> Quality: ...
    @property
    def times(self) -> Times | None: ...
    @property
    def footprint(self) -> Footprint: ...


M = TypeVar("M", bound=MeasuredPlan)


def decode_speedup(one: MeasuredPlan) -> Quartiles | None:
    return one.times.speedup_decode if one.times else None


def fastest(records: Iterable[M]) -> M | None:
    """Of the usable ones the fastest: of those that may be as fast, by its quartiles, what loses least.

    Where nothing was timed, the smallest, then the best.
    """
    usable = [one for one in records if one.plan and is_usable(one.quality)]

    def pace(one: M) -> float:
        return speedup.median if (speedup := decode_speedup(one)) else 0

    first = max(usable, key=lambda one: (pace(one), -one.footprint.weight_bytes, -one.quality.nats_lost), default=None)
    if first is None or not (speedup := decode_speedup(first)):
        return first
    return min((one for one in usable if pace(one) >= speedup.low), key=lambda one: one.quality.nats_lost)


def mildest(records: Iterable[M]) -> M | None:
    """What loses least, usable or not."""
    known = (one for one in records if one.plan and is_number(one.quality.delta_nll))
    return min(known, key=lambda one: one.quality.nats_lost, default=None)


# --- how a command ends -----------------------------------------------------------------------------------------------


class Bytes(Fact):
    """Of the dense model, and of what is left."""

    dense: Count | None
    skipped: Count | None


class VerdictFact(Fact):
    """A verdict for programs."""

    said: str
    usable: bool | None
    missed: str | None
    next: str
    text: str | None
    delta_nll: Number
    perplexity_factor: Number
    top1_agreement: Share
    speedup: Number
    weight_bytes: Bytes
    kv_bytes_per_token: Bytes
    state_bytes: Bytes


@dataclass(frozen=True)
class Verdict:
    """A plan with what is known of it: its `quality` on a `text`, None where not measured.

    `left_out` counts what is skipped, in words, "nothing" where nothing is. `missed` says what was reached of a budget
    that was not, `late` that the time was up before the search was done, and `next` is the command to type.
    """

    left_out: str
    dense: Footprint
    left: Footprint
    quality: Quality | None = None
    text: str = ""
    speedup: Quartiles | None = None
    missed: str | None = None
    late: bool = False
    next: str = ""

    @classmethod
    def on(cls, model: PreTrainedModel, plan: Plan, quality: Quality | None = None, text: str = "") -> Verdict:
        """What a plan leaves of a model, and what it costs."""
        from ..running.footprint import footprint
        from ..structure.locating import locate

        kinds: list[str] = [part.kind for part in locate(model).sublayers]
        words = plan.in_words({kind: kinds.count(kind) for kind in ("attention", "mlp")})
        return cls(words, footprint(model, Plan()), footprint(model, plan), quality, text)

    @property
    def usable(self) -> bool | None:
        """Whether perplexity has at most doubled and at least half of the first choices are the same."""
        return None if self.quality is None else is_usable(self.quality)

    def then(self, mend: str, otherwise: str) -> Verdict:
        """With the command that makes up for a plan that is of no use, or else with what one would do with it."""
        return replace(self, next=mend if self.usable is False else otherwise)

    def lines(self) -> Iterator[str]:
        """What to print, most important first."""
        yield from self._said()
        if self.next:
            yield f"Next:    {self.next}"

    def fact(self) -> VerdictFact:
        """For programs."""
        lost = self.quality.nats_lost if self.quality else math.nan
        return VerdictFact(
            said=" ".join(self._said()),
            usable=self.usable,
            missed=self.missed,
            next=self.next,
            text=self.text if self.quality else None,
            delta_nll=lost,
            perplexity_factor=perplexity_factor(lost) if is_number(lost) else math.nan,
            top1_agreement=self.quality.top1_agreement if self.quality else math.nan,
            speedup=self.speedup.median if self.speedup else math.nan,
            weight_bytes=Bytes(dense=self.dense.weight_bytes, skipped=self.left.weight_bytes),
            kv_bytes_per_token=Bytes(dense=self.dense.kv_bytes_per_token, skipped=self.left.kv_bytes_per_token),
            state_bytes=Bytes(dense=self.dense.state_bytes, skipped=self.left.state_bytes),
        )

    def _said(self) -> Iterator[str]:
        if self.left_out == "nothing":
            yield "Nothing is left out: this is the dense model."
        else:
            yield f"Without {self.left_out}: {'; '.join(self._parts())}."
        if self.quality and (faults := faults_of(self.quality)):
            yield f"Warning: the model is no longer usable: {' and '.join(faults)}."
        if self.missed:
            yield f"Missed {self.missed}."
        if self.late:
            yield "The time was up before the search was done: with more --max-minutes it may find better."

    def _parts(self) -> Iterator[str]:
        if self.quality:
            factor = perplexity_factor(self.quality.nats_lost)
            yield f"{in_nats(self.quality, 3)} nats a token (perplexity × {factor:.3g}) on {self.text}"
            yield f"{self.quality.top1_agreement:.0%} of the first choices are the same"
        else:
            yield "what that costs was not measured on other text: give --held-out"
        if self.speedup:
            yield f"{self.speedup.median:.2f} ± {self.speedup.error:.2f} times as fast"
        yield _less("weights", "", self.dense.weight_bytes, self.left.weight_bytes)
        yield _less("KV cache", " a token", self.dense.kv_bytes_per_token, self.left.kv_bytes_per_token)
        if self.dense.state_bytes:
            yield _less("states", "", self.dense.state_bytes, self.left.state_bytes or 0)


def _less(what: str, unit: str, dense: int, left: int) -> str:
    if left == dense:
        return f"the same {what}"
    return f"{what} {1 - left / dense:.0%} smaller ({in_bytes(left)}{unit})"


def mending(model: str, plan: object, repaired: bool) -> str:
    """The command that makes up for what the plan in a file, or the folder of a repair, leaves out."""
    name, out = ("heal", "healed") if repaired else ("repair", "repaired")
    return next_command(name, model, plan=plan, out=out)


def next_command(name: str, *words: object, **options: object) -> str:
    """A command line of notall; an option that is True has no value, and one that is None is left out."""
    given = [
        [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]
        for option, value in options.items()
        if value is not None
    ]
    return shlex.join(["notall", name, *map(str, words), *(word for option in given for word in option)])


def plan_message(said: str, model: str, made: Path, quality: Quality | None, state: str) -> Message:
    """Of the plan that is in `made`, in this state."""
    if quality is None:
        return Message(said, None, "see what that costs", next_command("eval", model, plan=made))
    if is_usable(quality):
        mend, pruned = "refit" if state == "skipped" else None, made.with_name(f"{made.stem}-pruned")
        command = next_command("export", model, plan=made, repair=mend, to="hf", out=pruned)
        return Message(said, True, "repair it, and write that model" if mend else "write that model", command)
    if state == "healed":
        return Message(said, False, *asking_for_less(model))
    return Message(said, False, "make up for what is lost", mending(model, made, state == "repaired"))


def asking_for_less(model: str) -> tuple[str, str]:
    """What to do where nothing was usable, and the command."""
    return "ask for what costs little", next_command("search", model, max_nll=LITTLE, out="plan.json")
