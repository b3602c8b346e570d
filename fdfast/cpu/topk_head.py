"""topk_head on the CPU: a chunk of tokens against the whole vocabulary in a bounded workspace.

With a group each rank finds the k best of its columns, and the k best of those are merged from one
all-gather of 2 + 2k float64 numbers a token.
Legend: N tokens, D hidden, V vocabulary (of a rank), K top-k, R tokens of a chunk, W ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fdfast.cpu.blocks import RowBlocks, call
from fdfast.cpu.gemm import Gemms, fast_gemms
from fdfast.cpu.policy_head_group import merged_norm
from fdfast.policy_head_group import VocabularySlice
from fdfast.reference import statistics_dtype
from fdfast.types import Head


def topk_head_fwd(
    head: Head, k: int, *, temperature: float, logit_softcap: float | None, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, K), log-probabilities (N, K) and their summed probability (N,)."""
    ids_NK, z_NK, norm_N2 = _best(head, k, temperature, logit_softcap, workspace_bytes, int)
    return _results(head, ids_NK, z_NK, norm_N2)


def topk_head_sliced_fwd(
    head: Head,
    k: int,
    ranks: VocabularySlice,
    *,
    temperature: float,
    logit_softcap: float | None,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over the vocabulary of all ranks, with global ids; a collective. Of equal logits
    that are the k-th together, the lower rank's goes first.
    """
    own = min(k, len(head.weight_VD))
    ids_NK, z_NK, norm_N2 = _best(
        head, own, temperature, logit_softcap, workspace_bytes, ranks.least
    )
    if not len(ids_NK):
        return _results(head, ids_NK.new_zeros(0, k), z_NK.new_zeros(0, k), norm_N2)
    facts_FN = torch.zeros(2 + 2 * k, len(ids_NK), dtype=torch.float64)
    facts_FN[:2] = norm_N2.T
    facts_FN[2 : 2 + own] = z_NK.T
    facts_FN[2 + k : 2 + k + own] = ids_NK.T + float(ranks.first)
    facts_WFN = ranks.gather(facts_FN)
    # What a rank with fewer columns than k has no token for is left out.
    has_Wk = torch.arange(k) < ranks.gather(torch.tensor([own]))
    z_NC, ids_NC = (facts_WFN[:, start : start + k][has_Wk].T for start in (2, 2 + k))
    merged = z_NC.sort(stable=True, dim=1, descending=True)
    order_NK = merged.indices[:, :k]
    all_norm_N2, _ = merged_norm(facts_WFN[:, :2])
    return _results(head, ids_NC.gather(1, order_NK).long(), merged.values[:, :k], all_norm_N2)


def _best(
    head: Head,
    k: int,
    temperature: float,
    logit_softcap: float | None,
    workspace_bytes: int,
    agree: Callable[[int], int],
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and tempered logits (N, K) of the k best columns, and the log-sum-exp of all as (max,
    log_sum), (N, 2); float64.
    """
    N, V = len(head.hidden_ND), len(head.weight_VD)
    dtype = statistics_dtype(head.hidden_ND, head.weight_VD)
    ids_NK = torch.zeros(N, k, dtype=torch.int64)
    z_NK = torch.zeros(N, k, dtype=torch.float64)
    norm_N2 = torch.zeros(N, 2, dtype=torch.float64)
    gemms = Gemms.choose([head], dtype, workspace_bytes)
    blocks = RowBlocks(
        head,
        None,
        None,
        dtype=dtype,
        gemms=gemms,
        workspace_bytes=workspace_bytes - gemms.scratch_bytes,
        operation="topk_head",
        agree=agree,
    )
    for rows in blocks.chunks():
        with fast_gemms(gemms.onednn):
            logits_RV, _ = blocks.project(rows)
        if logit_softcap is not None:
            logits_RV.div_(logit_softcap).tanh_().mul_(logit_softcap)
        logits_RV /= temperature
        R = len(logits_RV)
        call("row_norms", dtype, logits_RV, R, V, torch.get_num_threads(), norm_N2[rows])
        top = logits_RV.topk(k, dim=1)
        ids_NK[rows], z_NK[rows] = top.indices, top.values.double()
    return ids_NK, z_NK, norm_N2


def _results(
    head: Head, ids_NK: Tensor, z_NK: Tensor, norm_N2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(head.hidden_ND, head.weight_VD)
    logprobs_NK = (z_NK - norm_N2[:, :1]) - norm_N2[:, 1:]
    return ids_NK, logprobs_NK.to(dtype), logprobs_NK.exp().sum(1).to(dtype)
