"""Weights in Ray's object store: put there once, one copy a machine, read without another."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdfast.errors import MachineError


class Stored(NamedTuple):
    """A tensor in the store: its bytes' reference, its dtype and its shape."""

    ref: Any
    dtype: torch.dtype
    shape: tuple[int, ...]


def put_weights(ray: Any, weights: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Put tensors of any dtype and device there, one after the other.

    Raises:
        MachineError: the store is full.
    """
    try:
        return {name: _put(ray, tensor) for name, tensor in weights.items()}
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        raise MachineError(
            f"ray: its object store has no room for {size >> 20} MiB of weights; start this "
            f"machine's Ray with more: ray start --object-store-memory={2 * size}"
        ) from error


def get_weights(ray: Any, stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Read them, in any process of the cluster; each is a copy of its own on the CPU."""
    for name, (ref, dtype, shape) in stored.items():
        flat = torch.from_numpy(ray.get(ref).copy())  # the store's own memory is read-only
        yield name, flat.view(dtype).reshape(shape)


def _put(ray: Any, tensor: Tensor) -> Stored:
    # As bytes, which numpy has and Ray reads without copying; numpy has no bfloat16.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return Stored(ray.put(flat.numpy()), tensor.dtype, tuple(tensor.shape))
