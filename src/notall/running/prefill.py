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

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, UsageError
from ..plan import Plan
from ..structure.key_values import (
    CACHE_NAMES,
    CacheSlot,
    Catching,
    Joining,
    attention_of,
    caught,
    index_of,
    key_value_rows,
    writer_of,
)
from ..structure.model_structure import (
    ModelStructure,
    Sublayer,
    base_model,
    inputs_device,
    text_config,
)
from ..structure.observation import (
    Arguments,
    Branch,
    LayerCall,
    child,
    parameter_names,
    run_branches,
)
from ..structure.proving import relative_error, tolerance
from ..structure.undoing import Undo
from .repaired import RepairedPlan, placed_in_prompt

CANNOT = (
    "cannot be skipped in the prompt alone: its keys and values cannot be written"
    " without the rest of it"
)
FIX = "skip it for every token, or take it out of the plan"
PROBE_TOKENS, PROBE_LAST = 7, 3  # of the check: no size of a model's that a test has


@dataclass
class Prompt:
    """What is known of the prompt while a model runs. Columns are places in the cache,
    padding included.
    """

    last_tokens: int
    end: int | None = (
        None  # the column behind the prompt; None outside of a declaration
    )
    whole: int | None = (
        None  # how many last tokens of the forward that runs are whole; None: all
    )

    @property
    def key(self) -> str:
        """Of the hook that counts tokens."""
        return "notall prompt"

    def enter(self, tokens: int, past: Callable[[], int]) -> None:
        """A forward of so many tokens begins, behind `past` columns."""
        self.whole = None
        if self.end is None:
            return
        early = min(tokens, self.end - self.last_tokens - past())
        if early > 0:
            self.whole = tokens - early


PROMPTS: WeakKeyDictionary[nn.Module, Prompt] = (
    WeakKeyDictionary()
)  # of models inside a `skip` with a prefill part


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
    declared = PROMPTS.get(base_model(model))
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

    def generate(*args: Any, **kwargs: Any) -> Any:
        with prompt(model, _columns(args, kwargs)):
            return type(model).generate(model, *args, **kwargs)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> None:
        given = dict(zip(parameter_names(module), args)) | kwargs
        tokens = next(
            given[name]
            for name in ("input_ids", "inputs_embeds")
            if given.get(name) is not None
        )
        found.enter(tokens.shape[1], partial(_past, given))

    undo.put(PROMPTS, model, found)
    undo.put(model.__dict__, "generate", generate)
    undo.put(decoder._forward_pre_hooks, found.key, enter)
    undo.put(decoder._forward_pre_hooks_with_kwargs, found.key, True)
    return found


def _columns(args: tuple[Any, ...], kwargs: Arguments) -> int:
    """How many tokens `generate` is given, with those that are in its cache; without
    any it begins with one.
    """
    given = [
        *args[:1],
        *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")),
    ]
    return max(
        (
            value.shape[1]
            for value in given
            if isinstance(value, Tensor) and value.dim() > 1
        ),
        default=1,
    )


def _past(arguments: Arguments) -> int:
    """How many tokens are in the cache of a forward's arguments."""
    if arguments.get("cache_position") is not None:
        return int(arguments["cache_position"][0])
    cache = next(
        (arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None),
        None,
    )
    return 0 if cache is None else int(cache.get_seq_length())


@dataclass
class InPrompt:
    """What a layer skips in the prompt, as it runs: sublayers by name, and their layers
    that write keys and values.
    """

    prompt: Prompt
    names: frozenset[str]
    writers: Mapping[str, nn.Module]

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
                else:
                    total = _added(branch, holder, hidden, total, call)
        return total


