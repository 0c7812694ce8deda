"""Heal a skipped model by a short distillation: its next-token distributions are drawn to the dense model's.

What is trained are weights of kept sublayers alone, a few of each: their norms and output projections, or all of them.
So the result is a plan with weights, as a repair is. The loop is transformers' Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from ..measuring.token_scores import TokenScorer
from ..progress import Progress, silent
from ..records.plan import Plan
from ..running.repaired import RepairedPlan
from ..running.replay import live_steps, record
from ..running.skipping import remove
from ..structure.anatomy import Anatomy, base_model
from ..structure.locating import locate
from ..structure.observation import LayerCall, forward_replaced
from .projections import find_projection
from .readers import is_norm

Trained = Literal["outputs", "all"]
RATE = 2e-4


@dataclass(frozen=True)
class Healed:
    """A plan with the weights that were trained, and (tokens seen, KL on the held-out text) along the way."""

    plan: RepairedPlan
    curve: tuple[tuple[int, float], ...]


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    *,
    train: Trained = "outputs",
    rate: float = RATE,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress = silent,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained on `batches` of token ids, (batch, tokens) each.

    Each batch is a step of AdamW, whose rate falls from `rate` to none. `train` says which weights: `outputs` are
    norms and output projections, `all` those of every kept sublayer. With a `folder` it goes on where it was killed.
    Needs room for a second model.
    """
    inner = base_model(model)
    anatomy = locate(inner)
    plan.check(anatomy)
    student = copy.deepcopy(inner)
    paths = {id(parameter): path for path, parameter in student.named_parameters()}
    wanted = _trained(inner, anatomy, plan, train, batches[0][:1])
    if isinstance(plan, RepairedPlan):
        for path, weight in plan.weights.items():
            student.get_parameter(path).data.copy_(weight)
    remove(student, Plan(plan.attention, plan.mlp))
    own: dict[str, nn.Parameter] = {}
    for parameter in student.parameters():
        path = paths.get(id(parameter), "")
        parameter.requires_grad_(path in wanted)
        if path in wanted:
            parameter.data = parameter.data.float()  # steps are too small for few bits
            own[path] = parameter
    _train(inner, student, batches, rate, seed, folder, progress)
    dtype = inner.dtype
    weights = dict(plan.weights) if isinstance(plan, RepairedPlan) else {}
    weights |= {path: parameter.detach().to(dtype) for path, parameter in own.items()}
    return RepairedPlan(plan.attention, plan.mlp, fingerprint=plan.fingerprint, note=plan.note, weights=weights)


def _trained(model: PreTrainedModel, anatomy: Anatomy, plan: Plan, train: Trained, tokens: Tensor) -> set[str]:
    """The paths of the parameters to train."""
    recording = record(model, input_ids=tokens)
    found: set[str] = set()
    for block, parts in live_steps(anatomy, plan):
        layer = model.get_submodule(f"{anatomy.layers}.{block.index}")
        for part in parts:
            names = [
                f"{module}.{name}"
                for module in part.modules
                for name, _ in layer.get_submodule(module).named_parameters()
            ]
            if train == "outputs":
                norms = tuple(f"{module}." for module in part.modules if is_norm(layer.get_submodule(module)))
                with torch.no_grad():
                    call = LayerCall(recording.arguments[block.index])
                    last = find_projection(layer, part, recording.embedded, call)
                names = [n for n in names if n.startswith(norms) or (last and n.startswith(f"{last.path}."))]
            found |= {f"{anatomy.layers}.{block.index}.{name}" for name in names}
    return found


def _train(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Tensor],
    rate: float,
    seed: int,
    folder: Path | None,
    progress: Progress,
) -> None:
    rows = [{"input_ids": row} for batch in batches for row in batch]
    with TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(folder or scratch),
            per_device_train_batch_size=len(batches[0]),
            num_train_epochs=1,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, len(batches) // 10),
            weight_decay=0.0,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=teacher.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            seed=seed,
            remove_unused_columns=False,
        )
        trainer = _Distillation(
            teacher=teacher, model=student, args=arguments, train_dataset=rows, callbacks=[_Told(progress)]
        )
        trainer.train()


class _Distillation(Trainer):
    """The loss is KL(dense || skipped), mean over tokens."""

    def __init__(self, *, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(**options)
        self.teacher, self.scorer = teacher, TokenScorer(teacher)
        self.model_accepts_loss_kwargs = False
        self.losses: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            aim = _states(self.teacher, inputs["input_ids"])
        loss = _Distance.apply(_states(model, inputs["input_ids"]), aim, self.scorer).mean()
        self.losses.append(float(loss))
        return loss


class _Told(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress(state.global_step, state.max_steps, "healing")


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
