"""topk_head on the CPU: a chunk of tokens against the whole vocabulary in a bounded workspace.

Legend: N tokens, D hidden, V vocabulary, K top-k, R tokens of a chunk.
"""

import torch
from torch import Tensor

from fdfast.cpu.blocks import RowBlocks, call
from fdfast.cpu.gemm import Gemms, fast_gemms
from fdfast.reference import statistics_dtype
from fdfast.types import Head


def topk_head_fwd(
    head: Head, k: int, *, temperature: float, logit_softcap: float | None, workspace_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ids (N, K), log-probabilities (N, K) and their summed probability (N,)."""
    N, V = len(head.hidden_ND), len(head.weight_VD)
    dtype = statistics_dtype(head.hidden_ND, head.weight_VD)
    ids_NK = torch.zeros(N, k, dtype=torch.int64)
    logprobs_NK = torch.zeros(N, k, dtype=torch.float64)
    gemms = Gemms.choose([head], dtype, workspace_bytes)
    blocks = RowBlocks(
        head,
        None,
        None,
        dtype=dtype,
        gemms=gemms,
        workspace_bytes=workspace_bytes - gemms.scratch_bytes,
        operation="topk_head",
    )
    for rows in blocks.chunks():
        with fast_gemms(gemms.onednn):
            logits_RV, _ = blocks.project(rows)
        if logit_softcap is not None:
            logits_RV.div_(logit_softcap).tanh_().mul_(logit_softcap)
        logits_RV /= temperature
        norm_R2 = torch.zeros(len(logits_RV), 2, dtype=torch.float64)
        call("row_norms", dtype, logits_RV, len(logits_RV), V, torch.get_num_threads(), norm_R2)
        top = logits_RV.topk(k, dim=1)
        ids_NK[rows] = top.indices
        logprobs_NK[rows] = (top.values.double() - norm_R2[:, :1]) - norm_R2[:, 1:]
    return ids_NK, logprobs_NK.to(dtype), logprobs_NK.exp().sum(1).to(dtype)
