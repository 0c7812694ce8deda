"""The proof of what was read: each layer, run again from its parts, gives what it gave;
no MLP sees other tokens.
"""

import itertools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel
from . import calls, observation, traces
from .branches import Branch, run_branches, scaled as scaled_by
from .calls import Arguments, LayerCall, as_given, called_with, first
from .in_place import stubbed_layer
from .model_structure import Block, cache_argument, inputs_device, text_config
from .observation import Watch
from .slicing import count_past_empty_places, free_cache_slots, renumber, slice_config
from .traces import LayerTrace
from .undoing import Undo

BATCH, TOKENS = observation.PROBE_BATCH, observation.PROBE_TOKENS
NOT_WHAT = (
    " differs by {error:.1e} of its largest value from {what} (expected at most"
    " {most:.0e})"
)
NOT_LOCAL = (
    " looks at other tokens without a cache, or keeps a state elsewhere; expected that"
    " of a mixer that writes to the cache"
)


def run_probe(
    model: PreTrainedModel,
    run: Callable[..., object],
    cache: DynamicCache | None = None,
) -> None:
    """Have `run` call the model with a few tokens, one of them padding, and this cache
    or one of its own.
    """
    device, vocabulary = inputs_device(model), text_config(model).vocab_size
    tokens = (
        torch.arange(BATCH * TOKENS, device=device).view(BATCH, TOKENS) % vocabulary
    )
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    given = {} if cache is None else {cache_argument(model): cache}
    run(input_ids=tokens, attention_mask=mask, use_cache=True, **given)


@dataclass(frozen=True)
class Alone:
    """A layer as it was called, in a cache where no other has left anything: in its
    place, or the only one there is.
    """

    config: PretrainedConfig
    trace: LayerTrace
    sharing: traces.Sharing
    in_place: bool

    def numbered(self, undo: Undo) -> Undo:
        """Have it count itself as layer 0 until `undo` is left, if it is the only one
        there is.
        """
        if not self.in_place:
            renumber(self.trace.layer, 0, undo)
        return undo

    def run(
        self, hidden: Tensor, layer: nn.Module | None = None, freed: bool = False
    ) -> Tensor:
        """What it makes of `hidden`, or `layer` does as its twin, with its place in the
        cache `freed` or not.
        """
        return first(
            (self.trace.layer if layer is None else layer)(
                hidden.clone(), **self.arguments(freed)
            )
        )

    def arguments(self, freed: bool = False) -> Arguments:
        """What it was called with. What others lend and it was not seen to read makes
        no difference: zeros.
        """
        with Undo() as undo, undo:
            undo.put_fields(self.config)
            if not self.in_place:
                slice_config(self.config, [self.trace.index])
            elif freed:
                free_cache_slots(self.config, [self.trace.index])
            cache = DynamicCache(config=self.config)
        return {
            name: (
                cache if isinstance(value, DynamicCache) else self._unread_zeroed(value)
            )
            for name, value in as_given(self.trace.given).items()
        }

    def _unread_zeroed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            maker = self.sharing.source_of(value)
            pairs = self.sharing.pairs
            read = not maker or any(
                source == maker and at == self.trace.index for source, (at, _) in pairs
            )
            return value if read else torch.zeros_like(value)
        if isinstance(value, MutableMapping):
            for name, held in value.items():
                value[name] = self._unread_zeroed(held)
        return tuple(map(self._unread_zeroed, value)) if type(value) is tuple else value

    def expect(
        self,
        found: Tensor,
        expected: Tensor,
        message: str,
        what: str = "",
        computed_in: torch.dtype | None = None,
    ) -> None:
        """Raise `UnsupportedModel`, which says this of the layer, where more than
        rounding is between both.
        """
        error, most = (
            relative_error(found, expected),
            tolerance(computed_in or expected.dtype),
        )
        if not error <= most:
            problem = message.format(error=error, most=most, what=what)
            raise UnsupportedModel(
                f"{self.trace}{problem}. notall leaves this model alone: choose"
                " another one"
            )

    def computed_in(self, dtype: torch.dtype) -> torch.dtype:
        """LLM.int8() computes in float16, and picks by all tokens the columns that it
        does not round to 8 bits.
        """
        is_int8 = getattr(
            getattr(self.config, "quantization_config", None), "load_in_8bit", False
        )
        return torch.float16 if is_int8 else dtype


