"""Attention over a pack of sequences that share prefixes: exact, forward and backward.

Each token attends to the tokens of its own path alone. Backends compute it in parts, of which the
backward pass uses the merged output and log-sum-exp: plain autograd through a merge of parts gives
right outputs and wrong dq and dk.
Legend: T tokens, H query heads, K key heads, E head size.
"""

from typing import Any

import torch
from torch import Tensor

from fdfast import dispatch, reference
from fdfast.packing import PrefixTree
from fdfast.types import Forest


def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: PrefixTree,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend from each token to those of its path, itself included; differentiable.

    Args:
        query: (T, H, E), float64 (not triton, flash), float32, float16 or bfloat16, rotated
            already.
        key: (T, K, E); K divides H.
        value: (T, K, E).
        tree: of T tokens, on the same device.
        scale: of the products; None is E ** -0.5.
        sliding_window: a token sees this many positions at most, its own included; None: all.
        backend: auto, cpu, triton, flash or reference.

    Returns:
        (T, H, E) in the query's dtype.

    Raises:
        ValueError: shapes that do not fit, or a window or scale that is not positive.
        TypeError: dtypes that differ or that the backend does not compute in.
        MachineError: the backend cannot run here.
    """
    _check(query, key, value, tree, scale, sliding_window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    forest = Forest(tree.cu_seqlens, tree.parent, tree.kv_end, tree.position_ids)
    if backend == "reference":
        return reference.prefix_attention(query, key, value, forest, scale, sliding_window)
    out, _ = torch.ops.fdfast.prefix_attention(
        query, key, value, *forest, scale, sliding_window, backend
    )
    return out  # type: ignore[no-any-return]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: PrefixTree,
    scale: float | None,
    sliding_window: int | None,
) -> None:
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            "prefix_attention: query must be (T, H, E), key and value (T, K, E) alike; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    T, H, E = query.shape
    if key.shape[0] != T or key.shape[2] != E or not key.shape[1] or H % key.shape[1] or not E:
        raise ValueError(
            "prefix_attention: key must have the query's tokens and head size, and a number of "
            f"heads that divides the query's; got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    if tree.kv_end.shape != (T,):
        raise ValueError(
            f"prefix_attention: tree must have the query's {T} tokens; got {tree.num_tokens}"
        )
    if tree.kv_end.device != query.device:
        raise ValueError(
            f"prefix_attention: tree is on {tree.kv_end.device}, the query on {query.device}; "
            "use tree.to(...)"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise TypeError(
            "prefix_attention: query, key and value must have one floating dtype; got "
            f"{query.dtype}, {key.dtype}, {value.dtype}"
        )
    for name, number in (("scale", scale), ("sliding_window", sliding_window)):
        if number is not None and not number > 0:
            raise ValueError(f"prefix_attention: {name} must be positive; got {number}")


class _Reference:
    """The reference where `auto` finds nothing better: its backward pass computes it anew."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        forest: Forest,
        scale: float,
        sliding_window: int | None,
    ) -> tuple[Tensor, Tensor]:
        out = reference.prefix_attention(query, key, value, forest, scale, sliding_window)
        T, H, _ = query.shape
        return out, query.new_empty((H, T), dtype=reference.statistics_dtype(query))

    @staticmethod
    def backward(
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _out: Tensor,
        _lse: Tensor,
        forest: Forest,
        scale: float,
        sliding_window: int | None,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
            out = reference.prefix_attention(q, k, v, forest, scale, sliding_window)
            return torch.autograd.grad(out, (q, k, v), dout)


# One operator for torch.compile, to which the tree is tensors: another one is no other program.
@torch.library.custom_op("fdfast::prefix_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor,
    kv_end: Tensor,
    position_ids: Tensor,
    scale: float,
    sliding_window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    forest = Forest(cu_seqlens, parent, kv_end, position_ids)
    module = dispatch.backend_for("prefix_attention", query, backend) or _Reference
    out, lse = module.forward(query, key, value, forest, scale, sliding_window)
    return out, lse


@_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, _E = query.shape
    lse = query.new_empty((H, T), dtype=reference.statistics_dtype(query))
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse


@torch.library.custom_op("fdfast::prefix_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    parent: Tensor,
    kv_end: Tensor,
    position_ids: Tensor,
    scale: float,
    sliding_window: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    forest = Forest(cu_seqlens, parent, kv_end, position_ids)
    module = dispatch.backend_for("prefix_attention", query, backend) or _Reference
    dq, dk, dv = module.backward(dout, query, key, value, out, lse, forest, scale, sliding_window)
    return dq, dk, dv


@_backward.register_fake
def _(_dout: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *forest = inputs[:7]
    ctx.save_for_backward(query, key, value, *output, *forest)
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[7:]


def _differentiate(context: Any, dout: Tensor, _dlse: Tensor | None) -> tuple[Any, ...]:
    gradients = torch.ops.fdfast.prefix_attention_backward(
        dout, *context.saved_tensors, *context.settings
    )
    return (*gradients, *[None] * 7)


_forward.register_autograd(_differentiate, setup_context=_save)