def in_prompts(
    model: PreTrainedModel, structure: ModelStructure, plan: Plan, prompt: Prompt
) -> dict[int, InPrompt]:
    """For each block of which `plan` skips something in the prompt, by its index, what
    that is.

    Raises `UnsupportedModel` where keys and values cannot be written alone, which is
    tried once for each sublayer.
    """
    layers = model.get_submodule(structure.layers)
    skipped = [
        part
        for part in structure.sublayers
        if part.index in getattr(plan.prefill, part.kind)
    ]
    rows = checked_rows(model, structure, skipped)
    weights: dict[str, dict[str, Tensor]] = {}
    if isinstance(plan, RepairedPlan):
        placed = {
            path: placed_in_prompt(model, path, weight)
            for path, weight in plan.prompt_weights.items()
        }
        there = plan.model_copy(update={"prompt_weights": placed})
        weights = {
            part.name: there.prompt_weights_of(structure, part) for part in skipped
        }
    found: dict[int, InPrompt] = {}
    for index in dict.fromkeys(part.index for part in skipped):
        layer = child(layers, str(index))
        parts = [part for part in skipped if part.index == index]
        writers = {
            part.name: writer_of(
                layer, branch, rows[part.name], weights.get(part.name, {})
            )
            for part in parts
            for branch in part.branches
            if branch.is_attention
        }
        found[index] = InPrompt(prompt, frozenset(part.name for part in parts), writers)
    return found


Rows = dict[str, dict[str, Tensor]]  # by sublayer, what `key_value_rows` returns
_CHECKED: WeakKeyDictionary[nn.Module, tuple[ModelStructure, Rows]] = (
    WeakKeyDictionary()
)


def checked_rows(
    model: PreTrainedModel, structure: ModelStructure, parts: Sequence[Sublayer]
) -> Rows:
    """For each attention among `parts` its `key_value_rows`, once each was seen to run
    for the last tokens alone.
    """
    known = _CHECKED.get(model)
    rows = known[1] if known and known[0] is structure else {}
    _CHECKED[model] = structure, rows
    new = [part for part in parts if part.name not in rows]
    if not new:
        return rows
    from .replay import record  # which runs plans, and so imports what skips

    layers = model.get_submodule(structure.layers)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # gradients find what keys and values need
        ids = torch.arange(2 * PROBE_TOKENS, device=inputs_device(model)).view(
            2, PROBE_TOKENS
        )
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        recordings = [
            record(
                model,
                input_ids=ids % text_config(model).vocab_size,
                attention_mask=mask,
            )
            for mask in (padded, torch.ones_like(ids))
        ]
        for part in new:
            layer = child(layers, str(part.index))
            for recording in recordings:
                call = LayerCall(recording.arguments[part.index])
                embedded = recording.embedded.to(recording.devices[part.index])
                rows[part.name] = _check(
                    part, layer, embedded, call, text_config(model)
                )
    return rows


def _check(
    part: Sublayer,
    layer: nn.Module,
    hidden: Tensor,
    call: LayerCall,
    config: PretrainedConfig,
) -> dict[str, Tensor]:
    """Run a sublayer whole and for the last tokens alone, (batch, tokens, hidden): both
    and their caches agree.

    Raises `UnsupportedModel` where they don't. Returns the `key_value_rows` of an
    attention.
    """
    rows: dict[str, Tensor] = {}
    caches = [DynamicCache(config=config) for _ in range(2)]
    total = hidden
    try:
        slot = CacheSlot.of(call.arguments)
        calls = [
            LayerCall(call.arguments | {slot.name: cache}, call.extras)
            for cache in caches
        ]
        for branch in part.branches:
            if branch.is_attention:
                rows |= key_value_rows(branch, layer, hidden, call)
                writer = writer_of(layer, branch, rows, {})
            total = run_last(
                branch,
                layer,
                hidden,
                total,
                calls[0],
                PROBE_LAST,
                writer if branch.is_attention else None,
            )
        expected = run_branches(part.branches, layer, hidden, calls[1])
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UnsupportedModel(f"{part.name} {CANNOT} ({reason}); {FIX}") from error
    errors = [relative_error(total[:, -PROBE_LAST:], expected[:, -PROBE_LAST:])]
    pairs = zip(*(caches_tensors(cache) for cache in caches))
    errors += [relative_error(found, wanted) for found, wanted in pairs]
    if not max(errors) <= tolerance(hidden.dtype):
        found = f"with them it differs by {max(errors):.1e} of its largest value"
        raise UnsupportedModel(f"{part.name} {CANNOT} ({found}); {FIX}")
    return rows


def caches_tensors(cache: DynamicCache) -> list[Tensor]:
    """The keys and values that it holds."""
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in cache.layers
    ]
    return [one for pair in pairs for one in pair if one is not None]


def _added(
    branch: Branch, holder: nn.Module, hidden: Tensor, total: Tensor, call: LayerCall
) -> Tensor:
    """`total` and what `branch` makes of `hidden`, (batch, tokens, hidden) each."""
    value = branch.run(holder, hidden, call).view(hidden.shape)
    return value if branch.adds_itself else total + value


