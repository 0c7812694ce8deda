"""The model that a healing trains: the dense one without what a plan skips, and copies
of the weights to train.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError, shortened
from ..plan import Plan
from ..running.generating import seeded
from ..running.prefill import prompt
from ..running.recording import Recording, states_before_output
from ..running.repaired import RepairedPlan
from ..running.skipping import remove, skip
from ..running.steps import live_steps
from ..running.weight_swaps import placed_at
from ..structure.calls import first
from ..structure.key_values import SomeOutputs
from ..structure.locating import decoder_layers, locate
from ..structure.model_structure import ModelStructure
from .projections import Projections, is_matrix, is_norm, reading_gains
from .streams import DenseStream, steps_of

Trained = Literal["outputs", "all", "lora"]
ADAPTER = "healing"


@dataclass(frozen=True)
class TrainConfig:
    """How a healing trains: AdamW, whose learning rate rises to `rate` in up to ten
    steps and falls to none.

    `train` says which weights: `outputs` are norms and output projections, `all` those
    of every kept sublayer, and `lora` has two thin matrices of `rank` beside each of
    those, which are added to them in the end. For the share `warm_up` of the steps each
    kept sublayer aims at the original's stream behind it, and only then all of them at
    the next token. The held-out text is looked at `evaluations` times, evenly;
    `patience` of them in a row without a gain end it: while the rate is high there may
    be none, and as it falls there are.

    Of a plan that skips in the prompt alone, the prompt's own keys and values are
    trained, whatever `train` says, at what follows the first `prompt_tokens` of each
    window (default: half of them).

    With `minutes` (of CPU time, of all threads of this process together) it trains for
    all of them, evaluations included, over the text as often as there is time: shares
    are of the time, and the rate is none when it is up. Raises `UsageError` for a time
    that is not positive and finite, and a warm-up that is no share.
    """

    train: Trained = "outputs"
    rank: int = 16
    rate: float = 3e-4
    warm_up: float = 0.0
    seed: int = 0
    evaluations: int = 10
    patience: int = 5
    minutes: float | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up <= 1:
            raise UsageError(
                f"a warm-up of {self.warm_up} is no share of the training: give one"
                " from 0 to 1"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise UsageError(
                f"{self.minutes} minutes of CPU time are none to train for: give more"
                " than 0, such as 3"
            )


class Student(nn.Module):
    """`model` without what `plan` skips, with the weights that the plan brings; the
    model itself stays as it is.

    `trained` are the weights to train, by name: copies of kept sublayers' own, or LoRA
    matrices beside theirs, in float32, as steps are too small for dtypes of few bits.
    The student runs them in the model's dtype, as what comes out will be run:
    `take_gradients` before a step, and `follow` after it. All others share memory with
    the model's.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, config: TrainConfig, tokens: Tensor
    ) -> None:
        super().__init__()
        structure = locate(model)
        wanted = set(_chosen(model, plan, config.train, tokens))
        own: dict[int, nn.Parameter | Tensor] = {
            id(buffer): buffer for buffer in model.buffers()
        }
        own |= {
            id(one): nn.Parameter(one.detach(), requires_grad=False)
            for one in model.parameters()
        }
        self.model = copy.deepcopy(
            model, own
        )  # whose parameters share the memory of the model's
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(model)
        for path, weight in (
            plan.weights.items() if isinstance(plan, RepairedPlan) else ()
        ):
            parameters, name, parameter = placed_at(self.model, path, weight)
            parameters[name] = parameter
        layers = self.model.get_submodule(structure.layers)
        self.adapters = (
            _adapted(layers, f"{structure.layers}.", wanted, config.rank)
            if config.train == "lora"
            else {}
        )
        self.running = {
            path: one
            for path, one in self.model.named_parameters()
            if (f".{ADAPTER}." in path if self.adapters else path in wanted)
        }
        self.layerwise = (
            Layerwise(model, structure, plan, layers) if config.warm_up > 0 else None
        )
        remove(self.model, Plan(plan.attention, plan.mlp))
        for parameter in self.running.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        self._train()

    def _train(self) -> None:
        """Begin with what runs, of which a copy in more bits is trained where it has
        few.
        """
        self.trained = {path: _exact(one) for path, one in self.running.items()}
        pairs = zip(self.trained.values(), self.running.values())
        self.rounded = [(own, running) for own, running in pairs if own is not running]

    def forward(
        self, input_ids: Tensor, targets: tuple[Recording, list[Tensor]] | None = None
    ) -> Tensor:
        """What the head's matrix is given, (tokens, width); with targets the loss of
        the layers, (1,).
        """
        if self.layerwise is None or targets is None:
            return states_of(self.model, input_ids)
        return self.layerwise.loss(*targets)

    def rows(self, ids: Tensor) -> Tensor:
        """What the last layer answers for all tokens that another one follows, (tokens,
        hidden).
        """
        return rows_of(self.model, ids)

    def take_gradients(self) -> None:
        """Move the gradients of what runs to what is trained."""
        for own, running in self.rounded:
            own.grad = None if running.grad is None else running.grad.to(own.dtype)
            running.grad = None

    def follow(self) -> None:
        """Run what was trained by now."""
        for own, running in self.rounded:
            running.data.copy_(own.data)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """What was trained, by its path in the original model, in the dtype that it has
        there; with LoRA merged.
        """
        if not self.adapters:
            return {
                path: self.trained[path].detach().to(one.dtype)
                for path, one in self.running.items()
            }
        for path, running in self.running.items():
            running.data = self.trained[path].data  # merged before it is rounded
        found = {}
        for path, adapter in self.adapters.items():
            own: Tensor = adapter.base_layer.weight
            found[f"{path}.weight"] = (
                own.float() + adapter.get_delta_weight(ADAPTER).float()
            ).to(own.dtype)
        return found


