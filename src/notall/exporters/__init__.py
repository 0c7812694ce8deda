"""Plans become files that engines serve: `export`, with one module a target."""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..entry_points import class_named
from ..errors import UsageError, shortened
from ..files import FULL, temporary, writing
from ..plan import Plan, refuse_prefill
from ..progress import Progress, silent
from ..results.lines import refuse_unwritable
from ..results.table import in_bytes
from ..strict_json import Settings
from .manifest import TURNED_OFF, Origin, Verification, describe, manifest_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGETS = {
    "hf": "notall.exporters.hf:HFExport",
    "nemotron-nas": "notall.exporters.nemotron_nas:NemotronExport",
    "gguf": "notall.exporters.gguf:GGUFExport",
    "executorch": "notall.exporters.executorch:ExecuTorchExport",
    "executorch-8da4w": "notall.exporters.executorch:Export8da4w",
    "swiftkv": "notall.exporters.swiftkv:SwiftKVExport",
}
SHARD_BYTES = 5_000_000_000
# what a GGUF file's numbers are written in: what they are run and timed in
UNPACKED = "bfloat16"


@dataclass(frozen=True)
class Source:
    """The original model of an export: what `notall.load` takes, or a live `model` with
    its `tokenizer`.

    `dtype` (float32, bfloat16, float16) is that of the written weights; without one
    they keep theirs, and those of a GGUF file, which have no such dtype, become
    bfloat16. A program of ExecuTorch is in float32 without one.
    """

    model: "PreTrainedModel | str | Path"
    tokenizer: "PreTrainedTokenizerBase | None" = None
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str | None = None


class Export(ABC):
    """A model without what `plan` skips in the form of one target, before it is
    written.
    """

    plan: Plan
    origin: Origin
    form: str  # the model type that is written
    use: str  # how to run it, for people
    library: ClassVar[str] = ""  # that loads it, as the hub names it
    skips_prompts: ClassVar[bool] = (
        False  # whether its engines skip what only a prompt does
    )
    own_keys: ClassVar[
        str
    ] = (  # whose weights a repair of a prompt changes, for people
        "The tokens that skip have weights of their own for keys and values, and in the"
        " place of MLPs; all others are the original's."
    )
    dense_bytes: int  # of weights
    written_bytes: int

    @classmethod
    @abstractmethod
    def prepared(cls, source: Source, plan: Plan) -> "AbstractContextManager[Export]":
        """Work it out, with no weights in memory. Raises `UsageError` where the target
        cannot express the plan.
        """

    @abstractmethod
    def write(self, folder: Path, shard_bytes: int, progress: Progress) -> None:
        """Write the files into an empty folder, of several about `shard_bytes` each."""

    @abstractmethod
    def verify(self, folder: Path) -> Verification:
        """Run what was written; raise `UsageError` where it answers differently from
        the skipped model.
        """

    @property
    def manifest(self) -> Settings:
        """What `notall.json` has of the export before it is written."""
        return manifest_of(self.origin, self.plan, self.form)


def target_named(name: str) -> type[Export]:
    """That of `TARGETS`, of an installed package, or `module:Class`. Raises
    `UsageError` where there is none.
    """
    abstract: type[Export] = Export  # type: ignore[type-abstract]
    return class_named(name, TARGETS, "notall.targets", "export target", abstract)


def export(
    model: "Source | PreTrainedModel | str | Path",
    plan: Plan,
    target: str,
    out: str | Path,
    *,
    measured: Mapping[str, object] | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = True,
    command: str = "",
    progress: Progress = silent,
) -> Path:
    """Write `model` without the sublayers of `plan` as files for the engines of
    `target`; returns the folder `out`.

    `model` is a name, a folder or a file as `notall.load` takes it, a live model, or a
    `Source`, which also names a revision, a dtype or a tokenizer; `target` is one of
    `TARGETS`. Weights are copied from file to file, one shard at a time, of about
    `shard_bytes`; `verify` needs memory for the dense and for the written model, which
    it runs, one at a time, and compares. `measured` goes into the model card as a
    table, and `command` as the one that wrote it. `out` appears whole or not at all.

    Raises `UsageError` for a plan of another model, one that keeps matrices at run
    time, a folder that exists, damaged files, a target that cannot express the plan, a
    full disk, and a model that answers differently.
    """
    if type(plan) is not Plan:  # the module of repaired plans imports torch
        from ..running.repaired import refuse_run_time_maps

        refuse_run_time_maps(plan)
    kind = _target_for(target, plan)
    source = model if isinstance(model, Source) else Source(model)
    out = Path(out)
    with appearing(out) as folder, kind.prepared(source, plan) as prepared:
        check_room(folder, prepared.written_bytes)
        prepared.write(folder, shard_bytes, progress)
        if verify:
            progress(0, 1, "comparing with the skipped model")
        describe(
            folder,
            prepared,
            prepared.verify(folder) if verify else TURNED_OFF,
            measured,
            command,
        )
    return out


def check_export(source: Source, plan: Plan, target: str, out: Path) -> None:
    """Raise `UsageError` as `export` does, as far as that is known without running a
    model, and write nothing.
    """
    check_absent(out)
    with _target_for(target, plan).prepared(source, plan) as prepared:
        check_room(out, prepared.written_bytes)


def _target_for(name: str, plan: Plan) -> type[Export]:
    """As `target_named`. Raises `UsageError` where a prompt skips what this target has
    no form for.
    """
    kind = target_named(name)
    if not kind.skips_prompts:
        refuse_prefill(plan, f"an export as {name}")
    return kind


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `out` in the end, or is removed. Raises
    `UsageError` where it cannot.
    """
    check_absent(out)
    with temporary(out) as scratch:
        with writing(f"to {out.parent}", "choose another folder"):
            scratch.mkdir(parents=True)
        try:
            yield scratch
            os.rename(scratch, out)
        except OSError as error:
            if error.errno in FULL:
                raise UsageError(
                    f"no space left for {out}; free some, or choose another disk"
                ) from None
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise UsageError(
                    f"{out} was made by someone else meanwhile; choose another folder"
                ) from None
            raise


def check_absent(out: Path) -> None:
    """Raise `UsageError` where a folder `out` cannot be made."""
    if out.exists() or out.is_symlink():
        raise UsageError(
            f"{out} exists already; choose another folder, or remove it first"
        )
    refuse_unwritable(out.parent)


def check_room(folder: Path, size: int) -> None:
    """Raise `UsageError` where the disk of `folder`, which need not be there, has fewer
    than `size` bytes left.
    """
    existing = next(
        path for path in (folder, *folder.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(existing).free
    if size > free:
        problem = (
            f"the export takes {in_bytes(size)}, and {shortened(existing)} has"
            f" {in_bytes(free)} left"
        )
        raise UsageError(f"{problem}; free some, or choose another disk")
