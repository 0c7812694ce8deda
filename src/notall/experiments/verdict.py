"""What a plan costs and saves, in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..errors import shortened
from ..models.gguf_sizes import StoredSizes, gguf_stored_sizes
from ..plan import Plan, several
from ..results.facts import RECOVERY, Footprint, PlanScore, Quality
from ..results.lines import finite
from ..results.record import Quartiles, is_number
from ..results.table import in_bytes
from ..strict_json import Settings
from .recovery import kept_in_words, last_state, short_of, verdict_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.model_structure import ModelStructure


def in_nats(quality: Quality) -> str:
    """Such as `+0.20 ± 0.02 nats a token`, with three digits where the error needs
    them; one window has no error.
    """
    digits, error = digits_of(quality), quality.delta_nll_se
    loss = f"{quality.nats_lost:+.{digits}f}"
    if is_number(error):
        loss += f" ± {error:.{digits}f}"
    return f"{loss} nats a token"


def digits_of(quality: Quality) -> int:
    """How many digits after the point a loss has: as many as its error needs."""
    return 3 if is_number(quality.delta_nll_se) and quality.delta_nll_se < 0.005 else 2


MOST_NATS = math.log(2)  # above, perplexity has more than doubled
LEAST_AGREEMENT = 0.5  # below, most of what the model would say first has changed
# of a name in a sentence; the tables' CSV and the provenance have all of them
NAME_LETTERS = 120


def faults_of(quality: Quality) -> list[str]:
    """Why a model of this quality is of no use; nothing where it is usable."""
    faults = {
        "perplexity has more than doubled": quality.nats_lost > MOST_NATS,
        "top-1 agreement is below one half": (
            not quality.top1_agreement >= LEAST_AGREEMENT
        ),  # nan too
    }
    return [fault for fault, found in faults.items() if found]


def perplexity_factor(nats: float) -> float:
    """What so many nats per token multiply perplexity by; inf where it overflows."""
    return math.inf if nats >= 700 else math.exp(nats)


def is_usable(quality: Quality) -> bool:
    """Whether perplexity at most doubles, and top-1 agreement is at least one half."""
    return not faults_of(quality)


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = parts or ("",)
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class Verdict:
    """A plan with what is known of it, for the first sentence of a page and the last of a
    command.
    """

    plan: Plan
    quality: Quality | None = None  # on `text`
    text: str = ""
    also: Mapping[str, Quality] = field(
        default_factory=dict
    )  # on other texts, by their names
    speedup: Quartiles | None = None  # of what `verb` says
    verb: str = "decodes"
    footprint: Footprint | None = None  # with the plan
    dense: Footprint | None = None
    stored: StoredSizes | None = None  # of the model's GGUF file
    model: str = ""
    named: str = ""  # how the plan came to be
    state: str = ""  # repaired or healed, where it is
    among: Mapping[str, int] | None = None  # how many sublayers of a kind there are
    layers: int = 0
    missed: str | None = None  # what was reached of a budget that was not
    late: bool = False  # the time was up before the search was done
    scores: Sequence[PlanScore] = ()  # on tasks
    least: float = RECOVERY  # the share of the original model's score to keep
    next: str = ""  # the command to type

    @classmethod
    def on(
        cls,
        model: "PreTrainedModel",
        plan: Plan,
        quality: Quality | None = None,
        text: str = "",
        state: str = "",
        spec: str = "",
    ) -> "Verdict":
        """Of a `model` in memory; with the `spec` that it was loaded by, its file's
        sizes are named too.
        """
        from ..running.skipping import footprint
        from ..structure.locating import locate

        structure = locate(model)
        kinds: list[str] = [part.kind for part in structure.sublayers]
        among = {kind: kinds.count(kind) for kind in ("attention", "mlp")}
        among["block"] = len(structure.blocks)
        left, dense = footprint(model, plan), footprint(model, Plan())
        stored = gguf_stored_sizes(spec, plan) if spec else None
        state = state or plan.state
        return cls(
            plan,
            quality,
            text,
            footprint=left,
            dense=dense,
            stored=stored,
            among=among,
            state=state,
        )

    @property
    def usable(self) -> bool | None:
        """Whether no task is lost, perplexity has at most doubled, and half of the
        top-1 predictions are the same.
        """
        return not self.faults if self.quality or self.scores else None

    @property
    def faults(self) -> list[str]:
        """Why the model is of no use: of its losses, and of its scores on tasks."""
        faults = [
            fault for quality in self.qualities.values() for fault in faults_of(quality)
        ]
        lost = [
            score.task
            for score in last_state(self.scores)
            if verdict_on(score, self.least) == "lost"
        ]
        if lost:
            tasks = listed([*dict.fromkeys(lost)])
            faults.append(
                f"less than {self.least:.2g} of the original model's score is kept on"
                f" {tasks}"
            )
        return [*dict.fromkeys(faults)]

    @property
    def qualities(self) -> dict[str, Quality]:
        """That on each text, by its name."""
        return ({self.text: self.quality} if self.quality else {}) | {**self.also}

    def judged(
        self, scores: Sequence[PlanScore], asked: float | None = None
    ) -> "Verdict":
        """With what tasks say of it; where less is kept than is `asked` for, or that is
        not seen, it is missed.
        """
        short = short_of(scores, asked) if asked else None
        missed = "; ".join(filter(None, (self.missed, short))) or None
        return replace(self, scores=scores, least=asked or RECOVERY, missed=missed)

    @property
    def lost(self) -> float:
        """Nats a token; nan where that was not measured."""
        return self.quality.nats_lost if self.quality else math.nan

    @property
    def perplexity_factor(self) -> float:
        """What the nats that are lost multiply perplexity by."""
        return perplexity_factor(self.lost)

    @property
    def sentence(self) -> str:
        """What the plan costs and saves, and each warning, in one line."""
        return " ".join(self._sentences())

    def then(self, mend: str, otherwise: str) -> "Verdict":
        """With the command that makes up for a plan that is of no use, or else with
        what one would do with it.
        """
        return replace(self, next=mend if self.usable is False else otherwise)

    def lines(self) -> Iterator[str]:
        """The sentences, and the command to type next, a line each."""
        yield from self._sentences()
        if self.next:
            yield f"Next:    {self.next}"

    def in_numbers(self) -> Settings:
        """The same for programs; of bytes those of the original model, and those that
        are left.
        """
        dense, left = vars(self.dense), vars(self.footprint)
        numbers: Settings = {
            "said": self.sentence,
            "usable": self.usable,
            "missed": self.missed,
            "next": self.next,
            "text": self.text if self.quality else None,
            "delta_nll": self.lost,
            "perplexity_factor": self.perplexity_factor,
            "top1_agreement": self.quality.top1_agreement if self.quality else None,
            "speedup": self.speedup.median if self.speedup else None,
        }
        for kind in ("weight_bytes", "kv_bytes_per_token", "state_bytes"):
            numbers[kind] = {"dense": dense[kind], "skipped": left[kind]}
        if stored := self.stored:
            numbers["file_bytes"] = {"dense": stored.whole, "skipped": stored.left}
        return finite(numbers)

    def _sentences(self) -> Iterator[str]:
        if self.plan:
            yield f"{self._heading()}: {'; '.join(self._parts())}."
        else:
            yield "Nothing is left out: this is the original model."
        if faults := self.faults:
            yield f"Warning: the model is no longer usable: {' and '.join(faults)}."
        if recovery := kept_in_words(self.scores, self.least):
            yield recovery
        if self.missed:
            yield f"Missed {self.missed}."
        if self.late:
            yield (
                "The time was up before the search was done: with more --max-minutes it"
                " may find better."
            )

    def _heading(self) -> str:
        """What is skipped, of which model, and how the plan came to be."""
        heading = f"Without {self.plan.in_words(self.among)}"
        if self.layers:
            layers = several(self.layers, "layer")
            in_prompt = self.plan.prefill
            heading += f" (it has {layers})" if in_prompt else f" of its {layers}"
        if self.named:
            heading += f" ({shortened(self.named, NAME_LETTERS)})"
        if self.model:
            state = f"the {self.state} " if self.state in ("repaired", "healed") else ""
            heading += f", {state}{shortened(self.model, NAME_LETTERS)}"
        return heading

    def _parts(self) -> Iterator[str]:
        for text, quality in self.qualities.items():
            on = f" on {text}" if text else ""
            factor = perplexity_factor(quality.nats_lost)
            yield f"{in_nats(quality)} (perplexity × {factor:.3g}){on}"
            if is_number(quality.top1_agreement):
                yield f"top-1 agreement {quality.top1_agreement:.0%}"
        if not self.quality:
            yield "what that costs was not measured"
        if self.speedup:
            spread = "of one round, which has no spread"
            if self.speedup.n != 1:
                low, high = self.speedup.low, self.speedup.high
                spread = f"quartiles {low:.2f} to {high:.2f}"
            yield f"{self.verb} {self.speedup.median:.2f}× as fast ({spread})"
        if self.footprint and self.dense:
            yield from self._sizes(self.dense, self.footprint)

    def _sizes(self, dense: Footprint, left: Footprint) -> Iterator[str]:
        """How much smaller weights, KV cache and states are."""
        packed = ""
        if self.stored:
            packed = f" unpacked, {in_bytes(self.stored.left)} in the file's types"
        for what, unit, whole, rest in (
            ("weights", packed, dense.weight_bytes, left.weight_bytes),
            (
                "KV cache",
                " a token",
                dense.kv_bytes_per_token,
                left.kv_bytes_per_token,
            ),
            ("states", "", dense.state_bytes, left.state_bytes or 0),
        ):
            if whole and rest < whole:
                size = f"{in_bytes(rest)}{unit}"
                yield f"{what} {1 - rest / whole:.0%} smaller ({size})"
            elif whole:
                yield f"the same {what}"


def prompt_in_words(structure: "ModelStructure", plan: Plan) -> str:
    """What a plan saves in the prompt alone, which its weights and cache do not show;
    "" of one that does not.
    """
    if not plan.prefill:
        return ""
    share = share_skipped(structure, plan)
    count = plan.prefill.last_tokens
    last = "token" if count == 1 else several(count, "token")
    return (
        f"A prompt skips {share:.0%} of the layers' parameters, but for keys"
        f" and values, up to its last {last}. Weights, KV cache and decoding stay as"
        " they are."
    )


def share_skipped(structure: "ModelStructure", plan: Plan) -> float:
    """The share of the layers' parameters that a plan skips; of one that skips in the
    prompt alone, there.
    """
    skips = plan.prefill or plan
    whole = sum(part.parameters for part in structure.sublayers)
    skipped = sum(
        part.parameters
        for part in structure.sublayers
        if part.index in getattr(skips, part.kind)
    )
    return skipped / whole
