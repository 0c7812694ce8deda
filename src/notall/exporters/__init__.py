"""Plans become files that engines serve: `export`, with one module a target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UsageError
from ..models.names import hub_id, named_gguf
from ..models.paths import expanded
from ..progress import Progress, silent
from ..records.plan import Plan
from .writing import appearing, check_absent, check_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .dense import DenseModel

Target = Literal["hf", "nemotron-nas", "gguf"]
SHARD_BYTES = 5_000_000_000
UNPACKED = "bfloat16"  # what a GGUF file's numbers are written in: what they are run and timed in


def export(
    model: PreTrainedModel | str | Path,
    plan: Plan,
    target: Target,
    out: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    measured: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
    push_to_hub: str | None = None,
    progress: Progress = silent,
) -> Path:
    """Write `model` without the sublayers of `plan` as files for the engines of `target`; returns the folder `out`.

    `model` is what `notall.load` takes, or a live model with its `tokenizer`. Weights are copied file to file, so that
    memory is needed for `verify` alone, which runs the dense and the written model, one at a time, and compares them.
    `dtype` (float32, bfloat16, float16) is that of the written weights; without one they keep theirs, and those of a
    GGUF file, which have no such dtype, become bfloat16.
    `measured` goes into the model card as a table. `out` appears whole or not at all.
    Raises `UsageError` for a plan of another model, one that keeps matrices at run time, a folder that exists,
    damaged or unreadable files, a target that cannot hold the plan, a full disk, and a written model that answers
    differently.
    """
    if type(plan) is not Plan:  # what looks at a repaired plan imports torch
        from ..running.repaired import refuse_maps

        refuse_maps(plan)
    out = Path(out)
    with appearing(out) as folder:
        if target == "gguf":
            _refuse_dtype(dtype)
            from .gguf import export_gguf

            export_gguf(_gguf(model), plan, folder, measured=measured, check=verify, progress=progress)
        elif target in ("hf", "nemotron-nas"):
            from ..models.loading import named_dtype
            from ..running.repaired import RepairedPlan
            from .dense import opened
            from .hf import export_hf
            from .nemotron_nas import export_nemotron_nas

            dtype = _asked_dtype(model, dtype)
            if dtype:
                named_dtype(dtype)  # refused before a model is fetched
            write = export_hf if target == "hf" else export_nemotron_nas
            with opened(model, tokenizer=tokenizer, revision=revision, trust_remote_code=trust_remote_code) as dense:
                plan.check(dense.anatomy)
                if isinstance(plan, RepairedPlan):
                    dense = dense.with_weights(plan.weights)
                dense = _in_dtype(dense, dtype)
                write(dense, plan, folder, shard_bytes=shard_bytes, measured=measured, check=verify, progress=progress)
        else:
            raise UsageError(f"cannot export to {target!r}: choose hf, nemotron-nas or gguf")
    if push_to_hub:
        _push(out, push_to_hub)
    return out


def check_export(
    model: str | Path,
    plan: Plan,
    target: Target,
    out: Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
) -> None:
    """Raise `UsageError` as `export` does, as far as that is known without running a model, and write nothing."""
    check_absent(out)
    if target == "gguf":
        from .gguf import cut
        from .gguf_file import read_gguf
        from .gguf_file import total_bytes as gguf_bytes

        _refuse_dtype(dtype)
        check_room(out, gguf_bytes(cut(read_gguf(_gguf(model)), plan)[1]))
        return
    from . import hf, nemotron_nas
    from .dense import opened
    from .tensors import total_bytes

    prepared: Any = hf.prepared if target == "hf" else nemotron_nas.prepared
    with opened(model, revision=revision, trust_remote_code=trust_remote_code) as dense:
        plan.check(dense.anatomy)
        check_room(out, total_bytes(prepared(_in_dtype(dense, _asked_dtype(model, dtype)), plan)[1]))


def _refuse_dtype(dtype: str | None) -> None:
    if dtype:
        raise UsageError("a GGUF export keeps the types of the dense model's file: leave --dtype out")


def _asked_dtype(model: Any, dtype: str | None) -> str | None:
    return UNPACKED if dtype is None and isinstance(model, str | Path) and named_gguf(model) else dtype


def _in_dtype(dense: DenseModel, dtype: str | None) -> DenseModel:
    from ..models.loading import named_dtype

    return dense.in_dtype(named_dtype(dtype)) if dtype else dense


def _gguf(model: Any) -> Path:
    """The GGUF file to rewrite."""
    if isinstance(model, str | Path):
        if path := named_gguf(model):
            return path
        if not expanded(model).exists():
            hub_id(model)
    raise UsageError(f"a gguf export rewrites the GGUF file of the dense model: give that file, not {model}")


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (OSError, ValueError, RuntimeError) as error:  # what httpx, requests and the hub's checks raise
        raise UsageError(
            f"{folder} is written, but {repository} did not take it ({_first_line(error)}); "
            f"try again with `hf upload {repository} {folder}`"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
