"""Heal a skipped model by a short distillation: its next-token distributions are drawn to the dense model's.

Weights of kept sublayers alone are trained (see `students`, `training`): the result is a plan with weights, as a
repair is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..digests import digest_of
from ..errors import UnsupportedModel, UsageError, expect
from ..models.quantisation import quantisation_name, quantisation_of
from ..models.texts import checked
from ..plan import Plan
from ..progress import Progress, silent
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.repairs import HealRecord, RepairStep
from ..running.head import Head
from ..running.repaired import BEFORE, HEALED, RepairedPlan, keep_whole, refuse_other_work, step_of
from ..running.tensor_files import read_tensors, write_tensors
from ..structure.locating import locate
from ..structure.model_structure import base_model
from .refitting import about_weights
from .students import TrainConfig
from .training import CHECKPOINTS, Training, processes_of

TRAINED = "trained.safetensors"  # in the folder of the checkpoints


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, Any] | None = None,
    workers: Spread | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained to be near the dense model.

    `batches` are token ids, (batch, tokens) each, of as many steps of AdamW as `config` says how. It ends early where
    the KL on `held_out`, batches as well, no longer falls, and keeps the best weights, possibly the initial ones.
    With a folder `out` the result is written down, and repeating the call resumes an interrupted run. Several
    processes may share each batch: `workers`, or those of `accelerate launch`, each of which calls this. They need the
    folder.

    Needs room for what is trained, and for its gradients and moments. Raises `UsageError` for a plan that does not fit
    or skips nothing, a quantised model, a folder that holds other work or is in use, a full disk, `lora` without peft,
    and as `Spread.train` does, and `UnsupportedModel` as `locate` does and where the head is no matrix.
    """
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    config, inner, folder = config or TrainConfig(), base_model(model), Path(out) if out else None
    training = Training(plan, [*checked(batches, model)], [*checked(held_out, model)], config)
    _check(inner, training)
    processes = processes_of(inner)
    if folder is None and (workers or processes.num_processes > 1):
        raise UsageError("workers share a folder: give one")
    earlier = plan if isinstance(plan, RepairedPlan) else RepairedPlan.of(plan)
    about = _about(inner, training, earlier.history, provenance or {})
    is_first = processes.is_main_process  # which keeps the folder for all
    alone = working_in(folder, "heal") if folder and is_first else nullcontext()
    with alone, TemporaryDirectory() as scratch:
        ledger = Ledger(folder, HealRecord, about) if folder else None
        is_finished = folder is not None and refuse_other_work(folder, HealRecord, plan)
        processes.wait_for_everyone()  # all have looked before the first of them writes
        if folder and is_finished:
            return RepairedPlan.load(folder)
        if workers and folder:
            trained = workers.train(training, folder, about, progress)
        else:
            trained = training.run(inner, folder or Path(scratch), ledger, progress)
        history = (*earlier.history, step_of("heal", about))
        healed = RepairedPlan.of(plan, weights={**earlier.weights, **trained}, history=history)
        if folder and is_first:
            keep_whole(folder, healed, HEALED)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        processes.wait_for_everyone()
    return healed


def _check(model: PreTrainedModel, training: Training) -> None:
    """Raise where `model` cannot be healed without what the plan skips, or not in this way."""
    plan, warm_up = training.plan, training.config.warm_up
    if not 0 <= warm_up <= 1:
        raise UsageError(f"a warm-up of {warm_up} is no share of the training: give one from 0 to 1")
    if told := quantisation_of(model.config):
        raise UsageError(
            f"healing trains plain weights, and these are quantised ({quantisation_name(told)}): heal the plan on the "
            "model that was quantised, export that, and quantise the export"
        )
    structure = locate(model)
    plan.check(structure)
    structure.refuse_stubs("healing")
    if Head(model).projection is None:
        raise UnsupportedModel(
            f"the head of {type(model).__name__} is no matrix, and cannot be aimed at; use notall.repair instead"
        )
    if not plan or not training.batches or not training.held_out:
        raise UsageError("healing takes a plan that skips something, text to train on, and other text to stop by")
    if len({batch.shape[1] for batch in training.batches}) > 1:
        raise UsageError("the windows to train on are of several lengths: give windows of one")


def _about(
    model: PreTrainedModel, training: Training, history: Sequence[RepairStep], settings: Provenance | Mapping[str, Any]
) -> Provenance:
    """What decides the weights."""
    plan, how = training.plan, asdict(training.config)
    how["train_seed"] = how.pop("seed")  # that of the text has this name
    if training.config.train != "lora":
        del how["rank"]
    how |= {
        "repair": plan.digest if isinstance(plan, RepairedPlan) else "none",
        "training": digest_of(training.batches)[:16],
        "stops_by": digest_of(training.held_out)[:16],
        BEFORE: [step.model_dump(mode="json") for step in history],
    }
    return about_weights(settings, model, plan, **how)


@dataclass(frozen=True)
class Spread:
    """Workers that share a training, each with the model that `load_options` (the arguments of `notall.load`) name.

    They are those of a Ray cluster, which needs the extra `ray`. `address` is as in `cluster.joined`, but from a
    machine of the cluster. There are `count` workers, or one for each GPU, or without GPUs as many as half of the CPUs.
    """

    load_options: Mapping[str, Any]
    address: str = "local"
    count: int | None = None

    def check(self, rows: int, count: int | None = None) -> None:
        """Raise `UsageError` where `count` workers, else as many as are asked for, can't train on batches of `rows`."""
        if self.address.startswith("ray://"):
            raise UsageError("a training is started from a machine of the cluster: give --ray auto or HOST:PORT there")
        count = count or self.count or 1
        if count < 1 or rows % count:
            raise UsageError(
                f"{count} workers cannot share a batch of {rows} evenly: give another --batch-size or --ray-workers"
            )

    def train(self, training: Training, folder: Path, about: Provenance, progress: Progress) -> dict[str, Tensor]:
        """As `Training.run`, the evaluations noted in `folder`, which all workers must see under this path.

        When a worker is lost, all of them go on from the last checkpoint, once. Raises `UsageError` where a batch does
        not part evenly among the workers, and where they fail.
        """
        from ..running import cluster

        self.check(len(training.batches[0]))
        with cluster.joined(self.address):
            most, has_gpus = cluster.room()
            count, on_gpus = self.count or most, has_gpus and self.load_options.get("device") != "cpu"
            self.check(len(training.batches[0]), count)
            progress(0, 1, f"healing on {count} workers")
            given = {"training": training, "folder": folder.absolute(), "about": about, "load": dict(self.load_options)}
            cluster.train(_work, given, folder / CHECKPOINTS / "ray", count=count, on_gpus=on_gpus)
            progress(1, 1, f"healed on {count} workers")
        return read_tensors(folder / CHECKPOINTS / TRAINED)[0]


def _work(
    device: str | None, is_first: bool, *, training: Training, folder: Path, about: Provenance, load: Mapping[str, Any]
) -> None:
    """What each worker does; the first of them writes it down."""
    from ..models.loading import load as load_model

    model, _ = load_model(**{**load, **({"device": device} if device else {})})
    trained = training.run(base_model(model), folder, Ledger(folder, HealRecord, about), silent)
    if is_first:
        write_tensors(folder / CHECKPOINTS / TRAINED, trained)
