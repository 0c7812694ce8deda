"""Record a batch as the first layer is given it, and hand hidden states on to the head:
a model's own forward, with others in place of what its layers make.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError
from ..structure.calls import Arguments, called_with, forward_of
from ..structure.locating import locate
from ..structure.model_structure import (
    Block,
    ModelStructure,
    base_model,
    inputs_device,
)
from ..structure.undoing import Undo


@dataclass(frozen=True)
class Recording:
    """One batch, ready to be replayed: what went into the first layer, and what each
    layer was called with besides.
    """

    inputs: dict[str, Tensor]  # of the model's forward, (batch, tokens) ids and more
    embedded: Tensor  # (batch, tokens, hidden)
    arguments: tuple[Arguments, ...]  # a layer each
    devices: tuple[torch.device, ...]  # where each layer runs
    # the first ones of each sequence, where these are a prompt
    prompt_tokens: int | None = None

    def whole(self, last_tokens: int) -> int:
        """How many last tokens run whole where those of the prompt do so but for
        `last_tokens`.
        """
        if self.prompt_tokens is None:
            problem = (
                "a plan skips sublayers in the prompt alone, and nothing says which"
                " tokens are the prompt"
            )
            raise UsageError(
                f"{problem}: give prompt_tokens (--prompt-tokens), the first tokens of"
                " each window"
            )
        tokens = self.embedded.shape[1]
        return min(tokens, tokens - self.prompt_tokens + last_tokens)

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return next(iter(self.inputs.values())).device


class Enough(Exception):
    """What a forward is run for was seen: raised inside of it, where the rest of it
    would be for nothing.
    """


def record(
    model: PreTrainedModel, prompt_tokens: int | None = None, /, **inputs: Tensor
) -> Recording:
    """Run the embedding of `model` on `inputs` (as for its forward), and note what each
    layer is called with.

    The first `prompt_tokens` of each sequence are a prompt, where that is said.
    """
    inner = base_model(model)
    structure = locate(inner)
    inputs = {name: value.to(inputs_device(inner)) for name, value in inputs.items()}
    calls: list[tuple[Arguments, Tensor]] = []

    def note(arguments: Arguments, hidden: Tensor) -> Tensor:
        calls.append((arguments, hidden))
        if len(calls) == len(structure.blocks):
            raise Enough
        return hidden

    with (
        suppress(Enough),
        standing_in(inner, structure, partial(answering, answer=note)),
    ):
        inner(**inputs, use_cache=False)
    arguments, streams = zip(*calls)
    return Recording(
        inputs,
        streams[0],
        arguments,
        tuple(hidden.device for hidden in streams),
        prompt_tokens,
    )


def states_before_output(model: PreTrainedModel, run: Callable[[], object]) -> Tensor:
    """What `run` has the output embeddings of `model` given. Raises `UnsupportedModel`
    where it doesn't.
    """
    given: list[Tensor] = []

    def reach(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])
        raise Enough

    with output_embeddings(model).register_forward_pre_hook(reach), suppress(Enough):
        run()
    if not given:
        raise UnsupportedModel(
            f"{type(model).__name__} makes logits without its output embeddings"
        )
    return given[0]


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    """The module that makes logits. Raises `UnsupportedModel` where there is none."""
    if (output := model.get_output_embeddings()) is None:
        raise UnsupportedModel(
            f"{type(model).__name__} makes logits without output embeddings"
        )
    return output


@contextmanager
def handing(
    model: PreTrainedModel, structure: ModelStructure, hidden: Tensor
) -> Iterator[None]:
    """Have `hidden` stand in for what a replay yields, for the time of the `with`: what
    follows is the model's own.
    """
    with ExitStack() as undo:
        if not structure.apart:
            output = output_embeddings(model)
            # ahead of hooks that look at what is given
            undo.enter_context(
                output.register_forward_pre_hook(
                    lambda _, args: (hidden, *args[1:]), prepend=True
                )
            )
        answer = partial(
            answering, answer=lambda _, given: hidden if structure.apart else given
        )
        undo.enter_context(standing_in(model, structure, answer))
        yield


def answering(
    layer: nn.Module, block: Block, answer: Callable[[Arguments, Tensor], Tensor]
) -> Callable[..., object]:
    """A forward for a layer that answers, in its form, the hidden states
    `answer(arguments, hidden)`.
    """

    def forward(*args: object, **kwargs: object) -> object:
        hidden = answer(*called_with(layer, args, kwargs))
        return (
            hidden if block.answer is None else (hidden, *(None for _ in block.answer))
        )

    return forward


@contextmanager
def standing_in(
    model: PreTrainedModel,
    structure: ModelStructure,
    forward: Callable[[nn.Module, Block], Callable[..., object]],
) -> Iterator[None]:
    """Have `forward(layer, block)` stand in for each layer's forward, below
    accelerate's hooks, in the `with`.
    """
    with Undo() as undo, undo:
        for layer, block in zip(
            model.get_submodule(structure.layers).children(), structure.blocks
        ):
            undo.put(*forward_of(layer), forward(layer, block))
        yield
