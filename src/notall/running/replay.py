"""Run many plans over one batch, computing what they share only once.

What they keep is a tree, which is walked depth first, so that only the states along one
branch are alive at a time. Embedding and head are the model's own forward, with hidden
states in place of its layers.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from ..plan import Plan
from ..structure.branches import run_branches, scaled
from ..structure.calls import LayerCall, first
from ..structure.locating import locate
from ..structure.model_structure import (
    Sublayer,
    base_model,
    layer_modules,
)
from .prefill import InPrompt, Prompt, in_prompts
from .recording import Recording, states_before_output
from .repaired import RepairedPlan
from .skipping import refuse_skipping, skip
from .steps import PrefixCache, Step, live_steps, step_name
from .weight_swaps import with_weights


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
        self.layers = layer_modules(self.model, self.structure)
        self.first: dict[str, Step] = {}
        self.plans = len(plans)
        self.executions = 0  # sublayers run for one batch
        # sublayers run so far, over all batches; one that the prompt skips counts as
        # the share of tokens it runs
        self.ran = 0.0
        # plans that share nothing, with their numbers
        self.alone: dict[Plan, list[int]] = {}
        for number, plan in enumerate(plans):
            plan.check(self.structure)
            if isinstance(plan, RepairedPlan):
                plan = plan.placed(self.model)
            if self.structure.apart:
                self._grow(plan, number)
                continue
            if plan not in self.alone:
                self.executions += len(self.structure.running(plan))
            self.alone.setdefault(plan, []).append(number)

    def _grow(self, plan: Plan, number: int) -> None:
        """Add the steps of a plan to the tree, where they are not there yet."""
        here, step = self.first, None
        for new in self._steps_of(plan):
            begin = step.block.index if step else 0
            new.scale = self.structure.scale(begin, new.block.index)
            step = here.setdefault(new.name, new)
            here = step.after
            if step is new:
                self.executions += len(new.parts)
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
        # steps, or the numbers of plans that end, each with the stream that goes in,
        # (batch, tokens, hidden), and its place on the prefix
        waiting: list[tuple[Step | list[int], Tensor | None, PrefixCache | None, int]]
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
                end = len(self.structure.blocks)
                left = self.structure.scale(step.block.index, end)
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
                continue
            weights: dict[str, Tensor] = {}
            if isinstance(plan, RepairedPlan):
                weights = plan.weights_of(self.structure, parts)
            name = f"{name} {plan.digest}" if weights else name
            step = Step(name, block, parts, weights)
            here = split.get(block.index)
            if here and any(map(here.changes, parts)):
                step.in_prompt = here
                step.name = f"{name} {self._prompt_name(plan, parts, here)}"
            yield step

    def _in_prompt(self, plan: Plan) -> dict[int, InPrompt]:
        """Of each block, by its index, what of it the prompt skips."""
        if not plan.prefill:
            return {}
        weights = plan.weights if isinstance(plan, RepairedPlan) else {}
        prompt = Prompt(plan.prefill.last_tokens)
        # keys and values of the prompt are made with these weights, too
        with with_weights(self.model, weights):
            return in_prompts(self.model, self.structure, plan, prompt)

    def _prompt_name(
        self, plan: Plan, parts: Sequence[Sublayer], here: InPrompt
    ) -> str:
        """What tells a step that the prompt skips from one that it doesn't: plans with
        such steps alike share them.
        """
        skipped = [part for part in parts if part.name in here.names]
        own = isinstance(plan, RepairedPlan) and any(
            plan.prompt_weights_of(self.structure, part) for part in parts
        )
        last = f"last {plan.prefill.last_tokens}"
        digest = f", {plan.digest}" if own else ""
        without = f"without {step_name(skipped)}" if skipped else "otherwise"
        return f"{without} in the prompt ({last}{digest})"

    def _run(self, step: Step, hidden: Tensor, recording: Recording) -> Tensor:
        """The stream behind a step; both are (batch, tokens, hidden)."""
        hidden = scaled(hidden.to(recording.devices[step.block.index]), step.scale)
        if step.in_prompt:
            whole = recording.whole(step.in_prompt.prompt.last_tokens)
            if whole < hidden.shape[1]:
                return self._run_split(step, step.in_prompt, hidden, recording, whole)
        self.ran += len(step.parts)
        if step.map:
            step.map = step.map.like(hidden)
            return step.map.run(hidden)
        layer = self.layers[step.block.index]
        arguments = recording.arguments[step.block.index]
        with with_weights(layer, step.weights):
            # its own forward adds up in an order and a dtype of its own
            if step.parts == step.block.sublayers and not step.block.scaled_by:
                return first(layer(hidden, **arguments))
            branches = step.parts[0].branches
            return run_branches(branches, layer, hidden, LayerCall(arguments))

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
