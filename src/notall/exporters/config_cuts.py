"""The config of a model of fewer layers: the original's, with what it says of single
layers cut. Each rule below is of the families whose settings have that name.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..running.regrouping import Layer
from ..strict_json import Settings
from ..structure.slicing import PER_LAYER_LISTS
from .dense import DenseModel


@dataclass(frozen=True)
class Sources:
    """For each layer of an export, the layer of the original that it comes from."""

    attentions: list[int]
    mlps: list[int]  # the one whose MLP decides of which kind its own are

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Sources":
        """Those of regrouped layers. Without an MLP of its own a layer has the kind of
        the first that stands before or after it, else that of its attention's layer.
        """
        mlps = []
        for layer in layers:
            own = [] if layer.mlp is None else [layer.mlp]
            mlps.append([*own, *layer.before, *layer.after, layer.attention][0])
        return cls([layer.attention for layer in layers], mlps)


# Lists with a value per layer that are about its MLP.
LISTS_OF_MLPS = (
    "mlp_layer_types",
    "expert_swiglu_limit_list",
    "share_expert_swiglu_limit_list",
)


def cut_settings(dense: DenseModel, layers: Sequence[Layer]) -> Settings:
    """config.json of a model of `layers`: the original's, with its per-layer settings
    cut by the source of each.
    """
    whole = copy.deepcopy(dense.settings)
    whole.pop("transformers_weights", None)  # those of an export have the usual names
    config = dense.config.get_text_config(decoder=True)
    settings = _of_text(whole, dense.config, config)
    sources = Sources.of(layers)
    for cut in CUTS:
        cut(settings, config, sources)
    depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings[depth] = len(layers)
    settings |= rope_names(settings)
    return whole


def _of_text(whole: Settings, config: Any, text: PretrainedConfig) -> Settings:
    """The part of config.json that is about the language model, where it has parts."""
    for name in config.sub_configs:
        if getattr(config, name, None) is text:
            part = whole.get(name)
            return part if isinstance(part, dict) else whole
    return whole


def _cut_lists(settings: Settings, config: Any, sources: Sources) -> None:
    """Lists with a value per layer, as the file has them: a derived one is not there."""
    for name in (*PER_LAYER_LISTS, "num_attention_heads_per_layer", *LISTS_OF_MLPS):
        values = settings.get(name) or vars(config).get(name)
        if isinstance(values, list | tuple) and len(values) == config.num_hidden_layers:
            indices = sources.mlps if name in LISTS_OF_MLPS else sources.attentions
            settings[name] = [values[index] for index in indices]


def _cut_pattern(settings: Settings, config: Any, sources: Sources) -> None:
    """Nemotron-H: a letter per layer."""
    if pattern := settings.get("hybrid_override_pattern"):
        letters = [pattern[index] for index in sources.attentions]
        settings["hybrid_override_pattern"] = "".join(letters)


def _cut_attention_indices(settings: Settings, config: Any, sources: Sources) -> None:
    """Bamba: the numbers of the layers that have an attention."""
    if indices := settings.get("attn_layer_indices"):
        settings["attn_layer_indices"] = _numbers(sources.attentions, indices)


def _cut_own_settings(settings: Settings, config: Any, sources: Sources) -> None:
    """Settings of single layers, by their number."""
    others = settings.get("per_layer_config")
    if isinstance(others, dict):
        settings["per_layer_config"] = {
            str(number): others[str(index)]
            for number, index in enumerate(sources.attentions)
            if str(index) in others
        }


def _cut_repeated_types(settings: Settings, config: Any, sources: Sources) -> None:
    """GPT-Neo: the list again, as repeated patterns."""
    if "attention_types" in settings:
        kinds = settings["attention_layers"]
        settings["attention_types"] = [[[kind], 1] for kind in kinds]


def _cut_mlp_indices(settings: Settings, config: Any, sources: Sources) -> None:
    """The numbers of the layers whose MLP is of one kind, in mixtures of experts."""
    for name in ("mlp_only_layers", "moe_layers"):
        if indices := getattr(config, name, None):
            settings[name] = _numbers(sources.mlps, indices)


def _cut_dense_beginning(settings: Settings, config: Any, sources: Sources) -> None:
    """How many first layers have no experts."""
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if count := getattr(config, name, None):
            settings[name] = sum(index < count for index in sources.mlps)


def _cut_sparse_step(settings: Settings, config: Any, sources: Sources) -> None:
    """Experts in every step-th layer: the layers without them are listed instead."""
    step = getattr(config, "decoder_sparse_step", 1)
    if step == 1:
        return
    plain = config.mlp_only_layers or ()
    settings["mlp_only_layers"] = [
        number
        for number, index in enumerate(sources.mlps)
        if (index + 1) % step or index in plain
    ]
    settings["decoder_sparse_step"] = 1


def _numbers(sources: Sequence[int], indices: Sequence[int]) -> list[int]:
    """The new numbers of the layers whose source is one of `indices`."""
    return [number for number, index in enumerate(sources) if index in indices]


CUTS: tuple[Callable[[Settings, Any, Sources], None], ...] = (
    _cut_lists,
    _cut_pattern,
    _cut_attention_indices,
    _cut_own_settings,
    _cut_repeated_types,
    _cut_mlp_indices,
    _cut_dense_beginning,
    _cut_sparse_step,
)


def rope_names(settings: Settings) -> Settings:
    """The names that transformers 4 and other engines read RoPE's settings by, where
    only version 5's are written.
    """
    rope = settings.get("rope_parameters")
    if not rope or "rope_theta" in settings:
        return {}
    named: Settings = {}
    if "sliding_attention" in rope:
        # Gemma 3 alone has a name for the second base
        if not settings.get("model_type", "").startswith("gemma3"):
            return {}
        named["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return {}
    own = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in own}
    if "partial_rotary_factor" in rope:
        named["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") != "default":
        named["rope_scaling"] = scaling
    return {**named, "rope_theta": rope["rope_theta"]}
