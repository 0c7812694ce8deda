"""The texts of a repair: windows that it is fitted to, of a text or of the model's own, and those it is measured on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..digests import digest_of
from ..errors import UsageError
from ..files import Settings
from ..measuring.quality import evaluate
from ..models.mix import text_of
from ..models.names import USE
from ..models.texts import token_batches, windows_in
from ..plan import Plan
from ..progress import Progress, Stages, silent, tracked
from ..results import lines
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.repairs import MeasuredRecord, State
from ..running.generating import sample
from ..running.repaired import Kept, kept_tensors
from ..structure.locating import locate
from ..structure.model_structure import inputs_device, positions_of

SEQUENCES, LENGTH = 128, 512  # windows that a repair is fitted to, and their tokens
MEASURED = 16  # windows of each text that what came out is measured on
GIVEN = 8  # tokens of each window that the model goes on from
AT_ONCE = 32  # windows that it writes


@dataclass(frozen=True)
class RepairTexts:
    """Windows to fit to, (1, tokens) each and a list a text, and batches to measure on, by name; `described`: what."""

    own: list[list[Tensor]]
    other: dict[str, list[Tensor]]
    described: Settings

    @classmethod
    def draw(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str] = (USE,),
        held_out: Sequence[str] = (),
        *,
        sequences: int | None = None,
        most: int | None = None,
        length: int | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> "RepairTexts":
        """As many of each text, `sequences` together, else what there is, up to `most`, and others to measure on.

        Those are of the `held_out` texts, or, without any, of the same. Windows have `length` tokens, else as many as
        the model reads, up to 512. Raises `UsageError` for a text that is missing or too short, and for too long ones.
        """
        positions = positions_of(model)
        length = int(min(LENGTH, positions)) if length is None else length
        if length > positions:
            raise UsageError(f"windows of {length} tokens exceed the model's {positions} positions: lower --length")
        read = {source: text_of(model, tokenizer, source, progress) for source in (*texts, *held_out)}
        each = -(-(sequences or most or SEQUENCES) // len(texts))
        if sequences is None:
            fewest = min(windows_in(tokenizer, read[source], length) for source in texts)
            each = max(1, min(each, fewest - (0 if held_out else MEASURED)))
        own, other, told = list[list[Tensor]](), dict[str, list[Tensor]](), list[dict[str, str]]()
        for source, count in [(source, each) for source in texts] + [(source, 0) for source in held_out]:
            text, beside = read[source], 0 if count and held_out else MEASURED
            windows, size = count + beside, 1 if count else 2
            drawn = token_batches(tokenizer, text, sequences=windows, length=length, batch_size=size, seed=seed)
            rows = [row.to(inputs_device(model)) for row in drawn]
            if count:
                own.append(rows[:count])
                told.append({"text": text.name, "text_sha256": text.sha256})
            if beside:
                other[f"{text.name}, other windows" if count else text.name] = rows[count:]
        return cls(own, other, {"texts": told, "sequences": each * len(texts), "length": length, "seed": seed})

    def together(self, size: int, most: int | None = None) -> list[Tensor]:
        """Up to `most` windows of all texts in turn, `size` at a time: each part of them holds some of each text."""
        return list(torch.cat([row for windows in zip(*self.own) for row in windows])[:most].split(size))

    def stop(self, size: int) -> list[Tensor]:
        """A few windows of each text to measure on, to stop a training by."""
        return list(torch.cat([row for rows in self.other.values() for row in rows[: MEASURED // 2]]).split(size))


def sampled(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    folder: Path,
    settings: Provenance,
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Tensor]:
    """As many windows as `batches` have, (batch, tokens) each, that begin as those do and go on as the model would.

    They are kept in `folder`, a file for each text and settings. Raises `UsageError` where that is damaged.
    """
    windows = torch.cat(list(batches))
    given, length = min(GIVEN, windows.shape[1] // 2), windows.shape[1]

    def write() -> Kept:
        prompts = tracked(windows[:, :given].split(AT_ONCE), "sampling text to train on", progress)
        parts = [sample(model, some, length - given, seed=seed + number) for number, some in enumerate(prompts)]
        return {"ids": torch.cat(parts)}, {}

    kept, _ = kept_tensors(folder, "sampled", [settings.what, digest_of(batches)[:16], seed], write)
    return list(kept["ids"].to(windows.device).split([len(batch) for batch in batches]))


def measure(
    model: PreTrainedModel,
    plans: Mapping[State, Plan],
    texts: Mapping[str, Sequence[Tensor]],
    folder: Path,
    settings: Provenance,
    progress: Progress = silent,
) -> list[MeasuredRecord]:
    """A record a text and plan. Each is kept in `folder`, and not measured again for the same weights and windows.

    `texts` are token ids, (batch, tokens), by the text's name. Raises `UsageError` for a folder in use or damaged.
    """
    found: list[MeasuredRecord] = []
    stages = Stages(progress, len(texts))
    with lines.lock(folder):
        kept = Ledger(folder, MeasuredRecord)
        for text, batches in texts.items():
            about = {name: about_measured(model, settings, plan, batches) for name, plan in plans.items()}
            lacking = {name: plan for name, plan in plans.items() if (text, name, about[name].key) not in kept}
            telling = stages.stage(1)
            if lacking:
                read = tracked(batches, f"measuring on {text}", telling)
                qualities = zip(lacking.items(), evaluate(model, [*lacking.values()], read))
                kept.add(
                    *(
                        MeasuredRecord(text=text, model=name, plan=plan, quality=quality, provenance=about[name])
                        for (name, plan), quality in qualities
                    )
                )
            found += [kept[text, name, about[name].key] for name in plans]
    return found


def about_measured(model: PreTrainedModel, settings: Provenance, plan: Plan, batches: Sequence[Tensor]) -> Provenance:
    told = {"plan": plan.indices, "fingerprint": locate(model).fingerprint, "weights": plan.digest}
    return Provenance.of(settings, **told, windows=digest_of(batches)[:16])
