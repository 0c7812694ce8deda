"""Heal a skipped model by a short distillation of weights of kept sublayers, by AdamW
on accelerate.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import tensor_files
from ..digests import digest_of, digest_of_json
from ..errors import UnsupportedModel, UsageError, expect
from ..measuring.heads import Head
from ..measuring.quality import check_prompt, evaluate
from ..measuring.token_scores import Dense, TokenScorer
from ..models.loading import load as load_model
from ..models.quantisation import quantisation_name, quantisation_of
from ..models.texts import checked
from ..models.windows import refuse_overlap
from ..plan import Plan, several
from ..progress import Progress, silent
from ..results.facts import State
from ..results.ledger import Ledger, working_in
from ..results.provenance import Provenance
from ..results.repairs import HealRecord, RepairStep
from ..running import repair_folder
from ..running.generating import seeded
from ..running.repaired import RepairedPlan
from ..structure.locating import locate
from ..structure.model_structure import base_model
from .checkpoints import Checkpoints
from .refitting import about_weights
from .students import PromptStudent, Student, TrainConfig, rows_of, states_of


def heal(
    model: PreTrainedModel,
    plan: Plan,
    batches: Sequence[Tensor],
    held_out: Sequence[Tensor],
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    provenance: Provenance | Mapping[str, object] | None = None,
    workers: "Spread | None" = None,
    progress: Progress = silent,
    spent: float = 0.0,
    clock: Callable[[], float] = time.process_time,
) -> RepairedPlan:
    """`plan`, repaired or not, with weights of what it keeps trained to be near the
    original model.

    `batches` are token ids, (batch, tokens), a step of AdamW each, as `config` says. It
    ends early where the KL on the batches `held_out` no longer falls, and keeps the
    best weights, possibly the initial ones. With a folder `out` the result is kept, and
    an interrupted run resumed. Several processes may share each batch, and need the
    folder: `workers`, or those of `accelerate launch`. After a repair of `spent` CPU
    seconds the record begins with the skipped model.

    Needs room for what is trained, and for its gradients and moments. Raises
    `UsageError` for a plan that does not fit or skips nothing, held-out windows that
    overlap those of `batches`, a quantised model, a folder that holds other work or is
    in use, a full disk, `lora` without peft, workers that fail or are given `minutes`,
    and `UnsupportedModel` as `locate` does and where the head is no matrix.
    """
    expect(plan, Plan, "a plan, such as notall.Plan(attention=[3])")
    config, inner = config or TrainConfig(), base_model(model)
    training = Training(
        plan,
        [*checked(batches, model)],
        [*checked(held_out, model)],
        config,
        spent,
        clock,
    )
    training.check(inner)
    processes = processes_of(inner)
    if (workers or processes.num_processes > 1) and (not out or config.minutes):
        told = (
            "do not train by time: drop --minutes or --ray"
            if out
            else "share a folder: give one"
        )
        raise UsageError(f"workers {told}")
    if plan.prefill and (workers or processes.num_processes > 1):
        raise UsageError(
            "keys and values of the prompt are trained in one process: drop --ray"
        )
    earlier = plan if isinstance(plan, RepairedPlan) else RepairedPlan.of(plan)
    about = about_weights(
        provenance or {}, inner, plan, **_settings(training, earlier.history)
    )
    is_first = processes.is_main_process  # which keeps the folder for all
    with (
        TemporaryDirectory() as scratch,
        working_in(Path(out or scratch), "heal") if is_first else nullcontext(),
    ):
        folder = Path(out or scratch)
        ledger, is_finished = (
            Ledger(folder, HealRecord, about),
            repair_folder.refuse_other_work(folder, HealRecord, plan),
        )
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
        brought = {kind: {**getattr(earlier, kind), **trained}}
        healed = RepairedPlan.of(plan, **brought, history=history).knowing(inner)
        if out and is_first:
            repair_folder.keep_whole(folder, healed, repair_folder.HEALED)
            checkpoints.remove()
        processes.wait_for_everyone()
    return healed


def _settings(training: "Training", history: Sequence[RepairStep]) -> dict[str, object]:
    plan, how = training.plan, asdict(training.config)
    how["train_seed"] = how.pop("seed")  # that of the text has this name
    if training.config.train != "lora":
        del how["rank"]
    del how["prompt_tokens"]
    if training.prompt_tokens is not None:
        how["prompt_tokens"] = training.prompt_tokens
    return how | {
        "repair": plan.digest if isinstance(plan, RepairedPlan) else "none",
        "training": digest_of(training.batches)[:16],
        "stops_by": digest_of(training.held_out)[:16],
        repair_folder.BEFORE: [step.model_dump(mode="json") for step in history],
    }


@dataclass(frozen=True)
class Training:
    """What is trained, on which text and how, wherever that is."""

    plan: Plan
    batches: Sequence[Tensor]
    held_out: Sequence[Tensor]
    config: TrainConfig
    spent: float = (
        0.0  # CPU seconds that made the plan's weights, where the record has them
    )
    clock: Callable[[], float] = time.process_time

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` for a model, plan or text that can't be trained, and as
        `heal` does.
        """
        if told := quantisation_of(model.config):
            why = (
                "healing trains plain weights, and these are quantised"
                f" ({quantisation_name(told)})"
            )
            fix = (
                "heal the plan on the model that was quantised, export that, and"
                " quantise the export"
            )
            raise UsageError(f"{why}: {fix}")
        if any(one.is_meta for one in model.parameters()):
            why = (
                "healing trains weights in memory, and accelerate offloaded a part of"
                " this model"
            )
            raise UsageError(f"{why}: load it on devices that hold all of it")
        structure = locate(model)
        self.plan.check(structure)
        if self.plan.prefill:
            self._check_prompt()
        structure.refuse_stubs("healing")
        if Head(model).projection is None:
            why = (
                f"the head of {type(model).__name__} is no matrix, and cannot be"
                " aimed at"
            )
            raise UnsupportedModel(f"{why}; use notall.repair instead")
        if not self.plan or not self.batches or not self.held_out:
            raise UsageError(
                "healing takes a plan that skips something, text to train on, and other"
                " text to stop by"
            )
        refuse_overlap(self.held_out, self.batches, "is trained on")
        if len({batch.shape[1] for batch in self.batches}) > 1:
            raise UsageError(
                "the windows to train on are of several lengths: give windows of one"
            )

    def _check_prompt(self) -> None:
        """Raise `UsageError` for what cannot be trained of a plan that skips in the
        prompt alone.
        """
        if len(self.plan):
            told = (
                "healing is of what is skipped for every token, or in the prompt alone,"
                " and this plan does both"
            )
            raise UsageError(f"{told}: heal a plan of each part")
        if self.config.train != "outputs" or self.config.warm_up:
            told = (
                "of a plan that skips in the prompt alone, the prompt's keys and values"
                " are trained"
            )
            raise UsageError(
                f"{told}: leave train and warm_up (--train, --warm-up) as they are"
            )
        for batch in (*self.batches, *self.held_out):
            check_prompt([self.plan], batch.shape[1], self.prompt_tokens)

    @property
    def prompt_tokens(self) -> int | None:
        """How many first tokens of each window are the prompt, of a plan that skips in
        it alone.
        """
        if not self.plan.prefill:
            return None
        return self.config.prompt_tokens or self.batches[0].shape[1] // 2

    @property
    def start(self) -> int:
        """The first token of each window from which something is predicted that
        counts.
        """
        return 0 if self.prompt_tokens is None else self.prompt_tokens - 1

    def student(self, model: PreTrainedModel) -> Student:
        if self.prompt_tokens is None:
            return Student(model, self.plan, self.config, self.batches[0])
        return PromptStudent(model, self.plan, self.prompt_tokens)

    def run(
        self,
        model: PreTrainedModel,
        folder: Path,
        ledger: Ledger[HealRecord],
        progress: Progress,
    ) -> dict[str, Tensor]:
        """The best weights, by their paths in `model`, the dense one. All processes run
        this; the first one writes.
        """
        return _Loop(self, model, Checkpoints.of(folder), ledger, progress).run()


