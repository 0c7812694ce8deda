"""From a plan to the layers of an export, the config that describes them, and where
each tensor and module goes.
"""

import copy
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from ..errors import UsageError
from ..models.weightless import build_empty
from ..running.regrouping import Layer, folded
from ..strict_json import Settings
from ..structure.calls import child
from ..structure.model_structure import ModelStructure, Sublayer
from ..structure.slicing import LAYER_INDICES, PER_LAYER_LISTS
from .dense import DenseModel
from .tensors import FLOATS, Weight, Weights


def sublayers_of(structure: ModelStructure, layer: Layer) -> list[Sublayer]:
    """What an exported layer has but for the MLPs before and after it."""
    block = structure.blocks[layer.attention]
    if layer.mlp == layer.attention:
        return list(block.sublayers)
    return (
        [block.attention]
        if layer.mlp is None
        else [block.attention, structure.blocks[layer.mlp].mlp]
    )


def cut_settings(dense: DenseModel, layers: Sequence[Layer]) -> Settings:
    """config.json of a model of `layers`: the dense one, with its per-layer settings
    cut by the source of each.
    """
    whole, config = (
        copy.deepcopy(dense.settings),
        dense.config.get_text_config(decoder=True),
    )
    whole.pop(
        "transformers_weights", None
    )  # the weights of an export have the usual names
    parts = (
        name
        for name in dense.config.sub_configs
        if getattr(dense.config, name, None) is config
    )
    text = whole.get(next(parts, ""))
    settings = (
        text if isinstance(text, dict) else whole
    )  # of the text part, where there are others
    attentions = [layer.attention for layer in layers]
    own = [[] if layer.mlp is None else [layer.mlp] for layer in layers]
    # The dense layers whose MLPs say of which kind those of each layer are.
    mlps = [
        (*mlp, *layer.before, *layer.after, layer.attention)[0]
        for mlp, layer in zip(own, layers)
    ]
    for name in (*PER_LAYER_LISTS, "num_attention_heads_per_layer"):
        values = settings.get(name) or vars(config).get(
            name
        )  # as the file words them; a derived list is in neither
        if isinstance(values, list | tuple) and len(values) == config.num_hidden_layers:
            settings[name] = [
                values[index]
                for index in (mlps if name == "mlp_layer_types" else attentions)
            ]
    if pattern := settings.get(
        "hybrid_override_pattern"
    ):  # Nemotron-H's, a letter a layer
        settings["hybrid_override_pattern"] = "".join(
            pattern[index] for index in attentions
        )
    if indices := settings.get("attn_layer_indices"):
        settings["attn_layer_indices"] = [
            number for number, index in enumerate(attentions) if index in indices
        ]
    if isinstance(
        others := settings.get("per_layer_config"), dict
    ):  # what some layers have otherwise, by their number
        settings["per_layer_config"] = {
            str(n): others[str(i)] for n, i in enumerate(attentions) if str(i) in others
        }
    if "attention_types" in settings:  # GPT-Neo writes its list as repeated patterns
        settings["attention_types"] = [
            [[kind], 1] for kind in settings["attention_layers"]
        ]
    for name in (
        "mlp_only_layers",
        "moe_layers",
    ):  # indices of layers whose MLP is of one kind
        if indices := getattr(config, name, None):
            settings[name] = [
                number for number, index in enumerate(mlps) if index in indices
            ]
    for name in ("first_k_dense_replace", "num_dense_layers"):  # from the first on
        if count := getattr(config, name, None):
            settings[name] = sum(index < count for index in mlps)
    if (
        step := getattr(config, "decoder_sparse_step", 1)
    ) != 1:  # every step-th layer has experts
        is_sparse = [
            (index + 1) % step == 0 and index not in (config.mlp_only_layers or ())
            for index in mlps
        ]
        settings["mlp_only_layers"] = [
            number for number, sparse in enumerate(is_sparse) if not sparse
        ]
        settings["decoder_sparse_step"] = 1
    settings[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(
        layers
    )
    settings |= rope_names(settings)
    return whole


def rope_names(settings: Settings) -> Settings:
    """The names that transformers 4 and other engines read RoPE's settings by, where
    only version 5's are written.
    """
    rope = settings.get("rope_parameters")
    if not rope or "rope_theta" in settings:
        return {}
    named: Settings = {}
    if "sliding_attention" in rope:
        if not settings.get("model_type", "").startswith(
            "gemma3"
        ):  # which alone has a name for the second base
            return {}
        named["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if "rope_theta" not in rope:
        return {}
    scaling = {
        name: value
        for name, value in rope.items()
        if name not in ("rope_theta", "partial_rotary_factor")
    }
    if "partial_rotary_factor" in rope:
        named["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") != "default":
        named["rope_scaling"] = scaling
    return {**named, "rope_theta": rope["rope_theta"]}


def check_built(dense: DenseModel, settings: Settings, layers: Sequence[Layer]) -> None:
    """Raise `UsageError` unless a model of cut settings builds its layers as the dense
    ones that they are made of.
    """
    kind, rule = (
        dense.structure.model_type,
        "has a rule by layer or depth that notall cannot cut",
    )
    try:
        with tempfile.TemporaryDirectory(
            prefix="notall-"
        ) as folder:  # where an infinite number stands in words
            Path(folder, "config.json").write_text(
                json.dumps(settings), encoding="utf-8"
            )
            config = type(dense.config).from_dict(
                PretrainedConfig.get_config_dict(folder)[0]
            )
        config.name_or_path = (
            dense.config.name_or_path
        )  # where code of the model's own is found
        exported = build_empty(config).get_submodule(dense.structure.layers)
    except (ValueError, UsageError) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise UsageError(
            f"{kind} {rule} ({said}), so this plan runs in memory only"
        ) from None
    for number, layer in enumerate(layers):
        for part in sublayers_of(dense.structure, layer):
            if build_of(exported.get_submodule(str(number)), part) != build_of(
                dense.layer(part.index), part
            ):
                told = (
                    f"{kind} would build {part.name} in another way as a part of layer"
                    f" {number}"
                )
                raise UsageError(
                    f"{told}: its config {rule}, so this plan runs in memory only"
                )


def build_of(layer: nn.Module, part: Sublayer) -> Settings:
    """How a sublayer is built: the class, settings and shapes of each of its
    modules.
    """
    # Gemma 4's last attention of each kind leaves its keys to layers that share them:
    # none do where it can be cut.
    plain, others = (
        (bool, int, float, str, type(None)),
        (
            *LAYER_INDICES,
            "store_full_length_kv",
        ),
    )

    def settings(module: nn.Module) -> Settings:
        return {
            k: v
            for k, v in vars(module).items()
            if isinstance(v, plain) and k[0] != "_" and k not in others
        }

    facts: Settings = {}
    modules = dict(layer.named_modules())
    for path in part.modules:
        if path not in modules:
            facts[path] = None
            continue
        for name, module in modules[path].named_modules(prefix=path):
            shapes = {
                key: tuple(weight.shape)
                for key, weight in module.named_parameters(recurse=False)
            }
            facts[name] = (type(module).__name__, settings(module), shapes)
    if part.kind == "attention":
        facts[""] = settings(layer)
    return facts


def moved_tensors(
    dense: DenseModel, layers: Sequence[Layer]
) -> Iterator[tuple[str, Weight]]:
    """The tensors of the export under their new names; of a name that comes again, the
    later one.
    """
    yield from dense.outside_layers.items()
    for _, tensors, start in _pieces(dense, layers):
        yield from ((start + name, tensor) for name, tensor in tensors.items())
    yield from folded_scales(dense, layers)


def moved_modules(dense: DenseModel, layers: Sequence[Layer]) -> dict[str, str | None]:
    """The new name of each module, in the files and in the model; None for what is left
    out.
    """
    moved: dict[str, str | None] = {
        name: name for name in _modules_of(dense.outside_layers)
    }
    for block in dense.structure.blocks:
        moved |= dict.fromkeys(
            _new_names(dense, block.sublayers, dense.layers[block.index], "")
        )
    for piece in _pieces(dense, layers):
        moved |= _new_names(dense, *piece)
    return moved


def _pieces(
    dense: DenseModel, layers: Sequence[Layer]
) -> Iterator[tuple[Sequence[Sublayer], Weights, str]]:
    """Sublayers of one dense layer, their tensors by the names below it, and the start
    of their new names.
    """
    blocks = dense.structure.blocks
    for number, layer in enumerate(layers):
        start, block = f"{dense.prefix}{number}.", blocks[layer.attention]
        parts = [(start, part) for part in sublayers_of(dense.structure, layer)]
        if layer.mlp == layer.attention:
            yield block.sublayers, dense.layers[block.index], start
            parts = []
        for place, indices in (("before", layer.before), ("after", layer.after)):
            parts += [
                (f"{start}{place}.{slot}.", blocks[index].mlp)
                for slot, index in enumerate(indices)
            ]
        yield from (([part], dense.parts(part), beginning) for beginning, part in parts)


def _new_names(
    dense: DenseModel, parts: Sequence[Sublayer], tensors: Weights, start: str
) -> dict[str, str]:
    """The names of a piece's modules in the original model, to those in the export."""
    index = parts[0].index
    layer = dense.layer(index)
    paths = [path for part in parts for path in part.modules]
    modules = dict(
        pair for path in paths for pair in child(layer, path).named_modules(prefix=path)
    )
    weigh = {
        name
        for name, module in modules.items()
        if next(module.parameters(), None) is not None
    }
    return {
        f"{dense.prefix}{index}.{name}": start + name
        for name in weigh | _modules_of(tensors)
    }


def _modules_of(tensors: Iterable[str]) -> set[str]:
    """The modules that tensors of these names are in, and those that these are in."""
    paths = [name.split(".")[:-1] for name in tensors]
    return {
        ".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)
    }


def folded_scales(
    dense: DenseModel, layers: Sequence[Layer]
) -> Iterator[tuple[str, Weight]]:
    """The numbers of the layers of the export, and what is divided by some. Raises
    `UsageError` where it cannot be.
    """
    if not dense.structure.scaled:
        return
    blocks = dense.structure.blocks
    scales = [_scale(dense, index) for index in range(len(blocks))]
    for number, (layer, by) in enumerate(zip(layers, folded(layers, scales))):
        start, block = f"{dense.prefix}{number}.", blocks[layer.attention]
        if by.attention != 1:
            yield from _divided(dense, block.attention, by.attention, start)
        if by.mlp != 1:
            yield from _divided(
                dense,
                blocks[layer.attention if layer.mlp is None else layer.mlp].mlp,
                by.mlp,
                start,
            )
        if block.scaled_by:
            stored = dense.layers[layer.attention][block.scaled_by]
            yield (
                start + block.scaled_by,
                stored.holding(torch.full(stored.shape, by.whole, dtype=torch.float64)),
            )


def _scale(dense: DenseModel, index: int) -> float:
    name = dense.structure.blocks[index].scaled_by
    if name is None:
        return 1.0
    stored = dense.layers[index].get(name)
    scale = (
        math.nan
        if stored is None or stored.dtype not in FLOATS
        else float(stored.read().double().sum())
    )
    if not 0 < abs(scale) < math.inf:
        raise UsageError(
            f"files of {dense.origin.model} have {scale} for {name} of layer {index};"
            " download them again"
        )
    return scale


def _divided(
    dense: DenseModel, part: Sublayer, by: float, start: str
) -> Iterator[tuple[str, Weight]]:
    """The weights of its last module, by which what it adds to the stream is so many
    times less.
    """
    last = (part.stub or part.branches[0]).modules[-1]
    module = dense.layer(part.index).get_submodule(last)
    if not _is_divided_by_weights(module):
        told = f"layers of {dense.structure.model_type} multiply their stream"
        why = f"what {part.name} adds cannot be divided by what is cut before it"
        raise UsageError(
            f"{told}, and {why}; keep the layer before it whole, or skip in memory"
        )
    for name, stored in dense.parts(part).items():
        if name.startswith(f"{last}."):
            yield start + name, stored.changed(lambda values: values.double() / by)


@torch.no_grad()
def _is_divided_by_weights(module: nn.Module) -> bool:
    """Whether what it answers is half as large with weights that are: tried on random
    ones.
    """
    trial = copy.deepcopy(module).to_empty(device="cpu").double()
    weights = list(trial.parameters())
    for weight in weights:
        weight.copy_(
            torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) + 0.5
        )
    width = weights[0].shape[-1] if weights else 1
    given = torch.randn(
        1, 3, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    try:
        answer = trial(given)
        for weight in weights:
            weight.div_(2)
        return torch.allclose(trial(given), answer / 2, rtol=1e-5)
    except Exception:  # whatever a module raises that takes or answers something else
        return False
