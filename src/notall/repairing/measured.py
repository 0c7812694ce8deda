"""What a repair gives back: a plan before it and after it, on text that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..measuring.quality import evaluate
from ..progress import Progress, silent
from ..records import lines
from ..records.ledger import Ledger
from ..records.measured import MeasuredRecord, State
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.repaired import RepairedPlan
from ..structure.locating import locate
from .refitting import digest_of


def measure(
    model: PreTrainedModel,
    plans: Mapping[State, Plan],
    texts: Mapping[str, Sequence[Tensor]],
    folder: Path,
    settings: Provenance,
    progress: Progress = silent,
) -> list[MeasuredRecord]:
    """A record a text and plan. Each is kept in `folder`, and not measured again for the same weights and windows.

    `texts` are token ids, (batch, tokens) each, by the name of the text. Raises `UsageError` when the folder is in use
    or holds a malformed line.
    """
    found: list[MeasuredRecord] = []
    with lines.lock(folder):
        kept = Ledger(folder, MeasuredRecord)
        for text, batches in texts.items():
            about = {name: about_measured(model, settings, plan, batches) for name, plan in plans.items()}
            keys = {name: (text, name, about[name].key) for name in plans}
            lacking = [name for name in plans if keys[name] not in kept]
            if lacking:
                progress(0, 1, f"measuring on {text}")
                qualities = evaluate(model, [plans[name] for name in lacking], batches)
                kept.add(
                    *(
                        MeasuredRecord(
                            text=text, model=name, plan=plans[name], provenance=about[name], **asdict(quality)
                        )
                        for name, quality in zip(lacking, qualities)
                    )
                )
            found += [kept[key] for key in keys.values()]
    return found


def about_measured(model: PreTrainedModel, settings: Provenance, plan: Plan, batches: Sequence[Tensor]) -> Provenance:
    """What decides the figures."""
    return Provenance.of(
        settings,
        plan=plan.indices,
        fingerprint=locate(model).fingerprint,
        weights=plan.digest if isinstance(plan, RepairedPlan) else "none",
        windows=digest_of(batches),
    )
