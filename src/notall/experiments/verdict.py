"""What a plan comes to, in words, and what comes next."""

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import shortened
from ..models.gguf_sizes import StoredSizes, stored_sizes
from ..models.names import DEFAULT_TEXT, USE
from ..plan import Plan, several
from ..results.facts import RECOVERY, Footprint, PlanScore, Quality
from ..results.lines import finite
from ..results.provenance import Provenance
from ..results.record import Quartiles, is_number
from ..results.table import in_bytes
from ..strict_json import Settings
from .folder import Folder, Message, Step, in_nats
from .recovery import kept_in_words, last_state, short_of, verdict_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..structure.model_structure import ModelStructure

MOST_NATS = math.log(2)  # above, perplexity has more than doubled
LEAST_AGREEMENT = 0.5  # below, most of what the model would say first has changed
LITTLE = 0.1  # nats to ask for where nothing was usable
REFITTING = "refit the keys and values of the prompt"
NAME_LETTERS = (
    120  # of a name in a sentence; the tables' CSV and the provenance have all of them
)


def faults_of(quality: Quality) -> list[str]:
    """Why a model of this quality is of no use; nothing where it is usable."""
    faults = {
        "perplexity has more than doubled": quality.nats_lost > MOST_NATS,
        "over half of its first choices have changed": (
            not quality.top1_agreement >= LEAST_AGREEMENT
        ),  # nan too
    }
    return [fault for fault, found in faults.items() if found]


def perplexity_factor(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)


def is_usable(quality: Quality) -> bool:
    return not faults_of(quality)


def joined(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = parts or ("",)
    return f"{', '.join(most)} and {last}" if most else last


@dataclass(frozen=True)
class Verdict:
    """A plan with what is known of it, which the first sentence of a page and the last
    of a command say.
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
        sizes are told too.
        """
        from ..running.skipping import footprint
        from ..structure.locating import locate

        structure = locate(model)
        kinds: list[str] = [part.kind for part in structure.sublayers]
        among = {kind: kinds.count(kind) for kind in ("attention", "mlp")}
        among["block"] = len(structure.blocks)
        left, dense = footprint(model, plan), footprint(model, Plan())
        stored = stored_sizes(spec, plan) if spec else None
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

    @classmethod
    def of(cls, step: Step, folder: Folder, named: str = "") -> "Verdict":
        verb, speedup = step.faster if step.times else ("decodes", None)
        return cls(
            step.plan,
            step.quality,
            speedup=speedup,
            verb=verb,
            footprint=step.footprint,
            dense=step.dense,
            model=folder.model,
            named=named,
            layers=folder.layers,
        )

    @property
    def usable(self) -> bool | None:
        """Whether no task is lost, perplexity has at most doubled, and half of the
        first choices are the same.
        """
        return not self.faults if self.quality or self.scores else None

    @property
    def faults(self) -> list[str]:
        lost = [
            *dict.fromkeys(
                one.task
                for one in last_state(self.scores)
                if verdict_on(one, self.least) == "lost"
            )
        ]
        told = (
            [
                f"less than {self.least:.2g} of the original model's score is kept on"
                f" {joined(lost)}"
            ]
            if lost
            else []
        )
        return [
            *dict.fromkeys(
                fault
                for quality in self.qualities.values()
                for fault in faults_of(quality)
            ),
            *told,
        ]

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
        missed = (
            "; ".join(
                filter(None, (self.missed, short_of(scores, asked) if asked else None))
            )
            or None
        )
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
    def said(self) -> str:
        return " ".join(self._said())

    def then(self, mend: str, otherwise: str) -> "Verdict":
        """With the command that makes up for a plan that is of no use, or else with
        what one would do with it.
        """
        return replace(self, next=mend if self.usable is False else otherwise)

    def message(self, end: str, command: str) -> Message:
        return Message(self.said, self.usable, end, command)

    def lines(self) -> Iterator[str]:
        yield from self._said()
        if self.next:
            yield f"Next:    {self.next}"

    def in_numbers(self) -> Settings:
        """What it says, for programs; of bytes those of the original model, and those
        that are left.
        """
        dense, left = vars(self.dense), vars(self.footprint)
        told = {
            **{
                name: getattr(self, name)
                for name in ("said", "usable", "missed", "next")
            },
            "text": self.text if self.quality else None,
            "delta_nll": self.lost,
            "perplexity_factor": self.perplexity_factor,
            "top1_agreement": self.quality.top1_agreement if self.quality else None,
            "speedup": self.speedup.median if self.speedup else None,
        }
        kinds = "weight_bytes", "kv_bytes_per_token", "state_bytes"
        sizes = {kind: {"dense": dense[kind], "skipped": left[kind]} for kind in kinds}
        if stored := self.stored:
            sizes["file_bytes"] = {"dense": stored.whole, "skipped": stored.left}
        return finite(told | sizes)

    def _said(self) -> Iterator[str]:
        if not self.plan:
            yield "Nothing is left out: this is the original model."
        else:
            among = f" of its {several(self.layers, 'layer')}" if self.layers else ""
            if self.layers and self.plan.prefill:
                among = f" (it has {several(self.layers, 'layer')})"
            among += f" ({shortened(self.named, NAME_LETTERS)})" if self.named else ""
            state = f"the {self.state} " if self.state in ("repaired", "healed") else ""
            model = (
                f", {state}{shortened(self.model, NAME_LETTERS)}" if self.model else ""
            )
            yield (
                f"Without {self.plan.in_words(self.among)}{among}{model}:"
                f" {'; '.join(self._parts())}."
            )
        if faults := self.faults:
            yield f"Warning: the model is no longer usable: {' and '.join(faults)}."
        if told := kept_in_words(self.scores, self.least):
            yield told
        if self.missed:
            yield f"Missed {self.missed}."
        if self.late:
            yield (
                "The time was up before the search was done: with more --max-minutes it"
                " may find better."
            )

    def _parts(self) -> Iterator[str]:
        for text, quality in self.qualities.items():
            on = f" on {text}" if text else ""
            yield (
                f"{in_nats(quality)} (perplexity ×"
                f" {perplexity_factor(quality.nats_lost):.3g}){on}"
            )
            if is_number(quality.top1_agreement):
                yield f"{quality.top1_agreement:.0%} of the first choices are the same"
        if not self.quality:
            yield "what that costs was not measured"
        if self.speedup:
            spread = f"quartiles {self.speedup.low:.2f} to {self.speedup.high:.2f}"
            spread = (
                "of one round, which has no spread" if self.speedup.n == 1 else spread
            )
            yield f"{self.verb} {self.speedup.median:.2f}× as fast ({spread})"
        if self.footprint and self.dense:
            packed = (
                f" unpacked, {in_bytes(self.stored.left)} in the file's types"
                if self.stored
                else ""
            )
            for what, unit, dense, left in (
                (
                    "weights",
                    packed,
                    self.dense.weight_bytes,
                    self.footprint.weight_bytes,
                ),
                (
                    "KV cache",
                    " a token",
                    self.dense.kv_bytes_per_token,
                    self.footprint.kv_bytes_per_token,
                ),
                ("states", "", self.dense.state_bytes, self.footprint.state_bytes or 0),
            ):
                if dense:
                    smaller = (
                        f"{what} {1 - left / dense:.0%} smaller"
                        f" ({in_bytes(left)}{unit})"
                    )
                    yield smaller if left < dense else f"the same {what}"


def next_command(name: str, *words: object, **options: object) -> str:
    """A command line of notall; an option that is True has no value, and one that is
    None is left out.
    """
    line = ["notall", name, *map(str, words)]
    for option, value in options.items():
        if value is not None:
            line += [
                f"--{option.replace('_', '-')}",
                *([] if value is True else [str(value)]),
            ]
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
        "search", model, max_nll=LITTLE, phase=phase, out="plan.json"
    )
    return "ask for what costs little", command


