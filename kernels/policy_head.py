"""policy_head in Triton: the launchers. The kernels are in policy_head_sweep, _merge, _settle,
_grad and _filter.

Forward: one sweep keeps every statistic online; jsd and skew_kl against a teacher's hidden states
sweep twice. Backward, the *recompute* way: for each vocabulary block that fits the workspace a
kernel recomputes the tiles and writes dlogits (in the dtype of 16-bit inputs, else float32), then
PyTorch's GEMMs add to the hidden states' gradient and finish the block of the weight's, both summed
in float32. GEMM units (2 N D V): 2 forward (4 for jsd, skew_kl; 1 without TeacherHidden), 2 or 1 to
recompute, 2 for the gradients (1 for a frozen weight). Where the loss of a token is known from the
token alone and the workspace allows, `policy_head_loss` takes the *token-chunk* way instead: see
policy_head_loss.py.

Forward results depend neither on the tokens beside a token nor on timing. The gradients are
deterministic; their GEMMs are the library's, whose order of sums may change with N.
Legend: M tokens, N trained tokens, D hidden, V vocabulary, K top-k, S splits, R tokens of a chunk,
B columns of a block.
"""

import torch
from torch import Tensor

from fdfast.divergences import TABLE
from fdfast.kernels import launch
from fdfast.kernels.policy_head_backward import policy_head_bwd
from fdfast.kernels.policy_head_forward import HeadStats, finish, settle, sweep, sweep_bytes
from fdfast.kernels.policy_head_loss import can_chunk, policy_head_loss_fwd
from fdfast.kernels.policy_head_merge import MERGED
from fdfast.types import Head, HeadOptions, TeacherTopK

__all__ = ["can_chunk", "policy_head_bwd", "policy_head_fwd", "policy_head_loss_fwd"]


def policy_head_fwd(
    student: Head,
    targets_N: Tensor,
    teacher: Head | TeacherTopK | None,
    options: HeadOptions,
    rows_N: Tensor | None,
) -> tuple[tuple[Tensor, ...], HeadStats]:
    """logprobs, entropy, divergence, teacher_mass (float32), argmax, each (N,); and what backward
    wants.

    Args:
        student: hidden (M, D), weight (V, D), bias (V,).
        targets_N: of the trained tokens.
        teacher: hidden (M, D_T) and its head, or ids and logprobs (N, K) of the trained tokens.
        options: everything that is no tensor.
        rows_N: which of the M tokens are trained; None for all.
    """
    full = teacher if isinstance(teacher, Head) else None
    topk = teacher if isinstance(teacher, TeacherTopK) else None
    launch.check_dtypes("policy_head", *student, *(full or ()))
    N, device = len(targets_N), targets_N.device
    kind = "single" if full is None else "pair"
    kind = launch.tile_kind(kind, softcap=options.logit_softcap is not None)
    tile = launch.tile_for(kind, student, full)
    merged_RN = torch.zeros(MERGED, N, dtype=torch.float64, device=device)
    argmax_N = torch.zeros(N, dtype=torch.int64, device=device)
    center_N = merged_RN.new_zeros(N)
    K = 0 if topk is None else topk.ids.shape[1]
    z_NK = merged_RN.new_zeros(N, K)
    token_bytes = sweep_bytes(len(student.weight_VD), K, tile)
    with launch.on_device(targets_N):
        step = launch.token_chunk(N, token_bytes, options.workspace_bytes, tile.block_n)
        for start in range(0, N, max(step, 1)):
            chunk = slice(start, min(start + step, N))
            heads = (
                launch.chunk_of(student, rows_N, chunk)[0],
                launch.chunk_of(full, rows_N, chunk)[0],
            )
            rows_R = None if rows_N is None else rows_N[chunk]
            ids_RK = None if topk is None else topk.ids[chunk]
            merged_RR, argmax_R, z_RK = sweep(
                heads, targets_N[chunk], ids_RK, options, rows_R, tile
            )
            merged_RN[:, chunk], argmax_N[chunk] = merged_RR, argmax_R
            if z_RK is not None:
                z_NK[chunk] = z_RK
            elif full is not None and TABLE[options.divergence].needs_alpha:
                merged_RN[6, chunk], center_N[chunk] = settle(heads, merged_RR, options, rows_R)
    fields, stats = finish(merged_RN, center_N, z_NK, teacher, options)
    return (*fields, argmax_N), stats
