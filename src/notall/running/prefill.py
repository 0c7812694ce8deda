"""Prefill-only skipping: sublayers left out of a prompt's tokens alone, whose keys and
values are written all the same.

In one forward pass all tokens go in. A skipped MLP runs on the last ones alone; a
skipped attention makes keys and values of all tokens, and looks at them from the last
ones alone. What is a prompt is declared, by `generate` or with `prompt`, and never
guessed: a forward outside of a declaration runs whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..plan import Plan
from ..structure.calls import Arguments, LayerCall, by_name, child
from ..structure.key_values import (
    CACHE_NAMES,
    EarlyOutputs,
    early_outputs,
    writer_of,
)
from ..structure.model_structure import (
    ModelStructure,
    Sublayer,
    base_model,
)
from ..structure.undoing import Undo
from .last_tokens import added, run_last
from .prefill_check import checked_rows
from .repaired import RepairedPlan
from .stand_in import StandIn
from .weight_swaps import placed_in_prompt, with_modules


@dataclass
class Prompt:
    """What is known of the prompt while a model runs. Columns are places in the cache,
    padding included.
    """

    last_tokens: int
    # the column behind the prompt; None outside of a declaration
    end: int | None = None
    # how many last tokens of the forward that runs are whole; None: all
    whole: int | None = None

    @property
    def key(self) -> str:
        """Of the hook that counts tokens."""
        return "notall prompt"

    def last(self) -> int:
        """How many last tokens of a forward that is split are whole."""
        assert self.whole is not None
        return self.whole

    def enter(self, tokens: int, past: Callable[[], int]) -> None:
        """A forward of so many tokens begins, behind `past` columns."""
        self.whole = None
        if self.end is None:
            return
        early = min(tokens, self.end - self.last_tokens - past())
        if early > 0:
            self.whole = tokens - early


# Of models inside a `skip` with a prefill part.
DECLARED_PROMPTS: WeakKeyDictionary[nn.Module, Prompt] = WeakKeyDictionary()


@contextmanager
def prompt(model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """Declare the first `tokens` columns of the cache, padding included, the prompt of
    all forwards in the `with`.

    Inside a `with notall.skip(model, plan)` of a plan with a prefill part; `generate`
    does it by itself. All but the last tokens of the prompt
    (`plan.prefill.last_tokens`) run without what the plan skips in the prompt. Without
    such a plan it changes nothing. Raises `UsageError` for a prompt without tokens.
    """
    if tokens < 1:
        raise UsageError(f"a prompt of {tokens} tokens is none: give 1 or more")
    declared = DECLARED_PROMPTS.get(base_model(model))
    if declared is None:
        yield
        return
    around = declared.end
    declared.end = tokens
    try:
        yield
    finally:
        declared.end, declared.whole = around, None


def declaring(
    model: PreTrainedModel, decoder: nn.Module, plan: Plan, undo: Undo
) -> Prompt:
    """Have `generate` declare its prompt, and `decoder`, which runs the layers, count
    tokens, until `undo` is left.
    """
    found = Prompt(plan.prefill.last_tokens)
    kind: Any = type(model)  # one that generates

    def generate(*args: Any, **kwargs: Any) -> Any:
        with prompt(model, _columns(args, kwargs)):
            return kind.generate(model, *args, **kwargs)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        given = by_name(module, args, kwargs)
        tokens = given.get("input_ids")  # (batch, tokens)
        if tokens is None:
            tokens = given["inputs_embeds"]  # (batch, tokens, hidden)
        found.enter(tokens.shape[1], partial(_past, given))

    undo.put(DECLARED_PROMPTS, model, found)
    undo.put(model.__dict__, "generate", generate)
    undo.put(decoder._forward_pre_hooks, found.key, enter)
    undo.put(decoder._forward_pre_hooks_with_kwargs, found.key, True)
    return found


def _columns(args: tuple[Any, ...], kwargs: Arguments) -> int:
    """How many tokens `generate` is given, with those that are in its cache; without
    any it begins with one.
    """
    names = ("inputs", "input_ids", "inputs_embeds")
    given = [*args[:1], *(kwargs.get(name) for name in names)]
    counts = [
        value.shape[1]  # (batch, tokens), or (batch, tokens, hidden)
        for value in given
        if isinstance(value, Tensor) and value.dim() > 1
    ]
    return max(counts, default=1)


def _past(arguments: Arguments) -> int:
    """How many tokens are in the cache of a forward's arguments."""
    if arguments.get("cache_position") is not None:
        return int(arguments["cache_position"][0])
    for name in CACHE_NAMES:
        if arguments.get(name) is not None:
            return int(arguments[name].get_seq_length())
    return 0


