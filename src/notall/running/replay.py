"""Run many plans over one batch, computing what they share only once.

What they keep is a tree, which is walked depth first, so that only the states along one
branch are alive at a time. Embedding and head are the model's own forward, with hidden
states in place of its layers.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError
from ..plan import Plan
from ..structure.locating import locate
from ..structure.model_structure import (
    Block,
    ModelStructure,
    Sublayer,
    base_model,
    inputs_device,
)
from ..structure.observation import (
    Arguments,
    LayerCall,
    called_with,
    first,
    forward_of,
    run_branches,
    scaled,
)
from ..structure.undoing import Undo
from .prefill import InPrompt, Prompt, in_prompts
from .repaired import LinearMap, RepairedPlan, with_weights
from .skipping import refuse_skipping, skip


@dataclass(frozen=True)
class Recording:
    """One batch, ready to be replayed: what went into the first layer, and what each
    layer was called with besides.
    """

    inputs: dict[str, Tensor]
    embedded: Tensor  # (batch, tokens, hidden)
    arguments: tuple[Arguments, ...]  # a layer each
    devices: tuple[torch.device, ...]  # where each layer runs
    prompt_tokens: int | None = (
        None  # the first ones of each sequence, where these are a prompt
    )

    def whole(self, last_tokens: int) -> int:
        """How many last tokens run whole where those of the prompt do so but for
        `last_tokens`.
        """
        if self.prompt_tokens is None:
            told = (
                "a plan skips sublayers in the prompt alone, and nothing says which"
                " tokens are the prompt"
            )
            raise UsageError(
                f"{told}: give prompt_tokens (--prompt-tokens), the first tokens of"
                " each window"
            )
        tokens = self.embedded.shape[1]
        return min(tokens, tokens - self.prompt_tokens + last_tokens)

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device


@dataclass
class Step:
    """A node of the tree: a sublayer, or a whole parallel block, and what may come
    after it.
    """

    name: str
    block: Block
    parts: tuple[
        Sublayer, ...
    ]  # none where a `map` stands in for something skipped: no sublayer is counted
    weights: Mapping[
        str, Tensor
    ]  # a repaired plan's own, by their paths below the layer, and part of the name
    map: LinearMap | None = None
    in_prompt: InPrompt | None = (
        None  # what of its parts the prompt skips, and part of the name
    )
    # what the layers between the step before it and its own multiply the stream by
    scale: float = 1.0
    after: "dict[str, Step]" = field(default_factory=dict)
    plans: list[int] = field(default_factory=list)  # the plans that end here


@dataclass
class PrefixCache:
    """States of one plan on one batch, kept where plans that begin alike can go on from
    them.
    """

    names: tuple[str, ...]  # of its steps, in order
    every: int = 1  # of so many steps one is kept
    states: dict[int, Tensor] = field(
        default_factory=dict
    )  # streams behind steps, (batch, tokens, hidden)

    def moved(self, names: tuple[str, ...]) -> "PrefixCache":
        """The prefix of another plan, with the states that both share."""
        shared = next(
            (
                i
                for i, (ours, theirs) in enumerate(zip(self.names, names))
                if ours != theirs
            ),
            len(names),
        )
        return PrefixCache(
            names,
            self.every,
            {place: state for place, state in self.states.items() if place < shared},
        )

    def has(self, step: Step, place: int) -> bool:
        """Whether `step` is its step at `place`, where all before it are its own
        too.
        """
        return place < len(self.names) and self.names[place] == step.name

    def wants(self, step: Step, place: int) -> bool:
        """Whether this step of its own must be run: it isn't kept, and a plan ends here
        or what follows needs it.
        """
        if place in self.states:
            return False
        return bool(step.plans) or any(
            not self.has(following, place + 1) or self.wants(following, place + 1)
            for following in step.after.values()
        )


class Replay:
    """Evaluate `plans` together, batch after batch.

    Where layers cannot be run apart, plan by plan is skipped in the model itself, and
    nothing is shared. Raises `UsageError` when a plan does not fit the model, or the
    model is inside a `skip`.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[Plan]) -> None:
        self.model = base_model(model)
        refuse_skipping(self.model, "evaluating plans")
        self.structure = locate(self.model)
        self.layers: nn.ModuleList = self.model.get_submodule(self.structure.layers)
        self.first: dict[str, Step] = {}
        self.plans = len(plans)
        self.executions = 0  # sublayers run for one batch
        # sublayers run so far, over all batches; one that the prompt skips counts as
        # the share of tokens it runs
        self.ran = 0.0
        self.alone: dict[
            Plan, list[int]
        ] = {}  # plans that share nothing, with their numbers
        for number, plan in enumerate(plans):
            plan.check(self.structure)
            if isinstance(plan, RepairedPlan):
                plan = plan.placed(self.model)
            if not self.structure.apart:
                self.executions += (
                    0 if plan in self.alone else len(self.structure.running(plan))
                )
                self.alone.setdefault(plan, []).append(number)
                continue
            here, step = self.first, None
            for new in self._steps_of(plan):
                new.scale = self.structure.scale(
                    step.block.index if step else 0, new.block.index
                )
                step = here.setdefault(new.name, new)
                here = step.after
                self.executions += len(new.parts) if step is new else 0
            assert step is not None, "a plan keeps at least one attention"
            step.plans.append(number)

    @property
    def path(self) -> tuple[str, ...]:
        """The names of the steps of the first plan, in order; of one that shares
        nothing there are none.
        """
        names, steps = list[str](), self.first
        while step := next(iter(steps.values()), None):
            names.append(step.name)
            steps = step.after
        return tuple(names)

    def hidden_states(
        self, recording: Recording, prefix: PrefixCache | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """For each end of the tree: the numbers of the plans that end there, and the
        last layer's output.

        The output is (batch, tokens, hidden), before the final norm, or, where layers
        cannot be run apart, what the output embeddings are given. A plan comes after
        those that go on where it ends, and otherwise in the order given. What `prefix`
        holds of this batch is not run again, and what it lacks is left there when it is
        run.
        """
        for plan, numbers in self.alone.items():
            self.ran += len(self.structure.running(plan))
            run = partial(self.model, **recording.inputs, use_cache=False)
            with skip(self.model, plan):
                yield numbers, states_before_output(self.model, run)
        waiting: list[
            tuple[Step | list[int], Tensor | None, PrefixCache | None, int]
        ]  # with its place on the prefix
        waiting = [
            (step, recording.embedded, prefix, 0)
            for step in reversed(self.first.values())
        ]
        while waiting:
            step, hidden, kept, place = waiting.pop()
            if isinstance(step, list):
                assert hidden is not None
                yield step, hidden
                continue
            kept = kept if kept and kept.has(step, place) else None
            if kept and not kept.wants(step, place):
                hidden = kept.states.get(place)  # None where all that follows is kept
            else:
                assert hidden is not None
                hidden = self._run(step, hidden, recording)
                if kept and place % kept.every == 0:
                    kept.states[place] = hidden
            if step.plans:
                assert hidden is not None
                left = self.structure.scale(
                    step.block.index, len(self.structure.blocks)
                )
                waiting.append((step.plans, scaled(hidden, left), None, 0))
            waiting.extend(
                (child, hidden, kept, place + 1)
                for child in reversed(step.after.values())
            )

    def _steps_of(self, plan: Plan) -> Iterator[Step]:
        maps = plan.maps if isinstance(plan, RepairedPlan) else {}
        split = self._in_prompt(plan)
        for block, parts in live_steps(self.structure, plan, mapped=maps):
            name = step_name(parts)
            if name in maps:
                yield Step(f"map of {name} {plan.digest}", block, (), {}, maps[name])
            else:
                weights = (
                    plan.weights_of(self.structure, parts)
                    if isinstance(plan, RepairedPlan)
                    else {}
                )
                name = f"{name} {plan.digest}" if weights else name
                step = Step(name, block, parts, weights)
                here = split.get(block.index)
                if here and any(part.name in here.names for part in parts):
                    step.in_prompt, step.name = (
                        here,
                        f"{name} {self._prompt_name(plan, parts, here)}",
                    )
                yield step

    def _in_prompt(self, plan: Plan) -> dict[int, InPrompt]:
        """Of each block, by its index, what of it the prompt skips."""
        if not plan.prefill:
            return {}
        weights = plan.weights if isinstance(plan, RepairedPlan) else {}
        with with_weights(
            self.model, weights
        ):  # which keys and values of the prompt are made with, too
            return in_prompts(
                self.model, self.structure, plan, Prompt(plan.prefill.last_tokens)
            )

    def _prompt_name(
        self, plan: Plan, parts: Sequence[Sublayer], here: InPrompt
    ) -> str:
        """What tells a step that the prompt skips from one that it doesn't: plans with
        such steps alike share them.
        """
        skipped = [part for part in parts if part.name in here.names]
        own = isinstance(plan, RepairedPlan) and any(
            plan.prompt_weights_of(self.structure, p) for p in skipped
        )
        digest = f", {plan.digest}" if own else ""
        return (
            f"without {step_name(skipped)} in the prompt (last"
            f" {plan.prefill.last_tokens}{digest})"
        )

    def _run(self, step: Step, hidden: Tensor, recording: Recording) -> Tensor:
        hidden = scaled(hidden.to(recording.devices[step.block.index]), step.scale)
        whole = (
            recording.whole(step.in_prompt.prompt.last_tokens)
            if step.in_prompt
            else None
        )
        if step.in_prompt and whole is not None and whole < hidden.shape[1]:
            return self._run_split(step, step.in_prompt, hidden, recording, whole)
        self.ran += len(step.parts)
        if step.map:
            step.map = step.map.like(hidden)
            return step.map.run(hidden)
        layer, arguments = (
            self.layers[step.block.index],
            recording.arguments[step.block.index],
        )
        with with_weights(layer, step.weights):
            # its own forward adds up in an order and a dtype of its own
            if step.parts == step.block.sublayers and not step.block.scaled_by:
                return first(layer(hidden, **arguments))
            return run_branches(
                step.parts[0].branches, layer, hidden, LayerCall(arguments)
            )

    def _run_split(
        self,
        step: Step,
        here: InPrompt,
        hidden: Tensor,
        recording: Recording,
        whole: int,
    ) -> Tensor:
        """What the step makes of the stream, (batch, tokens, hidden), some of it for
        the `whole` last tokens alone.
        """
        here.prompt.whole = whole
        skipped = sum(part.name in here.names for part in step.parts)
        self.ran += len(step.parts) - skipped + skipped * whole / hidden.shape[1]
        call = LayerCall(recording.arguments[step.block.index])
        layer = self.layers[step.block.index]
        with with_weights(layer, step.weights):
            return here.run(step.parts, layer, hidden, call)


def step_name(parts: Sequence[Sublayer]) -> str:
    return "+".join(part.name for part in parts)


def live_steps(
    structure: ModelStructure, plan: Plan, mapped: Container[str] = ()
) -> Iterator[tuple[Block, tuple[Sublayer, ...]]]:
    """What `plan` keeps, in order, and `mapped` ones that it skips: each alone, a
    parallel block kept whole as one.
    """
    for block in structure.blocks:
        kept = [
            part
            for part in block.sublayers
            if block.index not in getattr(plan, part.kind)
        ]
        live = [part for part in block.sublayers if part in kept or part.name in mapped]
        if block.parallel and len(kept) == 2:
            yield block, tuple(live)
        else:
            yield from ((block, (part,)) for part in live)


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