def run_last(
    branch: Branch,
    holder: nn.Module,
    hidden: Tensor,
    total: Tensor,
    call: LayerCall,
    last: int,
    writer: nn.Module | None = None,
) -> Tensor:
    """`total` and, for the `last` tokens alone, what `branch` makes of `hidden`,
    (batch, tokens, hidden) each.

    An attention writes keys and values of all tokens, those of earlier ones as
    `writer`, a layer, makes them.
    """
    tokens = hidden.shape[1]
    early, rows = slice(0, tokens - last), slice(tokens - last, tokens)
    ending = cut(call, rows, hidden)
    if branch.is_attention:
        written = caught(
            branch,
            writer or holder,
            hidden[:, early].contiguous(),
            cut(call, early, hidden),
        )
        slot = CacheSlot.of(call.arguments)
        if not last:
            _write(written, slot, child(holder, attention_of(branch)))
        ending.arguments[slot.name] = Joining(
            slot.held, written.found, _positions(call)
        )
        _unmask(
            ending,
            holder,
            last,
            tokens,
            slot.keys(tokens, child(holder, attention_of(branch))),
        )
    if not last:
        return total
    ended = _added(branch, holder, hidden[:, rows].contiguous(), total[:, rows], ending)
    call.attention = ending.attention
    return torch.cat([total[:, early], ended], dim=1)


def _write(written: Catching, slot: CacheSlot, attention: nn.Module) -> None:
    """Write what was caught where `attention` has its place in the cache, which a
    writer may not know.
    """
    if slot.held is not None:
        args, kwargs = written.how
        slot.held.update(*written.found, index_of(attention), *args, **kwargs)


def _positions(call: LayerCall) -> Tensor | None:
    return (call.arguments | call.extras).get("cache_position")


def _unmask(
    call: LayerCall, holder: nn.Module, last: int, tokens: int, keys: int
) -> None:
    """Give the last of some tokens a mask where none says that each sees those before
    it: torch would count from the first key, of which a static cache has more than
    there are tokens.
    """
    is_sdpa = _attention_implementation(holder) == "sdpa"
    if (
        is_sdpa
        and call.arguments.get("attention_mask", call) is None
        and (last > 1 or keys > tokens)
    ):
        seen = torch.ones(
            last, keys, dtype=torch.bool, device=next(holder.parameters()).device
        )
        call.arguments["attention_mask"] = seen.tril(tokens - last)[
            None, None
        ]  # (1, 1, last, keys)


def _attention_implementation(holder: nn.Module) -> str | None:
    configs = (getattr(module, "config", None) for module in holder.modules())
    return next(
        (config._attn_implementation for config in configs if config is not None), None
    )


def cut(call: LayerCall, rows: slice, hidden: Tensor) -> LayerCall:
    """The call of a layer for these `rows` of its tokens alone."""

    def of(arguments: Arguments) -> Arguments:
        return {
            name: _rows(name, value, rows, hidden.shape[:2])
            for name, value in arguments.items()
        }

    return LayerCall(of(call.arguments), of(call.extras))


def _rows(name: str, value: Any, rows: slice, shape: torch.Size) -> Any:
    if isinstance(value, Tensor):
        axis = _token_axis(name, value, shape)
        return (
            value
            if axis is None
            else value.narrow(axis, rows.start, rows.stop - rows.start)
        )
    if type(value) in (tuple, list):
        return type(value)(_rows(name, one, rows, shape) for one in value)
    if type(value) is dict:
        return {key: _rows(name, one, rows, shape) for key, one in value.items()}
    return value


def _token_axis(name: str, value: Tensor, shape: torch.Size) -> int | None:
    """Along which axis an argument holds a layer's tokens, where it does; masks hold
    those that look in rows.
    """
    batch, tokens = shape
    if "mask" in name:
        axis = -2 if value.dim() > 2 else None
    elif "position_embeddings" in name:
        axis = -2 if value.dim() > 1 else None
    elif "position" in name:
        axis = -1
    else:
        axis = 1 if value.dim() > 1 and value.shape[0] in (1, batch) else None
    return axis if axis is not None and value.shape[axis] == tokens else None