def prompt_in_words(structure: "ModelStructure", plan: Plan) -> str:
    """What a plan saves in the prompt alone, which its weights and cache do not tell;
    "" of one that does not.
    """
    if not plan.prefill:
        return ""
    whole = sum(part.parameters for part in structure.sublayers)
    skipped = sum(
        part.parameters
        for part in structure.sublayers
        if part.index in getattr(plan.prefill, part.kind)
    )
    count = plan.prefill.last_tokens
    last = "token" if count == 1 else several(count, "token")
    told = (
        f"skips {skipped / whole:.0%} of the layers' parameters, but for keys and"
        " values"
    )
    return (
        f"A prompt {told}, up to its last {last}. Weights, KV cache and decoding stay"
        " as they are."
    )


def what_next(
    verdict: Verdict, model: str, made: Path, repair_text: str | None = None
) -> tuple[str, str]:
    """What to do with the plan that is in `made`, and the command; `repair_text` is
    what a repair would fit it to.
    """
    if verdict.usable is None:
        return "see what that costs", next_command("eval", model, plan=made)
    if (
        verdict.usable and verdict.plan.prefill
    ):  # no released engine runs it but transformers
        if verdict.state == "skipped" and verdict.plan.prefill.attention:
            return REFITTING, mending(model, made, repaired=False)
        if verdict.speedup and not model.endswith(".gguf"):
            written = made.with_name(f"{made.stem}-pruned")
            return "write that model", next_command(
                "export", model, plan=made, to="hf", out=written
            )
        return "see what that saves", next_command("bench", model, plan=made)
    if verdict.usable:
        form = (
            "gguf" if model.endswith(".gguf") else "hf"
        )  # a file in few bits is no checkpoint of transformers
        pruned = {"to": form, "out": made.with_name(f"{made.stem}-pruned")}
        if verdict.state != "skipped":
            return "write that model", next_command(
                "export", model, plan=made, **pruned
            )
        mend = {"repair": "refit", "repair_text": repair_text}
        return "repair it, and write that model", next_command(
            "export", model, plan=made, **mend, **pruned
        )
    if verdict.state == "healed":
        return asking_for_less(model, verdict.plan)
    return "make up for what is lost", mending(model, made, verdict.state == "repaired")


def on_the_text(about: Provenance, *sizes: str) -> dict[str, object]:
    """The options that name the text of a run, where it is not what commands read by
    default; with it its `sizes`.
    """
    what = about.what
    if what.get("text", USE) in (DEFAULT_TEXT, USE):
        return {}
    return {name: what[name] for name in ("text", *sizes) if name in what}
