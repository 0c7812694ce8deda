"""The files of weights in a model's folder, by the names that transformers has for them."""

from pathlib import Path

from .errors import UsageError, shortened

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"


def named_weights(spec: str | Path, config: object) -> str | None:
    """The file that a config names for the weights, in place of the usual ones. Raises
    `UsageError` for a pickle.
    """
    name = getattr(config, "transformers_weights", None)
    if name is None:
        return None
    is_plain = isinstance(name, str) and Path(name).name == name
    if not is_plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        problem = (
            f"the config of {shortened(str(spec))} names {shortened(str(name))} for the"
            " weights"
        )
        fix = "take transformers_weights out of config.json"
        raise UsageError(
            f"{problem}: only safetensors files in its own folder are read; {fix}"
        )
    return name


def refuse_adapter(spec: str | Path, found: object) -> None:
    """transformers would merge a LoRA that lies beside a model in silence, where peft
    is installed, and else not.
    """
    if found:
        fix = (
            "merge it with peft's merge_and_unload and save the result, or take that"
            " file away"
        )
        raise UsageError(
            f"{shortened(str(spec))} has a LoRA beside the model ({ADAPTER_CONFIG}): {fix}"
        )
