"""Checks of arguments that every operation on an LM head makes, each failure one line."""

import torch
from torch import Tensor


def check_head(operation: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (..., D), weight (V, D) and bias (V,) are floating and fit together.

    Raises:
        TypeError: one is not floating.
        ValueError: the shapes do not fit, or V or D is 0.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{operation}: {name} must be floating; got {tensor.dtype}")
    D = hidden.shape[-1] if hidden.dim() else 0
    if not D or weight.dim() != 2 or weight.shape[1] != D or not len(weight):
        raise ValueError(
            f"{operation}: weight must have shape (V, D) with D = {D}, the last dimension of "
            f"hidden, D > 0 and V > 0; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{operation}: bias must have shape ({len(weight)},); got {tuple(bias.shape)}"
        )


def check_positive(operation: str, values: dict[str, float | None]) -> None:
    """Each number that is given is positive and finite.

    Raises:
        ValueError: one is not.
    """
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{operation}: {name} must be positive and finite; got {value}")


def check_ids(operation: str, name: str, ids: Tensor, V: int) -> None:
    """Token ids are int64 and, where looking does not stall a GPU, lie in the vocabulary.

    Raises:
        TypeError: they are not int64.
        ValueError: one lies outside.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"{operation}: {name} must be int64; got {ids.dtype}; use .long()")
    if ids.device.type == "cpu" and ids.numel() and (ids.min() < 0 or ids.max() >= V):
        bad = ids[(ids < 0) | (ids >= V)][0].item()
        raise ValueError(
            f"{operation}: {name} must lie in [0, {V}); got {bad}; mask positions without a token"
        )
