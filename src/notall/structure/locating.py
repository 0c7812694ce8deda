"""Where a model's sublayers are: found by watching one forward pass, proved by
recomposing another.

There is no table of architectures: what `observation` reads each layer as is run again
from its parts (`proving`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, UsageError, expect
from .calls import child, first
from .in_place import DummyLayer, Stubs, halves, whole
from .model_structure import (
    Block,
    ModelStructure,
    base_model,
    fingerprint,
    name_of,
    text_config,
)
from .observation import PROBE_BATCH, PROBE_TOKENS, Watch, watching
from .proving import Alone, prove, prove_apart, prove_causal, run_probe
from .reading import block_of, mixer_of, read_block, sublayer_of
from .slicing import LAYER_INDICES
from .traces import LayerTrace, MadeBy
from .undoing import Undo
from .weights import is_weightless, running_weightless

Probe = Callable[
    ..., None
]  # runs the model on a few tokens, with a cache if one is given
LOCATED: WeakKeyDictionary[nn.Module, tuple[nn.ModuleList, ModelStructure]] = (
    WeakKeyDictionary()
)  # of these layers


def locate(model: PreTrainedModel) -> ModelStructure:
    """Find and prove the sublayers of a causal language model, once per model.

    Takes about three forward passes of 8 tokens, or six where layers depend on each
    other. On the meta device only the structure is read. Raises `UnsupportedModel`,
    naming the layer, what was expected and what to do, when the model is not an
    embedding, a residual stream of attentions and MLPs, and a head, or when a layer
    differs from its recomposition.
    """
    expect(model, nn.Module, "a model, as notall.load returns it")
    model = base_model(model)
    if not hasattr(model, "config"):
        raise UsageError(
            f"{type(model).__name__} has no config: give a causal language model of"
            " transformers"
        )
    path, layers = decoder_layers(model)
    if getattr(model, "_is_stateful", False) and not hasattr(
        DynamicCache, "update_conv_state"
    ):
        held = (
            f"which transformers {transformers.__version__} holds in a cache of the"
            " model's own"
        )
        raise UnsupportedModel(
            f"{type(model).__name__} keeps a recurrent state, {held}; install"
            " transformers 5"
        )
    known = LOCATED.get(model)
    if known and known[0] is layers:
        return known[1]
    try:
        with torch.no_grad(), Undo() as undo, undo:
            for module in model.modules():
                if module.training:
                    undo.put(module.__dict__, "training", False)
            weightless = is_weightless(model)
            with (
                running_weightless(model) if weightless else nullcontext(model)
            ) as call:
                structure, watch = _found(
                    model, path, layers, partial(run_probe, model, call)
                )
            if not weightless:
                alone = [
                    Alone(text_config(model), trace, watch.sharing, structure.in_place)
                    for trace in watch.traces
                ]
                for one, block in zip(alone, structure.blocks):
                    prove(one, block)
                prove_causal(
                    next((one for one in alone if one.trace.cache_writes), alone[0])
                )
    except (torch.OutOfMemoryError, UnsupportedModel):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        problem = (
            f"its forward of {PROBE_TOKENS} tokens with an ordinary cache failed"
            f" ({reason})"
        )
        fix = "choose another model, or describe this one in an issue"
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be watched: {problem}; {fix}"
        ) from error
    LOCATED[model] = layers, structure
    return structure


def has_missing(model: nn.Module) -> bool:
    """Whether sublayers of `model` are known to be missing, so that only `skip` counts
    its layers right.
    """
    known = LOCATED.get(base_model(model))
    return bool(known and known[1].missing)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder layers. Raises `UnsupportedModel` where
    there is none.
    """
    config, kind = text_config(model), text_config(model).model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{kind} is an encoder-decoder; notall skips sublayers of decoder-only"
            " models"
        )
    if (shared := getattr(config, "num_kv_shared_layers", 0)) and DummyLayer is None:
        problem = (
            f"{kind} shares keys and values between layers"
            f" (num_kv_shared_layers={shared})"
        )
        raise UnsupportedModel(
            f"{problem}: an attention cannot be left out without those that read from it"
        )
    for within in (
        model.get_decoder() or model,
        model,
    ):  # ModernBERT's answers with its output projection
        for name, module in model.named_modules():
            layers = (
                isinstance(module, nn.ModuleList)
                and len(module) == config.num_hidden_layers
            )
            if layers and any(inner is module for inner in within.modules()):
                return name, module
    problem = (
        f"no list of {config.num_hidden_layers} decoder layers in"
        f" {type(model).__name__}"
    )
    raise UnsupportedModel(
        f"{problem}; notall needs a model whose layers are in one ModuleList"
    )


