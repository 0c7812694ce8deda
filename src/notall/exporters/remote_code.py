"""The modeling file of a regrouped checkpoint, from one template: it subclasses
transformers' own classes.
"""

import atexit
import importlib.util
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import mkdtemp
from types import ModuleType

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..cache import cache_folder, write_cached
from ..errors import UsageError
from ..files import contents
from ..models.own_exports import REGROUPED
from ..strict_json import read_json
from ..version import __version__


@dataclass(frozen=True)
class Family:
    """Transformers' names for one architecture, and what an MLP sublayer runs there."""

    name: str
    mlp: tuple[str, ...] = (
        "post_attention_layernorm",
        "mlp",
    )  # its modules in the order they run
    text: str = ""  # what its text-only config and model add to the name
    scaled: str = ""  # what its answer is multiplied with
    # some answers are tuples in transformers 4, and 5 fuses experts as it loads them
    experts: bool = False


_SANDWICH = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")

FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "smollm3": Family("SmolLM3"),
    "gemma2": Family("Gemma2", mlp=_SANDWICH),
    "gemma3_text": Family("Gemma3", mlp=_SANDWICH, text="Text"),
    "phi3": Family(
        "Phi3", mlp=("post_attention_layernorm", "mlp", "resid_mlp_dropout")
    ),
    "granite": Family("Granite", scaled=" * self.residual_multiplier"),
    "olmo2": Family("Olmo2", mlp=("mlp", "post_feedforward_layernorm")),
    "mixtral": Family("Mixtral", experts=True),
    "qwen3_moe": Family("Qwen3Moe", experts=True),
}


def model_type_of(base: str) -> str:
    """The model type of regrouped checkpoints of a family."""
    return f"{REGROUPED}{base}"


def modeling_file(base: str) -> str:
    """The name of the modeling file of a family."""
    return f"modeling_{model_type_of(base)}.py"


def classes_of(base: str) -> dict[str, str]:
    """The classes of the modeling file, as `auto_map` has them; vLLM looks for
    AutoModel.
    """
    name = f"Notall{FAMILIES[base].name}"
    return {
        "AutoConfig": f"{name}Config",
        "AutoModel": f"{name}Model",
        "AutoModelForCausalLM": f"{name}ForCausalLM",
    }


def auto_map(base: str) -> dict[str, str]:
    """What a checkpoint's config says of its code."""
    return {
        auto: f"{modeling_file(base).removesuffix('.py')}.{name}"
        for auto, name in classes_of(base).items()
    }


def check_code(folder: Path) -> None:
    """Raise `UsageError` where a regrouped checkpoint's folder holds, or names, code
    that notall did not write.
    """
    settings = read_json(contents(folder / "config.json"))
    base = settings["model_type"].removeprefix(REGROUPED)
    stored = settings.get("auto_map")
    found = {file.name: contents(file) for file in folder.glob("**/*.py")}
    named = {
        file.name for file in folder.glob("*.json") if b'"auto_map"' in contents(file)
    }
    if (
        found != {modeling_file(base): source_of(base).encode()}
        or named != {"config.json"}
        or stored != auto_map(base)
    ):
        raise UsageError(
            f"{folder} holds code that this notall did not write: delete the folder,"
            " and measure again"
        )


def load_modeling(folder: Path, base: str) -> ModuleType:
    """The modeling file of `base`, whose place is in `folder`: its source is run, and
    not what lies there.
    """
    return run_source(folder / modeling_file(base), source_of(base))


def run_source(path: Path, source: str) -> ModuleType:
    """The module that `source` makes, whose place is `path`; what lies there is not
    read.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    exec(compile(source, str(path), "exec"), vars(module))
    return module


def register(*bases: str) -> None:
    """Make this process's transformers know regrouped checkpoints, with no
    `trust_remote_code`.

    Of the model types `bases`, such as llama, or of all that have such a form. Their
    classes are written to a folder first, so that `save_pretrained` can copy them
    beside the weights.
    """
    for base in bases or FAMILIES:
        if model_type_of(base) in CONFIG_MAPPING:
            continue
        module = load_modeling(_folder_with(base), base)
        sys.modules[module.__name__] = (
            module  # where pickle and save_pretrained look for it
        )
        config, *models = (getattr(module, name) for name in classes_of(base).values())
        AutoConfig.register(model_type_of(base), config)
        for auto, model in zip((AutoModel, AutoModelForCausalLM), models):
            auto.register(config, model)
            model.register_for_auto_class(auto.__name__)
        config.register_for_auto_class()


def _folder_with(base: str) -> Path:
    """A folder with the modeling file: in the cache, or a new one if the cache holds
    another.
    """
    source, folder = source_of(base).encode(), cache_folder("modeling", __version__)
    path = folder / modeling_file(base)
    write_cached(path, source)
    with suppress(OSError, UsageError):
        if contents(path) == source:
            return folder
    place = _new_folder()
    (place / path.name).write_bytes(source)
    return place


@cache
def _new_folder() -> Path:
    """A folder of this process alone, which goes with it."""
    folder = mkdtemp(prefix="notall-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def source_of(base: str) -> str:
    """The modeling file for a model type of transformers. Raises `KeyError` for one
    that is not in `FAMILIES`.
    """
    family = FAMILIES[base]
    mlp = ", ".join("MIXER" if name == "mlp" else f'"{name}"' for name in family.mlp)
    zeros = "torch.zeros_like(hidden_states)"
    return Template(_MODEL + _EXPERTS if family.experts else _MODEL).substitute(
        base=base,
        name=family.name,
        package=base.removesuffix("_text"),
        config=f"{family.name}{family.text}Config",
        model=f"{family.name}{family.text}Model",
        model_type=model_type_of(base),
        mlp=f"({mlp})",
        nothing=(
            f"({zeros}, None) if TRANSFORMERS_4 else {zeros}"
            if family.experts
            else zeros
        ),
        mixer=(
            '"block_sparse_moe" if TRANSFORMERS_4 else "mlp"'
            if base == "mixtral"
            else '"mlp"'
        ),
        imports="\nimport transformers" if family.experts else "",
        release=(
            'TRANSFORMERS_4 = transformers.__version__.startswith("4.")\n'
            if family.experts
            else ""
        ),
        keep_scale=(
            "\n        self.residual_multiplier = config.residual_multiplier"
            if family.scaled
            else ""
        ),
        scaled=family.scaled,
    )


_MODEL = (
    files("notall.exporters").joinpath("modeling.template").read_text(encoding="utf-8")
)

_EXPERTS = """

if not TRANSFORMERS_4:
    # Version 5 fuses the experts of a checkpoint as it loads them, by rules for each model type.
    from transformers import conversion_mapping

    rules = conversion_mapping.get_checkpoint_conversion_mapping("$base")
    conversion_mapping.register_checkpoint_conversion_mapping("$model_type", rules, overwrite=True)
"""
