"""What a plan comes to, in words: what is left out, what that costs and brings, if it is of use, what comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..records.columns import Row, in_bytes, is_number
from ..records.plan import Plan

if TYPE_CHECKING:  # a page says what is of use without loading what runs models
    from transformers import PreTrainedModel

    from ..measuring.speed import Spread
    from ..running.footprint import Footprint

MOST_NATS = math.log(2)  # above, perplexity has more than doubled
NOTHING = "nothing"  # left out
LEAST_AGREEMENT = 0.5  # below, most of what the model would say first has changed


@dataclass(frozen=True)
class Verdict:
    """A plan with what is known of it: `quality` as tables have it, and on which `text`; None where not measured.

    `left_out` counts what is skipped, in words. `missed` says what was reached of a budget that was not, `late` that
    the time was up before the search was done, and `next` is the command to type.
    """

    left_out: str
    dense: Footprint
    left: Footprint
    quality: Row | None = None
    text: str = ""
    speedup: Spread | None = None
    missed: str | None = None
    late: bool = False
    next: str = ""

    @property
    def usable(self) -> bool | None:
        """Whether perplexity has at most doubled and at least half of the first choices are the same."""
        if self.quality is None:
            return None
        return not faults_of(self.quality)

    def then(self, mend: str, otherwise: str) -> Verdict:
        """With the command that makes up for a plan that is of no use, or else with what one would do with it."""
        return replace(self, next=mend if self.usable is False else otherwise)

    def lines(self) -> Iterator[str]:
        """What to print, most important first."""
        yield from self._said()
        if self.next:
            yield f"Next:    {self.next}"

    def _said(self) -> Iterator[str]:
        if self.left_out == NOTHING:
            yield "Nothing is left out: this is the dense model."
        else:
            yield f"Without {self.left_out}: {'; '.join(self._parts())}."
        if self.quality and (faults := faults_of(self.quality)):
            yield f"Warning: the model is no longer usable: {' and '.join(faults)}."
        if self.missed:
            yield f"Missed {self.missed}."
        if self.late:
            yield "The time was up before the search was done: with more --max-minutes it may find better."

    def row(self) -> Row:
        """For programs."""
        quality, speed = self.quality or {}, self.speedup
        lost = nats_lost(quality) if quality else math.inf
        return {
            "said": " ".join(self._said()),
            "usable": self.usable,
            "missed": self.missed,
            "next": self.next,
            "text": self.text if self.quality else None,
            "delta_nll": lost if math.isfinite(lost) else None,
            "perplexity_factor": perplexity_factor(lost) if math.isfinite(lost) else None,
            "top1_agreement": quality.get("top1_agreement"),
            "speedup": speed.median if speed else None,
            "weight_bytes": {"dense": self.dense.weight_bytes, "skipped": self.left.weight_bytes},
            "kv_bytes_per_token": {"dense": self.dense.kv_bytes_per_token, "skipped": self.left.kv_bytes_per_token},
            "state_bytes": {"dense": self.dense.state_bytes, "skipped": self.left.state_bytes},
        }

    def _parts(self) -> Iterator[str]:
        if self.quality:
            lost = nats_lost(self.quality)
            yield f"{in_nats(self.quality, 3)} nats a token (perplexity × {perplexity_factor(lost):.3g}) on {self.text}"
            yield f"{self.quality['top1_agreement']:.0%} of the first choices are the same"
        else:
            yield "what that costs was not measured on other text: give --held-out"
        if self.speedup:
            yield f"{self.speedup.median:.2f} ± {self.speedup.error:.2f} times as fast"
        yield _less("weights", "", self.dense.weight_bytes, self.left.weight_bytes)
        yield _less("KV cache", " a token", self.dense.kv_bytes_per_token, self.left.kv_bytes_per_token)
        if self.dense.state_bytes:
            yield _less("states", "", self.dense.state_bytes, self.left.state_bytes or 0)


def faults_of(quality: Row) -> list[str]:
    """Why a model of this quality, as tables have it, is of no use; nothing where it is usable."""
    agreement = quality["top1_agreement"]
    faults = {
        "perplexity has more than doubled": nats_lost(quality) > MOST_NATS,
        "over half of its first choices have changed": agreement is None or agreement < LEAST_AGREEMENT,
    }
    return [fault for fault, found in faults.items() if found]


def nats_lost(quality: Row) -> float:
    """Nats a token that were lost; infinite where the model overflows, which is no number."""
    lost = quality["delta_nll"]
    return lost if is_number(lost) else math.inf


def in_nats(quality: Row, digits: int) -> str:
    """What was lost, with its standard error, which one window alone has not."""
    lost, error = nats_lost(quality), quality.get("delta_nll_se")
    return f"{lost:+.{digits}f}" + (f" ± {error:.{digits}f}" if is_number(error) else "")


def perplexity_factor(nats: float) -> float:
    """What so many nats a token more multiply perplexity by."""
    return math.exp(nats) if nats < 700 else math.inf


def left_out_of(model: PreTrainedModel, plan: Plan) -> tuple[str, Footprint, Footprint]:
    """What a plan leaves out of a model, in words, and what both weigh: the first fields of a `Verdict`."""
    from ..running.footprint import footprint
    from ..structure.locating import locate

    kinds: list[str] = [part.kind for part in locate(model).sublayers]
    parts = [
        f"{len(skipped)} of {kinds.count(kind)} {name}{'s' if kinds.count(kind) > 1 else ''}"
        for kind, name, skipped in (("attention", "attention", plan.attention), ("mlp", "MLP", plan.mlp))
        if skipped
    ]
    return " and ".join(parts) or NOTHING, footprint(model, Plan()), footprint(model, plan)


def mending(model: str, plan: object, repaired: bool) -> str:
    """The command that makes up for what the plan in a file, or the folder of a repair, leaves out."""
    name, out = ("heal", "healed") if repaired else ("repair", "repaired")
    return next_command(name, model, plan=plan, out=out)


def next_command(name: str, *words: object, **options: object) -> str:
    """A command line of notall; an option that is True has no value."""
    given = [[f"--{option}", *([] if value is True else [str(value)])] for option, value in options.items()]
    return shlex.join(["notall", name, *map(str, words), *(word for option in given for word in option)])


def _less(what: str, unit: str, dense: int, left: int) -> str:
    if left == dense:
        return f"the same {what}"
    return f"{what} {1 - left / dense:.0%} smaller ({in_bytes(left)}{unit})"