def _found(
    model: PreTrainedModel, path: str, layers: nn.ModuleList, probe: Probe
) -> tuple[ModelStructure, Watch]:
    """Lines of a residual stream where layers can be read as such; else layers in
    place, or as wholes.
    """
    config, in_place, apart = text_config(model), False, True
    cache = DynamicCache(config=config)
    with watching(layers, cache) as watch:
        probe(cache)
    if [trace.index for trace in watch.traces] != list(range(len(layers))):
        problem = (
            f"the layers of {type(model).__name__} do not run one after the other, each"
            " once"
        )
        raise UnsupportedModel(
            f"{problem}; notall needs a plain stack of decoder layers"
        )
    handed = False  # more than the stream
    for before, after in pairwise(watch.traces):
        if not _is_handed_on(first(before.answer), after.kept[0]):
            problem = (
                f"the model changes its hidden states between layers {before.index} and"
                f" {after.index}"
            )
            expected = "expected each layer's output to be the next one's input"
            raise UnsupportedModel(
                f"{problem}; {expected}. notall leaves this model alone"
            )
        others = before.answer[1:] if isinstance(before.answer, tuple) else ()
        made = [value for value in others if isinstance(value, Tensor)]
        taken = [
            value for value in after.arguments.values() if isinstance(value, Tensor)
        ]
        handed = handed or any(
            _is_handed_on(value, given) for value in made for given in taken
        )
    indices = (
        trace.arguments.get(name) for trace in watch.traces for name in LAYER_INDICES
    )
    # where the model gives layers their index
    numbered = any(isinstance(index, int) for index in indices)
    depend = bool(watch.sharing.pairs) or numbered
    try:
        if depend or handed:
            raise UnsupportedModel(
                f"layers of {config.model_type} depend on each other by more than a"
                " residual stream"
            )
        blocks = tuple(read_block(config, trace) for trace in watch.traces)
    except UnsupportedModel:
        if DummyLayer is None:  # there a cache keeps a place for every layer
            raise
        blocks, in_place = _in_place(model, watch, probe, depend)
        apart = not in_place and watch.traces[0].hidden.shape == (
            PROBE_BATCH,
            PROBE_TOKENS,
            config.hidden_size,
        )
    return (
        ModelStructure(
            config.model_type, path, blocks, str(fingerprint(config)), in_place, apart
        ),
        watch,
    )


def _in_place(
    model: PreTrainedModel, watch: Watch, probe: Probe, depend: bool
) -> tuple[tuple[Block, ...], bool]:
    """The blocks, and whether their layers must stay where they are, as those that
    depend on others do.
    """
    if any(
        getattr(module, "is_cut", False)
        for trace in watch.traces
        for module in trace.layer.modules()
    ):
        raise UnsupportedModel(
            "sublayers were removed from this model for good; start from the original"
            " model"
        )
    writers = [trace.index for trace in watch.traces if trace.cache_writes]
    writing = [
        (trace.layer, write.module)
        for trace in watch.traces
        for write in trace.cache_writes
    ]
    mixers = frozenset(
        type(child(layer, module)) for layer, module in writing if module
    )
    wholes = [whole(trace) for trace in watch.traces]
    by_halves = [
        halves(trace, mixers) or parts for trace, parts in zip(watch.traces, wholes)
    ]
    for stubs in (by_halves, wholes):
        in_place = depend or not all(
            stub.is_layer for parts in stubs for stub in parts.values()
        )
        try:
            prove_apart(
                text_config(model), watch, probe, freed=writers[:-1] if in_place else []
            )
        except UnsupportedModel:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            continue
        return (
            tuple(
                _block_in_place(text_config(model), trace, stubs, watch)
                for trace in watch.traces
            ),
            in_place,
        )
    problem = (
        f"the layers of {type(model).__name__} depend on each other, and its cache"
        " needs a place for each of them"
    )
    raise UnsupportedModel(
        f"{problem} ({reason}). notall leaves this model alone: choose another one"
    )


def _block_in_place(
    config: PretrainedConfig, trace: LayerTrace, stubs: list[Stubs], watch: Watch
) -> Block:
    def at(place: MadeBy) -> str:
        """The sublayer at `place`, or its layer, where no sublayer of it is there."""
        index, module = place
        found = (
            name_of(kind, index)
            for kind, one in stubs[index].items()
            if one.is_layer or module in one.modules
        )
        return next(found, f"layer.{index}")

    parts, pairs = (
        [],
        [(at(source), at(reader)) for source, reader in watch.sharing.pairs],
    )
    for kind, stub in stubs[trace.index].items():
        read_by = {
            reader for source, reader in pairs if source == name_of(kind, trace.index)
        }
        mixer = (
            None
            if kind == "mlp"
            else "layer"
            if stub.is_layer
            else mixer_of(config, trace)
        )
        part = sublayer_of(trace, kind, mixer, stub.modules)
        parts.append(replace(part, stub=stub, read_by=tuple(sorted(read_by))))
    modules = [module for part in parts for module in part.modules]
    own = all(
        name.startswith(tuple(f"{module}." for module in modules))
        for name, _ in trace.layer.named_parameters()
    )
    bare = own and "" not in modules and not any(part.read_by for part in parts)
    return block_of(trace, parts, parallel=False, bare=bare)


def _is_handed_on(answer: object, given: Tensor) -> bool:
    """Whether the next layer was given `answer` itself, all of it, or, on another
    device, a copy of it.
    """
    if given is answer or not isinstance(answer, Tensor):
        return given is answer
    if given.untyped_storage()._cdata == answer.untyped_storage()._cdata:
        views = [
            (one.shape, one.stride(), one.storage_offset()) for one in (given, answer)
        ]
        return views[0] == views[1]
    return given.device != answer.device and torch.equal(given, answer.to(given.device))
