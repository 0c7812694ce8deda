"""The texts of a repair: windows that it is fitted to, of a text or of the model's own,
and those it is measured on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..errors import UsageError
from ..measuring.quality import evaluate
from ..models.mix import text_of
from ..models.texts import Text
from ..models.windows import Drawn, draw
from ..plan import Plan
from ..progress import Progress, Stages, silent, tracked
from ..results import lines
from ..results.ledger import Ledger
from ..results.provenance import Provenance, behind
from ..results.repairs import MeasuredRecord, State
from ..running.generating import sample
from ..strict_json import Settings
from ..structure.locating import locate
from ..structure.model_structure import positions_of
from ..tensor_files import TensorsAndNotes, cached_tensors
from .fit_texts import LENGTH, SEQUENCES, FitTexts

MEASURED_WINDOWS = 16  # windows of each text that what came out is measured on
# windows of each text that a training stops by, and by which its best weights are
# chosen
STOPS = 8
GIVEN_TOKENS = 8  # tokens of each window that the model goes on from
GENERATED_AT_ONCE = 32  # windows that it writes


@dataclass(frozen=True)
class RepairTexts:
    """Windows to fit to, of each text, and batches to measure on, by name; `described`
    says what they are.

    `stops` are windows to stop a training by, (windows, tokens) of each text that is
    measured on.
    """

    fitted: list[Drawn]
    other: dict[str, list[Tensor]]
    described: Settings
    stops: list[Tensor]

    @classmethod
    def draw(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        wanted: FitTexts | None = None,
        *,
        training: bool = False,
        used: Sequence[Drawn] = (),
        progress: Progress = silent,
    ) -> "RepairTexts":
        """As many windows of each text as are `wanted`, and others to measure on.

        The others overlap none that is fitted to, none that a `training` stops by, and
        none of those `used` before, such as to choose the plan. Raises `UsageError` for
        a text that is missing or has too few windows, and for too long ones.
        """
        wanted = wanted or FitTexts()
        texts, held_out = wanted.texts, wanted.held_out
        length = _length_of(model, wanted)
        read = {
            source: text_of(model, tokenizer, source, progress)
            for source in (*texts, *held_out)
        }
        own = [read[source] for source in texts]
        judged = {read[source].sha256: read[source] for source in held_out or texts}
        for text in own:
            if text.sha256 in judged:  # a held-out file may be a copy of one
                judged[text.sha256] = text
        window = partial(draw, tokenizer, length=length, seed=wanted.seed)
        judging = partial(_judging, window, [*judged.values()], training, used)
        fewer = wanted.sequences is None
        most = wanted.most or SEQUENCES
        each = -(-(wanted.sequences or most) // len(texts))
        fitted = [window(text, sequences=each, fewer=fewer) for text in own]
        if fewer:
            each = _left_by(judging, fitted)
            fitted = [window(text, sequences=each) for text in own]
        other, stops = judging(fitted)
        held: dict[str, list[Tensor]] = {}
        for text, one in zip(judged.values(), other):
            is_own = text in own
            name = f"{text.name}, other windows" if is_own else text.name
            held[name] = one.on(model).batches(1 if is_own else 2)
        settings = {
            "texts": [{"text": text.name, "text_sha256": text.sha256} for text in own],
            "sequences": each * len(texts),
            "length": length,
            "seed": wanted.seed,
        }
        fitted = [one.on(model) for one in fitted]
        return cls(fitted, held, settings, [one.on(model).rows for one in stops])

    def together(self, size: int, most: int | None = None) -> list[Tensor]:
        """Up to `most` windows of all texts in turn, `size` at a time: each part of
        them holds some of each text.
        """
        rows = torch.stack([one.rows for one in self.fitted], dim=1)
        in_turn = rows.flatten(0, 1)  # (windows of all, tokens)
        return list(in_turn[:most].split(size))

    def stop(self, size: int) -> list[Tensor]:
        """Windows of each text that is measured on, others than those, to stop a
        training by.
        """
        return list(torch.cat(self.stops).split(size))


def _length_of(model: PreTrainedModel, wanted: FitTexts) -> int:
    """Tokens of a window. Raises `UsageError` for more than the model has positions."""
    positions = positions_of(model)
    if wanted.length is None:
        return int(min(LENGTH, positions))
    if wanted.length > positions:
        raise UsageError(
            f"windows of {wanted.length} tokens exceed the model's {positions}"
            " positions: lower --length"
        )
    return wanted.length


def _judging(
    window: Callable[..., Drawn],
    texts: Sequence[Text],
    training: bool,
    used: Sequence[Drawn],
    fitted: Sequence[Drawn],
    fewer: bool = False,
) -> tuple[list[Drawn], list[Drawn]]:
    """Windows of each text to measure on, and to stop a training by: both apart from
    those that are fitted to.
    """
    other = [
        window(text, sequences=MEASURED_WINDOWS, apart=[*fitted, *used], fewer=fewer)
        for text in texts
    ]
    if not training:
        return other, []
    return other, [
        window(text, sequences=STOPS, apart=[*fitted, *other], fewer=fewer)
        for text in texts
    ]


def _left_by(
    judging: Callable[..., tuple[list[Drawn], list[Drawn]]], fitted: Sequence[Drawn]
) -> int:
    """How many of the windows of each text may be fitted to, so that there are enough
    to judge by; at least one.
    """
    each = max(1, min(map(len, fitted)))
    while each > 1:
        other, stops = judging([one[:each] for one in fitted], fewer=True)
        missing = max(MEASURED_WINDOWS - len(one) for one in other) + max(
            (STOPS - len(one) for one in stops), default=0
        )
        if not missing:
            break
        each = max(1, each - missing)
    return each


def sampled(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    folder: Path,
    settings: Provenance,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Tensor]:
    """As many windows as `batches` have, (batch, tokens) each, that begin as those do
    and go on as the model would.

    They are kept in `folder`, a file for each text and settings. Raises `UsageError`
    where that is damaged.
    """
    windows = torch.cat(list(batches))
    given, length = min(GIVEN_TOKENS, windows.shape[1] // 2), windows.shape[1]

    def write() -> TensorsAndNotes:
        prompts = tracked(
            windows[:, :given].split(GENERATED_AT_ONCE),
            "sampling text to train on",
            progress,
        )
        parts = [
            sample(model, some, length - given, seed=seed + number)
            for number, some in enumerate(prompts)
        ]
        return {"ids": torch.cat(parts)}, {}

    kept, _ = cached_tensors(
        folder, "sampled", [settings.what, digest_of(batches)[:16], seed], write
    )
    return list(kept["ids"].to(windows.device).split([len(batch) for batch in batches]))


def measure_on_texts(
    model: PreTrainedModel,
    plans: Mapping[State, Plan],
    texts: Mapping[str, Sequence[Tensor]],
    folder: Path,
    settings: Provenance,
    progress: Progress = silent,
) -> list[MeasuredRecord]:
    """A record a text and plan. Each is kept in `folder`, and not measured again for
    the same weights and windows.

    `texts` are token ids, (batch, tokens), by the text's name. Where a plan skips in
    the prompt alone, half of each window is the prompt, and what follows is measured.
    Raises `UsageError` for a folder in use or damaged.
    """
    found: list[MeasuredRecord] = []
    by_prompt = any(plan.prefill for plan in plans.values())
    stages = Stages(progress, len(texts))
    with lines.lock(folder):
        kept = Ledger(folder, MeasuredRecord)
        for name_of_text, batches in texts.items():
            prompt = batches[0].shape[1] // 2 if by_prompt else None
            text = f"{name_of_text}{behind(prompt)}"
            about = {
                name: about_measured(model, settings, plan, batches)
                for name, plan in plans.items()
            }
            missing = {
                name: plan
                for name, plan in plans.items()
                if (text, name, about[name].key) not in kept
            }
            telling = stages.stage(1)
            if missing:
                read = tracked(batches, f"measuring on {text}", telling)
                qualities = zip(
                    missing.items(), evaluate(model, [*missing.values()], read, prompt)
                )
                kept.add(
                    *(
                        MeasuredRecord(
                            text=text,
                            model=name,
                            plan=plan,
                            quality=quality,
                            provenance=about[name],
                        )
                        for (name, plan), quality in qualities
                    )
                )
            found += [kept[text, name, about[name].key] for name in plans]
    return found


def about_measured(
    model: PreTrainedModel, settings: Provenance, plan: Plan, batches: Sequence[Tensor]
) -> Provenance:
    """The settings of a run, with the plan, the model and the windows of a measurement."""
    facts = {
        "plan": plan.indices,
        "fingerprint": locate(model).fingerprint,
        "weights": plan.digest,
    }
    return Provenance.of(settings, **facts, windows=digest_of(batches)[:16])
