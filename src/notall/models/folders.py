"""What may be read of a model's folder: its own files, and weights that are safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UsageError, shortened

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def own_file(folder: Path, name: str) -> Path | None:
    """The file of that name in a folder; None where there is none, or something that is no file.

    Raises `UsageError` for a name that leads elsewhere, and for a link out of the folder: only a hub's cache keeps
    what its folders show in another place, its blobs.
    """
    if Path(name).name != name:
        raise UsageError(f"{folder.name} names {shortened(name)}, which is not in it; download it again")
    try:
        if not (folder / name).is_file():
            return None
    except OSError as error:  # a name that is too long
        raise UsageError(f"{folder.name} names {shortened(name)}: {error.strerror}; download it again") from None
    place, home = (folder / name).resolve(), folder.resolve()
    if not place.is_relative_to(home) and place.parent != _blobs(home):
        raise UsageError(f"{shortened(name)} of {folder.name} is a link out of that folder; put the file itself there")
    return folder / name


def _blobs(folder: Path) -> Path | None:
    """Where the files of a hub cache's snapshot are: models--org--name/blobs beside models--org--name/snapshots."""
    repository = folder.parent.parent
    return repository / "blobs" if folder.parent.name == "snapshots" and "--" in repository.name else None


def named_weights(spec: str | Path, config: Any) -> str | None:
    """The file that a config names for the weights, in place of the usual ones. Raises `UsageError` for a pickle."""
    name = getattr(config, "transformers_weights", None)
    if name is None:
        return None
    is_plain = isinstance(name, str) and Path(name).name == name
    if not is_plain or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UsageError(
            f"the config of {shortened(str(spec))} names {shortened(str(name))} for the weights: only safetensors "
            "files in its own folder are read; take transformers_weights out of config.json"
        )
    return name


def refuse_adapter(spec: str | Path, found: Any) -> None:
    """transformers would merge a LoRA that lies beside a model in silence, where peft is installed, and else not."""
    if found:
        raise UsageError(
            f"{shortened(str(spec))} has a LoRA beside the model ({ADAPTER}): merge it with peft's merge_and_unload "
            "and save the result, or take that file away"
        )