@dataclass
class _State:
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


@dataclass(eq=False)
class _Loop:
    training: Training
    teacher: PreTrainedModel
    checkpoints: Checkpoints
    ledger: Ledger[HealRecord]
    progress: Progress

    def __post_init__(self) -> None:
        training, teacher, self.config = (
            self.training,
            self.teacher,
            self.training.config,
        )
        self.tokens, self.rows = (
            training.batches[0].numel(),
            torch.cat(list(training.batches)),
        )
        self.size = len(training.batches[0])
        self.steps = -(-len(self.rows) // self.size)  # of a pass over the text
        self.rise = (
            0.1 if self.config.minutes else min(10, self.steps // 10) / self.steps
        )  # the share of a rising rate
        self.of = digest_of_json(_settings(training, ()))
        self.scorer, self.state, self.start = (
            TokenScorer(teacher),
            _State(),
            training.clock(),
        )
        self.start -= max(
            [training.spent, *(evaluation.seconds for evaluation in self.ledger)]
        )
        self.student = training.student(teacher)
        processes_of(
            teacher
        )  # before accelerate settles who they are without the model
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
        self.held_out = list[
            tuple[Tensor, Tensor, Tensor, Dense]
        ]()  # token ids, and what the original says of them
        for ids in training.held_out[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]:
            targets = ids[:, training.start + 1 :].flatten()
            scores, dense = self.scorer.dense(
                rows_of(teacher, ids, training.start), targets, likeliest=True
            )
            self.held_out.append((ids, targets, scores.likeliest, dense))

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
        most = (
            60 * minutes - state.evaluation_seconds
        )  # the last evaluation is within the time
        return (
            (self.seconds + state.step_seconds / 2 - state.begun) / most
            if most > 0
            else 1.0
        )

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
        with seeded(self.config.seed):
            if not self._restore():
                self._begin()
            state, done = self.state, self.done
            while done < 1 and (
                self.config.minutes or state.waited < self.config.patience
            ):
                passes, number = divmod(
                    state.step, self.steps
                )  # each pass over the text has an order of its own
                generator, before = (
                    torch.Generator().manual_seed(self.config.seed + passes),
                    self.seconds,
                )
                order = torch.randperm(len(self.rows), generator=generator)
                self._step(self.rows[order[number * self.size :][: self.size]], done)
                state.step += 1
                state.step_seconds = self.seconds - before
                done = self.done
                self.progress(min(done, 1.0) * self.steps, self.steps, "healing")
                if done >= 1 or int(done * self.looks + 1e-9) > state.looked:
                    state.looked = int(done * self.looks + 1e-9)
                    self._evaluate()
                    done = self.done
        if (
            state.step
            and state.best >= state.first
            and self.accelerator.is_main_process
        ):
            warnings.warn(
                "KL on held-out text did not fall: no weight is changed; try a lower"
                " --rate",
                stacklevel=2,
            )
        self.accelerator.wait_for_everyone()
        for path, weight in tensor_files.read_tensors(
            self.checkpoints.best, of=self.of
        )[0].items():
            self.student.trained[path].data.copy_(weight)
        self.accelerator.wait_for_everyone()  # all have read it before it is deleted
        return self.student.weights()

    def _begin(self) -> None:
        """Evaluate what the training begins with, and what a repair began with."""
        if self.training.spent:
            cut = {"prompt_tokens": self.training.prompt_tokens}
            (skipped,) = evaluate(
                self.teacher,
                [self.training.plan.unrepaired],
                self.training.held_out,
                **cut,
            )
            self._note("skipped", skipped.kl, skipped.nll, skipped.top1_agreement, 0.0)
        self._evaluate()
        self.state.begun, self.state.step_seconds = (
            self.seconds,
            self.state.evaluation_seconds,
        )  # about as much work

    def _step(self, batch: Tensor, done: float) -> None:
        """One of AdamW, on this process's share of a batch, (sequences, tokens), where
        so much of the training is done.

        The rate rises in a straight line, and falls in half a wave of a cosine.
        """
        count, index = self.accelerator.num_processes, self.accelerator.process_index
        share = batch[index::count]
        weight = (
            len(share) * count / len(batch)
        )  # gradients are averaged over processes, and are to be over tokens
        torch.manual_seed(
            self.config.seed + self.state.step * count + index
        )  # of dropout
        self.student.train()
        self.is_warming = done < self.config.warm_up
        loss = weight * self._loss(share if len(share) else batch[:1])
        self.scaler.scale(loss).backward()
        self.student.take_gradients()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        fall = 0.5 * (1.0 + math.cos(math.pi * (done - self.rise) / (1 - self.rise)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate * (
                done / self.rise if done < self.rise else fall
            )
        self.scaler.step(
            self.optimizer
        )  # unless a gradient is not finite: the next one is scaled by less
        self.scaler.update()
        self.optimizer.zero_grad()
        self.student.follow()

    def _loss(self, ids: Tensor) -> Tensor:
        """What has the gradient of the mean KL over tokens; in the warm-up a share of
        the stream's square.
        """
        if self.student.layerwise and self.is_warming:
            targets = self.student.layerwise.targets(ids)
            return self.model(ids, targets).mean()
        with torch.no_grad():
            dense = states_of(self.teacher, ids, self.training.start)
        states: Tensor = self.model(ids)
        _, derivative = self.scorer.distance(states.detach(), dense)
        return (states * derivative).sum(-1).mean()

    def _evaluate(self) -> None:
        state, before = self.state, self.seconds
        self.student.eval()
        kl, nll, same, count = self.accelerator.reduce(
            self._held_out_sums(), "sum"
        ).tolist()
        found, state.evaluation_seconds = kl / count, self.seconds - before
        is_best = state.step == 0 or found < min(state.best, state.first)
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
            same / count,
            self.seconds,
        )
        if self.accelerator.is_main_process:
            self._save(is_best)

    def _note(
        self, model: State, kl: float, nll: float, agreement: float, seconds: float
    ) -> None:
        """Write down an evaluation, in one process, unless it is there."""
        tokens = self.state.step * self.tokens
        if self.accelerator.is_main_process and (model, tokens) not in self.ledger:
            found = {
                "held_out_kl": kl,
                "held_out_nll": nll,
                "held_out_agreement": agreement,
                "seconds": seconds,
            }
            self.ledger.add(
                HealRecord.model_validate({"model": model, "tokens": tokens, **found})
            )

    @torch.no_grad()
    def _held_out_sums(self) -> Tensor:
        """KL, NLL and same first choices, summed over all tokens that are predicted,
        and how many these are, (4,).
        """
        student = self.student.model
        found = [torch.zeros(4, 0, device=student.device)]
        for ids, targets, likeliest, dense in self.held_out:
            scores = self.scorer.score(
                self.student.rows(ids), targets, dense, likeliest=True
            )
            same = (scores.likeliest == likeliest).to(scores.kl)
            found.append(
                torch.stack([scores.kl, scores.nll, same, torch.ones_like(same)]).to(
                    student.device
                )
            )
        return torch.cat(found, 1).sum(1)

    def _save(self, is_best: bool) -> None:
        trained, moments = self.student.trained, self.optimizer.state
        if is_best:
            tensor_files.write_tensors(
                self.checkpoints.best, trained, {tensor_files.OF: self.of}
            )
        if self.state.step:
            held = {
                f"{kind} {path}": one
                for path, p in trained.items()
                for kind, one in moments.get(p, {}).items()
            }
            held |= {f"weight {path}": one for path, one in trained.items()}
            notes = {"state": json.dumps(asdict(self.state)), tensor_files.OF: self.of}
            notes["scaler"] = json.dumps(self.scaler.state_dict())
            tensor_files.write_tensors(self.checkpoints.last, held, notes)

    def _restore(self) -> bool:
        """Go on from the last checkpoint, and say whether there is one whose
        evaluations are written down.
        """
        if not self.checkpoints.last.is_file() or not self.ledger:
            return False
        held, notes = tensor_files.read_tensors(self.checkpoints.last, of=self.of)
        self.state = _State(**json.loads(notes["state"]))
        if scaler := json.loads(notes.get("scaler", "{}")):
            self.scaler.load_state_dict(scaler)
        for name, tensor in held.items():
            kind, _, path = name.partition(" ")
            parameter = self.student.trained[path]
            if kind == "weight":
                parameter.data.copy_(tensor)
            else:
                self.optimizer.state[parameter][kind] = tensor.to(parameter.device)
        self.student.follow()
        return True


def processes_of(model: PreTrainedModel) -> PartialState:
    """Those that a launcher has started to train `model` together, or this one
    alone.
    """
    return PartialState(
        cpu=model.device.type == "cpu"
    )  # which it does not find out where there is no GPU


@dataclass(frozen=True)
class Spread:
    """Workers that share a training, each with the model that `load_options` (the
    arguments of `notall.load`) name.

    They are those of a Ray cluster, which needs the extra `ray`. `address` is as in
    `cluster.joined`, but from a machine of the cluster. There are `count` workers, or
    one for each GPU, or without GPUs as many as half of the CPUs.
    """

    load_options: Mapping[str, Any]
    address: str = "local"
    count: int | None = None

    def check(self, rows: int, count: int | None = None) -> None:
        """Raise `UsageError` where `count` workers, else as many as are asked for,
        can't train on batches of `rows`.
        """
        if self.address.startswith("ray://"):
            raise UsageError(
                "a training is started from a machine of the cluster: give --ray auto"
                " or HOST:PORT there"
            )
        count = count or self.count or 1
        if count < 1 or rows % count:
            told = f"{several(count, 'worker')} cannot share a batch of {rows} evenly"
            raise UsageError(f"{told}: give another --per-step or --ray-workers")

    def train(
        self, training: Training, folder: Path, about: Provenance, progress: Progress
    ) -> dict[str, Tensor]:
        """As `Training.run`, in a `folder` that all see. Raises `UsageError` for uneven
        batches and lost workers.
        """
        from ..running import cluster

        self.check(len(training.batches[0]))
        with cluster.joined(self.address):
            most, has_gpus = cluster.room()
            count, on_gpus = (
                self.count or most,
                has_gpus and self.load_options.get("device") != "cpu",
            )
            self.check(len(training.batches[0]), count)
            progress(0, 1, f"healing on {several(count, 'worker')}")
            given = {
                "training": training,
                "folder": folder.absolute(),
                "about": about,
                "load": dict(self.load_options),
            }
            with Checkpoints.of(folder).for_ray() as scratch:
                cluster.train(_work, given, scratch, count=count, on_gpus=on_gpus)
            progress(1, 1, f"healed on {several(count, 'worker')}")
        return tensor_files.read_tensors(Checkpoints.of(folder).trained)[0]


def _work(
    device: str | None,
    is_first: bool,
    *,
    training: Training,
    folder: Path,
    about: Provenance,
    load: Mapping[str, Any],
) -> None:
    """What each worker does; the first of them writes it down."""
    model, _ = load_model(**{**load, **({"device": device} if device else {})})
    trained = training.run(
        base_model(model), folder, Ledger(folder, HealRecord, about), silent
    )
    if is_first:
        tensor_files.write_tensors(Checkpoints.of(folder).trained, trained)
