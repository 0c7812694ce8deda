"""The loop of a healing: transformers' Trainer, and so accelerate, with a loss that keeps no logits.

Where several processes train, each has its share of every batch and of the held-out text.

The loss is KL(dense || skipped) of the next token, whose derivative by what the head is given is known (see
`TokenScorer.distance`). For a first share of the steps it may be how far the student's stream is off instead.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from ..measuring.token_scores import Dense, TokenScorer
from ..progress import Progress
from ..records.healing import HealRecord
from ..records.ledger import Ledger
from ..records.plan import Plan
from ..structure.locating import locate
from .students import Student, Trained, rows_of, states_of

LOOKS = 10  # at the held-out text, evenly over the training
PATIENCE = 5  # looks without a gain that end it: while the rate is high there may be none, and as it falls there are
CHECKPOINTS, WEIGHTS = "checkpoints", "trained.safetensors"


@dataclass(frozen=True)
class Course:
    """How a training goes: `warm_up` is the share of the steps that aim at the stream."""

    rate: float
    warm_up: float
    seed: int


@dataclass(frozen=True)
class Training:
    """What is trained, on which text and how, wherever that is."""

    plan: Plan
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    train: Trained
    rank: int
    course: Course

    def run(
        self, model: PreTrainedModel, folder: Path, kept: Ledger[HealRecord] | None, progress: Progress
    ) -> dict[str, Tensor]:
        """The weights that were best, by their paths in `model`, the dense one."""
        streamed = self.course.warm_up > 0
        student = Student(
            model, locate(model), self.plan, self.train, self.batches[0], rank=self.rank, streamed=streamed
        )
        Distillation(model, student, folder, kept, progress).train(self.batches, self.held_out, self.course)
        return student.weights()


class Distillation:
    """One training: a dense teacher, a student, and where it is written down."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: Student,
        folder: Path,
        kept: Ledger[HealRecord] | None,
        progress: Progress,
    ) -> None:
        self.teacher, self.student = teacher, student
        self.folder, self.kept, self.progress = folder, kept, progress
        self.at_first = math.inf  # the KL on held-out text before any step

    def train(self, batches: Sequence[Tensor], held_out: Sequence[Tensor], course: Course) -> None:
        """Leave the student with the weights that were best on `held_out`, if only those that it began with."""
        checkpoint = _last_whole(self.folder / CHECKPOINTS)
        if checkpoint and self.kept is not None:
            first = next(look.held_out_kl for look in self.kept if look.tokens == 0)
            self.at_first = math.inf if first is None else first
        warm = round(course.warm_up * len(batches))
        trainer = _Trainer(
            run=self,
            warm=warm,
            held_out=held_out,
            model=self.student,
            args=self._arguments(batches, course, fresh=checkpoint is None),
            train_dataset=[{"input_ids": row} for batch in batches for row in batch],
            eval_dataset=[{"input_ids": row} for batch in held_out for row in batch],
            callbacks=[_Patience(warm), _Told(self, batches[0].numel(), checkpoint is not None)],
        )
        trainer.remove_callback(PrinterCallback)
        before = {path: one.detach().clone() for path, one in self.student.trained.items()}
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if not (trainer.state.best_metric or math.inf) < self.at_first:
            for path, weight in before.items():
                self.student.trained[path].data.copy_(weight)

    def _arguments(self, batches: Sequence[Tensor], course: Course, *, fresh: bool) -> TrainingArguments:
        steps = len(batches)
        arguments = TrainingArguments(
            output_dir=str(self.folder / CHECKPOINTS),
            max_steps=steps,
            learning_rate=course.rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(10, steps // 10),
            weight_decay=0.0,
            adam_beta2=0.98,
            bf16=self.teacher.dtype in (torch.bfloat16, torch.float16),
            use_cpu=self.teacher.device.type == "cpu",
            eval_strategy="steps",
            eval_on_start=fresh,  # one look more would count against the patience
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
            seed=course.seed,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        arguments.per_device_train_batch_size = len(batches[0]) // arguments.world_size
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # threads over several GPUs would each take a batch, and are slower than one
        return arguments


def _last_whole(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end, where its state stands; torn ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if _is_json(path / TRAINER_STATE_NAME)]
    for torn in set(found) - set(whole):
        shutil.rmtree(torn, ignore_errors=True)  # another worker may be at it
    return whole[-1] if whole else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


class _Trainer(Trainer):
    """transformers' loop with our losses, and checkpoints of what is trained alone."""

    def __init__(self, *, run: Distillation, warm: int, held_out: Sequence[Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.run, self.warm, self.held_out = run, warm, held_out
        self.scorer = TokenScorer(run.teacher)
        self.exam: _Exam | None = None
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Mean over tokens, in nats; in the warm-up a share of the stream's square."""
        ids, stream = inputs["input_ids"], self.run.student.stream
        if stream is not None and self.state.global_step < self.warm:
            return model(ids, stream.lesson(ids)).mean()
        with torch.no_grad():
            aim = states_of(self.run.teacher, ids)
        return _Distance.apply(model(ids), aim, self.scorer).mean()

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """A look at the held-out text."""
        share = self.held_out[self.args.process_index :: self.args.world_size]
        self.exam = self.exam or _Exam(self.run.teacher, self.scorer, share)
        self.run.student.eval()
        with self.accelerator.autocast():
            sums = self.exam.look(self.run.student.model)
        kl, nll, same, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"eval_loss": kl / count, "nll": nll / count, "same": same / count}
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # which writes to `control`
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        into = Path(output_dir or self.args.output_dir)
        into.mkdir(parents=True, exist_ok=True)
        trained = self.run.student.trained
        save_file({path: one.detach().cpu().contiguous() for path, one in trained.items()}, into / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        for path, weight in load_file(Path(resume_from_checkpoint) / WEIGHTS).items():
            self.run.student.trained[path].data.copy_(weight)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Exam:
    """The held-out text, and what the dense model says of it, once."""

    def __init__(self, teacher: PreTrainedModel, scorer: TokenScorer, batches: Sequence[Tensor]) -> None:
        self.scorer, self.asked = scorer, list[tuple[Tensor, Tensor, Tensor, Dense]]()
        for ids in batches:
            targets = ids[:, 1:].flatten()
            scores, dense = scorer.dense(rows_of(teacher, ids), targets, likeliest=True)
            self.asked.append((ids, targets, scores.likeliest, dense))

    @torch.no_grad()
    def look(self, student: PreTrainedModel) -> Tensor:
        """Sums over all tokens that are predicted, and how many these are."""
        found = [torch.zeros(4, 0, device=student.device)]
        for ids, targets, likeliest, dense in self.asked:
            scores = self.scorer.score(rows_of(student, ids), targets, dense, likeliest=True)
            same = (scores.likeliest == likeliest).to(scores.kl)
            found.append(torch.stack([scores.kl, scores.nll, same, torch.ones_like(same)]))
        return torch.cat(found, 1).sum(1)


class _Patience(EarlyStoppingCallback):
    """Looks in the warm-up, so many steps, do not count: what it aims at is something else."""

    def __init__(self, warm: int) -> None:
        super().__init__(PATIENCE)
        self.warm = warm

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
        if state.global_step > self.warm or not self.warm:
            super().on_evaluate(args, state, control, metrics, **more)

    def state(self) -> dict[str, Any]:
        """What another is made like it from, where a run goes on."""
        return {**super().state(), "args": {"warm": self.warm}}


class _Told(TrainerCallback):
    """Tells how far it is, and notes each look at the held-out text."""

    def __init__(self, run: Distillation, tokens: int, resumed: bool) -> None:
        spent = max((look.seconds or 0 for look in run.kept or ()), default=0.0) if resumed else 0.0
        self.run, self.tokens, self.start = run, tokens, time.process_time() - spent

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.run.progress(state.global_step, state.max_steps, "healing")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.run.at_first = metrics["eval_loss"]
        look = HealRecord(
            tokens=state.global_step * self.tokens,
            held_out_kl=metrics["eval_loss"],
            held_out_nll=metrics["nll"],
            held_out_agreement=metrics["same"],
            seconds=time.process_time() - self.start,
        )
        if state.is_world_process_zero and self.run.kept is not None and look.key not in self.run.kept:
            self.run.kept.add(look)


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