def prove(alone: Alone, block: Block) -> None:
    """Raise `UnsupportedModel` unless a layer is made of what `block` says: its parts
    give what it gave.
    """
    with Undo() as undo, alone.numbered(undo):
        if not block.sublayers[0].stub:
            _prove_lines(alone, block)
        elif alone.in_place:
            _prove_in_place(alone, block)
        else:  # goes or stays as a whole
            alone.expect(
                alone.run(alone.trace.hidden),
                first(alone.trace.answer),
                NOT_WHAT,
                "what it answers alone",
            )
            if not alone.trace.cache_writes:
                _prove_local(alone, alone.trace.hidden, alone.run)


def _prove_lines(alone: Alone, block: Block) -> None:
    """Run the layer from its parts, alone in a cache of one layer, and compare it with
    what the layer answered.
    """
    hidden, call, layer = (
        alone.trace.hidden,
        LayerCall(alone.arguments()),
        alone.trace.layer,
    )
    local: list[tuple[Branch, Tensor]] = []  # with the stream that they are given
    for branches in block_lines(block):
        for branch in branches:
            if branch.adds_itself:
                _prove_adds(alone, branch, hidden)
            if not branch.is_attention:
                local.append((branch, hidden))
        hidden = run_branches(branches, layer, hidden, call)
    message = (
        " differs from its recomposition by {error:.1e} of its largest value (expected"
        " at most {most:.0e}); {what}"
    )
    why = "it may count on its index or on what other layers leave behind"
    alone.expect(
        scaled_by(hidden, block.scale), first(alone.trace.answer), message, why
    )
    for branch, stream in local:
        names = ", ".join(branch.modules)
        message = (
            f": {names} looks at other tokens without a cache; expected that of the"
            " attention alone"
        )

        def run(given: Tensor, branch: Branch = branch) -> Tensor:
            return branch.run(layer, given, LayerCall(alone.arguments())).view(
                given.shape
            )

        _prove_local(alone, stream, run, message)


def _prove_adds(alone: Alone, branch: Branch, residual: Tensor) -> None:
    """A module that is given the residual must add it, unchanged: its answer for none
    is less by just that.
    """
    *ops, last = branch.ops
    layer = alone.trace.layer
    value = Branch(tuple(ops)).run(layer, residual, LayerCall(alone.arguments()))
    with_it, without = (
        last.run(layer, value, given, LayerCall(alone.arguments())).view(residual.shape)
        for given in (residual, torch.zeros_like(residual))
    )
    message = (
        f": {branch.modules[-1]} changes the residual stream that it is given; expected"
        " it to add to it"
    )
    alone.expect(without + residual, with_it, message, computed_in=residual.dtype)


def _prove_in_place(alone: Alone, block: Block) -> None:
    """It depends on others only by what it was seen to read, its stubs do what silence
    does, and its MLP is local.
    """
    trace = alone.trace
    elsewhere = [
        write.layer_idx
        for write in trace.cache_writes
        if write.layer_idx != trace.index
    ]
    if elsewhere:
        raise UnsupportedModel(
            f"{trace} writes to the cache at {elsewhere[0]}; expected its own place"
        )
    alone.expect(
        alone.run(trace.hidden),
        first(trace.answer),
        NOT_WHAT,
        "what it answers alone, in its place",
    )
    mixer = block.attention
    for part in block.sublayers:
        assert part.stub is not None
        silent = alone.run(
            trace.hidden,
            stubbed_layer(trace.layer, trace.index, {part.stub: torch.zeros_like}),
        )
        stubbed = alone.run(
            trace.hidden,
            stubbed_layer(trace.layer, trace.index, {part.stub: None}),
            part is mixer,
        )
        alone.expect(
            stubbed,
            silent,
            NOT_WHAT,
            f"what it answers when {part.name} runs and adds nothing",
        )
    assert mixer.stub is not None
    if not mixer.stub.is_layer:
        without = stubbed_layer(trace.layer, trace.index, {mixer.stub: None})
        _prove_local(alone, trace.hidden, partial(alone.run, layer=without, freed=True))
    elif not trace.cache_writes and not any(
        reader[0] == trace.index for _, reader in alone.sharing.pairs
    ):
        _prove_local(alone, trace.hidden, alone.run)


