"""Repairs that are kept in a folder, each in a file of tensors, for a comparison."""

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ...digests import digest_of
from ...entry_points import hash_of_source
from ...errors import UsageError
from ...models.loading import dtype_name
from ...plan import Plan
from ...progress import Progress, silent
from ...running.repaired import LinearMap, RepairedPlan
from ...structure.model_structure import base_model
from ...tensor_files import TensorsAndNotes, cached_tensors
from .registry import method

# What the names of tensors begin with, before the path of a parameter or the name of a
# sublayer.
WEIGHT, PROMPT, MATRIX, BIAS = "weight ", "prompt ", "matrix ", "bias "


def kept_repair(
    folder: Path,
    name: str,
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    progress: Progress = silent,
) -> tuple[RepairedPlan, float]:
    """`plan` repaired by the method `name`, and the CPU seconds that took; kept in
    `folder`, which is one model's.

    Raises `UsageError` where the folder has repairs by a function of this name that
    has changed since, and as the method does.
    """

    def make() -> TensorsAndNotes:
        start = time.process_time()
        found = method(name).repair(model, plan, batches, progress)
        return _tensors_of(found), {"seconds": str(time.process_time() - start)}

    method(name)  # imports it, so that its file is known
    key = [plan.indices, dtype_name(base_model(model)), digest_of(batches)[:16]]
    tensors, notes = cached_tensors(folder, _stem(folder, name), key, make)
    return _plan_of(plan, tensors), float(notes["seconds"])


def _stem(folder: Path, name: str) -> str:
    """What the names of files by a method begin with: its name, and of a function of
    others a part of the hash of its file.
    """
    spelt = name.replace(":", "-").replace("/", "-")
    digests = [digest[:8] for digest in hash_of_source(name).values()]
    stem = "-".join([spelt, *digests])
    others = [
        file for file in folder.glob(f"{spelt}-*") if not file.name.startswith(stem)
    ]
    if digests and others:
        raise UsageError(
            f"{folder} has repairs by {name} as it was before it changed: choose"
            " another --out"
        )
    return stem


def _tensors_of(plan: RepairedPlan) -> dict[str, Tensor]:
    """The weights and matrices of a repaired plan, by names that `_plan_of` reads."""
    tensors: dict[str, Tensor] = {}
    for path, weight in plan.weights.items():
        tensors[WEIGHT + path] = weight
    for path, weight in plan.prompt_weights.items():
        tensors[PROMPT + path] = weight
    for name, linear in plan.maps.items():
        tensors[MATRIX + name] = linear.matrix
        if linear.bias is not None:
            tensors[BIAS + name] = linear.bias
    return tensors


def _plan_of(plan: Plan, tensors: dict[str, Tensor]) -> RepairedPlan:
    def named(kind: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(kind): tensor
            for name, tensor in tensors.items()
            if name.startswith(kind)
        }

    biases = named(BIAS)
    maps = {
        name: LinearMap(matrix, biases.get(name))
        for name, matrix in named(MATRIX).items()
    }
    return RepairedPlan.of(
        plan, weights=named(WEIGHT), prompt_weights=named(PROMPT), maps=maps
    )
