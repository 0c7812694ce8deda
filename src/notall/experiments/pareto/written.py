"""The checkpoints that a command writes into its folder: it replaces its own, and
nobody else's.
"""

from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError, shortened
from ...files import remove_path
from ...results import lines

FIX = "move it away, or choose a new --out"


@dataclass(frozen=True)
class WrittenCheckpoints:
    """`folder` need not exist; a file in it lists each checkpoint before it is
    written.
    """

    folder: Path

    @classmethod
    def of(cls, out: Path) -> "WrittenCheckpoints":
        """Those of a command that writes to `out`."""
        return cls(out / "checkpoints")

    @property
    def _list(self) -> Path:
        return self.folder / "written.jsonl"

    def check(self) -> None:
        """Raise `UsageError` where the folder is a link or a file, or holds others'
        files alone.
        """
        self._refuse_link(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{shortened(self.folder)} is a file: {FIX}")
        held = [*self.folder.iterdir()] if self.folder.is_dir() else []
        listed = lines.read_lines(self._list) if self._list in held else []
        is_list = listed and all(line.keys() == {"checkpoint"} for line in listed)
        if held and not is_list:
            raise UsageError(
                f"{shortened(min(held))} is there, and notall did not write it: {FIX}"
            )

    def check_own(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is there. Raises `UsageError` for a link, and for one of
        others.
        """
        self._refuse_link(self.folder)
        self._refuse_link(checkpoint)
        if not checkpoint.exists():
            return False
        if {"checkpoint": checkpoint.name} not in lines.read_lines(self._list):
            raise UsageError(
                f"{shortened(checkpoint)} is there, and notall did not write it: {FIX}"
            )
        return True

    def make_way(self, checkpoint: Path) -> None:
        """Remove an own checkpoint, or list what will be written. Raises as `check_own`
        does.
        """
        if self.check_own(checkpoint):
            remove_path(checkpoint)
        else:
            lines.append(self._list, {"checkpoint": checkpoint.name})

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink():
            raise UsageError(
                f"{shortened(path)} is a link, or holds one: what it leads to may be"
                " others'; choose a new --out"
            )
