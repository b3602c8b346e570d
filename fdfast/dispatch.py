"""The only place that chooses a backend."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch
from torch import Tensor

from fdfast.errors import MachineError

BACKENDS = ("auto", "cpu", "triton", "reference")
ATTENTION_BACKENDS = (*BACKENDS, "flash")
logger = logging.getLogger("fdfast")


def backend_for(
    operation: str, tensor: Tensor, requested: str, dtype: torch.dtype | None = None
) -> ModuleType | None:
    """The module that computes `operation` on the tensor's device; None means fdfast.reference with
    its own autograd.

    "auto" takes the fast backend of the device and says so once in the log: cpu on the CPU, triton
    on a GPU that can run it, else the reference. A backend asked for by name that cannot run
    raises.

    Args:
        operation: policy_head, topk_head or prefix_attention.
        tensor: one on the device where all are.
        requested: a name in BACKENDS.
        dtype: of logits and statistics; None: the tensor's.

    Raises:
        ValueError: no such backend.
        TypeError: the backend does not compute in this dtype.
        MachineError: the backend cannot run here.
    """
    known = ATTENTION_BACKENDS if operation == "prefix_attention" else BACKENDS
    if requested not in known:
        raise ValueError(
            f"{operation}: backend must be one of {', '.join(known)}; got {requested!r}"
        )
    dtype = tensor.dtype if dtype is None else dtype
    chosen = requested
    if requested == "auto":
        chosen, reason = _automatic(tensor.device, dtype)
        _announce(operation, chosen, tensor.device.type, reason)
    if chosen == "triton":
        _check_triton(operation, tensor.device, dtype)
    if chosen == "flash" and tensor.device.type != "cuda":
        raise MachineError(
            f"{operation}: backend='flash' wants tensors on a CUDA GPU; got one on "
            f"{tensor.device}; move it, or take 'auto'"
        )
    if chosen == "cpu" and tensor.device.type != "cpu":
        raise MachineError(
            f"{operation}: backend='cpu' wants tensors on the CPU; got one on {tensor.device}; "
            f"move it, or take 'auto'"
        )
    if chosen == "reference":
        return None
    modules = {"cpu": _cpu_module, "triton": _triton_module, "flash": _flash_module}
    return modules[chosen](operation)


def _automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The fast backend of a device, or the reference and why."""
    if device.type == "cpu":
        return "cpu", ""
    if device.type != "cuda":
        return "reference", "no other backend knows this device"
    if dtype == torch.float64:
        return "reference", "triton does not compute in float64"
    lacking = _gpu_lacks(device)
    if lacking is None and importlib.util.find_spec("triton") is None:
        lacking = "triton is not installed: pip install triton"
    return ("triton", "") if lacking is None else ("reference", lacking)


def _gpu_lacks(device: torch.device) -> str | None:
    """What a GPU lacks to run the kernels as they were compiled and tested."""
    if torch.version.hip is not None:
        return "the triton kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the triton kernels want compute capability 8.0; this GPU has {major}.{minor}"
    return None


def _check_triton(operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Triton can run on this device and in this dtype.

    Raises:
        TypeError: float64.
        MachineError: it cannot.
    """
    if dtype == torch.float64:
        raise TypeError(
            f"{operation}: backend='triton' computes in float32; got a float64 tensor; take "
            f"'auto' or 'reference'"
        )
    if device.type == "cuda":
        lacking = _gpu_lacks(device)
        if lacking is not None:
            raise MachineError(f"{operation}: {lacking}; take backend='auto'")
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        raise MachineError(
            f"{operation}: backend='triton' wants tensors on a CUDA GPU; got one on {device}; move "
            "it, take 'auto', or run Python with TRITON_INTERPRET=1 for CPU tensors in Triton's "
            "(slow) interpreter"
        )


@functools.cache
def _cpu_module(operation: str) -> ModuleType:
    try:
        return importlib.import_module(f"fdfast.cpu.{operation}")
    except ImportError as error:
        raise MachineError(
            f"{operation}: the C++ extension fdfast._cpu is not built ({error}); run `pip install "
            f"-e .` in the "
            "repository, or take backend='reference'"
        ) from error


@functools.cache
def _flash_module(_operation: str) -> ModuleType:
    return importlib.import_module("fdfast.flash")


@functools.cache
def _triton_module(operation: str) -> ModuleType:
    try:
        from fdfast.kernels import launch
    except ImportError as error:
        raise MachineError(
            f"{operation}: triton cannot be imported ({error}); run `pip install triton`, or take "
            "backend='reference'"
        ) from error
    if os.environ.get("TRITON_INTERPRET") == "1" and not launch.INTERPRETING:
        raise MachineError(
            f"{operation}: TRITON_INTERPRET=1 was set after fdfast.kernels was imported; set it "
            "before Python starts"
        )
    return importlib.import_module(f"fdfast.kernels.{operation}")


@functools.cache
def _announce(operation: str, chosen: str, device: str, reason: str) -> None:
    because = f" ({reason})" if reason else ""
    logger.info(
        "%s: backend='auto' takes '%s' for tensors on %s%s", operation, chosen, device, because
    )
