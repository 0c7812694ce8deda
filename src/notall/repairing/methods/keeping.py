"""Repairs by these methods as files, so that one that was made once is there when it is asked for again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UsageError, shortened
from ...models.loading import dtype_name
from ...progress import Progress, silent
from ...records.ledger import Ledger, working_in
from ...records.plan import Plan
from ...records.provenance import Provenance
from ...records.repair import RefitRecord
from ...running.repaired import LinearMap, RepairedPlan, holder_of, refuse_maps
from ...running.repaired_folders import PLAN, WHOLE, keep_whole, load_repaired
from ...structure.anatomy import base_model
from ...structure.locating import locate
from ..refitting import digest_of
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


def repair_into(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    settings: Provenance | Mapping[str, Any],
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan` repaired by the method `name`, as a folder that is given as a plan; at once where it is there.

    Raises `UsageError` for a method that keeps matrices at run time, weights that are none of the model's, and a folder
    that holds other work or is in use, and as the method does.
    """
    anatomy = locate(base_model(model))
    plan.check(anatomy)
    about = Provenance.of(
        settings,
        plan=plan.indices,
        fingerprint=anatomy.fingerprint,
        dtype=dtype_name(base_model(model)),
        calibration=digest_of(batches),
        method=name,
    )
    with working_in(folder, "repair"):
        ledger = Ledger(folder, RefitRecord, about)
        if not (folder / PLAN).is_file():
            repaired = method(name).repair(model, plan, batches, progress)
            refuse_maps(repaired)
            repaired.check(anatomy)
            for path, weight in repaired.weights.items():
                holder_of(model, path, weight)
            ledger.add()  # its first line alone: where the weights come from
            keep_whole(folder, repaired, WHOLE)
        return load_repaired(folder)


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
