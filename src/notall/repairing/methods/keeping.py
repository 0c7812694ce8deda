"""Repairs by these methods as files, so that one that was made once is there when it is asked for again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError, shortened
from ...models.loading import dtype_name
from ...progress import Progress, silent
from ...records.plan import Plan
from ...running.repaired import LinearMap, RepairedPlan
from ...structure.anatomy import base_model
from . import method

WEIGHT, MATRIX, BIAS = "weight ", "matrix ", "bias "


def kept_repair(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> tuple[RepairedPlan, float]:
    """`plan` repaired by the method `name`, and the CPU seconds that took; from `folder` where it is there.

    Its file is named by the method, and by a hash of the plan, the dtype and the text; the folder is one model's.
    Raises as the method does.
    """
    asked = hashlib.sha256(json.dumps([plan.indices, dtype_name(base_model(model))]).encode())
    for batch in batches:
        asked.update(json.dumps(batch.tolist()).encode())
    path = folder / f"{name.replace(':', '-').replace('/', '-')}-{asked.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        start = time.process_time()
        repaired = method(name).repair(model, plan, batches, progress)
        seconds = time.process_time() - start
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file(_tensors(repaired), part, {"seconds": str(seconds)})
        part.rename(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
            seconds = float(file.metadata()["seconds"])
    except SafetensorError as error:
        raise UsageError(f"{shortened(path)} is damaged ({shortened(error)}); delete it, and run again") from None
    return _repaired(plan, tensors), seconds


def _tensors(repaired: RepairedPlan) -> dict[str, Tensor]:
    named = {WEIGHT + path: weight for path, weight in repaired.weights.items()}
    for name, one in repaired.maps.items():
        named[MATRIX + name] = one.matrix
        if one.bias is not None:
            named[BIAS + name] = one.bias
    return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


def _repaired(plan: Plan, tensors: dict[str, Tensor]) -> RepairedPlan:
    def named(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}

    biases = named(BIAS)
    maps = {name: LinearMap(matrix, biases.get(name)) for name, matrix in named(MATRIX).items()}
    return RepairedPlan.of(plan, weights=named(WEIGHT), maps=maps)
