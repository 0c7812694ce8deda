"""The loop of a healing: AdamW on accelerate, in one process, or in several that share each batch.

The loss is KL(dense || skipped) of the next token, whose derivative by what the head is given is known, so that no
logits are kept (see `TokenScorer.distance`); in the warm-up it is how far the student's stream is from the dense one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from transformers import PreTrainedModel

from ..measuring.token_scores import Dense, TokenScorer
from ..plan import Plan
from ..progress import Progress
from ..results.ledger import Ledger
from ..results.repairs import HealRecord
from ..running.tensor_files import read_tensors, write_tensors
from .students import Student, TrainConfig, rows_of, states_of

CHECKPOINTS, LAST, BEST = "checkpoints", "last.safetensors", "best.safetensors"
STATE = "state"  # of the loop, in the notes of the last checkpoint


@dataclass(frozen=True)
class Training:
    """What is trained, on which text and how, wherever that is."""

    plan: Plan
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    config: TrainConfig

    def run(
        self, model: PreTrainedModel, folder: Path, ledger: Ledger[HealRecord] | None, progress: Progress
    ) -> dict[str, Tensor]:
        """The weights that were best, by their paths in `model`, the dense one.

        Every process of a training runs this, on the same `folder`; the first of them writes there and to `ledger`.
        """
        return _Loop(self, model, folder / CHECKPOINTS, ledger, progress).run()


@dataclass
class _State:
    """How far a training is. `first` and `best` are KLs on held-out text: before any step, and the least since."""

    step: int = 0
    waited: int = 0  # evaluations without a gain
    first: float = math.inf
    best: float = math.inf


class _Loop:
    """One training: a dense teacher, a student, and where it is written down."""

    def __init__(
        self,
        training: Training,
        teacher: PreTrainedModel,
        folder: Path,
        ledger: Ledger[HealRecord] | None,
        progress: Progress,
    ) -> None:
        self.config, self.teacher, self.folder = training.config, teacher, folder
        self.ledger, self.progress = ledger, progress
        self.tokens, self.rows = training.batches[0].numel(), torch.cat(list(training.batches))
        self.size = len(training.batches[0])
        self.steps = -(-len(self.rows) // self.size)
        self.warm = round(self.config.warm_up * self.steps)
        self.every = max(1, self.steps // self.config.evaluations)
        self.scorer, self.state, self.start = TokenScorer(teacher), _State(), time.process_time()
        self.student = Student(teacher, training.plan, self.config, training.batches[0], layerwise=self.warm > 0)
        processes_of(teacher)  # before accelerate settles who they are without the model
        # what a batch does not need, such as an expert, waits for nobody
        spread = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(device_placement=False, kwargs_handlers=[spread])
        plain = torch.optim.AdamW(self.student.trained.values(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(self.student, plain)
        # what is trained is in float32, also where the rest has fewer bits
        half = teacher.dtype in (torch.bfloat16, torch.float16)
        self.autocast = torch.autocast(teacher.device.type, torch.bfloat16, enabled=half)
        share = training.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        self.held_out = _HeldOut(teacher, self.scorer, share)

    def run(self) -> dict[str, Tensor]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.config.seed))
        devices = [self.teacher.device] if self.teacher.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if not self._restore():
                self._evaluate()
            while self.state.step < self.steps and self.state.waited < self.config.patience:
                at = self.state.step * self.size
                self._step(self.rows[order[at : at + self.size]])
                self.state.step += 1
                self.progress(self.state.step, self.steps, "healing")
                if self.state.step % self.every == 0 or self.state.step == self.steps:
                    self._evaluate()
        self.accelerator.wait_for_everyone()
        for path, weight in read_tensors(self.folder / BEST)[0].items():
            self.student.trained[path].data.copy_(weight)
        self.accelerator.wait_for_everyone()  # all have read it before it is deleted
        return self.student.weights()

    def _step(self, batch: Tensor) -> None:
        """One of AdamW, on this process's share of a batch, (sequences, tokens)."""
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        share = batch[index::count]
        weight = len(share) * count / len(batch)  # gradients are averaged over processes, and are to be over tokens
        torch.manual_seed(self.config.seed + self.state.step * count + index)  # of dropout
        self.student.train()
        loss = self._loss(share if len(share) else batch[:1])
        self.accelerator.backward(weight * loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * share_of_rate(self.state.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, ids: Tensor) -> Tensor:
        """What has the gradient of the mean KL over tokens; in the warm-up a share of the stream's square."""
        if self.student.layerwise and self.state.step < self.warm:
            targets = self.student.layerwise.targets(ids)
            with self.autocast:
                return self.model(ids, targets).mean()
        with torch.no_grad():
            dense = states_of(self.teacher, ids)
        with self.autocast:
            states: Tensor = self.model(ids)
        _, derivative = self.scorer.distance(states.detach(), dense)
        return (states * derivative).sum(-1).mean()

    def _evaluate(self) -> None:
        """Look at the held-out text, and write down how far it is."""
        state = self.state
        self.student.eval()
        sums = self.held_out.sums(self.student.model, self.autocast)
        kl, nll, same, count = self.accelerator.reduce(sums, "sum").tolist()
        evaluation = HealRecord(
            tokens=state.step * self.tokens,
            held_out_kl=kl / count,
            held_out_nll=nll / count,
            held_out_agreement=same / count,
            seconds=time.process_time() - self.start,
        )
        is_best = state.step == 0 or kl / count < min(state.best, state.first)
        if state.step == 0:
            state.first = kl / count
        elif state.step > self.warm or not self.warm:  # the warm-up aims at something else
            state.waited = 0 if kl / count < state.best else state.waited + 1
        if state.step:
            state.best = min(state.best, kl / count)
        if self.accelerator.is_main_process:
            if self.ledger is not None and evaluation.key not in self.ledger:
                self.ledger.add(evaluation)
            self._save(is_best)

    def _save(self, is_best: bool) -> None:
        trained, moments = self.student.trained, self.optimizer.state
        if is_best:
            write_tensors(self.folder / BEST, trained)
        if self.state.step:
            held = {f"{kind} {path}": one for path, p in trained.items() for kind, one in moments.get(p, {}).items()}
            held |= {f"weight {path}": one for path, one in trained.items()}
            write_tensors(self.folder / LAST, held, {STATE: json.dumps(asdict(self.state))})

    def _restore(self) -> bool:
        """Go on from the last checkpoint; whether there is one, and what it is of is written down."""
        if not (self.folder / LAST).is_file() or not self.ledger:
            return False
        held, notes = read_tensors(self.folder / LAST)
        self.state = _State(**json.loads(notes[STATE]))
        for name, tensor in held.items():
            kind, _, path = name.partition(" ")
            parameter = self.student.trained[path]
            if kind == "weight":
                parameter.data.copy_(tensor)
            else:
                self.optimizer.state[parameter][kind] = tensor.to(parameter.device)
        self.start -= max(evaluation.seconds or 0 for evaluation in self.ledger)
        return True


def processes_of(model: PreTrainedModel) -> PartialState:
    """Those that a launcher has started to train `model` together, or this one alone."""
    return PartialState(cpu=model.device.type == "cpu")  # which it does not find out where there is no GPU


def share_of_rate(step: int, steps: int) -> float:
    """What the learning rate is multiplied by, 0 to 1: a straight rise, and half a wave of a cosine down."""
    rise = min(10, steps // 10)
    if step < rise:
        return step / rise
    return 0.5 * (1.0 + math.cos(math.pi * ((step - rise) / max(1, steps - rise))))


class _HeldOut:
    """The held-out text, (batch, tokens) each, and what the dense model says of it, once."""

    def __init__(self, teacher: PreTrainedModel, scorer: TokenScorer, batches: Sequence[Tensor]) -> None:
        self.scorer, self.asked = scorer, list[tuple[Tensor, Tensor, Tensor, Dense]]()
        for ids in batches:
            targets = ids[:, 1:].flatten()
            scores, dense = scorer.dense(rows_of(teacher, ids), targets, likeliest=True)
            self.asked.append((ids, targets, scores.likeliest, dense))

    @torch.no_grad()
    def sums(self, student: PreTrainedModel, autocast: torch.autocast) -> Tensor:
        """KL, NLL and same first choices, summed over all tokens that are predicted, and how many these are, (4,)."""
        found = [torch.zeros(4, 0, device=student.device)]
        for ids, targets, likeliest, dense in self.asked:
            with autocast:
                rows = rows_of(student, ids).to(student.dtype)
            scores = self.scorer.score(rows, targets, dense, likeliest=True)
            same = (scores.likeliest == likeliest).to(scores.kl)
            found.append(torch.stack([scores.kl, scores.nll, same, torch.ones_like(same)]))
        return torch.cat(found, 1).sum(1)
