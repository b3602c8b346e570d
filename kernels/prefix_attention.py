"""prefix_attention in Triton: attention over a prefix forest, forward and backward.

The whole mask is one number a token: in depth-first order q sees k exactly when k <= q < kv_end[k].
The prompt's keys are read once a tile of queries, and tiles of keys that no query of a tile sees
are not visited: `tile_lists` finds the others on the device, once for a tree and tile size. The
backward is FlashAttention-2's (Dao 2023, arXiv:2307.08691), in two kernels so that nothing is added
by atomics: dq by tiles of queries, dk and dv by tiles of keys.
Legend: T tokens, H query heads, G key and value heads, D head size, S tiles in a list.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fdfast.kernels import launch, tiles
from fdfast.kernels.prefix_attention_backward import LOG2_E, _dkv_kernel, _dq_kernel
from fdfast.kernels.prefix_attention_forward import _forward_kernel
from fdfast.kernels.prefix_attention_tiles import TABLES, AttentionTile, Key
from fdfast.types import Forest

MIN_BLOCK_D = 16  # tl.dot takes no less
_DOT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class TileLists(NamedTuple):
    """Which tiles each tile meets: those of keys for a tile of queries, or the transpose."""

    first: Tensor  # (tiles + 1,) int32: where each one's list begins
    masked: Tensor  # (tiles,) int32: where, in its list, the tiles begin that need masks
    tiles: Tensor  # (S,) int32
    positions: Tensor | None  # (T,) int32, for a sliding window


class _Kept(NamedTuple):
    """Lists, and what they were made of: they hold until one of these is written to."""

    lists: TileLists
    position_ids: Tensor | None
    versions: tuple[int, int]


_kept: Any = WeakTensorKeyDictionary()  # kv_end -> dict of its lists


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
        q: (T, H, D) float32, float16 or bfloat16, any strides with the last dimension contiguous.
        k: (T, G, D) likewise, G a divisor of H.
        v: likewise.
        forest: of which kv_end is read and, for a sliding window, position_ids.
        scale: of the scores.
        sliding_window: a query sees keys less than this far behind its own position.

    Raises:
        TypeError: float64.
    """
    launch.check_dtypes("prefix_attention", q, k, v)
    T, H, D = q.shape
    q, k, v = map(_rows, (q, k, v))
    out = torch.empty(T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(H, T, dtype=torch.float32, device=q.device)
    if T == 0:
        return out, lse
    with launch.on_device(q):
        tile = tile_for("forward", q, sliding_window)
        lists = tile_lists(forest.kv_end, forest.position_ids, tile, sliding_window)
        _forward_kernel[(triton.cdiv(T, tile.block_q) * H,)](
            **launch.only(
                _forward_kernel,
                arguments(tile, lists, forest.kv_end, scale, sliding_window, q=q, k=k, v=v, out=out)
                | {"lse_ptr": lse},
            )
        )
    return out, lse


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
    """The gradients of q, k and v, each in its tensor's shape and dtype, contiguous.

    Args:
        dout: (T, H, D), of `out`.
        q: as in `forward`; so are k and v.
        k: likewise.
        v: likewise.
        out: of `forward`.
        lse: likewise.
        forest: as in `forward`.
        scale: likewise.
        sliding_window: likewise.

    Raises:
        TypeError: float64.
    """
    launch.check_dtypes("prefix_attention", dout, q, k, v)
    T, H, _ = q.shape
    G = k.shape[1]
    dout, q, k, v, out = map(_rows, (dout, q, k, v, out))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if T == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    rows = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    with launch.on_device(q):
        for kind, kernel in (("dq", _dq_kernel), ("dkv", _dkv_kernel)):
            tile = tile_for(kind, q, sliding_window)
            by_key = kind == "dkv"
            lists = tile_lists(
                forest.kv_end, forest.position_ids, tile, sliding_window, by_key=by_key
            )
            programs = (
                triton.cdiv(T, tile.block_k) * G if by_key else triton.cdiv(T, tile.block_q) * H
            )
            given = arguments(tile, lists, forest.kv_end, scale, sliding_window, **rows)
            kernel[(programs,)](**launch.only(kernel, given | {"lse_ptr": lse, "delta_ptr": delta}))
    return dq, dk, dv


def tile_for(kind: str, q: Tensor, sliding_window: int | None) -> AttentionTile:
    """The row of the tile table for a kernel of these inputs."""
    name = "interpret"
    if not launch.INTERPRETING:
        name = tiles.table_name(torch.cuda.get_device_capability(q.device))
    return TABLES[name][key_of(kind, q.dtype, q.shape[2], sliding_window)]


def key_of(kind: str, dtype: torch.dtype, D: int, sliding_window: int | None) -> Key:
    """Which row that is."""
    masks = sliding_window is not None or block_d(D) != D
    return Key(kind, dtype.itemsize, block_d(D), masks)


def block_d(D: int) -> int:
    """A head size as the kernels compute with it."""
    return max(1 << (D - 1).bit_length(), MIN_BLOCK_D)


# Kernels' names of the tensors' strides.
_STRIDES = {
    "q": "q",
    "k": "k",
    "v": "v",
    "out": "o",
    "dout": "g",
    "dq": "dq",
    "dk": "dk",
    "dv": "dv",
}


def arguments(
    tile: AttentionTile,
    lists: TileLists,
    kv_end: Tensor,
    scale: float,
    sliding_window: int | None,
    **rows: Tensor,
) -> dict[str, Any]:
    """Pointers, strides and constants under the kernels' names, for all three.

    Args:
        tile: of the kernel.
        lists: of the kernel.
        kv_end: (T,) int32.
        scale: of the scores.
        sliding_window: or None.
        rows: (T, heads, D) each, by their names in `backward`.
    """
    T, H, D = rows["q"].shape
    given: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in rows.items()}
    for name, tensor in rows.items():
        short = _STRIDES[name]
        given[f"stride_{short}t"], given[f"stride_{short}h"] = tensor.stride()[:2]
    dtype = rows["q"].dtype
    return {
        **given,
        "end_ptr": kv_end,
        "position_ptr": lists.positions,
        "first_ptr": lists.first,
        "masked_ptr": lists.masked,
        "list_ptr": lists.tiles,
        "T": T,
        "H": H,
        "D": D,
        "scale": float(scale),
        "scale_log2": float(scale) * LOG2_E.value,
        "window": sliding_window or 0,
        "GROUP": H // rows["k"].shape[1],
        "EVEN_D": block_d(D) == D,
        "HAS_WINDOW": sliding_window is not None,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "BLOCK_D": block_d(D),
        # The interpreter computes bfloat16 wrongly, and float32 products of 16-bit numbers are
        # exact.
        "DOT": tl.float32 if launch.INTERPRETING else _DOT.get(dtype, tl.float32),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def tile_lists(
    kv_end: Tensor,
    position_ids: Tensor,
    tile: AttentionTile,
    sliding_window: int | None,
    *,
    by_key: bool = False,
) -> TileLists:
    """The lists of `tile`'s sizes, made once for a tree: layers and heads share them.

    Args:
        kv_end: (T,) int32, T > 0; the lists live as long as it does.
        position_ids: (T,) integers.
        tile: of the kernel.
        sliding_window: or None.
        by_key: tiles of queries for each tile of keys.
    """
    assert kv_end.dtype == torch.int32
    assert kv_end.is_contiguous()
    seen = None if sliding_window is None else position_ids
    versions = (_version(kv_end), 0 if seen is None else _version(seen))
    of_tree: dict[Any, _Kept] = _kept.setdefault(kv_end, {})
    key = (tile.block_q, tile.block_k, sliding_window, by_key)
    kept = of_tree.get(key)
    if kept is None or kept.position_ids is not seen or kept.versions != versions:
        lists = _make_lists(kv_end, seen, tile.block_q, tile.block_k, sliding_window, by_key)
        of_tree[key] = kept = _Kept(lists, seen, versions)
    return kept.lists


def _make_lists(
    kv_end: Tensor,
    position_ids: Tensor | None,
    block_q: int,
    block_k: int,
    sliding_window: int | None,
    by_key: bool,
) -> TileLists:
    """See `tile_lists`; without a window exactly the tiles in which some query sees some key."""
    T = len(kv_end)
    least_q = torch.arange(0, T, block_q, device=kv_end.device)[:, None]
    end_q = (least_q + block_q).clamp(max=T)
    least_k = torch.arange(0, T, block_k, device=kv_end.device)[None, :]
    low_k, high_k = (x[None, :] for x in _bounds(kv_end, block_k))
    met = (least_k < end_q) & (high_k > least_q)
    whole = (least_k + block_k <= least_q + 1) & (low_k >= end_q)
    positions = None
    if position_ids is not None and sliding_window is not None:
        positions = position_ids.to(torch.int32).contiguous()
        near_q, far_q = (x[:, None] for x in _bounds(positions, block_q))
        near_k, far_k = (x[None, :] for x in _bounds(positions, block_k))
        met &= near_q - far_k < sliding_window
        whole &= far_q - near_k < sliding_window
    whole &= met
    if by_key:
        met, whole = met.T, whole.T
    mine, theirs = met.nonzero(as_tuple=True)
    order = (2 * mine + ~whole[mine, theirs]).argsort(stable=True)
    first = torch.zeros(len(met) + 1, dtype=torch.int32, device=kv_end.device)
    first[1:] = met.sum(1).cumsum(0)
    masked = first[:-1] + whole.sum(1, dtype=torch.int32)
    return TileLists(first, masked, theirs[order].to(torch.int32), positions)


def _bounds(x_T: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Least and largest of each block of a vector."""
    filled = torch.cat([x_T, x_T[-1:].expand(-len(x_T) % block)])
    low, high = filled.view(-1, block).aminmax(dim=1)
    return low, high


def _version(tensor: Tensor) -> int:
    """Counts the writes to a tensor; those to one of inference mode are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous: the kernels take no stride of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
