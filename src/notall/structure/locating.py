"""Where a model's sublayers are: found by watching one forward pass, proved by recomposing another.

`locate` needs no table of architectures. It watches what each decoder layer does with its hidden states
(`observation`), reads each layer as lines of a residual stream, and then runs every layer again from those parts, with
a cache and a layer index of its own (`proving`): where the numbers differ, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel, UsageError, expect
from .in_place import DummyLayer, Stub, halves, whole
from .model_structure import Block, ModelStructure, Sublayer, base_model, cache_argument, fingerprint, text_config
from .observation import (
    PROBE_BATCH,
    PROBE_TOKENS,
    Arguments,
    Branch,
    LayerTrace,
    Watch,
    child,
    first,
    forward_replaced,
    lines_of,
    parameter_names,
    scale_of,
    watching,
)
from .proving import prove, prove_causal, prove_in_place, prove_layer
from .sharing import Place, Sharing, tensors_in
from .slicing import LAYER_INDICES, cache_slots_freed
from .weights import is_weightless, running_weightless, weights_of

_LOCATED: WeakKeyDictionary[nn.Module, tuple[nn.ModuleList, ModelStructure]] = WeakKeyDictionary()


def locate(model: PreTrainedModel) -> ModelStructure:
    """Find and prove the sublayers of a causal language model, once per model.

    Takes about three forward passes of 8 tokens, or six where layers depend on each other. On the meta device only the
    structure is read.
    Raises `UnsupportedModel`, naming the layer, what was expected and what to do, when the model is not an embedding,
    a residual stream of attentions and MLPs, and a head, or when a layer differs from its recomposition.
    """
    expect(model, nn.Module, "a model, as notall.load returns it")
    model = base_model(model)
    if not hasattr(model, "config"):
        raise UsageError(f"{type(model).__name__} has no config: give a causal language model of transformers")
    path, layers = decoder_layers(model)
    if getattr(model, "_is_stateful", False) and not hasattr(DynamicCache, "update_conv_state"):
        raise UnsupportedModel(
            f"{type(model).__name__} keeps a recurrent state, which transformers {transformers.__version__} holds in a "
            "cache of the model's own; install transformers 5"
        )
    known = _LOCATED.get(model)
    if known and known[0] is layers:
        return known[1]
    try:
        with _undisturbed(model):
            found = _weightless(model, layers) if is_weightless(model) else _proved(model, layers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _refusal(model, error) from error
    config = text_config(model)
    structure = ModelStructure(
        config.model_type, path, found.blocks, str(fingerprint(config)), found.in_place, found.apart
    )
    remember(model, layers, structure)
    return structure


def remember(model: nn.Module, layers: nn.ModuleList, structure: ModelStructure) -> None:
    """Note that `structure` is what `locate` answers while `layers` are the model's."""
    _LOCATED[model] = (layers, structure)


def has_missing(model: nn.Module) -> bool:
    """Whether sublayers of `model` are known to be missing, so that only `skip` counts its layers right."""
    known = _LOCATED.get(base_model(model))
    return bool(known and known[1].missing)


