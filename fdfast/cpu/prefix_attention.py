"""Prefix attention on the CPU: PyTorch's flash kernels over the parts of the forest, merged.

A part is a node's own causal square, or the rectangle of all that continues a node against its
tokens. With a sliding window that bites, blocks of queries against the keys they see, by GEMMs.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fdfast.reference import statistics_dtype
from fdfast.types import Forest

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_WINDOW_BLOCK = 128  # queries at once with a sliding window


class _Part(NamedTuple):
    queries: slice
    keys: slice
    causal: bool


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the output (T, H, E) in the query's dtype and the log-sum-exp (H, T)."""
    T, H, _ = query.shape
    dtype = statistics_dtype(query)
    out = torch.empty(query.shape, dtype=dtype)
    lse = torch.empty((T, H), dtype=dtype)
    window = _biting(sliding_window, forest)
    if window:
        _windowed_forward(query, key, value, forest, scale, window, out, lse)
        return out.to(query.dtype), lse.T.contiguous()
    q, k, v = map(_heads_first, (query, key, value))
    for queries, keys, causal in _parts(forest):
        part, part_lse = _FLASH(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
        )
        part, part_lse = part[0].transpose(0, 1), part_lse[0].T
        if causal:  # the first of its queries
            out[queries], lse[queries] = part, part_lse
        else:
            share = torch.sigmoid(part_lse - lse[queries]).unsqueeze(-1)
            out[queries] += share * (part.to(dtype) - out[queries])
            lse[queries] = torch.logaddexp(lse[queries], part_lse)
    return out.to(query.dtype), lse.T.contiguous()


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value: of each part with the merged output."""
    dtype = statistics_dtype(query)
    sums = tuple(torch.zeros(x.shape, dtype=dtype) for x in (query, key, value))
    window = _biting(sliding_window, forest)
    if window:
        _windowed_backward(dout, query, key, value, out, lse, forest, scale, window, sums)
    else:
        q, k, v, o, d = map(_heads_first, (query, key, value, out, dout))
        lse = lse.unsqueeze(0)
        for queries, keys, causal in _parts(forest):
            parts = _FLASH_BACKWARD(
                *(d[:, :, queries], q[:, :, queries], k[:, :, keys], v[:, :, keys]),
                *(o[:, :, queries], lse[:, :, queries], 0.0, causal),
                scale=scale,
            )
            for total, rows, part in zip(sums, (queries, keys, keys), parts, strict=True):
                total[rows] += part[0].transpose(0, 1)
    dq, dk, dv = (total.to(query.dtype) for total in sums)
    return dq, dk, dv


def _biting(sliding_window: int | None, forest: Forest) -> int:
    """A sliding window that hides something; 0 for none."""
    window = sliding_window or 0
    positions = forest.position_ids
    return window if 0 < window < len(positions) and window <= int(positions.max()) else 0


def _heads_first(tensor: Tensor) -> Tensor:
    """(T, H, E) as (1, H, T, E)."""
    return tensor.transpose(0, 1).unsqueeze(0)


def _parts(forest: Forest) -> Iterator[_Part]:
    """Every node's own square first, then the rectangles below each node."""
    bounds = forest.cu_seqlens.tolist()
    nodes = [slice(a, b) for a, b in itertools.pairwise(bounds) if a < b]
    for node in nodes:
        yield _Part(node, node, True)
    ends = forest.kv_end.tolist()
    for node in nodes:
        if ends[node.start] > node.stop:
            yield _Part(slice(node.stop, ends[node.start]), node, False)


class _Block(NamedTuple):
    """Some queries of one node, and the keys that one of them sees."""

    queries: slice
    keys: Tensor
    hidden: Tensor


def _blocks(forest: Forest, window: int) -> Iterator[_Block]:
    bounds, positions = forest.cu_seqlens.tolist(), forest.position_ids
    for start, stop in itertools.pairwise(bounds):
        for first in range(start, stop, _WINDOW_BLOCK):
            last = min(first + _WINDOW_BLOCK, stop)
            rows = torch.arange(first, last)
            near = (forest.kv_end[:last] > first) & (positions[:last] > positions[first] - window)
            keys = near.nonzero().squeeze(1)
            far = positions[rows].unsqueeze(1) - positions[keys] >= window
            yield _Block(slice(first, last), keys, far | (keys > rows.unsqueeze(1)))


def _windowed_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    window: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    for queries, keys, hidden in _blocks(forest, window):
        q, k, v = (_grouped(x, key.shape[1]) for x in (query[queries], key[keys], value[keys]))
        logits = _products(q, k, hidden, scale)
        block_lse = logits.logsumexp(-1)  # (K, G, queries)
        block = (logits - block_lse.unsqueeze(-1)).exp_() @ v
        out[queries] = block.flatten(0, 1).transpose(0, 1)
        lse[queries] = block_lse.flatten(0, 1).T


def _windowed_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    scale: float,
    window: int,
    sums: tuple[Tensor, ...],
) -> None:
    K = key.shape[1]
    dq, dk, dv = sums
    for queries, keys, hidden in _blocks(forest, window):
        rows = (query[queries], dout[queries], out[queries])
        q, d, o = (_grouped(x, K) for x in rows)
        k, v = (_grouped(x, K) for x in (key[keys], value[keys]))
        probs = _products(q, k, hidden, scale)
        probs = probs.sub_(lse[:, queries].reshape(K, -1, len(d[0, 0]), 1)).exp_()
        dprobs = (d @ v.mT).sub_((d * o).sum(-1, keepdim=True)).mul_(probs).mul_(scale)
        dq[queries] = (dprobs @ k).flatten(0, 1).transpose(0, 1)
        dk.index_add_(0, keys, (dprobs.mT @ q).sum(1).transpose(0, 1))
        dv.index_add_(0, keys, (probs.mT @ d).sum(1).transpose(0, 1))


def _grouped(tensor: Tensor, K: int) -> Tensor:
    """(rows, heads, E) as (K, heads / K, rows, E), in the dtype of statistics."""
    wide = tensor.to(statistics_dtype(tensor))
    rows, heads, E = wide.shape
    return wide.transpose(0, 1).reshape(K, heads // K, rows, E)


def _products(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    products: Tensor = q @ k.mT
    return products.mul_(scale).masked_fill_(hidden, -torch.inf)
