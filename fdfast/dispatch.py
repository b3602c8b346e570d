"""The only place that chooses a backend."""

import functools
import logging
from types import ModuleType

from torch import Tensor

from fdfast.errors import MachineError

BACKENDS = ("auto", "cpu", "reference")
logger = logging.getLogger("fdfast")


def backend_for(operation: str, tensor: Tensor, requested: str) -> ModuleType | None:
    """The module that computes `operation` on the tensor's device; None means fdfast.reference with
    its own autograd.

    "auto" takes the fast backend of the device and says so once in the log. A backend asked for by
    name that cannot run
    raises.

    Raises:
        ValueError: no such backend.
        MachineError: the backend cannot run here.
    """
    if requested not in BACKENDS:
        raise ValueError(
            f"{operation}: backend must be one of {', '.join(BACKENDS)}; got {requested!r}"
        )
    chosen = requested
    if requested == "auto":
        chosen = "cpu" if tensor.device.type == "cpu" else "reference"
        _announce(operation, chosen, tensor.device.type)
    if chosen == "reference":
        return None
    if tensor.device.type != "cpu":
        raise MachineError(
            f"{operation}: backend='cpu' wants tensors on the CPU; got one on {tensor.device}; "
            f"move it, or take 'auto'"
        )
    return _cpu_module(operation)


@functools.cache
def _cpu_module(operation: str) -> ModuleType:
    try:
        from fdfast.cpu import policy_head, topk_head
    except ImportError as error:
        raise MachineError(
            f"{operation}: the C++ extension fdfast._cpu is not built ({error}); run `pip install "
            f"-e .` in the "
            "repository, or take backend='reference'"
        ) from error
    return {"policy_head": policy_head, "topk_head": topk_head}[operation]


@functools.cache
def _announce(operation: str, chosen: str, device: str) -> None:
    logger.info("%s: backend='auto' takes '%s' for tensors on %s", operation, chosen, device)