def forget(model: nn.Module) -> None:
    """Have `locate` look again: the model was changed for good."""
    _LOCATED.pop(model, None)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder layers. Raises `UnsupportedModel` where there is none."""
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder; notall skips sublayers of decoder-only models"
        )
    if getattr(config, "num_kv_shared_layers", 0) and DummyLayer is None:
        raise UnsupportedModel(
            f"{config.model_type} shares keys and values between layers (num_kv_shared_layers="
            f"{config.num_kv_shared_layers}): an attention cannot be left out without those that read from it"
        )
    for within in (model.get_decoder() or model, model):  # ModernBERT's answers with its output projection
        inside = {id(module) for module in within.modules()}
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and id(module) in inside:
                return name, module
    raise UnsupportedModel(
        f"no list of {config.num_hidden_layers} decoder layers in {type(model).__name__}; "
        "notall needs a model whose layers are in one ModuleList"
    )


# --- watching and reading ---------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Without gradients, in eval mode; modes are put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _refusal(model: PreTrainedModel, error: Exception) -> UnsupportedModel:
    """Why the model cannot be used, when watching it ended in `error`."""
    if isinstance(error, UnsupportedModel):
        return error
    name = type(model).__name__
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UnsupportedModel(
        f"{name} cannot be watched: its forward of {PROBE_TOKENS} tokens with an ordinary cache failed ({reason}); "
        "choose another model, or describe this one in an issue"
    )


@dataclass(frozen=True)
class _Found:
    blocks: tuple[Block, ...]
    in_place: bool = False
    plain: bool = True  # the stream is (batch, tokens, hidden)

    @property
    def apart(self) -> bool:
        return self.plain and not self.in_place

    @property
    def by_lines(self) -> bool:
        return not any(part.stub for block in self.blocks for part in block.sublayers)


def _proved(model: PreTrainedModel, layers: nn.ModuleList) -> _Found:
    weight = model.get_input_embeddings().weight
    # accelerate moves inputs from the CPU to where it keeps an offloaded embedding
    device = weight.device if weight.device.type != "meta" else torch.device("cpu")
    config = text_config(model)
    watch = _observe(model, layers, model, device)
    found = _find(model, watch, model, device)
    for trace, block in zip(watch.traces, found.blocks):
        if found.by_lines:
            prove(config, trace, block)
        elif found.in_place:
            prove_in_place(config, trace, block, watch.sharing)
        else:
            prove_layer(config, trace)
    reads = [trace for trace in watch.traces if trace.cache_writes] or watch.traces
    prove_causal(config, reads[0], watch.sharing if found.in_place else None)
    return found


def _weightless(model: PreTrainedModel, layers: nn.ModuleList) -> _Found:
    device = torch.device("cpu")
    with running_weightless(model) as call:
        return _find(model, _observe(model, layers, call, device), call, device)


def _run_probe(model: PreTrainedModel, call: Callable[..., Any], device: torch.device, **cache: DynamicCache) -> None:
    vocabulary = text_config(model).vocab_size
    tokens = torch.arange(PROBE_BATCH * PROBE_TOKENS, device=device).view(PROBE_BATCH, PROBE_TOKENS) % vocabulary
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    call(input_ids=tokens, attention_mask=mask, use_cache=True, **cache)


def _observe(model: PreTrainedModel, layers: nn.ModuleList, call: Callable[..., Any], device: torch.device) -> Watch:
    cache = DynamicCache(config=text_config(model))
    with watching(layers, cache) as watch:
        _run_probe(model, call, device, **{cache_argument(model): cache})
    traces = watch.traces
    if [trace.index for trace in traces] != list(range(len(layers))):
        raise UnsupportedModel(
            f"the layers of {type(model).__name__} do not run one after the other, each once; "
            "notall needs a plain stack of decoder layers"
        )
    for before, after in zip(traces, traces[1:]):
        if not _is_handed_on(first(before.answer), after.kept[0]):
            raise UnsupportedModel(
                f"the model changes its hidden states between layers {before.index} and {after.index}; "
                "expected each layer's output to be the next one's input. notall leaves this model alone"
            )
    return watch


def _find(model: PreTrainedModel, watch: Watch, call: Callable[..., Any], device: torch.device) -> _Found:
    """Lines of a residual stream where layers can be read as such; else layers in place, or as wholes."""
    config = text_config(model)
    try:
        return _Found(_lines(config, watch))
    except UnsupportedModel:
        if DummyLayer is None:  # there a cache keeps a place for every layer
            raise
    if any(getattr(module, "is_cut", False) for trace in watch.traces for module in trace.layer.modules()):
        raise UnsupportedModel("sublayers were removed from this model for good; start from the dense model")
    writers = [trace.index for trace in watch.traces if trace.cache_writes]
    apart = not watch.sharing.pairs and not any(_is_told_index(trace) for trace in watch.traces)
    for stubs in (_halves(watch), _wholes(watch)):
        in_place = not apart or not all(stub.is_layer for named in stubs for stub in named.values())
        try:
            _prove_apart(model, watch, call, device, freed=writers[:-1] if in_place else [])
        except UnsupportedModel:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            continue
        parts = (_block_in_place(config, trace, stubs, watch.sharing) for trace in watch.traces)
        stream = watch.traces[0].hidden.shape
        return _Found(tuple(parts), in_place, plain=stream == (PROBE_BATCH, PROBE_TOKENS, config.hidden_size))
    raise UnsupportedModel(
        f"the layers of {type(model).__name__} depend on each other, and its cache needs a place for each of them "
        f"({reason}). notall leaves this model alone: choose another one"
    )


def _lines(config: PretrainedConfig, watch: Watch) -> tuple[Block, ...]:
    for before, after in zip(watch.traces, watch.traces[1:]):
        _refuse_more_than_hidden_states(before, after)
    for (source, _), (reader, _) in watch.sharing.pairs:
        raise UnsupportedModel(f"layer {reader} reads what layer {source} makes beside its hidden states")
    for trace in watch.traces:
        if _is_told_index(trace):
            raise UnsupportedModel(f"layer {trace.index} is told its index by the model")
    return tuple(_read(config, trace) for trace in watch.traces)


def _is_told_index(trace: LayerTrace) -> bool:
    """Whether the model says which layer it is; one that knows it itself can be told another."""
    return any(isinstance(trace.arguments.get(name), int) for name in LAYER_INDICES)


def _refuse_more_than_hidden_states(before: LayerTrace, after: LayerTrace) -> None:
    if _hands_on_more(before.answer, after.arguments):
        raise UnsupportedModel(
            f"layer {after.index} ({type(after.layer).__name__}) is given more than the hidden states of layer "
            f"{before.index}; expected layers that depend on each other by the residual stream alone. "
            "notall leaves this model alone: choose another one"
        )


Named = dict[str, Stub]  # the stubs of a layer, by the names of its sublayers


def _halves(watch: Watch) -> list[Named]:
    """By halves, and each layer that cannot be read so as a whole."""
    writers = [(trace.layer, write.module) for trace in watch.traces for write in trace.cache_writes]
    mixers = frozenset(type(child(layer, module)) for layer, module in writers if module)
    stubs = []
    for trace in watch.traces:
        found = halves(trace, mixers)
        mixer, mlp = (found.mixer, found.mlp) if found else (whole(trace), None)
        stubs.append({f"attn.{trace.index}": mixer} | ({f"mlp.{trace.index}": mlp} if mlp else {}))
    return stubs


def _wholes(watch: Watch) -> list[Named]:
    return [{f"attn.{trace.index}": whole(trace)} for trace in watch.traces]


def _block_in_place(config: PretrainedConfig, trace: LayerTrace, stubs: list[Named], sharing: Sharing) -> Block:
    parts = []
    for name, stub in stubs[trace.index].items():
        kind: Literal["attention", "mlp"] = "attention" if name.startswith("attn") else "mlp"
        mixer = None if kind == "mlp" else "layer" if stub.is_layer else _kind(config, trace)
        read_by = {_at(stubs, reader) for source, reader in sharing.pairs if _at(stubs, source) == name}
        parts.append(_sublayer(trace, kind, (), (), mixer, stub, tuple(sorted(read_by))))
    scaled_by, modules = scale_of(trace), [module for part in parts for module in part.modules]
    own = all(name.startswith(tuple(f"{module}." for module in modules)) for name, _ in trace.layer.named_parameters())
    bare = own and "" not in modules and not any(part.read_by for part in parts)
    value = _value(trace.layer, scaled_by)
    return Block(trace.index, tuple(parts), False, _answer(trace), scaled_by, value, bare)


def _at(stubs: list[Named], place: Place) -> str:
    """The sublayer at `place`, or its layer, where no sublayer of it is there."""
    index, module = place
    return next(
        (name for name, stub in stubs[index].items() if stub.is_layer or module in stub.modules), f"layer.{index}"
    )


def _prove_apart(
    model: PreTrainedModel, watch: Watch, call: Callable[..., Any], device: torch.device, freed: list[int]
) -> None:
    """With layers that do nothing, each is given the same, but for what layers were seen to make.

    The model makes its own cache, without places for the layers that are `freed`; whatever it raises goes on.
    """
    given: list[Arguments] = []
    with ExitStack() as idle:
        idle.enter_context(cache_slots_freed(text_config(model), freed))
        for trace in watch.traces:
            idle.enter_context(forward_replaced(trace.layer, _idle(trace, given)))
        _run_probe(model, call, device)
    for trace, other in zip(watch.traces, given):
        made = [held for held in tensors_in(trace.given) if not watch.sharing.source_of(held)]
        left = list(tensors_in(other))
        if len(made) != len(left) or not all(map(_alike, made, left)):
            raise UnsupportedModel(
                f"layer {trace.index} ({type(trace.layer).__name__}) is given what the model computes from other "
                "layers' answers; notall leaves this model alone: choose another one"
            )


def _alike(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and (isinstance(found, FakeTensor) or torch.equal(found, expected))


def _idle(trace: LayerTrace, given: list[Arguments]) -> Callable[..., Any]:
    """A forward that notes what it is given, and hands its hidden states on."""
    names = parameter_names(trace.layer)

    def idle(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args)) | kwargs
        hidden = arguments.pop(names[0])
        given.append(arguments)
        return (hidden, *(None for _ in trace.answer[1:])) if isinstance(trace.answer, tuple) else hidden

    return idle


def _hands_on_more(answer: Any, arguments: Arguments) -> bool:
    """Whether a layer is given something beside the hidden states that the layer before it made."""
    made = answer[1:] if isinstance(answer, tuple) else ()
    return any(value is given for value in made if isinstance(value, Tensor) for given in arguments.values())


def _is_handed_on(answer: Any, given: Tensor) -> bool:
    """Whether the next layer was given `answer` itself, all of it, or, on another device, a copy of it."""
    if given is answer or not isinstance(answer, Tensor):
        return given is answer
    if given.untyped_storage()._cdata == answer.untyped_storage()._cdata:
        return (given.shape, given.stride(), given.storage_offset()) == (
            answer.shape,
            answer.stride(),
            answer.storage_offset(),
        )
    return given.device != answer.device and torch.equal(given, answer.to(given.device))


def _read(config: PretrainedConfig, trace: LayerTrace) -> Block:
    """The block of a layer: a mixer and an MLP, in either order or side by side, or one of the two alone."""
    lines = lines_of(trace)
    mixing = [line for line in lines if any(branch.is_attention for branch in line)]
    others = [line for line in lines if any(not branch.is_attention for branch in line)]
    mixers = tuple(branch for line in mixing for branch in line if branch.is_attention)
    mlps = tuple(branch for line in others for branch in line if not branch.is_attention)
    names = {name for branch in mixers for name in branch.modules}
    elsewhere = [write for write in trace.cache_writes if write.module not in names]
    where = f"layer {trace.index} ({type(trace.layer).__name__})"
    if len(mixing) > 1 or elsewhere:
        raise UnsupportedModel(
            f"{where}: expected one sublayer that writes to the cache, found {len(mixing) + len(elsewhere)} "
            f"({_writers(trace)}). An MLP that keeps a state cannot be skipped by halves; choose another model"
        )
    if len(others) > 1:
        raise UnsupportedModel(
            f"{where}: expected a mixer that writes to the cache and one MLP, found {len(mixing)} and {len(others)}: "
            f"{_modules(trace)}. Layers that share a cache or keep their state elsewhere cannot be skipped by halves. "
            "If sublayers were removed from this model for good, start from the dense model"
        )
    parts = [_sublayer(trace, "attention", mixers, exclude=(), mixer=_kind(config, trace))] if mixing else []
    if mlps:
        mlp = _sublayer(trace, "mlp", mlps, exclude=names)
        parts.insert(0 if mixing != lines[:1] else 1, mlp)
    scaled_by = scale_of(trace)
    return Block(
        trace.index, tuple(parts), len(lines) < len(parts), _answer(trace), scaled_by, _value(trace.layer, scaled_by)
    )


def _value(layer: nn.Module, name: str | None) -> float:
    """That of a layer's own number; 1 without one, and where it has no value."""
    if name is None or (number := getattr(layer, name)).is_meta:
        return 1.0
    return float(number)


