"""Heal a skipped model by a short distillation: its next-token distributions are drawn to the dense model's.

What is trained are weights of kept sublayers alone (see `students`), so that the result is a plan with weights, as a
repair is; `distilling` has the loop.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError, expect
from ..models.loading import dtype_name
from ..models.quantisation import quantisation_name, quantisation_of
from ..progress import Progress, silent
from ..records.healing import HealRecord
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.head import Head
from ..running.repaired import RepairedPlan
from ..running.repaired_folders import BEFORE, HEALED, PLAN, keep_whole, load_repaired, step_of
from ..structure.anatomy import base_model
from ..structure.locating import locate
from ..structure.token_ids import checked
from .distilling import CHECKPOINTS, Course, Training
from .refitting import digest_of
from .students import RANK, Trained

if TYPE_CHECKING:
    from .spreading import Spread

RATE = 3e-4


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    train: Trained = "outputs",
    rank: int = RANK,
    rate: float = RATE,
    warm_up: float = 0.0,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    settings: Provenance | Mapping[str, Any] | None = None,
    workers: Spread | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained to be near the dense model.

    `batches` are token ids, (batch, tokens) each, one step of AdamW a batch, whose rate falls from `rate` to none.
    `train` says which weights: `outputs` are norms and output projections, `all` those of every kept sublayer, and
    `lora` has two thin matrices of `rank` beside each of those, which are added to them in the end. For the share
    `warm_up` of the batches each kept sublayer aims at the dense model's stream behind it, and only then all of them
    at the next token. It ends early where the KL on `held_out`, batches as well, no longer falls, and keeps the best
    weights, possibly the initial ones. With a `folder` the result is written down, and repeating the call resumes an
    interrupted run. `workers`, a `notall.repairing.spreading.Spread`, share each batch among them, and need the folder.

    Needs room for a second model. Raises `UsageError` for a plan that does not fit or skips nothing, a quantised model,
    a folder that holds other work or is in use, `lora` without peft, and as `Spread.train` does, and `UnsupportedModel`
    as `locate` does and where the head is no matrix.
    """
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    inner, folder = base_model(model), Path(folder) if folder else None
    batches, held_out = ([*checked(text, model)] for text in (batches, held_out))
    _check(inner, plan, warm_up)
    if not plan or not batches or not held_out:
        raise UsageError("healing takes a plan that skips something, text to train on, and other text to stop by")
    if workers and not folder:
        raise UsageError("workers share a folder: give one")
    anatomy = locate(inner)
    before = dict(plan.weights) if isinstance(plan, RepairedPlan) else {}
    how = {"training": digest_of(batches), "stops_by": digest_of(held_out), "train": train, "rate": rate}
    how |= {"train_seed": seed} | ({"rank": rank} if train == "lora" else {})
    history = plan.history if isinstance(plan, RepairedPlan) else ()
    about = Provenance.of(
        settings or {},
        plan=plan.indices,
        repair=plan.digest if isinstance(plan, RepairedPlan) else "none",
        fingerprint=anatomy.fingerprint,
        dtype=dtype_name(inner),
        **how | ({"warm_up": warm_up} if warm_up else {}),
        **{BEFORE: [step.model_dump(mode="json") for step in history]},
    )
    history += (step_of("heal", about),)
    with working_in(folder, "heal") if folder else nullcontext(), TemporaryDirectory() as scratch:
        kept = Ledger(folder, HealRecord, about) if folder else None
        if folder and (folder / PLAN).is_file():
            return load_repaired(folder)
        training = Training(plan, batches, held_out, train, rank, Course(rate, warm_up, seed))
        if workers and folder:
            trained = workers.train(training, folder, about, progress)
        else:
            trained = training.run(inner, Path(folder or scratch), kept, progress)
        healed = RepairedPlan.of(plan, weights=before | trained, history=history)
        if folder:
            keep_whole(folder, healed, HEALED)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return healed


def _check(model: PreTrainedModel, plan: Plan, warm_up: float) -> None:
    """Raise where `model` cannot be healed without what `plan` skips, or not with such a warm-up."""
    if not 0 <= warm_up <= 1:
        raise UsageError(f"a warm-up of {warm_up} is no share of the training: give one from 0 to 1")
    if told := quantisation_of(model.config):
        raise UsageError(
            f"healing trains plain weights, and these are quantised ({quantisation_name(told)}): heal the plan on the "
            "model that was quantised, export that, and quantise the export"
        )
    anatomy = locate(model)
    plan.check(anatomy)
    anatomy.refuse_stubs("healing")
    if Head(model).projection is None:
        raise UnsupportedModel(
            f"the head of {type(model).__name__} is no matrix, and cannot be aimed at; use notall.repair instead"
        )