def prove_causal(alone: Alone) -> None:
    """What a layer makes of a token must not hang on those that follow, as in an
    encoder: tried on the last one.
    """
    trace = alone.trace
    axis, changed = _tokens_axis(trace.hidden), _flipped(trace.hidden, last=True)
    with Undo() as undo, alone.numbered(undo):
        found = alone.run(changed)
    # the first one is padding in the probe, where attention may look anywhere
    found, expected = (
        answer.narrow(axis, 1, TOKENS - 2) for answer in (found, first(trace.answer))
    )
    message = (
        " looks at the tokens that follow, as encoders do; expected a causal language"
        " model"
    )
    alone.expect(
        found, expected, message, computed_in=alone.computed_in(expected.dtype)
    )


def prove_apart(
    config: PretrainedConfig, watch: Watch, probe: Callable[[], None], freed: list[int]
) -> None:
    """Without cache places for `freed`, with layers that do nothing, each is given the
    same but what layers make.
    """
    given: list[Arguments] = []

    def idle(trace: LayerTrace, *args: object, **kwargs: object) -> object:
        arguments, hidden = called_with(trace.layer, args, kwargs)
        given.append(arguments)
        return (
            (hidden, *(None for _ in trace.answer[1:]))
            if isinstance(trace.answer, tuple)
            else hidden
        )

    with Undo() as undo, undo:
        undo.put_fields(config)
        free_cache_slots(config, freed)
        count_past_empty_places(config, undo)
        for trace in watch.traces:
            undo.put(*calls.forward_of(trace.layer), partial(idle, trace))
        probe()
    for trace, other in zip(watch.traces, given):
        made = [
            held
            for held in calls.tensors_in(trace.given)
            if not watch.sharing.source_of(held)
        ]
        left = list(calls.tensors_in(other))
        shapes = [[one.shape for one in some] for some in (made, left)]
        if shapes[0] != shapes[1] or not all(
            isinstance(one, FakeTensor) or torch.equal(one, same)
            for one, same in zip(made, left)
        ):
            problem = (
                f"{trace} is given what the model computes from other layers' answers"
            )
            raise UnsupportedModel(
                f"{problem}; notall leaves this model alone: choose another one"
            )


def _prove_local(
    alone: Alone,
    hidden: Tensor,
    run: Callable[[Tensor], Tensor],
    message: str = NOT_LOCAL,
) -> None:
    """What is no mixer must make the same of the last token whatever came before it."""
    axis = _tokens_axis(hidden)
    found, expected = (
        run(given).select(axis, -1) for given in (_flipped(hidden, last=False), hidden)
    )
    alone.expect(
        found, expected, message, computed_in=alone.computed_in(expected.dtype)
    )


def _flipped(hidden: Tensor, last: bool) -> Tensor:
    """With other states of the last token, or of all earlier ones."""
    earlier, end = hidden.split([TOKENS - 1, 1], dim=_tokens_axis(hidden))
    return torch.cat(
        [earlier, end.flip(-1)] if last else [earlier.flip(-1), end],
        dim=_tokens_axis(hidden),
    )


def _tokens_axis(hidden: Tensor) -> int:
    """Of hidden states whose batch and tokens are those of the probe, in this order."""
    return list(itertools.pairwise(hidden.shape)).index((BATCH, TOKENS)) + 1


def block_lines(block: Block) -> list[tuple[Branch, ...]]:
    """The lines of a whole block: one where it is parallel, one a sublayer where it is
    not.
    """
    lines = [part.branches for part in block.sublayers]
    return [tuple(itertools.chain(*lines))] if block.parallel else lines


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a fraction of the largest expected magnitude; nan where
    either holds one.
    """
    return float(
        (found.float() - expected.float()).abs().max()
        / expected.float().abs().max().clamp_min(1e-30)
    )


def tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same additions may differ, relative to the largest
    value.
    """
    return 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