@dataclass
class InPrompt:
    """What a layer does otherwise in the prompt.

    `names` are those of skipped sublayers. By the name of a sublayer, `writers` are
    layers that write keys and values of skipped attentions, `early` the projections of
    attentions that run with keys and values of the prompt's own, and `stand_ins` what
    runs in the place of skipped MLPs.
    """

    prompt: Prompt
    names: frozenset[str]
    writers: Mapping[str, nn.Module]
    early: Mapping[str, Mapping[str, EarlyOutputs]]
    stand_ins: Mapping[str, StandIn]

    def changes(self, part: Sublayer) -> bool:
        """Whether the prompt runs a sublayer otherwise."""
        return part.name in self.names or part.name in self.early

    @property
    def splits(self) -> bool:
        """Whether the forward that runs has tokens that skip them."""
        return self.prompt.whole is not None

    def run(
        self,
        parts: Sequence[Sublayer],
        holder: nn.Module,
        hidden: Tensor,
        call: LayerCall,
    ) -> Tensor:
        """One line of the stream, (batch, tokens, hidden): what `parts` add, those
        skipped to the last tokens alone.
        """
        last = self.prompt.whole
        assert last is not None
        total = hidden
        for part in parts:
            for branch in part.branches:
                if part.name in self.names:
                    writer = self.writers.get(part.name)
                    total = run_last(branch, holder, hidden, total, call, last, writer)
                    continue
                with with_modules(holder, self.early.get(part.name, {})):
                    total = added(branch, holder, hidden, total, call)
            if part.name in self.stand_ins:
                total = self.stand_ins[part.name].added(hidden, total, last)
        return total


def in_prompts(
    model: PreTrainedModel, structure: ModelStructure, plan: Plan, prompt: Prompt
) -> dict[int, InPrompt]:
    """For each block that runs otherwise in the prompt of `plan`, by its index, how.

    Raises `UnsupportedModel` where keys and values cannot be written alone, which is
    tried once for each sublayer.
    """
    layers = model.get_submodule(structure.layers)
    own = _own_weights(model, structure, plan)
    changed = [
        part
        for part in structure.sublayers
        if _is_skipped(plan, part) or part.name in own
    ]
    rows = checked_rows(model, structure, changed)
    found: dict[int, InPrompt] = {}
    for index in dict.fromkeys(part.index for part in changed):
        layer = child(layers, str(index))
        parts = [part for part in changed if part.index == index]
        skipped = [part for part in parts if _is_skipped(plan, part)]
        writers, early, stand_ins = {}, {}, {}
        for part in parts:
            weights = own.get(part.name, {})
            if part.kind == "mlp":
                if weights:
                    stand_ins[part.name] = StandIn.of(weights)
            elif part in skipped:
                branch = next(one for one in part.branches if one.is_attention)
                writer = writer_of(layer, branch, rows[part.name], weights)
                writers[part.name] = writer
            else:
                early[part.name] = early_outputs(
                    layer, rows[part.name], weights, prompt.last
                )
        names = frozenset(part.name for part in skipped)
        found[index] = InPrompt(prompt, names, writers, early, stand_ins)
    return found


def _is_skipped(plan: Plan, part: Sublayer) -> bool:
    return part.index in getattr(plan.prefill, part.kind)


def _own_weights(
    model: PreTrainedModel, structure: ModelStructure, plan: Plan
) -> dict[str, dict[str, Tensor]]:
    """The weights that sublayers have for the prompt, by sublayer and by their paths
    below its layer, where the model is.
    """
    if not isinstance(plan, RepairedPlan):
        return {}
    placed = {
        path: placed_in_prompt(model, path, weight)
        for path, weight in plan.prompt_weights.items()
    }
    there = plan.model_copy(update={"prompt_weights": placed})
    found = {
        part.name: there.prompt_weights_of(structure, part)
        for part in structure.sublayers
    }
    return {name: weights for name, weights in found.items() if weights}
