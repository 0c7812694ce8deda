"""The model that a healing trains: a copy of the dense one without what a plan skips, and which weights are trained."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModel, UsageError, shortened
from ..records.plan import Plan
from ..running.repaired import RepairedPlan
from ..running.replay import Recording, live_steps, record
from ..running.skipping import remove
from ..structure.anatomy import Anatomy
from ..structure.locating import decoder_layers
from ..structure.observation import LayerCall, forward_replaced, run_branches, scaled
from .projections import find_projection
from .readers import is_norm, reading_gains
from .streams import DenseStream, steps_of

Trained = Literal["outputs", "all", "lora"]
RANK = 16  # of LoRA matrices
ADAPTER = "healing"
PROBED = 16  # tokens to find a projection with


class Student(nn.Module):
    """`model` without what `plan` skips, with the weights that the plan brings; the model itself stays as it is.

    `trained` are the parameters to train, by name: those of kept sublayers themselves, in float32, or LoRA matrices
    beside theirs. Weights that several layers share stay as they are. A `stream` is there where one is asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        plan: Plan,
        train: Trained,
        tokens: Tensor,
        *,
        rank: int = RANK,
        streamed: bool = False,
    ) -> None:
        super().__init__()
        wanted = set(_adaptable(model, anatomy, plan) if train == "lora" else _own(model, anatomy, plan, train, tokens))
        copied = copy.deepcopy(model).requires_grad_(False)
        for path, weight in plan.weights.items() if isinstance(plan, RepairedPlan) else ():
            copied.get_parameter(path).data.copy_(weight)
        self.adapters = _adapted(copied, wanted, rank) if train == "lora" else {}
        self.trained = {
            path: one
            for path, one in copied.named_parameters()
            if (f".{ADAPTER}." in path if self.adapters else path in wanted)
        }
        self.dtypes = {path: one.dtype for path, one in self.trained.items()}
        self.stream = _Stream(model, anatomy, plan, copied.get_submodule(anatomy.layers)) if streamed else None
        remove(copied, Plan(plan.attention, plan.mlp))
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()  # steps are too small for the dtypes of few bits
            parameter.requires_grad_(True)
        self.model = copied

    def forward(self, input_ids: Tensor, lesson: Lesson | None = None) -> Tensor:
        """What the head's matrix is given, (tokens, width); with a lesson how far off its stream is, (1,)."""
        return states_of(self.model, input_ids) if self.stream is None or lesson is None else self.stream.missed(lesson)

    def weights(self) -> dict[str, Tensor]:
        """What was trained, by its path in the dense model, in the dtype that it has there; with LoRA merged."""
        if self.adapters:
            return {f"{path}.weight": _merged(adapter) for path, adapter in self.adapters.items()}
        return {path: one.detach().to(self.dtypes[path]) for path, one in self.trained.items()}


def states_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the head's matrix is given, (tokens, width)."""
    seen: list[Tensor] = []

    def take(states: Tensor) -> Tensor:
        seen.append(states)
        return states[..., :1]

    with forward_replaced(model.get_output_embeddings(), take):
        model(input_ids=ids, use_cache=False)
    return seen[0].flatten(0, 1)


