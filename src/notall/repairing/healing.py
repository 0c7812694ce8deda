"""Heal a skipped model by a short distillation: its next-token distributions are drawn to the dense model's.

What is trained are weights of kept sublayers alone: their norms and output projections, or all of them. So the result
is a plan with weights, as a repair is. The loop is transformers' Trainer; the loss is KL(dense || skipped), whose
derivative by what the head is given is known, so that no logits are kept (see `TokenScorer.distance`).
"""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from ..errors import UnsupportedModel, UsageError
from ..measuring.token_scores import TokenScorer
from ..models.loading import dtype_name
from ..models.quantisation import quantisation_name, quantisation_of
from ..progress import Progress, silent
from ..records.healing import HealRecord
from ..records.ledger import Ledger, working_in
from ..records.plan import Plan
from ..records.provenance import Provenance
from ..running.head import Head
from ..running.repaired import RepairedPlan
from ..running.replay import live_steps, record
from ..running.skipping import remove
from ..structure.anatomy import Anatomy, base_model
from ..structure.locating import locate
from ..structure.observation import LayerCall, forward_replaced
from .kept import BEFORE, PLAN, keep_healed, load_repaired, step_of
from .projections import find_projection
from .readers import is_norm
from .refitting import PROBED, digest_of

Trained = Literal["outputs", "all"]
RATE = 3e-4
LOOKS = 10  # at the held-out text, evenly over the training
PATIENCE = 3  # looks without a gain that end it
CHECKPOINTS, WEIGHTS = "checkpoints", "trained.safetensors"


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    *,
    train: Trained = "outputs",
    rate: float = RATE,
    seed: int = 0,
    folder: Path | None = None,
    settings: Provenance | Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained to be near the dense model.

    `batches` are token ids, (batch, tokens) each, one step of AdamW a batch, whose rate falls from `rate` to none.
    `train` says which weights: `outputs` are norms and output projections, `all` those of every kept sublayer. It ends
    early where the KL on `held_out`, batches as well, no longer falls, with the weights that were best there, if only
    those that it began with. With a `folder` the result is written down, and the same call goes on where one that was
    killed stopped.

    Needs room for a second model. Raises `UsageError` for a plan that does not fit or skips nothing, a quantised model,
    and a folder that holds other work or is in use, and `UnsupportedModel` as `locate` does and where the head is no
    matrix.
    """
    inner = base_model(model)
    if told := quantisation_of(inner.config):
        raise UsageError(
            f"healing trains plain weights, and these are quantised ({quantisation_name(told)}): heal the plan on the "
            "model that was quantised, export that, and quantise the export"
        )
    anatomy = locate(inner)
    plan.check(anatomy)
    if not plan or not batches or not held_out:
        raise UsageError("healing takes a plan that skips something, text to train on, and other text to stop by")
    if Head(inner).projection is None:
        raise UnsupportedModel(
            f"the head of {type(inner).__name__} is no matrix, and cannot be aimed at; use notall.repair instead"
        )
    before = dict(plan.weights) if isinstance(plan, RepairedPlan) else {}
    history = plan.history if isinstance(plan, RepairedPlan) else ()
    about = Provenance.of(
        settings or {},
        plan=plan.indices,
        repair=plan.digest if isinstance(plan, RepairedPlan) else "none",
        fingerprint=anatomy.fingerprint,
        dtype=dtype_name(inner),
        training=digest_of(batches),
        stops_by=digest_of(held_out),
        train=train,
        rate=rate,
        train_seed=seed,
        **{BEFORE: [step.model_dump(mode="json") for step in history]},
    )
    history += (step_of("heal", about),)
    with working_in(folder, "heal") if folder else nullcontext(), TemporaryDirectory() as scratch:
        kept = Ledger(folder, HealRecord, about) if folder else None
        if folder and (folder / PLAN).is_file():
            return load_repaired(folder)
        student, own = _student(inner, anatomy, plan, train, batches[0][:1, :PROBED])
        run = _Run(inner, student, own, Path(folder or scratch), kept, progress)
        run.train(batches, held_out, rate, seed)
        weights = before | {path: one.detach().to(inner.dtype) for path, one in own.items()}
        healed = RepairedPlan.of(plan, weights=weights, history=history)
        if folder:
            keep_healed(folder, healed)
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return healed


def _student(
    model: PreTrainedModel, anatomy: Anatomy, plan: Plan, train: Trained, tokens: Tensor
) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """A copy without what the plan skips, and what is trained of it, by its path in the dense model."""
    wanted = _wanted(model, anatomy, plan, train, tokens)
    student = copy.deepcopy(model)
    paths = {id(parameter): path for path, parameter in student.named_parameters()}
    for path, weight in plan.weights.items() if isinstance(plan, RepairedPlan) else ():
        student.get_parameter(path).data.copy_(weight)
    remove(student, Plan(plan.attention, plan.mlp))
    own: dict[str, nn.Parameter] = {}
    for parameter in student.parameters():
        path = paths.get(id(parameter), "")
        parameter.requires_grad_(path in wanted)
        if path in wanted:
            parameter.data = parameter.data.float()  # steps are too small for the dtypes of few bits
            own[path] = parameter
    return student, own


def _wanted(model: PreTrainedModel, anatomy: Anatomy, plan: Plan, train: Trained, tokens: Tensor) -> set[str]:
    """The paths of the parameters to train."""
    probe = record(model, input_ids=tokens)
    found: set[str] = set()
    for block, parts in live_steps(anatomy, plan):
        layer = model.get_submodule(f"{anatomy.layers}.{block.index}")
        for part in parts:
            chosen = [f"{name}." for name in part.modules]
            if train == "outputs":
                chosen = [f"{name}." for name in part.modules if is_norm(layer.get_submodule(name))]
                last = find_projection(layer, part, probe.embedded, LayerCall(probe.arguments[block.index]))
                chosen += [f"{last.path}."] if last else []
            names = (name for name, _ in layer.named_parameters() if name.startswith(tuple(chosen)))
            found |= {f"{anatomy.layers}.{block.index}.{name}" for name in names}
    return found


class _Run:
    """One training: a dense teacher, a student, and what is trained of it."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        own: dict[str, nn.Parameter],
        folder: Path,
        kept: Ledger[HealRecord] | None,
        progress: Progress,
    ) -> None:
        self.teacher, self.student, self.own = teacher, student, own
        self.folder, self.kept, self.progress = folder, kept, progress
        self.at_first = math.inf  # the KL on held-out text before any step

    def train(self, batches: Sequence[Tensor], held_out: Sequence[Tensor], rate: float, seed: int) -> None:
        steps = len(batches)
        checkpoint = _last_whole(self.folder / CHECKPOINTS)
        if checkpoint and self.kept is not None:
            first = next(look.held_out_kl for look in self.kept if look.tokens == 0)
            self.at_first = math.inf if first is None else first
        arguments = TrainingArguments(
            output_dir=str(self.folder / CHECKPOINTS),
            per_device_train_batch_size=len(batches[0]),
            per_device_eval_batch_size=len(held_out[0]),
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps // 10),
            weight_decay=0.0,
            adam_beta2=0.98,
            bf16=self.student.dtype in (torch.bfloat16, torch.float16),
            use_cpu=self.teacher.device.type == "cpu",
            eval_strategy="steps",
            eval_on_start=checkpoint is None,  # one look more would count against the patience
            restore_callback_states_from_checkpoint=True,
            eval_steps=max(1, steps // LOOKS),
            save_strategy="steps",
            save_steps=max(1, steps // LOOKS),
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=False,
            prediction_loss_only=True,
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = _Distillation(
            run=self,
            model=self.student,
            args=arguments,
            train_dataset=[{"input_ids": row} for batch in batches for row in batch],
            eval_dataset=[{"input_ids": row} for batch in held_out for row in batch],
            callbacks=[EarlyStoppingCallback(PATIENCE), _Told(self, batches[0].numel())],
        )
        trainer.remove_callback(PrinterCallback)
        before = {path: one.detach().clone() for path, one in self.own.items()}
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not (trainer.state.best_metric or math.inf) < self.at_first:
            for path, weight in before.items():
                self.own[path].data.copy_(weight)


def _last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, where its state stands; torn ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / TRAINER_STATE_NAME).is_file()]
    for torn in set(found) - set(whole):
        shutil.rmtree(torn)
    return whole[-1] if whole else None


class _Distillation(Trainer):
    """transformers' loop with our loss, and checkpoints of what is trained alone."""

    def __init__(self, *, run: _Run, **options: Any) -> None:
        super().__init__(**options)
        self.run, self.scorer = run, TokenScorer(run.teacher)
        self.aims: dict[bytes, Tensor] = {}  # on held-out text, which is looked at again and again
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """KL(dense || skipped) of the next token, mean over tokens, in nats."""
        with torch.no_grad():
            aim = _states(self.run.teacher, inputs["input_ids"])
        return self._distance(model, inputs["input_ids"], aim)

    def _distance(self, model: nn.Module, ids: Tensor, aim: Tensor) -> Tensor:
        return _Distance.apply(_states(model, ids), aim, self.scorer).mean()

    def prediction_step(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            ids = self._prepare_inputs(inputs)["input_ids"]
            which = ids.cpu().numpy().tobytes()
            if which not in self.aims:
                self.aims[which] = _states(self.run.teacher, ids)
            return self._distance(model, ids, self.aims[which]), None, None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        into = Path(output_dir or self.args.output_dir)
        into.mkdir(parents=True, exist_ok=True)
        save_file({path: one.detach().cpu().contiguous() for path, one in self.run.own.items()}, into / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for path, weight in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
            self.run.own[path].data.copy_(weight)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Told(TrainerCallback):
    """Tells how far it is, and notes each look at the held-out text."""

    def __init__(self, run: _Run, tokens: int) -> None:
        self.run, self.tokens, self.start = run, tokens, time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.progress(state.global_step, state.max_steps, "healing")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.run.at_first = metrics["eval_loss"]
        seconds = time.process_time() - self.start
        look = HealRecord(tokens=state.global_step * self.tokens, held_out_kl=metrics["eval_loss"], seconds=seconds)
        if self.run.kept is not None and look.key not in self.run.kept:
            self.run.kept.add(look)


def _states(model: nn.Module, ids: Tensor) -> Tensor:
    """What the head's matrix is given, (tokens, width)."""
    inner = base_model(getattr(model, "module", model))
    seen: list[Tensor] = []

    def take(states: Tensor) -> Tensor:
        seen.append(states)
        return states[..., :1]

    with forward_replaced(inner.get_output_embeddings(), take):
        model(input_ids=ids, use_cache=False)
    return seen[0].flatten(0, 1)


class _Distance(torch.autograd.Function):
    """See `TokenScorer.distance`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, aim: Tensor, scorer: TokenScorer) -> Tensor:
        distance, derivative = scorer.distance(states, aim)
        ctx.save_for_backward(derivative)
        ctx.dtype = states.dtype
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return (gradients[0][:, None] * derivative).to(ctx.dtype), None, None
