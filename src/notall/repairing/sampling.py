"""Text to train on that the dense model writes itself: what it knows, also where no text like its own is at hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, shortened
from ..progress import Progress, silent
from ..records.provenance import Provenance
from ..running.generating import sample
from .refitting import digest_of

GIVEN = 8  # tokens of each window that it goes on from
AT_ONCE = 32  # windows


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

    They are kept in `folder`, in a file of their own for each text and settings, and are not drawn again. Raises
    `UsageError` where that is damaged, and for windows longer than the model has positions.
    """
    asked = json.dumps([settings.what, digest_of(batches), seed], sort_keys=True, default=str)
    path = folder / f"sampled-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.safetensors"
    if not path.is_file():
        windows = torch.cat(list(batches))
        given, length = min(GIVEN, windows.shape[1] // 2), windows.shape[1]
        parts: list[Tensor] = []
        for number, prompts in enumerate(windows[:, :given].split(AT_ONCE)):
            progress(number * AT_ONCE, len(windows), "sampling text to train on")
            parts.append(sample(model, prompts, length - given, seed=seed + number))
        progress(len(windows), len(windows), "sampled text to train on")
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"ids": torch.cat(parts).cpu()}, part)
        part.rename(path)
    try:
        ids = load_file(path)["ids"].to(batches[0].device)
    except (SafetensorError, KeyError):
        raise UsageError(f"{shortened(path)} is damaged: delete it, and run again") from None
    return list(ids.split([len(batch) for batch in batches]))
