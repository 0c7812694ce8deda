"""A training that workers of a Ray cluster share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import tensor_files
from ..errors import UsageError
from ..models.loading import load as load_model
from ..plan import several
from ..progress import Progress, silent
from ..results.ledger import Ledger
from ..results.provenance import Provenance
from ..results.repairs import HealRecord
from ..structure.model_structure import base_model
from .checkpoints import Checkpoints
from .training import Training


@dataclass(frozen=True)
class Spread:
    """Workers that share a training, each with the model that `load_options` (the
    arguments of `notall.load`) name.

    They are those of a Ray cluster, which needs the extra `ray`. `address` is as in
    `cluster.joined`, but from a machine of the cluster. There are `count` workers, or
    one for each GPU, or without GPUs as many as half of the CPUs.
    """

    load_options: Mapping[str, Any]
    address: str = "local"
    count: int | None = None

    def check(self, rows: int, count: int | None = None) -> None:
        """Raise `UsageError` where `count` workers, else as many as are asked for,
        can't train on batches of `rows`.
        """
        if self.address.startswith("ray://"):
            raise UsageError(
                "a training is started from a machine of the cluster: give --ray auto"
                " or HOST:PORT there"
            )
        count = count or self.count or 1
        if count < 1 or rows % count:
            raise UsageError(
                f"{several(count, 'worker')} cannot share a batch of {rows} evenly: give"
                " another --per-step or --ray-workers"
            )

    def train(
        self, training: Training, folder: Path, about: Provenance, progress: Progress
    ) -> dict[str, Tensor]:
        """As `Training.run`, in a `folder` that all see. Raises `UsageError` for uneven
        batches and lost workers.
        """
        from ..running import cluster

        self.check(len(training.batches[0]))
        with cluster.joined(self.address):
            most, has_gpus = cluster.room()
            count = self.count or most
            on_gpus = has_gpus and self.load_options.get("device") != "cpu"
            self.check(len(training.batches[0]), count)
            progress(0, 1, f"healing on {several(count, 'worker')}")
            given = {
                "training": training,
                "folder": folder.absolute(),
                "about": about,
                "load": dict(self.load_options),
            }
            with Checkpoints.of(folder).for_ray() as scratch:
                cluster.train(_work, given, scratch, count=count, on_gpus=on_gpus)
            progress(1, 1, f"healed on {several(count, 'worker')}")
        return tensor_files.read_tensors(Checkpoints.of(folder).trained)[0]


def _work(
    device: str | None,
    is_first: bool,
    *,
    training: Training,
    folder: Path,
    about: Provenance,
    load: Mapping[str, Any],
) -> None:
    """The share of one worker; the first of them writes the weights."""
    options = {**load, "device": device} if device else load
    model, _ = load_model(**options)
    ledger = Ledger(folder, HealRecord, about)
    trained = training.run(base_model(model), folder, ledger, silent)
    if is_first:
        tensor_files.write_tensors(Checkpoints.of(folder).trained, trained)
