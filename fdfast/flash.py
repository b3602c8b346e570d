"""Attention over a prefix forest by flash-attn's kernels for packed sequences, in a cascade.

Every node's own causal part is one call. Then, depth by depth, the tokens below each node attend to
its keys without a mask, one call a depth, and the parts are merged by their log-sum-exps. The
backward of every part is given the merged output and log-sum-exp: autograd through such a merge
gives the right output and wrong gradients, since flash-attn drops the gradient of the log-sum-exp.
A sliding window that hides something goes another way, one causal call whose keys are, for each
node, those of its ancestors within the window and its own.

Works with FlashAttention-2 (Dao 2023, arXiv:2307.08691), -3 (Shah et al. 2024, arXiv:2407.08608)
and -4: see flash_libraries.py. **It has not run on a GPU**: it was tested against modules with the
libraries' signatures in plain PyTorch.
Legend: T tokens, N nodes, H query heads, G key and value heads, D head size, Q and K rows of a
part.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fdfast.errors import MachineError
from fdfast.flash_libraries import Library, Part, capability_of, library
from fdfast.types import Forest


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forest: Forest,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: (T, H, D) in q's dtype and (H, T) float32, natural logarithm.

    Args:
        q: (T, H, D) float16 or bfloat16, on a CUDA GPU.
        k: (T, G, D) likewise, G a divisor of H.
        v: likewise.
        forest: of which cu_seqlens, that may repeat, and parent are read.
        scale: of the scores.
        sliding_window: a query sees keys less than this far behind its own position.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: no flash-attn that works here.
    """
    library = _library_for(q)
    if len(q) == 0:
        return torch.empty_like(q), q.new_empty(q.shape[1], 0, dtype=torch.float32)
    parts, left = plan(forest.cu_seqlens, forest.parent, sliding_window)
    first, *rest = parts
    out, lse = library.forward(q, k[first.key_rows], v[first.key_rows], first, scale, left)
    lse = without_keys(lse)
    if not rest:
        return out, lse
    # Rounded to 16 bits once, at the end.
    merged = out.float()
    for part in rest:
        rows, keys = part.query_rows, part.key_rows
        part_out, part_lse = library.forward(q[rows], k[keys], v[keys], part, scale, None)
        merged[rows], lse[:, rows] = merge(merged[rows], lse[:, rows], part_out, part_lse)
    return merged.to(q.dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    forest: Forest,
    scale: float,
    sliding_window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in its tensor's shape and dtype.

    The sums over parts are float32 and in one order; each part is as repeatable as the library's
    backward, which is asked to be deterministic where torch is.

    Args:
        dout: (T, H, D), of `out`.
        q: as in `forward`.
        k: likewise.
        v: likewise.
        out: of `forward`.
        lse: likewise.
        forest: as in `forward`.
        scale: likewise.
        sliding_window: likewise.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: no flash-attn that works here.
    """
    library = _library_for(q)
    if len(q) == 0:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    parts, left = plan(forest.cu_seqlens, forest.parent, sliding_window)
    sums = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)]
    for part in parts:
        rows, keys = part.query_rows, part.key_rows
        row_lse = lse[:, rows].contiguous()
        gradients = library.backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], row_lse, part, scale, left
        )
        sums[0][rows] += gradients[0]
        for total, gradient in zip(sums[1:], gradients[1:], strict=True):
            if part.repeats and isinstance(keys, Tensor):
                # By sorting, not by atomics: the order of the sum is always the same.
                total.index_put_((keys,), gradient.float(), accumulate=True)
            else:
                total[keys] += gradient
    dq, dk, dv = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
    return dq, dk, dv


def without_keys(lse: Tensor) -> Tensor:
    """A log-sum-exp that is -inf in rows without keys, where FlashAttention-2 writes +inf."""
    return torch.where(lse == float("inf"), float("-inf"), lse)


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the same queries' attention as one, in float32.

    Args:
        out: (Q, H, D) float32.
        lse: (H, Q) float32, finite: every row has a key here.
        part_out: (Q, H, D).
        part_lse: (H, Q) float32; infinite, of either sign, in rows without keys.
    """
    part_lse = without_keys(part_lse)
    both = torch.logaddexp(lse, part_lse)
    share, part_share = ((x - both).exp().T[..., None] for x in (lse, part_lse))
    # A row without keys may hold anything.
    part_out = torch.where(part_share == 0.0, 0.0, part_out.float())
    return out * share + part_out * part_share, both


def _library_for(q: Tensor) -> Library:
    """The fastest flash-attn for the tensor's GPU.

    Raises:
        TypeError: neither float16 nor bfloat16.
        MachineError: none works here.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"prefix_attention: backend='flash' computes in float16 or bfloat16; got {q.dtype}; "
            "take backend='triton'"
        )
    if q.shape[2] % 8 or q.shape[2] > 256:
        raise MachineError(
            "prefix_attention: flash-attn takes head sizes that are multiples of 8 up to 256; got "
            f"{q.shape[2]}; take backend='triton'"
        )
    return library(capability_of(q.device))


class _Kept(NamedTuple):
    """A plan, and what it was made of: it holds until one of these is written to."""

    parts: list[Part]
    left: int | None
    parent: Tensor
    versions: tuple[int, int]


_kept: Any = WeakTensorKeyDictionary()  # cu_seqlens -> dict of its plans


def plan(
    cu_seqlens: Tensor, parent: Tensor, sliding_window: int | None
) -> tuple[list[Part], int | None]:
    """The calls that a forest takes, and how many keys a query sees before its own (None: all).

    Made once for a forest, since it is made on the host: layers share it.

    Args:
        cu_seqlens: (N + 1,) int32.
        parent: (N,) int32.
        sliding_window: or None.
    """
    versions = tuple(0 if x.is_inference() else x._version for x in (cu_seqlens, parent))
    of_forest: dict[int | None, _Kept] = _kept.setdefault(cu_seqlens, {})
    kept = of_forest.get(sliding_window)
    if kept is None or kept.parent is not parent or kept.versions != versions:
        bounds = list(itertools.pairwise(cu_seqlens.tolist()))
        parts, left = _make_plan(bounds, parent.tolist(), sliding_window, cu_seqlens.device)
        kept = _Kept(parts, left, parent, versions)  # type: ignore[arg-type]
        of_forest[sliding_window] = kept
    return kept.parts, kept.left


Range = tuple[int, int]  # of rows: first, and one past the last


def _make_plan(
    nodes: list[Range], parents: list[int], sliding_window: int | None, device: torch.device
) -> tuple[list[Part], int | None]:
    """See `plan`."""
    # Ancestors with tokens, the root first; and the end of the subtree.
    paths: list[list[Range]] = []
    ends = [end for _, end in nodes]
    for index, above in enumerate(parents):
        node = nodes[above]
        has_tokens = above >= 0 and node[1] > node[0]
        paths.append([*(paths[above] if above >= 0 else []), *([node] if has_tokens else [])])
        assert above < index
    for index in reversed(range(len(nodes))):
        if parents[index] >= 0:
            ends[parents[index]] = max(ends[parents[index]], ends[index])
    own = [(node, path) for node, path in zip(nodes, paths, strict=True) if node[1] > node[0]]
    longest = max(sum(e - s for s, e in [*path, node]) for node, path in own)
    if sliding_window is not None and sliding_window < longest:
        keys = [_last(path, sliding_window - 1) for _, path in own]
        below = [[*above, node] for (node, _), above in zip(own, keys, strict=True)]
        part = _part([[node] for node, _ in own], below, device, causal=True, repeats=True)
        return [part], sliding_window - 1
    alone = [[node] for node, _ in own]
    parts = [_part(alone, alone, device, causal=True)]
    levels: dict[int, list[tuple[Range, Range]]] = {}
    for node, path, end in zip(nodes, paths, ends, strict=True):
        if node[1] > node[0] and end > node[1]:
            levels.setdefault(len(path), []).append(((node[1], end), node))
    for _, level in sorted(levels.items()):
        queries, keys = [[q] for q, _ in level], [[k] for _, k in level]
        parts.append(_part(queries, keys, device, causal=False))
    return parts, None


def _last(path: list[Range], count: int) -> list[Range]:
    """The last `count` rows of a path."""
    taken: list[Range] = []
    for start, end in reversed(path):
        if count <= 0:
            break
        taken.insert(0, (max(start, end - count), end))
        count -= end - start
    return taken


def _part(
    queries: list[list[Range]],
    keys: list[list[Range]],
    device: torch.device,
    *,
    causal: bool,
    repeats: bool = False,
) -> Part:
    """The call of these sequences, each some ranges of rows."""
    query_rows, cu_seqlens_q, max_q = _packed(queries, device)
    key_rows, cu_seqlens_k, max_k = _packed(keys, device)
    return Part(query_rows, key_rows, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, repeats)


def _packed(sequences: list[list[Range]], device: torch.device) -> tuple[Any, Tensor, int]:
    """Rows, where the sequences begin among them, and the longest."""
    ranges = [r for sequence in sequences for r in sequence]
    lengths = [sum(e - s for s, e in sequence) for sequence in sequences]
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(lengths)
    if all(a[1] == b[0] for a, b in itertools.pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1]), cu_seqlens, longest  # a view, not a copy
    rows = torch.cat([torch.arange(*r) for r in ranges])
    return rows.to(device), cu_seqlens, longest
