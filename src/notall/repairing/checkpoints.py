"""The folder in which a healing keeps how far it is: what it wrote there goes in the
end.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, shortened
from ..files import is_partial, remove_path, temporary
from ..tensor_files import is_tensors

LAST, BEST, TRAINED = "last.safetensors", "best.safetensors", "trained.safetensors"
OURS = (LAST, BEST, TRAINED)
RAY = "ray"  # what Ray Train keeps while it runs


@dataclass(frozen=True)
class Checkpoints:
    """`folder` need not exist."""

    folder: Path

    @classmethod
    def of(cls, out: Path) -> "Checkpoints":
        """Those of a healing that writes to `out`."""
        return cls(out / "checkpoints")

    @property
    def last(self) -> Path:
        """The file that a next run goes on from."""
        return self.folder / LAST

    @property
    def best(self) -> Path:
        """The file of the weights of least KL."""
        return self.folder / BEST

    @property
    def trained(self) -> Path:
        """The file in which workers leave the result."""
        return self.folder / TRAINED

    def refuse_others(self) -> None:
        """Raise `UsageError` where the folder is a link, or holds what no healing
        wrote.
        """
        if not self.folder.is_symlink() and not self.folder.exists():
            return
        others = [self.folder]
        if self.folder.is_dir() and not self.folder.is_symlink():
            others = [
                path for path in sorted(self.folder.iterdir()) if not _is_ours(path)
            ]
        if others:
            fix = "move it away, or choose another --out"
            raise UsageError(
                f"{shortened(others[0])} is there, and no healing wrote it: {fix}"
            )

    def remove(self) -> None:
        """Remove what a healing wrote, and the folder if it is empty then; no link is
        followed.
        """
        if self.folder.is_symlink() or not self.folder.is_dir():
            return
        for path in filter(_is_ours, [*self.folder.iterdir()]):
            remove_path(path)
        with suppress(OSError):  # it holds something else
            self.folder.rmdir()

    @contextmanager
    def for_ray(self) -> Iterator[Path]:
        """A new folder for Ray Train, which is removed in the end, as are those of
        killed runs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with temporary(self.folder / RAY) as scratch:
            yield scratch


def _is_ours(path: Path) -> bool:
    if path.is_symlink():
        return False
    return is_partial(path, (*OURS, RAY)) or (path.name in OURS and is_tensors(path))
