"""The functions of flash-attn that fdfast.flash calls, with the library's signatures, in plain
PyTorch on the CPU.

Legend: Q queries, K keys, H query heads, G key and value heads, D head size.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INFINITE = float("inf")


class Calls(list[dict[str, Any]]):
    """What each call of a stand-in was given besides tensors."""


def _sequences(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[slice, slice]]:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q[0] == cu_k[0] == 0
    assert len(cu_q) == len(cu_k)
    assert int(cu_q.diff().max()) == max_q
    assert int(cu_k.diff().max()) == max_k
    bounds = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in bounds]


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, left: int, right: int
) -> tuple[Tensor, int]:
    """(H, Q, K) float32, -inf where a query does not see a key: aligned to the bottom right."""
    group = q.shape[1] // k.shape[1]
    z = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * scale
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    if causal or right >= 0:
        z = z.masked_fill(ahead > max(right, 0), -INFINITE)
    if left >= 0:
        z = z.masked_fill(ahead < -left, -INFINITE)
    return z, group


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    empty: float,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, `empty` in rows without keys."""
    out = torch.full_like(q, float("nan"))
    lse = torch.full((q.shape[1], len(q)), float("nan"))
    for rows, keys in _sequences(cu_q, cu_k, max_q, max_k):
        z, group = _scores(q[rows], k[keys], scale, causal, left, right)
        row_lse = z.logsumexp(-1)
        p = z.softmax(-1).nan_to_num(0.0)
        out[rows] = torch.einsum("hqk,khd->qhd", p, v[keys].float().repeat_interleave(group, 1)).to(
            q.dtype
        )
        lse[:, rows] = row_lse.masked_fill(row_lse == -INFINITE, empty)
    return out, lse


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as the kernels make them: probabilities from the log-sum-exp that is given."""
    assert lse.is_contiguous()
    delta = (dout.float() * out.float()).sum(-1).T
    results = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    dq, dk, dv = results
    for rows, keys in _sequences(cu_q, cu_k, max_q, max_k):
        z, group = _scores(q[rows], k[keys], scale, causal, left, right)
        p = (z - lse[:, rows, None]).exp()
        heads = [x[keys].float().repeat_interleave(group, 1) for x in (k, v)]
        dp = torch.einsum("qhd,khd->hqk", dout[rows].float(), heads[1])
        dz = p * (dp - delta[:, rows, None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", dz, heads[0])
        for total, weights, x in ((dk, dz, q), (dv, p, dout)):
            per_head = torch.einsum("hqk,qhd->khd", weights, x[rows].float())
            total[keys] = per_head.unflatten(1, (-1, group)).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _copied(targets: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> None:
    for target, source in zip(targets, sources, strict=True):
        assert target.is_contiguous()
        target.copy_(source)


def _module(**functions: Callable[..., Any]) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    module.calls = Calls()  # type: ignore[attr-defined]
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def flash_2() -> types.ModuleType:
    """flash_attn.flash_attn_interface of flash-attn 2.8: +inf in rows without keys."""

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        module.calls.append({"causal": causal, "left": window_size_left})
        assert dropout_p == softcap == 0.0
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, window_size_right)
        out, lse = attend(q, k, v, *packing, softmax_scale, causal, *window, INFINITE)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        module.calls.append({"deterministic": deterministic})
        assert dropout_p == softcap == 0.0
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        given = (dout, q, k, v, out, softmax_lse, *packing, softmax_scale, causal)
        _copied((dq, dk, dv), gradients(*given, window_size_left, window_size_right))
        return torch.empty(0)

    module = _module(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=_flash_attn_varlen_backward,
    )
    return module


def flash_3_first() -> types.ModuleType:
    """hopper/flash_attn_interface.py at c082294e: no defaults, one window argument."""

    def _flash_attn_forward(
        q,
        k,
        v,
        k_new,
        v_new,
        qv,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        page_table,
        kv_batch_idx,
        leftpad_k,
        rotary_cos,
        rotary_sin,
        seqlens_rotary,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=1,
        pack_gqa=None,
        sm_margin=0,
    ):
        assert k_new is out is page_table is q_descale is None
        module.calls.append({"causal": causal, "left": window_size[0]})
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *attend(q, k, v, *packing, softmax_scale, causal, *window_size, -INFINITE), None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        dq,
        dk,
        dv,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        assert sequed_q is sequed_k is None
        module.calls.append({"deterministic": deterministic})
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        given = (dout, q, k, v, out, softmax_lse, *packing, softmax_scale, causal)
        _copied((dq, dk, dv), gradients(*given, *window_size))
        return dq, dk, dv, torch.empty(0)

    module = _module(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
    )
    return module


def flash_3() -> types.ModuleType:
    """hopper/flash_attn_interface.py at 01afd16d: operators of torch.library, two window
    arguments, is_causal in the backward.
    """

    def _flash_attn_forward(
        q,
        k,
        v,
        k_new=None,
        v_new=None,
        qv=None,
        out_=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        cu_seqlens_k_new=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        sm_margin=0,
    ):
        module.calls.append({"causal": causal, "left": window_size_left})
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = (window_size_left, window_size_right)
        out, lse = attend(q, k, v, *packing, softmax_scale, causal, *window, -INFINITE)
        return out, lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        module.calls.append({"deterministic": deterministic})
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        given = (dout, q, k, v, out, softmax_lse, *packing, softmax_scale, is_causal)
        _copied((dq, dk, dv), gradients(*given, window_size_left, window_size_right))
        return torch.empty(0)

    class Operator:
        """Like torch.library.custom_op's: its own signature says nothing."""

        def __init__(self, function):
            self._init_fn = function

        def __call__(self, *args, **kwargs):
            return self._init_fn(*args, **kwargs)

    module = _module(
        _flash_attn_forward=Operator(_flash_attn_forward),
        _flash_attn_backward=Operator(_flash_attn_backward),
    )
    return module


def flash_4() -> types.ModuleType:
    """flash_attn.cute.interface of flash-attn-4 4.0.0b36, as much as is asked for."""

    def _flash_attn_fwd(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        softcap=None,
        window_size_left=None,
        window_size_right=None,
        return_lse=False,
        out=None,
        lse=None,
    ):
        assert return_lse
        module.calls.append({"causal": causal, "left": window_size_left})
        left = -1 if window_size_left is None else window_size_left
        right = -1 if window_size_right is None else window_size_right
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        given = (q, k, v, *packing, softmax_scale, causal, left, right, -INFINITE)
        return *attend(*given), None, None, None

    def _flash_attn_bwd(
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        softcap=0.0,
        window_size_left=None,
        window_size_right=None,
        m_block_size=64,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
    ):
        module.calls.append({"deterministic": deterministic})
        left = -1 if window_size_left is None else window_size_left
        right = -1 if window_size_right is None else window_size_right
        packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return gradients(dout, q, k, v, out, lse, *packing, softmax_scale, causal, left, right)

    module = _module(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return module