@torch.no_grad()
def rows_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the last layer answers for all tokens that another one follows, (tokens, hidden)."""
    seen: list[Tensor] = []

    def note(_: nn.Module, given: Any, answer: Any) -> None:
        seen.append(answer[0] if isinstance(answer, tuple) else answer)

    _, layers = decoder_layers(model)
    handle = layers[-1].register_forward_hook(note)
    try:
        states_of(model, ids)
    finally:
        handle.remove()
    return seen[0][:, :-1].flatten(0, 1)


# --- which weights ----------------------------------------------------------------------------------------------------


def _own(model: PreTrainedModel, anatomy: Anatomy, plan: Plan, train: Trained, tokens: Tensor) -> Iterator[str]:
    """The paths of the parameters to train: of all that is kept, or of its norms and output projections."""
    probe, shared = record(model, input_ids=tokens[:1, :PROBED]), _shared(model)
    for block, parts in live_steps(anatomy, plan):
        path = f"{anatomy.layers}.{block.index}"
        layer = model.get_submodule(path)
        for part in parts:
            chosen = [f"{name}." for name in part.modules]
            if train == "outputs":
                chosen = [f"{name}." for name in part.modules if is_norm(layer.get_submodule(name))]
                last = find_projection(layer, part, probe.embedded, LayerCall(probe.arguments[block.index]))
                chosen += [f"{last.path}."] if last else []
            for name, parameter in layer.named_parameters():
                if name.startswith(tuple(chosen)) and id(parameter) not in shared:
                    yield f"{path}.{name}"


def _adaptable(model: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> Iterator[str]:
    """The paths of the matrices of all that is kept."""
    shared = _shared(model)
    for block, parts in live_steps(anatomy, plan):
        layer = f"{anatomy.layers}.{block.index}"
        for name in (f"{layer}.{name}" for part in parts for name in part.modules):
            for path, module in model.get_submodule(name).named_modules(prefix=name):
                if (
                    isinstance(module, nn.Linear | Conv1D)
                    and id(module.weight) not in shared
                    and _is_trained_in(module)
                ):
                    yield path


def _is_trained_in(module: nn.Module) -> bool:
    """Whether its matrix lies in memory as it is: not quantised."""
    return type(module.weight) is nn.Parameter and module.weight.is_floating_point()


def _shared(model: PreTrainedModel) -> set[int]:
    """The ids of the parameters that have several paths."""
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    return {one for one, count in uses.items() if count > 1}


# --- LoRA -------------------------------------------------------------------------------------------------------------


def _adapted(model: PreTrainedModel, paths: set[str], rank: int) -> dict[str, Any]:
    """Put LoRA matrices, which answer nothing at first, beside those at `paths`; peft's layers by these paths."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError("training LoRA matrices needs peft: pip install 'notall[lora]'") from None

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(paths))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # it sets by itself what it warns of
            torch.manual_seed(0)
            inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise UnsupportedModel(
            f"peft refuses this model ({shortened(error)}); train something else than lora"
        ) from None
    return {path: model.get_submodule(path) for path in sorted(paths)}


@torch.no_grad()
def _merged(adapter: Any) -> Tensor:
    """A matrix with what is beside it."""
    own: Tensor = adapter.base_layer.weight
    return (own.float() + adapter.get_delta_weight(ADAPTER).float()).to(own.dtype)


# --- the stream -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """One batch as the dense model runs it: `aims` are its stream behind each kept step and the gap that follows."""

    recording: Recording
    aims: list[Tensor]  # (batch, tokens, hidden) each


class _Stream:
    """The student's stream, sublayer by sublayer, and how far it is from where it should be."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, plan: Plan, layers: nn.Module) -> None:
        self.model, self.anatomy, self.layers = model, anatomy, layers
        self.steps = steps_of(anatomy, plan)
        self.dense: nn.ModuleList = model.get_submodule(anatomy.layers)
        self.metrics = reading_gains(model, self.dense, [step.parts for step in self.steps])

    @torch.no_grad()
    def lesson(self, ids: Tensor) -> Lesson:
        recording = record(self.model, input_ids=ids)
        dense = DenseStream(self.anatomy, self.dense, [recording])
        return Lesson(recording, [states for (states,) in dense.before(*(step.behind for step in self.steps))])

    def missed(self, lesson: Lesson) -> Tensor:
        """The squared distance over the square of the aim, mean over tokens and steps, (1,); each step on its own.

        No gradient goes from a step to those before it: each is given their stream, and aims at the dense one.
        """
        hidden, missed = lesson.recording.embedded, list[Tensor]()
        for step, aim, metric in zip(self.steps, lesson.aims, self.metrics):
            index = step.block.index
            call = LayerCall(lesson.recording.arguments[index])
            behind = scaled(
                run_branches(step.branches, self.layers.get_submodule(str(index)), hidden, call), step.scale
            )
            off, size = ((one.float().square() @ metric).flatten() for one in (behind - aim, aim))
            missed.append((off / size.clamp_min(torch.finfo(torch.float32).tiny)).mean())
            hidden = behind.detach()
        return torch.stack(missed).mean(0, keepdim=True)
