"""Joining a Ray cluster, without what Ray changes in a process that does."""

import os
import signal
import socket
import threading
from typing import Any

from fdfast.errors import InputError, MachineError

_CONNECT_S = 5.0
_START = (
    "start one: `ray start --head` on one machine, `ray start --address=HOST:6379` on the others, "
    "each with the same fdfast and RAY_USAGE_STATS_ENABLED=0"
)


def import_ray() -> Any:
    """The library, which then reports nothing to anyone.

    Raises:
        MachineError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MachineError(
            f"rollouts on a cluster need Ray ({error}); run: pip install 'fdfast[ray]'"
        ) from error
    return ray


def join_cluster(address: str) -> tuple[Any, bool]:
    """Connect this process to a cluster.

    Args:
        address: HOST:PORT of the head, "auto" for the one that runs on this machine, or
            ray://HOST:10001.

    Returns:
        The library, and whether it was not connected before: then whoever called disconnects it.

    Raises:
        InputError: that is no address.
        MachineError: Ray is missing, or there is no cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    _check_answers(address)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except ValueError as error:
        raise InputError(f"ray: address {address!r} is none: {_one_line(error)}") from error
    except (ConnectionError, RuntimeError, ImportError, ray.exceptions.RayError) as error:
        raise _no_cluster(address, error) from error
    finally:
        if in_main:  # Ray's own would end the process, and no checkpoint be written
            signal.signal(signal.SIGTERM, before)
    return ray, True


def _check_answers(address: str) -> None:
    """Somebody listens there; Ray would go on asking for minutes.

    Raises:
        MachineError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return  # "auto"; of the rest Ray says what is wrong with it
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> MachineError:
    return MachineError(f"ray: can't join a cluster at {address!r} ({_one_line(error)}); {_START}")


def num_that_fit(ray: Any, *, gpus: float, cpus: float) -> int:
    """Actors of this size for which the cluster has room, whoever else uses it.

    Raises:
        MachineError: for none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = 0
    for node in nodes:
        shares = [node.get(kind, 0.0) / size for kind, size in _wanted(gpus, cpus) if size]
        count += int(min(shares, default=1))
    if not count:
        seen = ", ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise MachineError(
            f"ray: no machine has room for an actor of {cpus:g} CPUs and {gpus:g} GPUs (they have "
            f"{seen}); lower ray.cpus_per_actor or ray.gpus_per_actor (0 samples on the CPU), or "
            "let another machine join: ray start --address=HOST:6379"
        )
    return count


def _wanted(gpus: float, cpus: float) -> tuple[tuple[str, float], ...]:
    return (("GPU", gpus), ("CPU", cpus))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