class PromptStudent(Student):
    """`model`, of which the prompt skips what `plan` says, with keys and values of the
    prompt to train.

    `trained` are rows of projections and biases, as a plan's `prompt_weights` are;
    everything else is the model's own.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, prompt_tokens: int) -> None:
        nn.Module.__init__(self)
        own: dict[int, nn.Parameter | Tensor] = {
            id(buffer): buffer for buffer in model.buffers()
        }
        own |= {
            id(one): nn.Parameter(one.detach(), requires_grad=False)
            for one in model.parameters()
        }
        self.model = copy.deepcopy(
            model, own
        )  # whose parameters share the memory of the model's
        self.prompt_tokens, self.layerwise, self.adapters = prompt_tokens, None, {}
        self.skipping = ExitStack()
        self.skipping.enter_context(
            skip(self.model, plan)
        )  # of a model of its own, as long as there is one
        self.running = dict(_in_prompts(self.model, locate(model).layers))
        self._train()

    def forward(self, input_ids: Tensor, targets: object = None) -> Tensor:
        """What the head's matrix is given from the last token of the prompt on,
        (tokens, width).
        """
        with prompt(self.model, self.prompt_tokens):
            return states_of(self.model, input_ids, self.prompt_tokens - 1)

    def rows(self, ids: Tensor) -> Tensor:
        """What the last layer answers from the last token of the prompt on, but for the
        last one, (tokens, hidden).
        """
        with prompt(self.model, self.prompt_tokens):
            return rows_of(self.model, ids, self.prompt_tokens - 1)


def _in_prompts(
    model: PreTrainedModel, layers: str
) -> Iterator[tuple[str, nn.Parameter]]:
    """What makes keys and values of the prompt of a model that skips in it, made
    trainable, by its path.
    """
    for layer in model.get_submodule(layers).children():
        in_prompt = getattr(layer, "in_prompt", None)
        for name, writer in in_prompt.writers.items() if in_prompt else ():
            for path, projection in writer.named_modules():
                if isinstance(projection, SomeOutputs) and projection.rows.any():
                    made = projection.matrix
                    bias = (
                        made.new_zeros(len(made))
                        if projection.bias is None
                        else projection.bias
                    )
                    projection.matrix, projection.bias = (
                        nn.Parameter(one.detach().clone()) for one in (made, bias)
                    )
                    where = f"{layers}.{name.removeprefix('attn.')}.{path}"
                    yield f"{where}.weight", projection.matrix
                    yield f"{where}.bias", projection.bias


def _exact(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or where it has fewer bits than float32 one that does."""
    exact = torch.promote_types(parameter.dtype, torch.float32)
    return (
        parameter
        if parameter.dtype == exact
        else nn.Parameter(parameter.detach().to(exact))
    )


def states_of(model: PreTrainedModel, ids: Tensor, start: int = 0) -> Tensor:
    """What the head's matrix is given, from token `start` of each sequence on, (tokens,
    width).
    """
    return states_before_output(model, partial(model, input_ids=ids, use_cache=False))[
        :, start:
    ].flatten(0, 1)


