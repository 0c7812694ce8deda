"""A healing on many GPUs or machines: Ray Train starts the workers, torch adds up their gradients. Needs `ray`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..progress import Progress, silent
from ..records.healing import HealRecord
from ..records.ledger import Ledger
from ..records.provenance import Provenance
from ..running.cluster import join, last_line, ray, room
from ..running.repaired_folders import read_weights, write_weights
from ..structure.anatomy import base_model
from .distilling import CHECKPOINTS, LOOKS, Training

try:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_context
    from ray.train.torch import TorchTrainer, get_device
except ImportError:
    raise UsageError("training on a cluster needs Ray Train; pip install -U 'notall[ray]'") from None

TRAINED, RAYS_OWN = "best.safetensors", "ray"  # in the folder of the checkpoints
POLL = 1.0  # seconds


@dataclass(frozen=True)
class Spread:
    """The workers of a training, each with the model that `load_options` (the arguments of `notall.load`) name.

    `address` is as in `cluster.join`, but from a machine of the cluster. There are `count` workers, or one for each
    GPU, or without GPUs as many as half of the CPUs.
    """

    load_options: Mapping[str, Any]
    address: str = "local"
    count: int | None = None

    def check(self, rows: int) -> None:
        """Raise `UsageError` where it is known before that no training of batches of `rows` can be begun."""
        if self.address.startswith("ray://"):
            raise UsageError("a training is started from a machine of the cluster: give --ray auto or HOST:PORT there")
        _check_share(self.count or 1, rows)

    def train(self, training: Training, folder: Path, about: Provenance, progress: Progress) -> dict[str, Tensor]:
        """As `Training.run`, the looks noted in `folder`, which all workers must see under this path.

        When a worker is lost, all of them go on from the last checkpoint, once. Raises `UsageError` where a batch does
        not part evenly among the workers, and where they fail.
        """
        rows = len(training.batches[0])
        self.check(rows)
        started = join(self.address)
        try:
            most, has_gpus = room()
            count, on_gpus = self.count or most, has_gpus and self.load_options.get("device") != "cpu"
            _check_share(count, rows)
            asked = {"training": training, "folder": folder.absolute(), "about": about, "load": dict(self.load_options)}
            trainer = TorchTrainer(
                _work,
                train_loop_config={"asked": ray.put(asked), "on_gpus": on_gpus},
                scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus),
                run_config=RunConfig(
                    storage_path=str(folder.absolute() / CHECKPOINTS / RAYS_OWN),
                    failure_config=FailureConfig(max_failures=1),
                ),
            )
            with _telling(folder / HealRecord.file, count, progress):
                trainer.fit()
        except (ray.exceptions.RayError, TrainingFailedError) as error:
            said = " ".join(last_line(str(error)).split())[-300:]
            raise UsageError(f"a worker failed: {said}; the same command goes on from its last checkpoint") from None
        finally:
            if started:
                ray.shutdown()
        return read_weights(folder / CHECKPOINTS, TRAINED)


def _work(config: dict[str, Any]) -> None:
    """What each worker does; the first of them writes it down."""
    from ..running.opening import load

    asked = ray.get(config["asked"])
    device = {"device": str(get_device())} if config["on_gpus"] else {}
    model, _ = load(**asked["load"] | device)
    kept = Ledger(asked["folder"], HealRecord, asked["about"])
    trained = asked["training"].run(base_model(model), asked["folder"], kept, silent)
    if get_context().get_world_rank() == 0:
        write_weights(asked["folder"] / CHECKPOINTS / TRAINED, trained)


def _check_share(count: int, rows: int) -> None:
    if count < 1 or rows % count:
        raise UsageError(
            f"{count} workers cannot share a batch of {rows} evenly: give another --batch-size or --ray-workers"
        )


@contextmanager
def _telling(looks: Path, count: int, progress: Progress) -> Iterator[None]:
    """Meanwhile tell how many looks at the held-out text were noted."""
    ended = Event()

    def tell() -> None:
        while not ended.wait(POLL):
            lines = looks.read_bytes().count(b"\n") if looks.exists() else 0
            done = lines - 2  # the first line is a header, and the second of before the training
            progress(min(max(0, done), LOOKS), LOOKS, f"healing on {count} workers")

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
