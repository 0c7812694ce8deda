"""What a recovery fine-tuning trains, and whether it can."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from ..digests import digest_of
from ..errors import UnsupportedModel, UsageError
from ..measuring.heads import Head
from ..measuring.quality import check_prompt
from ..models.quantisation import quantisation_name, quantisation_of
from ..models.windows import refuse_overlap
from ..plan import Plan, refuse_nothing_to_train
from ..progress import Progress
from ..results.ledger import Ledger
from ..results.repairs import HealRecord, RepairStep
from ..running import repair_folder
from ..running.repaired import RepairedPlan
from ..structure.locating import locate
from .checkpoints import Checkpoints
from .students import PromptStudent, Student
from .train_config import TrainConfig


@dataclass(frozen=True)
class Training:
    """What is trained, on which text and how, wherever that is."""

    plan: Plan
    batches: Sequence[Tensor]  # token ids, (batch, tokens), a step each
    held_out: Sequence[Tensor]  # likewise; what the training ends by
    config: TrainConfig
    # CPU seconds that made the plan's weights, where the record has them
    spent: float = 0.0
    clock: Callable[[], float] = time.process_time

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UsageError` for a model, plan or text that can't be trained, and as
        `heal` does.
        """
        if quantisation := quantisation_of(model.config):
            raise UsageError(
                "healing trains plain weights, and these are quantised"
                f" ({quantisation_name(quantisation)}): heal the plan on the model that"
                " was quantised, export that, and quantise the export"
            )
        if any(one.is_meta for one in model.parameters()):
            raise UsageError(
                "healing trains weights in memory, and accelerate offloaded a part of"
                " this model: load it on devices that hold all of it"
            )
        structure = locate(model)
        self.plan.check(structure)
        if self.plan.prefill:
            self._check_prompt()
        structure.refuse_stubs("healing")
        if Head(model).projection is None:
            raise UnsupportedModel(
                f"the head of {type(model).__name__} is no matrix, and cannot be"
                " aimed at; use notall.repair instead"
            )
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
            raise UsageError(
                "healing is of what is skipped for every token, or in the prompt alone,"
                " and this plan does both: heal a plan of each part"
            )
        refuse_nothing_to_train(self.plan)
        if self.config.train != "outputs" or self.config.warm_up:
            raise UsageError(
                "of a plan that skips in the prompt alone, the prompt's keys and values"
                " are trained: leave train and warm_up (--train, --warm-up) as they are"
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
        """The skipped model, of which some weights are trained; it shares all others
        with `model`.
        """
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
        """The best weights, by their paths in `model`, the original one. All processes
        call this; the first one writes to `folder`.
        """
        from .training_loop import Loop

        return Loop(self, model, Checkpoints.of(folder), ledger, progress).run()


def training_settings(
    training: Training, history: Sequence[RepairStep]
) -> dict[str, object]:
    """What identifies a training, for its records; `history` is what was done to the
    plan's weights before.
    """
    plan = training.plan
    how = asdict(training.config)
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
