"""From a plan to the layers of an export: where each tensor and module goes, and whether
a config of so many layers builds them.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig

from ..errors import UsageError
from ..models.weightless import build_empty
from ..running.regrouping import Layer
from ..strict_json import Settings
from ..structure.calls import child
from ..structure.model_structure import ModelStructure, Sublayer
from ..structure.slicing import LAYER_INDICES
from .dense import DenseModel
from .layer_scales import folded_scales
from .tensors import Weight, Weights

PLAIN_TYPES = (bool, int, float, str, type(None))
# Attributes that say where a module stands, and not how it is built. The last one is
# Gemma 4's: its last attention of each kind leaves its keys to layers that share them,
# and none do where it can be cut.
OF_PLACE = (*LAYER_INDICES, "store_full_length_kv")
LAYER_RULE = "has a rule by layer or depth that notall cannot cut"


def sublayers_of(structure: ModelStructure, layer: Layer) -> list[Sublayer]:
    """The sublayers of an exported layer, but for MLPs that stand before and after."""
    block = structure.blocks[layer.attention]
    if layer.mlp == layer.attention:
        return list(block.sublayers)
    if layer.mlp is None:
        return [block.attention]
    return [block.attention, structure.blocks[layer.mlp].mlp]


def check_built(dense: DenseModel, settings: Settings, layers: Sequence[Layer]) -> None:
    """Raise `UsageError` unless a model of cut settings builds its layers as the
    original ones that they are made of.
    """
    kind = dense.structure.model_type
    try:
        config = _config_of(settings, dense.config)
        exported = build_empty(config).get_submodule(dense.structure.layers)
    except (ValueError, StrictDataclassError, UsageError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UsageError(
            f"{kind} {LAYER_RULE} ({reason}), so this plan runs in memory only"
        ) from None
    for number, layer in enumerate(layers):
        built = exported.get_submodule(str(number))
        for part in sublayers_of(dense.structure, layer):
            if build_of(built, part) != build_of(dense.layer(part.index), part):
                raise UsageError(
                    f"{kind} would build {part.name} in another way as a part of layer"
                    f" {number}: its config {LAYER_RULE}, so this plan runs in memory only"
                )


def _config_of(settings: Settings, dense: PretrainedConfig) -> PretrainedConfig:
    """Settings as transformers reads them from a file, where an infinite number stands
    in words.
    """
    with tempfile.TemporaryDirectory(prefix="notall-") as folder:
        text = json.dumps(settings)
        Path(folder, "config.json").write_text(text, encoding="utf-8")
        read, _ = PretrainedConfig.get_config_dict(folder)
    config = type(dense).from_dict(read)
    config.name_or_path = dense.name_or_path  # by which the model's own code is found
    return config


def build_of(layer: nn.Module, part: Sublayer) -> Settings:
    """How a sublayer is built: the class, settings and shapes of each of its
    modules.
    """
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
            facts[name] = (type(module).__name__, _settings_of(module), shapes)
    if part.kind == "attention":
        facts[""] = _settings_of(layer)
    return facts


def _settings_of(module: nn.Module) -> Settings:
    """The plain attributes of a module, but for private ones and those of its place."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, PLAIN_TYPES) and name[0] != "_" and name not in OF_PLACE
    }


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
    """The new name of each module, in the files and in the model; None for one that
    goes.
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
        start = f"{dense.prefix}{number}."
        if layer.mlp == layer.attention:
            block = blocks[layer.attention]
            yield block.sublayers, dense.layers[block.index], start
        else:
            for part in sublayers_of(dense.structure, layer):
                yield [part], dense.parts(part), start
        for place, indices in (("before", layer.before), ("after", layer.after)):
            for slot, index in enumerate(indices):
                mlp = blocks[index].mlp
                yield [mlp], dense.parts(mlp), f"{start}{place}.{slot}."


def _new_names(
    dense: DenseModel, parts: Sequence[Sublayer], tensors: Weights, start: str
) -> dict[str, str]:
    """The names of a piece's modules in the original model, to those in the export."""
    index = parts[0].index
    layer = dense.layer(index)
    names = _modules_of(tensors)
    for path in (path for part in parts for path in part.modules):
        for name, module in child(layer, path).named_modules(prefix=path):
            if next(module.parameters(), None) is not None:
                names.add(name)
    return {f"{dense.prefix}{index}.{name}": start + name for name in names}


def _modules_of(tensors: Iterable[str]) -> set[str]:
    """The modules that tensors of these names are in, and those that these are in."""
    paths = [name.split(".")[:-1] for name in tensors]
    return {
        ".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)
    }
