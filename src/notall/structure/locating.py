"""Where a model's sublayers are: found by watching one forward pass, proved by recomposing another.

`locate` needs no table of architectures. It watches what each decoder layer does with its hidden states
(`observation`), reads each layer as lines of a residual stream, and then runs every layer again from those parts, with
a cache and a layer index of its own (`proving`): where the numbers differ, the model is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel
from .anatomy import Anatomy, Block, Sublayer, base_model, cache_argument, fingerprint, text_config
from .observation import Branch, LayerTrace, child, lines_of, watching
from .proving import prove
from .weightless import is_weightless, running_weightless

PROBE_BATCH, PROBE_TOKENS = 2, 4  # 8 tokens, one of them padding, so that masks are real tensors

_LOCATED: WeakKeyDictionary[nn.Module, tuple[nn.ModuleList, Anatomy]] = WeakKeyDictionary()


def locate(model: PreTrainedModel) -> Anatomy:
    """Find and prove the sublayers of a causal language model, once per model.

    Costs some three forward passes of 8 tokens. On the meta device only the structure is read.
    Raises `UnsupportedModel`, naming the layer, what was expected and what to do, when the model is not an embedding,
    a residual stream of attentions and MLPs, and a head, or when a layer differs from its recomposition.
    """
    model = base_model(model)
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
            blocks = _weightless_blocks(model, layers) if is_weightless(model) else _proved_blocks(model, layers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _refusal(model, error) from error
    config = text_config(model)
    anatomy = Anatomy(config.model_type, path, blocks, str(fingerprint(config)))
    remember(model, layers, anatomy)
    return anatomy


def remember(model: nn.Module, layers: nn.ModuleList, anatomy: Anatomy) -> None:
    """Note that `anatomy` is what `locate` answers while `layers` are the model's."""
    _LOCATED[model] = (layers, anatomy)


def lacks(model: nn.Module) -> bool:
    """Whether `model` is known to lack sublayers, so that only `skip` counts its layers right."""
    known = _LOCATED.get(base_model(model))
    return bool(known and known[1].lacking)


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
    if getattr(config, "num_kv_shared_layers", 0):
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


def _proved_blocks(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[Block, ...]:
    weight = model.get_input_embeddings().weight
    # accelerate moves inputs from the CPU to where it keeps an offloaded embedding
    device = weight.device if weight.device.type != "meta" else torch.device("cpu")
    config = text_config(model)
    traces = _observe(model, layers, model, device)
    blocks = tuple(_read(config, trace) for trace in traces)
    for trace, block in zip(traces, blocks):
        prove(config, trace, block)
    return blocks


def _weightless_blocks(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[Block, ...]:
    with running_weightless(model) as call:
        traces = _observe(model, layers, call, torch.device("cpu"))
        return tuple(_read(text_config(model), trace) for trace in traces)


def _observe(
    model: PreTrainedModel, layers: nn.ModuleList, call: Callable[..., Any], device: torch.device
) -> list[LayerTrace]:
    config = text_config(model)
    tokens = torch.arange(PROBE_BATCH * PROBE_TOKENS, device=device).view(PROBE_BATCH, PROBE_TOKENS) % config.vocab_size
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    cache = DynamicCache(config=config)
    with watching(layers, cache) as watch:
        call(input_ids=tokens, attention_mask=mask, use_cache=True, **{cache_argument(model): cache})
    traces = watch.traces
    if [trace.index for trace in traces] != list(range(len(layers))):
        raise UnsupportedModel(
            f"the layers of {type(model).__name__} do not run one after the other, each once; "
            "notall needs a plain stack of decoder layers"
        )
    for before, after in zip(traces, traces[1:]):
        if _hands_on_more(before.answer, after.arguments):
            raise UnsupportedModel(
                f"layer {after.index} ({type(after.layer).__name__}) is given more than the hidden states of layer "
                f"{before.index}; expected layers that depend on each other by the residual stream alone. "
                "notall leaves this model alone: choose another one"
            )
        answer = before.answer[0] if isinstance(before.answer, tuple) else before.answer
        if not _is_handed_on(answer, after.kept[0]):
            raise UnsupportedModel(
                f"the model changes its hidden states between layers {before.index} and {after.index}; "
                "expected each layer's output to be the next one's input. notall leaves this model alone"
            )
    return traces


def _hands_on_more(answer: Any, arguments: dict[str, Any]) -> bool:
    """Whether a layer is given something beside the hidden states that the layer before it made."""
    made = answer[1:] if isinstance(answer, tuple) else ()
    return any(value is given for value in made if isinstance(value, Tensor) for given in arguments.values())


def _is_handed_on(answer: Any, given: Tensor) -> bool:
    """Whether the next layer was given `answer` itself, or, on another device, a copy of it."""
    if given is answer or not isinstance(answer, Tensor):
        return given is answer
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
    return Block(trace.index, tuple(parts), len(lines) < len(parts), _answer(trace))


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
) -> Sublayer:
    names = {name for branch in branches for name in branch.modules} - set(exclude)
    weights = {id(p): p for name in names for p in child(trace.layer, name).parameters()}.values()
    return Sublayer(
        kind,
        trace.index,
        branches,
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        kv_bytes_per_token=sum(write.bytes_per_token for write in trace.cache_writes) if mixer else 0,
        state_bytes=trace.state_bytes if mixer else 0,
        mixer=mixer,
    )
