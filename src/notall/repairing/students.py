"""The model that a healing trains: the dense one without what a plan skips, and copies
of the weights to train.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..plan import Plan
from ..running.prefill import InPrompt, prompt
from ..running.recording import Recording, states_before_output
from ..running.repaired import RepairedPlan
from ..running.skipping import remove, skip
from ..running.stand_in import StandIn
from ..running.weight_swaps import placed_at
from ..structure.calls import first
from ..structure.key_values import SomeOutputs
from ..structure.locating import decoder_layers, locate
from .column_rates import column_rates, matrices_of
from .layerwise import Layerwise
from .train_config import TrainConfig
from .trained_weights import ADAPTER_NAME, adapted, chosen_paths

SEEN = 2  # windows whose inputs say how far columns move


class Student(nn.Module):
    """`model` without what `plan` skips, with the weights that the plan brings; the
    model itself stays as it is.

    `trained` are the weights to train, by name: copies of kept sublayers' own, matrices
    divided by the rates of their columns (`column_rates`), or LoRA matrices added to
    theirs. They are in float32, as steps are too small for dtypes of few bits. The
    student runs them in the model's dtype, as what comes out will be run:
    `take_gradients` before a step, and `follow` after it. All others share memory with
    the model's.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, config: TrainConfig, tokens: Tensor
    ) -> None:
        super().__init__()
        structure = locate(model)
        wanted = set(chosen_paths(model, plan, config.train, tokens))
        self.model = _sharing_memory(model)
        if isinstance(plan, RepairedPlan):
            plan.check_replaced(model)
            for path, weight in plan.weights.items():
                parameters, name, parameter = placed_at(self.model, path, weight)
                parameters[name] = parameter
        layers = self.model.get_submodule(structure.layers)
        self.adapters: dict[str, Any] = {}
        if config.train == "lora":
            start = f"{structure.layers}."
            self.adapters = adapted(layers, start, wanted, config.rank)
        self.running = {
            path: one
            for path, one in self.model.named_parameters()
            if (f".{ADAPTER_NAME}." in path if self.adapters else path in wanted)
        }
        self.layerwise: Layerwise | None = None
        if config.warm_up > 0:
            self.layerwise = Layerwise(model, structure, plan, layers)
        # LoRA's own start says how far its matrices move what they are added to
        matrices = {} if self.adapters else matrices_of(self.model, wanted)
        remove(self.model, Plan(plan.attention, plan.mlp))
        for parameter in self.running.values():
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
        run = partial(states_of, self.model, tokens[:SEEN])
        self._train(column_rates(matrices, run) if matrices else {})

    def _train(self, rates: Mapping[str, Tensor]) -> None:
        """Begin with what runs, divided by the `rates` of its columns, where it has
        any; of what has few bits a copy in more.
        """
        self.trained = {
            path: _exact(one, rates.get(path)) for path, one in self.running.items()
        }
        self.copied = [
            (own, self.running[path], rates.get(path, 1.0))
            for path, own in self.trained.items()
            if own is not self.running[path]
        ]

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
        return followed_rows(self.model, ids)

    def take_gradients(self) -> None:
        """Move the gradients of what runs to what is trained."""
        for own, running, rates in self.copied:
            if running.grad is not None:
                own.grad = running.grad.to(own.dtype) * rates
            running.grad = None

    def follow(self) -> None:
        """Run what was trained by now."""
        for own, running, rates in self.copied:
            running.data.copy_(own.data * rates)

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """What was trained, by its path in the original model, in the dtype that it has
        there; with LoRA merged.
        """
        if not self.adapters:
            self.follow()
            return {path: one.detach() for path, one in self.running.items()}
        for path, running in self.running.items():
            running.data = self.trained[path].data  # merged before it is rounded
        found = {}
        for path, adapter in self.adapters.items():
            own: Tensor = adapter.base_layer.weight
            merged = own.float() + adapter.get_delta_weight(ADAPTER_NAME).float()
            found[f"{path}.weight"] = merged.to(own.dtype)
        return found


class PromptStudent(Student):
    """`model`, of which the prompt skips what `plan` says, with keys and values of the
    prompt to train.

    `trained` are rows of projections and biases, as a plan's `prompt_weights` are;
    everything else is the model's own.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, prompt_tokens: int) -> None:
        nn.Module.__init__(self)
        self.model = _sharing_memory(model)
        self.prompt_tokens = prompt_tokens
        self.layerwise, self.adapters = None, {}
        self.skipping = ExitStack()  # as long as there is this model of its own
        self.skipping.enter_context(skip(self.model, plan))
        self.running = dict(_in_prompts(self.model, locate(model).layers))
        self._train({})

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
            return followed_rows(self.model, ids, self.prompt_tokens - 1)


def _in_prompts(
    model: PreTrainedModel, layers: str
) -> Iterator[tuple[str, nn.Parameter]]:
    """What makes keys and values of the prompt of a model that skips in it, made
    trainable, by its path.
    """
    for layer in model.get_submodule(layers).children():
        if in_prompt := getattr(layer, "in_prompt", None):
            for path, made in _own_in_prompt(in_prompt):
                matrix, bias = made.matrix, made.bias
                if bias is None:
                    bias = matrix.new_zeros(len(matrix))
                made.matrix = nn.Parameter(matrix.detach().clone())
                made.bias = nn.Parameter(bias.detach().clone())
                yield f"{layers}.{path}.weight", made.matrix
                yield f"{layers}.{path}.bias", made.bias


def _own_in_prompt(in_prompt: InPrompt) -> Iterator[tuple[str, SomeOutputs | StandIn]]:
    """What a layer has for the prompt alone, by its path below the layers."""
    for name, writer in in_prompt.writers.items():
        for path, made in writer.named_modules():
            if isinstance(made, SomeOutputs) and made.rows.any():
                yield f"{name.removeprefix('attn.')}.{path}", made
    for name, projections in in_prompt.early.items():
        for path, projection in projections.items():
            yield f"{name.removeprefix('attn.')}.{path}", projection
    for name, stand_in in in_prompt.stand_ins.items():
        yield f"{name.removeprefix('mlp.')}.{stand_in.path}", stand_in


def _sharing_memory(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters and buffers are in the memory of the model's own."""
    own: dict[int, nn.Parameter | Tensor] = {}
    for buffer in model.buffers():
        own[id(buffer)] = buffer
    for parameter in model.parameters():
        own[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, own)


def _exact(parameter: nn.Parameter, rates: Tensor | None) -> nn.Parameter:
    """The parameter, divided by the `rates` of its columns and with at least the bits
    of float32; itself where that changes nothing.
    """
    exact = torch.promote_types(parameter.dtype, torch.float32)
    if rates is not None:
        return nn.Parameter(parameter.detach().to(exact) / rates)
    if parameter.dtype == exact:
        return parameter
    return nn.Parameter(parameter.detach().to(exact))


def states_of(model: PreTrainedModel, ids: Tensor, start: int = 0) -> Tensor:
    """What the head's matrix is given, from token `start` of each sequence on, (tokens,
    width).
    """
    run = partial(model, input_ids=ids, use_cache=False)
    states = states_before_output(model, run)  # (batch, tokens, width)
    return states[:, start:].flatten(0, 1)


@torch.no_grad()
def followed_rows(model: PreTrainedModel, ids: Tensor, start: int = 0) -> Tensor:
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
