"""A Ray cluster: joined, or started here, what it has room for, and work for its
workers. Needs the extra `ray`.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError

try:
    import ray
    from ray.job_config import JobConfig
except ModuleNotFoundError:
    raise UsageError(
        "spreading over machines needs ray; pip install 'notall[ray]'"
    ) from None

# Ray's server forks while it has threads of its own, and at times that child dies at once
ATTEMPTS = 3
LOADING_SECONDS = 1800  # for a worker to load its model


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Be connected to a cluster, which ends with the `with` if it was not before.

    `address` is local (start a cluster here), auto (the running one), any (the running
    one, else start one here), HOST:PORT (from a machine of the cluster) or
    ray://HOST:PORT (from outside). Raises `UsageError` without one.
    """
    if ray.is_initialized():
        yield
        return
    how: dict[str, Any] = {
        "log_to_driver": False,
        "include_dashboard": False,
        "logging_level": logging.ERROR,
    }
    if not address.startswith("ray://"):  # whose server has a folder of its own
        how["job_config"] = config = JobConfig()
        # else workers look for modules in the working folder first
        config._py_driver_sys_path = deque(maxlen=0)
    try:
        for attempt in range(ATTEMPTS):
            try:
                ray.init(address=None if address == "any" else address, **how)
                break
            # a server is there, and could not start what it starts for each client
            except ConnectionAbortedError:
                if attempt == ATTEMPTS - 1:
                    raise
                ray.shutdown()
    except (OSError, ray.exceptions.RayError, ValueError) as error:
        fix = (
            "give local, auto, HOST:PORT or ray://HOST:PORT, and for a token set"
            " RAY_AUTH_MODE=token and HOME"
        )
        raise UsageError(
            f"no Ray cluster at {address}: {_last_line(error)[:200]}; {fix}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def room(gpus: int = 1) -> tuple[int, bool]:
    """How many workers the cluster holds, of `gpus` GPUs each, and True; without so
    many GPUs of two CPUs each.
    """
    held = ray.cluster_resources()
    has_gpus = held.get("GPU", 0) >= gpus
    if has_gpus:
        return int(held["GPU"] // gpus), True
    return max(1, int(held.get("CPU", 2) // 2)), False


def _last_line(error: BaseException) -> str:
    """What an error says in one line; of a traceback, which Ray hands on as a message,
    the reason that it ends with.
    """
    message = str(error).strip()
    return " ".join(
        (message.splitlines()[-1] if "Traceback" in message else message).split()
    )


class Pool:
    """`count` workers, or as many as fit: each a `kind(**options)` of `gpus` GPUs;
    `ready` answers its process.
    """

    def __init__(
        self, kind: type, options: Mapping[str, object], count: int | None, gpus: int
    ) -> None:
        most, has_gpus = room(gpus)
        remote = ray.remote(num_cpus=1, num_gpus=gpus if has_gpus else 0)(kind)
        self.actors: list[Any] = [
            remote.remote(**options) for _ in range(count or most)
        ]
        try:
            self.processes: list[int] = ray.get(
                [actor.ready.remote() for actor in self.actors], timeout=LOADING_SECONDS
            )
        except ray.exceptions.RayError as error:
            message = _last_line(getattr(error, "cause", None) or error)[-300:]
            raise UsageError(f"a worker could not load the model: {message}") from None

    def close(self) -> None:
        """End all workers."""
        for actor in self.actors:
            ray.kill(actor)

    def run(self, tasks: Sequence[tuple[str, tuple[object, ...]]]) -> list[Any]:
        """The answers to methods with arguments, in order; what a lost worker was doing
        goes to another one, once.
        """
        waiting = list(enumerate(tasks))[::-1]
        tried = [0] * len(tasks)
        running: dict[Any, tuple[int, Any]] = {}
        answers: dict[int, Any] = {}
        idle = list(self.actors)
        while waiting or running:
            while waiting and idle:
                number, (method, arguments) = waiting.pop()
                actor = idle.pop()
                tried[number] += 1
                running[getattr(actor, method).remote(*arguments)] = (number, actor)
            if not running:
                raise UsageError(
                    "every worker is lost; look at the cluster's logs and start again:"
                    " nothing is lost"
                )
            (ready, *_), _ = ray.wait(list(running))
            number, actor = running.pop(ready)
            try:
                answers[number] = ray.get(ready)
                idle.append(actor)
            except ray.exceptions.RayActorError:
                self.actors.remove(actor)
                if tried[number] > 1:
                    raise UsageError(
                        "two workers were lost on the same branches; look at the"
                        " cluster's logs"
                    ) from None
                waiting.append((number, tasks[number]))
        return [answers[number] for number in range(len(tasks))]


def train(
    work: Callable[..., None],
    given: Mapping[str, object],
    folder: Path,
    *,
    count: int,
    on_gpus: bool,
) -> None:
    """Have `count` processes run `work(device, is_first, **given)` as one torch process
    group; lost, once again.
    """
    try:
        from ray.train import (
            FailureConfig,
            RunConfig,
            ScalingConfig,
            TrainingFailedError,
        )
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise UsageError(
            "training on a cluster needs Ray Train; pip install -U 'notall[ray]'"
        ) from None
    trainer = TorchTrainer(
        _train_here,
        train_loop_config={
            "work": ray.put(work),
            "given": ray.put(dict(given)),
            "on_gpus": on_gpus,
        },
        scaling_config=ScalingConfig(num_workers=count, use_gpu=on_gpus),
        run_config=RunConfig(
            storage_path=str(folder.absolute()),
            failure_config=FailureConfig(max_failures=1),
        ),
    )
    try:
        trainer.fit()
    except (ray.exceptions.RayError, TrainingFailedError) as error:
        message = _last_line(error)[-300:]
        raise UsageError(
            f"a worker failed: {message}; the same command goes on from its last"
            " checkpoint"
        ) from None


def _train_here(config: Mapping[str, Any]) -> None:
    from ray.train import get_context
    from ray.train.torch import get_device

    device = str(get_device()) if config["on_gpus"] else None
    ray.get(config["work"])(
        device, get_context().get_world_rank() == 0, **ray.get(config["given"])
    )
