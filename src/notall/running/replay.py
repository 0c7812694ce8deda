"""Run many plans over one batch, computing what they share only once.

Plans that keep the same first sublayers share everything before they part. `Replay` lays the kept sublayers of all
plans out as a tree, writes down what each layer is called with (masks, position embeddings: they do not depend on the
hidden states), and walks the tree depth first, so that only the states along one branch are alive at a time.
The embedding and the head are the model's own forward, with hidden states standing in for its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel, UsageError
from ..plan import Plan
from ..structure.locating import locate
from ..structure.model_structure import Block, ModelStructure, Sublayer, base_model
from ..structure.observation import Arguments, LayerCall, forward_replaced, parameter_names, run_branches, scaled
from .repaired import LinearMap, RepairedPlan, with_weights
from .skipping import is_skipping, skip


@dataclass(frozen=True)
class Recording:
    """One batch, ready to be replayed: what went into the first layer, and what each layer was called with besides."""

    inputs: dict[str, Tensor]
    embedded: Tensor  # (batch, tokens, hidden)
    arguments: tuple[Arguments, ...]  # a layer each

    @property
    def device(self) -> torch.device:
        """Where its tokens are."""
        return next(iter(self.inputs.values())).device


@dataclass
class Step:
    """A node of the tree: a sublayer, or a whole parallel block, and what may come after it.

    `weights` are a repaired plan's own, by their paths below the layer, and part of the name. Where a `map` stands in
    for something skipped there are no `parts`, and no sublayer is counted. `scale` is what the layers between the step
    before it and its own multiply the stream by.
    """

    name: str
    block: Block
    parts: tuple[Sublayer, ...]
    weights: Mapping[str, Tensor]
    map: LinearMap | None = None
    scale: float = 1.0
    after: dict[str, Step] = field(default_factory=dict)
    plans: list[int] = field(default_factory=list)  # the plans that end here


@dataclass
class PrefixCache:
    """States of one plan on one batch, kept where plans that begin alike can go on from them.

    `names` are the steps of the plan, in order. `states` maps a step's place to the stream behind it, (batch, tokens,
    hidden): one of `every` steps, filled in as they are run.
    """

    names: tuple[str, ...]
    every: int = 1
    states: dict[int, Tensor] = field(default_factory=dict)

    def moved(self, names: tuple[str, ...]) -> PrefixCache:
        """The prefix of another plan, with the states that both share."""
        shared = next((i for i, (ours, theirs) in enumerate(zip(self.names, names)) if ours != theirs), len(names))
        return PrefixCache(names, self.every, {place: state for place, state in self.states.items() if place < shared})


class Replay:
    """Evaluate `plans` together, batch after batch.

    Where layers cannot be run apart, plan by plan is skipped in the model itself, and nothing is shared.
    Raises `UsageError` when a plan does not fit the model, or the model is inside a `skip`.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[Plan]) -> None:
        self.model = base_model(model)
        if is_skipping(self.model):
            raise UsageError("the model is inside a `with notall.skip(...)`; leave it before evaluating plans")
        self.structure = locate(self.model)
        self.layers: nn.ModuleList = self.model.get_submodule(self.structure.layers)
        self.first: dict[str, Step] = {}
        self.plans = len(plans)
        self.one_by_one = 0
        self.ran = 0  # sublayers run so far, over all batches
        self.alone: dict[Plan, list[int]] = {}  # plans that share nothing, with their numbers
        for number, plan in enumerate(plans):
            plan.check(self.structure)
            if isinstance(plan, RepairedPlan):
                plan = plan.placed(self.model)
            if self.structure.apart:
                self._plant(number, plan)
            else:
                self.alone.setdefault(plan, []).append(number)
                self.one_by_one += len(self.structure.running(plan))

    @property
    def executions(self) -> int:
        """Sublayers run for one batch; `one_by_one` says how many there would be without sharing."""
        shared = sum(len(step.parts) for step in self._steps())
        return shared + sum(len(self.structure.running(plan)) for plan in self.alone)

    def hidden_states(
        self, recording: Recording, prefix: PrefixCache | None = None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """For each end of the tree: the numbers of the plans that end there, and the last layer's output.

        The output is (batch, tokens, hidden), before the final norm. A plan comes after those that go on where it
        ends, and otherwise in the order given: the dense model, given first, comes first. What `prefix` holds of this
        batch is not run again, and what it lacks is left there when it is run. Where layers cannot be run apart, it is
        what the output embeddings are given, and there is nothing to go on from.
        """
        for plan, numbers in self.alone.items():
            self.ran += len(self.structure.running(plan))
            with skip(self.model, plan):
                yield (
                    numbers,
                    states_before_output(self.model, partial(self.model, **recording.inputs, use_cache=False)),
                )
        waiting: list[tuple[Step | list[int], Tensor | None, int | None]]  # with its place on the prefix
        start = None if prefix is None else 0
        waiting = [(step, recording.embedded, start) for step in reversed(self.first.values())]
        while waiting:
            step, hidden, place = waiting.pop()
            if isinstance(step, list):
                assert hidden is not None
                yield step, hidden
                continue
            place = place if _is_at(prefix, place, step) else None
            hidden = self._behind(step, hidden, recording, prefix, place)
            if step.plans:
                assert hidden is not None
                left = self.structure.scale(step.block.index, len(self.structure.blocks))
                waiting.append((step.plans, scaled(hidden, left), None))
            following = None if place is None else place + 1
            waiting.extend((child, hidden, following) for child in reversed(step.after.values()))

    def logits(self, **inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """For each plan, in the order of `hidden_states`: its number and its logits, (batch, tokens, vocabulary)."""
        recording = record(self.model, **inputs)
        for numbers, hidden in self.hidden_states(recording):
            logits = run_head(self.model, recording, hidden)
            for number in numbers:
                yield number, logits

    def _plant(self, number: int, plan: Plan) -> None:
        here, step = self.first, None
        for new in self._steps_of(plan):
            new.scale = self.structure.scale(step.block.index if step else 0, new.block.index)
            step = here.setdefault(new.name, new)
            here = step.after
            self.one_by_one += len(new.parts)
        assert step is not None, "a plan keeps at least one attention"
        step.plans.append(number)

    def _steps_of(self, plan: Plan) -> Iterator[Step]:
        """What is run of a plan, in order: steps that nothing follows yet."""
        if not isinstance(plan, RepairedPlan):
            yield from (Step(step_name(parts), block, parts, {}) for block, parts in live_steps(self.structure, plan))
            return
        for block, parts in live_steps(self.structure, plan, mapped=plan.maps):
            name = step_name(parts)
            if name in plan.maps:
                yield Step(f"map of {name} {plan.digest}", block, (), {}, plan.maps[name])
            else:
                weights = plan.weights_of(self.structure, parts)
                yield Step(f"{name} {plan.digest}" if weights else name, block, parts, weights)

    def _steps(self) -> Iterator[Step]:
        waiting = list(self.first.values())
        while waiting:
            step = waiting.pop()
            waiting.extend(step.after.values())
            yield step

    def _behind(
        self, step: Step, hidden: Tensor | None, recording: Recording, prefix: PrefixCache | None, place: int | None
    ) -> Tensor | None:
        """The stream behind a step: kept, run, or None where all that follows is kept."""
        if prefix and place is not None and not _is_wanted(step, prefix, place):
            return prefix.states.get(place)
        assert hidden is not None
        hidden = self._run(step, hidden, recording.arguments[step.block.index])
        if prefix and place is not None and place % prefix.every == 0:
            prefix.states[place] = hidden
        return hidden

    def _run(self, step: Step, hidden: Tensor, arguments: Arguments) -> Tensor:
        self.ran += len(step.parts)
        hidden = scaled(hidden, step.scale)
        if step.map:
            return step.map.run(hidden)
        layer = self.layers[step.block.index]
        with with_weights(layer, step.weights):
            if (
                step.parts == step.block.sublayers and not step.block.scaled_by
            ):  # its own forward adds up in an order and a dtype of its own
                answer = layer(hidden, **arguments)
                return answer[0] if isinstance(answer, tuple) else answer
            return run_branches(step.parts[0].branches, layer, hidden, LayerCall(arguments))


def _is_at(prefix: PrefixCache | None, place: int | None, step: Step) -> bool:
    """Whether `step` is the prefix's step at `place`, where all before it are the prefix's too."""
    return prefix is not None and place is not None and place < len(prefix.names) and prefix.names[place] == step.name


def _is_wanted(step: Step, prefix: PrefixCache, place: int) -> bool:
    """Whether this step of the prefix must be run: it isn't kept, and a plan ends here or what follows needs it."""
    if place in prefix.states:
        return False
    return bool(step.plans) or any(
        not _is_at(prefix, place + 1, child) or _is_wanted(child, prefix, place + 1) for child in step.after.values()
    )


def step_name(parts: tuple[Sublayer, ...]) -> str:
    return "+".join(part.name for part in parts)


def live_steps(
    structure: ModelStructure, plan: Plan, mapped: Container[str] = ()
) -> Iterator[tuple[Block, tuple[Sublayer, ...]]]:
    """What `plan` keeps, in order: sublayer by sublayer, a parallel block that is kept whole as one.

    Skipped sublayers whose names are `mapped` have steps as well, each one of its own.
    """
    for block in structure.blocks:
        kept = [part for part in block.sublayers if block.index not in getattr(plan, part.kind)]
        live = [part for part in block.sublayers if part in kept or part.name in mapped]
        if block.parallel and len(kept) == 2:
            yield block, tuple(live)
        else:
            yield from ((block, (part,)) for part in live)


def record(model: PreTrainedModel, **inputs: Tensor) -> Recording:
    """Run the embedding of `model` on `inputs` (as for its forward), and note what each layer is called with."""
    inner = base_model(model)
    structure = locate(inner)
    calls: list[Arguments] = []

    def note(layer: nn.Module, arguments: Arguments, hidden: Tensor) -> Tensor:
        calls.append(arguments)
        embedded.append(hidden)
        if len(calls) == len(structure.blocks):
            raise Enough
        return hidden

    embedded: list[Tensor] = []
    with suppress(Enough), standing_in(inner, structure, note):
        inner(**inputs, use_cache=False)
    return Recording(inputs, embedded[0], tuple(calls))


def run_head(model: PreTrainedModel, recording: Recording, hidden: Tensor) -> Tensor:
    """The logits, (batch, tokens, vocabulary), of the last layer's output `hidden`, by the model's own head."""
    inner = base_model(model)
    with handing(inner, locate(inner), hidden):
        return inner(**recording.inputs, use_cache=False).logits


class Enough(Exception):
    """What a forward is run for was seen: raised inside of it, where the rest of it would be for nothing."""


def states_at(module: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """What `run` first calls `module` with, (batch, tokens, hidden) say, and runs no further; None if it doesn't."""
    given: list[Tensor] = []

    def reach(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        given.append(args[0])
        raise Enough

    handle = module.register_forward_pre_hook(reach)
    try:
        with suppress(Enough):
            run()
    finally:
        handle.remove()
    return given[0] if given else None


def states_before_output(model: PreTrainedModel, run: Callable[[], object]) -> Tensor:
    """What `run` has the output embeddings of `model` given. Raises `UnsupportedModel` where it doesn't."""
    given = states_at(output_embeddings(model), run)
    if given is None:
        raise UnsupportedModel(f"{type(model).__name__} makes logits without its output embeddings")
    return given


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    """The module that makes logits. Raises `UnsupportedModel` where there is none."""
    output = model.get_output_embeddings()
    if output is None:
        raise UnsupportedModel(f"{type(model).__name__} makes logits without output embeddings")
    return output


@contextmanager
def handing(model: PreTrainedModel, structure: ModelStructure, hidden: Tensor) -> Iterator[None]:
    """Have `hidden` stand in for what a replay yields, for the time of the `with`: what follows is the model's own."""
    if structure.apart:
        with standing_in(model, structure, lambda *_: hidden):
            yield
        return
    output = output_embeddings(model)
    # ahead of hooks that look at what is given
    handle = output.register_forward_pre_hook(lambda module, args: (hidden, *args[1:]), prepend=True)
    try:
        with standing_in(model, structure, lambda layer, arguments, given: given):
            yield
    finally:
        handle.remove()


def answering(layer: nn.Module, block: Block, answer: Callable[[Arguments, Tensor], Tensor]) -> Callable[..., Any]:
    """A forward for a layer that answers, in its form, the hidden states `answer(arguments, hidden)`."""
    names = parameter_names(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args)) | kwargs
        hidden = answer(arguments, arguments.pop(names[0]))
        return hidden if block.answer is None else (hidden, *(None for _ in block.answer))

    return forward


@contextmanager
def standing_in(
    model: nn.Module, structure: ModelStructure, answer: Callable[[nn.Module, Arguments, Tensor], Tensor]
) -> Iterator[None]:
    """Have `answer(layer, arguments, hidden)` stand in for each layer's forward, for the time of the `with`.

    Below an accelerate hook, so that arguments come on the layer's own device.
    """

    with ExitStack() as replaced:
        for layer, block in zip(model.get_submodule(structure.layers).children(), structure.blocks):
            replaced.enter_context(forward_replaced(layer, answering(layer, block, partial(answer, layer))))
        yield
