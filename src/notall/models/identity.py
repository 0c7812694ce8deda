"""Where a model comes from, as records name it."""

from pathlib import Path

from huggingface_hub import hf_hub_download

from ..digests import digest_of, digest_of_file
from ..files import expanded
from .load_errors import explained
from .names import DEFAULT_MODEL, NAMED_SHAPES, hub_id, named_gguf, resolved


def identify(
    spec: str | Path = DEFAULT_MODEL, *, revision: str | None = None
) -> dict[str, str]:
    """Where a model comes from: {"model": its name, with no folder, "revision": a
    commit, or `sha256:` of files}.
    """
    if spec in NAMED_SHAPES:
        return {"model": str(spec), "revision": "built-in"}
    spec = resolved(spec)
    path = named_gguf(spec) or expanded(spec)
    name = DEFAULT_MODEL if spec == DEFAULT_MODEL else path.resolve().name
    with explained(spec):
        if path.is_file():
            return {"model": name, "revision": f"sha256:{digest_of_file(path)}"}
        if path.is_dir():
            named = (*path.glob("*.safetensors"), *path.glob("config.json"))
            files = sorted(one for one in named if one.is_file())
            digest = digest_of(
                f"{file.name} {digest_of_file(file)}\n" for file in files
            )
            return {"model": name, "revision": f"sha256:{digest}"}
        config = hf_hub_download(hub_id(spec), "config.json", revision=revision)
        return {"model": str(spec), "revision": Path(config).parent.name}
