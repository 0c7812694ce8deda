"""The loop of a recovery fine-tuning: AdamW on accelerate, with evaluations on held-out
text, checkpoints, and an end by time or where nothing falls any longer.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import tensor_files
from ..digests import digest_of_json
from ..measuring.quality import evaluate
from ..measuring.token_scores import Dense, TokenScorer
from ..plan import several
from ..progress import Progress
from ..results.facts import State
from ..results.ledger import Ledger
from ..results.repairs import HealRecord
from ..running.generating import seeded
from .brake import Brake
from .checkpoints import Checkpoints
from .students import followed_rows, states_of
from .training import Training, training_settings


def processes_of(model: PreTrainedModel) -> PartialState:  # type: ignore[no-any-unimported]
    """Those that a launcher has started to train `model` together, or this one
    alone.
    """
    # it doesn't find out by itself that there is no GPU
    return PartialState(cpu=model.device.type == "cpu")


@dataclass
class LoopState:
    """How far a training is. `first` and `best` are KLs on held-out text: before any
    step, and the least since.
    """

    step: int = 0
    waited: int = 0  # evaluations without a gain
    first: float = math.inf
    best: float = math.inf
    begun: float = 0.0  # CPU seconds before the first step
    step_seconds: float = 0.0  # of the last step
    evaluation_seconds: float = 0.0  # of the last evaluation
    looked: int = 0  # evaluations that were due
    brake: Brake = field(default_factory=Brake)


class HeldOut(NamedTuple):
    """A batch of held-out text, and what the original model predicts of it."""

    ids: Tensor  # (batch, tokens)
    targets: Tensor  # (predicted,), of all sequences
    likeliest: Tensor  # (predicted,), the original model's
    dense: Dense


@dataclass(eq=False)
class Loop:
    """One training. It lasts as long as its call of `run`, or goes on from the last
    checkpoint of an earlier one.
    """

    training: Training
    teacher: PreTrainedModel
    checkpoints: Checkpoints
    ledger: Ledger[HealRecord]
    progress: Progress

    def __post_init__(self) -> None:
        training, teacher = self.training, self.teacher
        self.config = training.config
        self.rows = torch.cat(list(training.batches))  # (sequences, tokens)
        self.size = len(training.batches[0])  # sequences of a step
        self.tokens = training.batches[0].numel()  # of a step
        self.steps = -(-len(self.rows) // self.size)  # of a pass over the text
        # the share of the training in which the rate rises
        self.rise = 0.1
        if not self.config.minutes:
            self.rise = min(10, self.steps // 10) / self.steps
        self.of = digest_of_json(training_settings(training, ()))
        self.state = LoopState()
        self.scorer = TokenScorer(teacher)
        earlier = [evaluation.seconds for evaluation in self.ledger]
        self.start = training.clock() - max([training.spent, *earlier])
        self.student = training.student(teacher)
        processes_of(teacher)  # before accelerate finds them without the model
        # what a batch does not need, such as an expert, waits for nobody
        spread = DistributedDataParallelKwargs(find_unused_parameters=True)
        # the student is in the precision of the original model, whatever a launcher
        # would choose
        self.accelerator = Accelerator(
            mixed_precision="no", device_placement=False, kwargs_handlers=[spread]
        )
        self.model = self.accelerator.prepare(self.student)
        self.trained = [*self.student.trained.values()]
        self.optimizer = torch.optim.AdamW(
            self.trained, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        # float16 has no room for small gradients, nor for large ones: the default
        # model's begin at about 2
        is_needed = teacher.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(
            teacher.device.type, init_scale=2.0**13, enabled=is_needed
        )
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        self.held_out = [
            self._scored_by_teacher(ids) for ids in training.held_out[index::count]
        ]

    def _scored_by_teacher(self, ids: Tensor) -> HeldOut:
        start = self.training.start
        targets = ids[:, start + 1 :].flatten()
        states = followed_rows(self.teacher, ids, start)
        scores, dense = self.scorer.dense(states, targets, likeliest=True)
        return HeldOut(ids, targets, scores.likeliest, dense)

    @property
    def seconds(self) -> float:
        """CPU seconds so far, also before a break, and of the repair."""
        return self.training.clock() - self.start

    @property
    def done(self) -> float:
        """The share of the training before the next step: of its steps, or of its time
        until the middle of that one.
        """
        state, minutes = self.state, self.config.minutes
        if minutes is None:
            return state.step / self.steps
        # the last evaluation is within the time
        most = 60 * minutes - state.evaluation_seconds
        if most <= 0:
            return 1.0
        return (self.seconds + state.step_seconds / 2 - state.begun) / most

    @property
    def looks(self) -> float:
        """How often the held-out text is looked at, about; of a time that is given, for
        a sixth at most.
        """
        if self.config.minutes is None:
            return self.steps / max(1, self.steps // self.config.evaluations)
        fitting = 10 * self.config.minutes / max(self.state.evaluation_seconds, 1e-9)
        return max(1.0, min(self.config.evaluations, fitting))

    def run(self) -> dict[str, Tensor]:
        """The best weights, by their paths in the original model."""
        with seeded(self.config.seed):
            if not self._restore():
                self._begin()
            state, done = self.state, self.done
            while done < 1 and not self._has_stopped_falling():
                before = self.seconds
                kl = self._step(self._next_batch(), done)
                state.step += 1
                state.step_seconds = self.seconds - before
                done = self.done
                self.progress(min(done, 1.0) * self.steps, self.steps, "healing")
                due = int(done * self.looks + 1e-9)
                is_due = done >= 1 or due > state.looked
                if self._alarms(kl) or is_due:
                    state.looked = max(due, state.looked)
                    self._evaluate()
                    done = self.done
        if self.accelerator.is_main_process and (line := self._outcome()):
            warnings.warn(line, stacklevel=2)
        self.accelerator.wait_for_everyone()
        self._take_best()
        self.accelerator.wait_for_everyone()  # all have read it before it is deleted
        return self.student.weights()

    def _take_best(self) -> None:
        best, _ = tensor_files.read_tensors(self.checkpoints.best, of=self.of)
        for path, weight in best.items():
            self.student.trained[path].data.copy_(weight)

    def _has_stopped_falling(self) -> bool:
        """Whether the KL rose at every rate, or has gained nothing for as long as the
        patience; a training of a given time goes on then.
        """
        is_patient = self.config.minutes or self.state.waited < self.config.patience
        return self.state.brake.is_over or not is_patient

    def _outcome(self) -> str:
        """What a user should know of how the KL went, in a line."""
        state, sentences = self.state, []
        if count := state.brake.count:
            rate = self.config.rate * state.brake.factor
            then = "ended early" if state.brake.is_over else f"went on at {rate:.2g}"
            sentences = [
                f"KL on held-out text rose at a rate of {self.config.rate:g}: training"
                f" went back to the best weights {several(count, 'time')}, and {then}"
            ]
        if state.step and state.best >= state.first:
            sentences.append(
                "KL on held-out text did not fall: no weight is changed; try a lower"
                " --rate"
            )
        return ". ".join(sentences)

    def _next_batch(self) -> Tensor:
        """The sequences of the next step, (sequences, tokens): each pass over the text
        has an order of its own.
        """
        passes, number = divmod(self.state.step, self.steps)
        draw = torch.Generator().manual_seed(self.config.seed + passes)
        order = torch.randperm(len(self.rows), generator=draw)
        return self.rows[order[number * self.size :][: self.size]]

    def _begin(self) -> None:
        """Evaluate what the training begins with, and what a repair began with."""
        if self.training.spent:
            (skipped,) = evaluate(
                self.teacher,
                [self.training.plan.unrepaired],
                self.training.held_out,
                prompt_tokens=self.training.prompt_tokens,
            )
            self._note("skipped", skipped.kl, skipped.nll, skipped.top1_agreement, 0.0)
        self._evaluate()
        self.state.begun = self.seconds
        self.state.step_seconds = self.state.evaluation_seconds  # about as much work

    def _alarms(self, kl: float) -> bool:
        """Whether the KL of the last batch is a cause to look at held-out text."""
        return not self.config.warm_up and self.state.brake.alarms(kl, self.state.first)

    def _step(self, batch: Tensor, done: float) -> float:
        """One of AdamW, on this process's share of a batch, (sequences, tokens), where
        so much of the training is done; the batch's KL before it.
        """
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        share = batch[index::count]
        # gradients are averaged over processes, and are to be over tokens
        weight = len(share) * count / len(batch)
        # of dropout
        torch.manual_seed(self.config.seed + self.state.step * count + index)
        self.student.train()
        self.is_warming = done < self.config.warm_up
        loss, kl = self._loss(share if len(share) else batch[:1])
        self.scaler.scale(weight * loss).backward()
        self.student.take_gradients()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(done)
        # makes no step where a gradient is not finite: the next one is scaled by less
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.student.follow()
        return float(self.accelerator.reduce(kl, "mean"))

    def _rate(self, done: float) -> float:
        """It rises in a straight line, and falls in half a wave of a cosine."""
        rate = self.config.rate * self.state.brake.factor
        if done < self.rise:
            return rate * (done / self.rise)
        fall = 0.5 * (1.0 + math.cos(math.pi * (done - self.rise) / (1 - self.rise)))
        return rate * fall

    def _loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What has the gradient of the mean KL over tokens, and that KL; in the warm-up
        a share of the stream's square. `ids` are (sequences, tokens).
        """
        if self.student.layerwise and self.is_warming:
            targets = self.student.layerwise.targets(ids)
            losses: Tensor = self.model(ids, targets)
            return losses.mean(), losses.detach().mean()
        with torch.no_grad():
            dense = states_of(self.teacher, ids, self.training.start)
        states: Tensor = self.model(ids)
        nats, derivative = self.scorer.distance(states.detach(), dense)
        return (states * derivative).sum(-1).mean(), nats.mean()

    def _evaluate(self) -> None:
        state = self.state
        before = self.seconds
        self.student.eval()
        sums = self.accelerator.reduce(self._held_out_sums(), "sum")
        kl, nll, agreement, count = sums.tolist()
        found = kl / count
        state.evaluation_seconds = self.seconds - before
        least = min(state.best, state.first)
        is_best = state.step == 0 or found < least
        if state.step == 0:
            state.first = found
        elif not self.is_warming:  # the warm-up aims at something else
            state.waited = 0 if found < state.best else state.waited + 1
        if state.step:
            state.best = min(state.best, found)
        self._note(
            "healed" if state.step else self.training.plan.state,
            found,
            nll / count,
            agreement / count,
            self.seconds,
        )
        if state.step and not self.config.warm_up and state.brake.slows(found, least):
            self._go_back()
        if self.accelerator.is_main_process:
            self._save(is_best)

    def _go_back(self) -> None:
        """To the best weights, and without what AdamW has learnt since."""
        self._take_best()
        self.student.follow()
        self.optimizer.state.clear()
        self.state.waited = 0

    def _note(
        self, model: State, kl: float, nll: float, agreement: float, seconds: float
    ) -> None:
        """Write down an evaluation, in one process, unless it is there."""
        tokens = self.state.step * self.tokens
        if not self.accelerator.is_main_process or (model, tokens) in self.ledger:
            return
        record = {
            "model": model,
            "tokens": tokens,
            "held_out_kl": kl,
            "held_out_nll": nll,
            "held_out_agreement": agreement,
            "seconds": seconds,
        }
        self.ledger.add(HealRecord.model_validate(record))

    @torch.no_grad()
    def _held_out_sums(self) -> Tensor:
        """KL, NLL and top-1 agreement, summed over all tokens that are predicted, and
        how many these are, (4,).
        """
        student = self.student.model
        found = [torch.zeros(4, 0, device=student.device)]
        for one in self.held_out:
            states = self.student.rows(one.ids)
            scores = self.scorer.score(states, one.targets, one.dense, likeliest=True)
            same = (scores.likeliest == one.likeliest).to(scores.kl)
            sums = [scores.kl, scores.nll, same, torch.ones_like(same)]
            found.append(torch.stack(sums).to(student.device))  # (4, predicted)
        return torch.cat(found, 1).sum(1)

    def _save(self, is_best: bool) -> None:
        """Write the weights where they are the best, and all that a next run needs."""
        trained, moments = self.student.trained, self.optimizer.state
        of = {tensor_files.OF: self.of}
        if is_best:
            tensor_files.write_tensors(self.checkpoints.best, trained, of)
        if not self.state.step:
            return
        tensors: dict[str, Tensor] = {}
        for path, parameter in trained.items():
            for kind, tensor in moments.get(parameter, {}).items():
                tensors[f"{kind} {path}"] = tensor
        for path, parameter in trained.items():
            tensors[f"weight {path}"] = parameter
        notes = {
            "state": json.dumps(asdict(self.state)),
            **of,
            "scaler": json.dumps(self.scaler.state_dict()),
        }
        tensor_files.write_tensors(self.checkpoints.last, tensors, notes)

    def _restore(self) -> bool:
        """Go on from the last checkpoint, and say whether there is one whose
        evaluations are written down.
        """
        if not self.checkpoints.last.is_file() or not self.ledger:
            return False
        tensors, notes = tensor_files.read_tensors(self.checkpoints.last, of=self.of)
        state = json.loads(notes["state"])
        self.state = LoopState(**state | {"brake": Brake(**state.get("brake", {}))})
        if scaler := json.loads(notes.get("scaler", "{}")):
            self.scaler.load_state_dict(scaler)
        for name, tensor in tensors.items():
            kind, _, path = name.partition(" ")
            parameter = self.student.trained[path]
            if kind == "weight":
                parameter.data.copy_(tensor)
            else:
                self.optimizer.state[parameter][kind] = tensor.to(parameter.device)
        self.student.follow()
        return True
