"""Repairs by these methods as files, so that one that was made once is there when it is asked for again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...models.loading import dtype_name
from ...plan import Plan
from ...progress import Progress, silent
from ...results.ledger import Ledger, working_in
from ...results.provenance import Provenance
from ...results.repairs import RefitRecord
from ...running.repaired import (
    WHOLE,
    LinearMap,
    RepairedPlan,
    holder_of,
    keep_whole,
    refuse_maps,
    refuse_other_work,
)
from ...running.tensor_files import Kept, Tensors, kept_tensors
from ...structure.locating import locate
from ...structure.model_structure import base_model
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

    def make() -> Kept:
        start = time.process_time()
        repaired = method(name).repair(model, plan, batches, progress)
        return _tensors(repaired), {"seconds": str(time.process_time() - start)}

    key = [plan.indices, dtype_name(base_model(model)), digest_of(batches)]
    tensors, notes = kept_tensors(folder, name.replace(":", "-").replace("/", "-"), key, make)
    return _repaired(plan, tensors), float(notes["seconds"])


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
    structure = locate(base_model(model))
    plan.check(structure)
    about = Provenance.of(
        settings,
        plan=plan.indices,
        fingerprint=structure.fingerprint,
        dtype=dtype_name(base_model(model)),
        calibration=digest_of(batches),
        method=name,
    )
    with working_in(folder, "repair"):
        ledger = Ledger(folder, RefitRecord, about)
        if not refuse_other_work(folder, RefitRecord, plan):
            repaired = method(name).repair(model, plan, batches, progress)
            refuse_maps(repaired)
            repaired.check(structure)
            for path, weight in repaired.weights.items():
                holder_of(model, path, weight)
            ledger.add()  # its first line alone: where the weights come from
            keep_whole(folder, repaired, WHOLE)
        return RepairedPlan.load(folder)


def _tensors(repaired: RepairedPlan) -> Tensors:
    maps = {MATRIX + name: one.matrix for name, one in repaired.maps.items()}
    biases = {BIAS + name: one.bias for name, one in repaired.maps.items() if one.bias is not None}
    return maps | biases | {WEIGHT + path: weight for path, weight in repaired.weights.items()}


def _repaired(plan: Plan, tensors: dict[str, Tensor]) -> RepairedPlan:
    def named(kind: str) -> dict[str, Tensor]:
        return {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}

    biases = named(BIAS)
    maps = {name: LinearMap(matrix, biases.get(name)) for name, matrix in named(MATRIX).items()}
    return RepairedPlan.of(plan, weights=named(WEIGHT), maps=maps)