def _kind(config: PretrainedConfig, trace: LayerTrace) -> str:
    """What transformers calls the mixer of a layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds and len(kinds) > trace.index:
        return str(kinds[trace.index])
    return "full_attention" if any(write.bytes_per_token for write in trace.cache_writes) else "linear_attention"


def _writers(trace: LayerTrace) -> str:
    return ", ".join(dict.fromkeys(write.module or "the layer itself" for write in trace.cache_writes))


def _answer(trace: LayerTrace) -> tuple[int | None, ...] | None:
    if not isinstance(trace.answer, tuple):
        return None
    given = trace.attention_answer if isinstance(trace.attention_answer, tuple) else ()
    found: list[int | None] = []
    for position, value in enumerate(trace.answer[1:], start=1):
        same = [index for index, other in enumerate(given) if other is value]
        found.append(position if position in same else next(iter(same), None))
    return tuple(found)


def _modules(trace: LayerTrace) -> str:
    return ", ".join(type(module).__name__ for module in trace.layer.children())


def _sublayer(
    trace: LayerTrace,
    kind: Literal["attention", "mlp"],
    branches: tuple[Branch, ...],
    exclude: Iterable[str],
    mixer: str | None = None,
    stub: Stub | None = None,
    read_by: tuple[str, ...] = (),
) -> Sublayer:
    names = {name for branch in branches for name in branch.modules} | {*(stub.modules if stub else ())}
    weights = {
        key: one for name in names - set(exclude) for key, one in weights_of(child(trace.layer, name)).items()
    }.values()
    return Sublayer(
        kind,
        trace.index,
        branches,
        parameters=sum(weight.elements for weight in weights),
        weight_bytes=sum(weight.bytes for weight in weights),
        kv_bytes_per_token=sum(write.bytes_per_token for write in trace.cache_writes) if mixer else 0,
        state_bytes=trace.state_bytes if mixer else 0,
        mixer=mixer,
        stub=stub,
        read_by=read_by,
    )
