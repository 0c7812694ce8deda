"""A Ray cluster that is joined, or started here, and the room that it has. Needs the extra `ray`."""

from __future__ import annotations

import logging

from ..errors import UsageError

try:
    import ray as ray  # for others, which learn here where it is missing
except ModuleNotFoundError:
    raise UsageError("spreading over machines needs ray; pip install 'notall[ray]'") from None

ATTEMPTS = 3  # Ray's server forks beside threads of its own, and at times that child dies at once


def join(address: str) -> bool:
    """Connect this process to a cluster, unless it is connected; whether that was necessary.

    `address` is local (start a cluster here), auto (the running one), any (the running one, else start one here),
    HOST:PORT (from a machine of the cluster) or ray://HOST:PORT (from outside, by Ray's client). Raises `UsageError`
    where no cluster is there.
    """
    if ray.is_initialized():
        return False
    try:
        _connect(None if address == "any" else address, ATTEMPTS)
    except (ConnectionError, ray.exceptions.RayError, ValueError) as error:
        said = " ".join(last_line(str(error)).split())[:200]
        raise UsageError(
            f"no Ray cluster at {address}: {said}; give local, auto, HOST:PORT or ray://HOST:PORT, and set "
            "RAY_AUTH_MODE=token where the cluster wants a token"
        ) from None
    return True


def _connect(address: str | None, attempts: int) -> None:
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except ConnectionAbortedError:  # a server is there, and could not start what it starts for each client
        if attempts == 1:
            raise
        ray.shutdown()
        _connect(address, attempts - 1)


def room(gpus: int = 1) -> tuple[int, bool]:
    """How many workers the cluster holds, of `gpus` GPUs each, and True; without so many GPUs of two CPUs each."""
    held = ray.cluster_resources()
    has_gpus = held.get("GPU", 0) >= gpus
    return (int(held["GPU"] // gpus) if has_gpus else max(1, int(held.get("CPU", 2) // 2))), has_gpus


def last_line(said: str) -> str:
    """The reason that a traceback ends with, which Ray hands on as a message; of any other message all."""
    return said.strip().splitlines()[-1] if "Traceback" in said else said