@torch.no_grad()
def rows_of(model: PreTrainedModel, ids: Tensor, start: int = 0) -> Tensor:
    """What the last layer answers for all tokens from `start` on that another one
    follows, (tokens, hidden).
    """
    seen: list[Tensor] = []
    _, layers = decoder_layers(model)
    with layers[-1].register_forward_hook(
        lambda _, given, answer: seen.append(first(answer))
    ):
        states_of(model, ids)
    return seen[0][:, start:-1].flatten(0, 1)


def _chosen(
    model: PreTrainedModel, plan: Plan, train: Trained, tokens: Tensor
) -> Iterator[str]:
    """The paths to train of what is kept: of all parameters, of norms and output
    projections, or (LoRA) of matrices.
    """
    projections, structure = Projections(model, tokens), locate(model)
    for block, parts in live_steps(structure, plan):
        path = f"{structure.layers}.{block.index}"
        layer = model.get_submodule(path)
        for part in parts:
            if train == "lora":
                modules = (
                    one
                    for top in part.modules
                    for one in layer.get_submodule(top).named_modules(prefix=top)
                )
                for name, module in modules:
                    if (
                        is_matrix(module)
                        and id(module.weight) not in projections.shared
                    ):
                        yield f"{path}.{name}"
                continue
            chosen = [f"{name}." for name in part.modules]
            if train == "outputs":
                chosen = [
                    f"{name}."
                    for name in part.modules
                    if is_norm(layer.get_submodule(name))
                ]
                last = projections.of(part)
                chosen += [f"{last.path}."] if last else []
            for name, parameter in layer.named_parameters():
                if (
                    name.startswith(tuple(chosen))
                    and id(parameter) not in projections.shared
                ):
                    yield f"{path}.{name}"


def _adapted(
    layers: nn.Module, where: str, paths: set[str], rank: int
) -> dict[str, Any]:
    """Put LoRA matrices, which answer nothing at first, beside those at `paths`; peft's
    layers by these paths.

    `where` is the beginning of each path, up to the layers. Given the whole model, peft
    would take the name of a dense MLP for that of experts, as checkpoints of
    transformers 4 have it.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UsageError(
            "training LoRA matrices needs peft: pip install 'notall[lora]'"
        ) from None

    below = {path: path.removeprefix(where) for path in sorted(paths)}
    names = "|".join(map(re.escape, below.values()))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    try:
        with warnings.catch_warnings(), seeded(0):
            warnings.simplefilter("ignore")  # it sets by itself what it warns of
            inject_adapter_in_model(config, layers, ADAPTER)
    except ValueError as error:
        problem = (
            f"peft refuses this model ({shortened(error)}); train something else than"
            " lora"
        )
        raise UnsupportedModel(problem) from None
    return {path: layers.get_submodule(name) for path, name in below.items()}


class Layerwise:
    """The student's stream, sublayer by sublayer, and how far it is from where it
    should be.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        structure: ModelStructure,
        plan: Plan,
        layers: nn.Module,
    ) -> None:
        self.model, self.layers = model, layers
        self.steps = steps_of(structure, plan)
        dense: nn.ModuleList = model.get_submodule(structure.layers)
        self.metrics = reading_gains(model, dense, [step.parts for step in self.steps])

    @torch.no_grad()
    def targets(self, ids: Tensor) -> tuple[Recording, list[Tensor]]:
        """A batch as the original model runs it, and its streams behind each kept step
        and the gap that follows.
        """
        dense = DenseStream(self.model, [ids])
        return dense.recordings[0], [
            states for (states,) in dense.before(*(step.behind for step in self.steps))
        ]

    def loss(self, recording: Recording, streams: list[Tensor]) -> Tensor:
        """The squared distance over the target's square, mean over tokens and steps,
        (1,); no gradient crosses one.
        """
        hidden, losses = recording.embedded, list[Tensor]()
        for step, target, metric in zip(self.steps, streams, self.metrics):
            behind = step.run(self.layers, hidden, recording)
            off, size = (
                (one.float().square() @ metric).flatten()
                for one in (behind - target, target)
            )
            losses.append(
                (off / size.clamp_min(torch.finfo(torch.float32).tiny)).mean()
            )
            hidden = behind.detach()
        return torch.stack(losses).mean(0, keepdim=True)
