"""Where work runs on a Ray cluster."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...options import option
from .model import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...evaluation.ray_workers import Workers


@dataclass(frozen=True)
class ClusterOptions:
    """On which Ray cluster, and with how many workers."""

    PANEL: ClassVar[str] = "Cluster"

    ray: str | None = option(
        None,
        "run on a Ray cluster: the running one, or a new one. ADDRESS may be local,"
        " auto, HOST:PORT or, except for heal, ray://HOST:PORT",
        metavar="[ADDRESS]",
    )
    ray_workers: int | None = option(
        None, "number of workers (default: one for each GPU)"
    )


@dataclass(frozen=True)
class RayOptions(ClusterOptions):
    """With workers that each have a copy of the model."""

    ray_gpus: int = option(1, "GPUs for each worker")

    def workers(
        self, model: PreTrainedModel, loading: ModelOptions
    ) -> AbstractContextManager[Workers | None]:
        """Workers with the model, inside; None where no cluster is asked for."""
        if self.ray is None:
            return nullcontext()
        from ...evaluation.ray_workers import Workers
        from ...structure.locating import locate

        return Workers(
            loading.for_workers,
            locate(model),
            self.ray,
            count=self.ray_workers,
            gpus=self.ray_gpus,
        )
