"""Heal a skipped model by a short distillation of weights of kept sublayers, by AdamW
on accelerate.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError, expect
from ..models.texts import checked
from ..plan import Plan
from ..progress import Progress, silent
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.repairs import HealRecord
from ..running import repair_folder
from ..running.repaired import RepairedPlan
from ..structure.model_structure import base_model
from .checkpoints import Checkpoints
from .refitting import about_weights
from .spread import Spread as Spread
from .train_config import TrainConfig
from .training import Training as Training, training_settings
from .training_loop import processes_of


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, object] | None = None,
    workers: Spread | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained to be near the
    original model.

    `batches` are token ids, (batch, tokens), a step of AdamW each, as `config` says. It
    ends early where the KL on the batches `held_out` no longer falls, and keeps the
    best weights, possibly the initial ones. Where KL rises by a tenth it goes back to
    those, and on at a quarter of the rate; the third time it ends. With a folder `out`
    the result is kept, and an interrupted run resumed. Several processes may share each
    batch, and need the folder: `workers`, or those of `accelerate launch`.

    Needs room for what is trained, and for its gradients and moments. Raises
    `UsageError` for a plan that does not fit or skips nothing, held-out windows that
    overlap those of `batches`, a quantised model, a folder that holds other work or is
    in use, a full disk, `lora` without peft, workers that fail or are given `minutes`,
    and `UnsupportedModel` as `locate` does and where the head is no matrix.
    """
    training = Training(plan, batches, held_out, config or TrainConfig())
    return heal_by(
        training,
        model,
        out=out,
        provenance=provenance,
        workers=workers,
        progress=progress,
    )


def heal_by(
    training: Training,
    model: PreTrainedModel,
    *,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, object] | None = None,
    workers: Spread | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """As `heal`; of a training whose plan took a repair, the record begins with the
    skipped model.
    """
    plan = training.plan
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    inner = base_model(model)
    training = replace(
        training,
        batches=[*checked(training.batches, model)],
        held_out=[*checked(training.held_out, model)],
    )
    training.check(inner)
    processes = processes_of(inner)
    if workers or processes.num_processes > 1:
        _check_shared(training, has_folder=bool(out))
    earlier = plan if isinstance(plan, RepairedPlan) else RepairedPlan.of(plan)
    settings = training_settings(training, earlier.history)
    about = about_weights(provenance or {}, inner, plan, **settings)
    is_first = processes.is_main_process  # which keeps the folder for all
    with (
        TemporaryDirectory() as scratch,
        working_in(Path(out or scratch), "heal") if is_first else nullcontext(),
    ):
        folder = Path(out or scratch)
        ledger = Ledger(folder, HealRecord, about)
        is_finished = repair_folder.refuse_other_work(folder, HealRecord, plan)
        checkpoints = Checkpoints.of(folder)
        if not is_finished:
            checkpoints.refuse_others()
        processes.wait_for_everyone()  # all have looked before the first of them writes
        if is_finished:
            healed = RepairedPlan.load(folder)
            healed.check_replaced(inner)
            if is_first:
                checkpoints.remove()  # of a run that was killed as it ended
            return healed
        if workers:
            trained = workers.train(training, folder, about, progress)
        else:
            trained = training.run(inner, folder, ledger, progress)
        history = (*earlier.history, repair_folder.step_of("heal", about))
        kind = "prompt_weights" if plan.prefill else "weights"
        weights = {kind: {**getattr(earlier, kind), **trained}}
        healed = RepairedPlan.of(plan, **weights, history=history).knowing(inner)
        if out and is_first:
            repair_folder.keep_whole(folder, healed, repair_folder.HEALED)
            checkpoints.remove()
        processes.wait_for_everyone()
    return healed


def _check_shared(training: Training, *, has_folder: bool) -> None:
    """Raise `UsageError` where several processes can't share a training."""
    if not has_folder:
        raise UsageError("workers share a folder: give one")
    if training.config.minutes:
        raise UsageError("workers do not train by time: drop --minutes or --ray")
    if training.plan.prefill:
        raise UsageError(
            "keys and values of the prompt are trained in one process: drop --ray"
        )
