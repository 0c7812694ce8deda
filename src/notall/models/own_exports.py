"""What `notall export` wrote, without the code beside it: layers of transformers' own
class that lack a sublayer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from pydantic import BaseModel, Field
from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from ..checkpoint_files import INDEX, SINGLE
from ..errors import UsageError, shortened
from ..files import contents, own_file
from ..strict_json import Settings, read_json
from ..structure.slicing import PER_LAYER_LISTS
from .load_errors import quiet

REGROUPED, NEMOTRON_NAS = "notall_", "nemotron-nas"
PROMPT_SKIPS = (  # what an export that skips in the prompt alone begins with
    f"{REGROUPED}prefill_"
)
SWIFTKV = "llama_swiftkv"  # which ArcticInference alone runs
MULTIPLE = 256  # nemotron-nas widths are rounded up to one of these
TENSOR = re.compile(
    r"(?P<start>.*\blayers\.)(?P<layer>\d+)\."
    r"(?:(?P<place>before|after)\.(?P<slot>\d+)\.)?"
    r"(?P<end>.*)"
)
REDONE = "export it anew from the original model"


@dataclass(frozen=True)
class OwnExport:
    """An export as layers of the original architecture, some of which lack a
    sublayer.
    """

    config: PretrainedConfig
    missing: dict[
        str, list[int]
    ]  # by kind, the layers of `config` that have no such sublayer
    # of a layer of the files, and where in it an MLP rides along (such as after, 0),
    # the layer of `config`
    places: Mapping[tuple[int, str, int], int] = field(default_factory=dict)

    def renamed(self, name: str) -> str:
        """What a tensor of the files is called in the model of `config`."""
        match = TENSOR.fullmatch(name)
        if match is None or not self.places:
            return name
        key = int(match["layer"]), match["place"] or "", int(match["slot"] or 0)
        if key not in self.places:
            raise UsageError(
                f"config.json says nothing of {shortened(name)}: it is damaged;"
                f" {REDONE}"
            )
        return f"{match['start']}{self.places[key]}.{match['end']}"

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """Every tensor of the files, by the names that the model of `config` gives
        them.
        """
        weights: dict[str, Tensor] = {}
        for shard in weight_files(first_file(folder)):
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    weights[self.renamed(name)] = file.get_tensor(name)
        return weights


def first_file(folder: Path, named: str | None = None) -> Path:
    """Where transformers begins: with what the config has `named`, else the one file,
    else the index of shards.
    """
    names = (named,) if named else (SINGLE, INDEX)
    file = next((path for name in names if (path := own_file(folder, name))), None)
    if file is None:
        raise UsageError(
            f"{folder.name} has no {shortened(' and no '.join(names))}; download or"
            " save it again"
        )
    return file


def weight_files(file: Path) -> list[Path]:
    """The safetensors files that transformers reads, where it begins with `file`: that
    one, or shards of an index.
    """
    if file.suffix == ".safetensors":
        return [file]
    found = []
    for name in shard_names(file):
        shard = own_file(file.parent, name)
        if shard is None:
            raise UsageError(
                f"{file.parent.name} lacks {shortened(name)}; download it again"
            )
        found.append(shard)
    return found


def shard_names(index: Path) -> list[str]:
    """The files that an index names. Raises `UsageError` for others than safetensors:
    pickles.
    """
    names = sorted(set(shard_index(index).values()))
    if others := [name for name in names if not name.endswith(".safetensors")]:
        other = shortened(others[0]) or "nothing"
        problem = f"{index.name} of {shortened(index.parent.name)} names {other}"
        fix = "save the model with save_pretrained"
        raise UsageError(f"{problem}, and only safetensors are read: {fix}")
    return names


class _Index(BaseModel):
    """As for transformers, an index without a table of metadata is none."""

    metadata: dict[str, object]
    weight_map: dict[str, str] = Field(min_length=1)


def shard_index(path: Path) -> dict[str, str]:
    """Which file holds each weight, from an index. Raises `UsageError` for a damaged one."""
    try:
        return _Index.model_validate(read_json(contents(path)), strict=True).weight_map
    except ValueError:
        raise UsageError(
            f"{path.parent.name}: {path.name} is damaged; download it again"
        ) from None


def own_export(name: str | Path, settings: Settings) -> OwnExport:
    """The layers that config.json of an export tells. Raises `UsageError` where it
    tells none that can be built.
    """
    refuse_prompt_skips(name, settings)
    try:
        return (
            _regrouped(settings)
            if settings["model_type"] != NEMOTRON_NAS
            else _nemotron_nas(settings)
        )
    except (
        Exception
    ) as error:  # transformers raises whatever a damaged file leads it to
        reason = shortened(f"{type(error).__name__}: {error}")
        raise UsageError(
            f"the config of {shortened(name)} is none that notall writes ({reason});"
            f" {REDONE}"
        ) from error


def refuse_prompt_skips(name: str | Path, settings: Settings) -> None:
    """Raise `UsageError` for an export that skips in the prompt alone, which other code
    than notall's runs.
    """
    form = str(settings.get("model_type"))
    if form == SWIFTKV:
        problem = (
            f"{shortened(name)} is in SwiftKV's form, which ArcticInference alone runs"
        )
        raise UsageError(f"{problem}; give the original model and the plan")
    if form.startswith(PROMPT_SKIPS):
        problem = (
            f"{shortened(name)} skips sublayers in the prompt alone, and runs in"
            " transformers by its own code"
        )
        raise UsageError(
            f"{problem} (trust_remote_code=True), or in vLLM; give the original model and"
            " the plan"
        )


def _regrouped(settings: Settings) -> OwnExport:
    rows = settings["sublayers"]
    places: dict[tuple[int, str, int], int] = {}
    missing: dict[str, list[int]] = {"attention": [], "mlp": []}
    for number, row in enumerate(rows):
        for place, count in (
            ("before", len(row["before"])),
            ("", 1),
            ("after", len(row["after"])),
        ):
            for slot in range(count):
                layer = len(places)
                places[number, place, slot] = layer
                if place:
                    missing["attention"].append(layer)
                elif row["mlp"] is None:
                    missing["mlp"].append(layer)
    sources = [number for number, _, _ in places]
    spread = {
        **settings,
        "num_hidden_layers": len(sources),
    }  # a layer each, with what that of the files has
    for name in PER_LAYER_LISTS:
        values = settings.get(name)
        if isinstance(values, list) and len(values) == len(rows):
            spread[name] = [values[source] for source in sources]
    if indices := settings.get("mlp_only_layers"):
        spread["mlp_only_layers"] = [
            number for number, source in enumerate(sources) if source in indices
        ]
    return OwnExport(
        _config(settings["model_type"].removeprefix(REGROUPED), spread), missing, places
    )


def _nemotron_nas(settings: Settings) -> OwnExport:
    """As Llama, which it is but for what its layers lack; only where the layers are of
    one size.
    """
    blocks, hidden = settings["block_configs"], settings["hidden_size"]
    missing = {
        kind: [number for number, block in enumerate(blocks) if block[name]["no_op"]]
        for kind, name in (("attention", "attention"), ("mlp", "ffn"))
    }
    if set(missing["attention"]) & set(missing["mlp"]):
        raise ValueError("a layer has neither an attention nor an MLP")
    parts = [block[name] for block in blocks for name in ("attention", "ffn")]
    if any(
        part.get(name)
        for part in parts
        for name in ("replace_with_linear", "sparsify", "window_length")
    ):
        raise ValueError("layers are not Llama's")
    groups = {
        block["attention"]["n_heads_in_group"]
        for block in blocks
        if not block["attention"]["no_op"]
    }
    widths = {block["ffn"]["ffn_mult"] for block in blocks if not block["ffn"]["no_op"]}
    if len(groups) != 1 or len(widths) > 1:
        raise ValueError("layers differ in size")
    width = max(
        (ceil(int(2 * mult * hidden / 3) / MULTIPLE) * MULTIPLE for mult in widths),
        default=MULTIPLE,
    )
    sizes = {
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": settings["num_attention_heads"] // groups.pop(),
        "intermediate_size": width,
    }
    return OwnExport(_config("llama", {**settings, **sizes}), missing)


def _config(model_type: str, settings: Settings) -> PretrainedConfig:
    not_ours = ("auto_map", "architectures", "sublayers", "block_configs")
    own = {name: value for name, value in settings.items() if name not in not_ours}
    config_class = CONFIG_MAPPING[model_type]
    if not config_class.__module__.startswith("transformers."):
        raise ValueError(f"{model_type} is no architecture of transformers")
    with quiet():
        return config_class.from_dict({**own, "model_type": model_type})
