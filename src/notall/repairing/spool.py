"""Where the streams of a text lie between the layers: in memory, or in files, where memory is short."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Spool:
    """Keeps tensors as they are or, with a folder, in files there that have no name and go when the tensors do.

    Raises `OSError` where the folder has no room.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or its like on the CPU whose bytes are in a file."""
        if self.folder is None or not tensor.numel():
            return tensor
        with tempfile.TemporaryFile(dir=self.folder) as file:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            file.write(flat.data)  # a full disk is an error here, and not a crash in reading
            file.flush()
            held = np.memmap(file, dtype=np.uint8, mode="r+", shape=flat.shape)
        return torch.from_numpy(held).view(tensor.dtype).view(tensor.shape)
