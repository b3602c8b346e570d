"""`policy_head_loss`: the sum of a loss of each token, its gradients taken on the way.

Where the loss of a token follows from the token alone (distillation, most of the GRPO family), the
logits of a chunk of tokens can become its gradients at once: nothing is projected twice.
`policy_head` projects again in its backward pass, since any loss may follow it. On the CPU that is
4 GEMMs instead of 6 with a TeacherHidden, 3 instead of 4 without.
Legend: M tokens, n tokens of a chunk, N trained tokens, D hidden, V vocabulary, K top-k.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fdfast.policy_head import Prepared, policy_head, prepare
from fdfast.types import DEFAULT_WORKSPACE_MB, PolicyHead, TeacherHidden, TeacherTopK

# (logprobs, entropy, divergence, positions) -> the loss of each token, all (n,)
TokenLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class _PolicyHeadLossFunction(torch.autograd.Function):
    """The loss with its gradients ready: the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        prepared: Prepared,
        token_loss: TokenLoss,
    ) -> tuple[Tensor, ...]:
        positions_N = prepared.rows_N
        if positions_N is None:
            positions_N = torch.arange(len(hidden_MD), device=hidden_MD.device)

        def chunk_loss(
            logprobs: Tensor, entropy: Tensor, divergence: Tensor, rows: slice
        ) -> Tensor:
            return token_loss(logprobs, entropy, divergence, positions_N[rows])

        loss, fields, gradients, dropped_N = prepared.module.policy_head_loss_fwd(
            prepared.student,
            prepared.targets_N,
            prepared.teacher,
            prepared.options,
            prepared.rows_N,
            chunk_loss,
            ctx.needs_input_grad[:3],
        )
        prepared.report_dropped(dropped_N)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*fields)
        return (loss, *fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if g_loss.item() != 1.0:
            gradients = tuple(None if g is None else g * g_loss.to(g.dtype) for g in gradients)
        return (*gradients, None, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def policy_head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_loss: TokenLoss,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    mask: Tensor | None = None,
    teacher: TeacherHidden | TeacherTopK | None = None,
    divergence: str = "forward_kl",
    alpha: float = 0.5,
    tail: str = "truncate",
    grad_filter: float | None = None,
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
    backend: str = "auto",
    group: Any = None,
) -> tuple[Tensor, PolicyHead]:
    """The sum over trained tokens of `token_loss`, differentiable in hidden, weight and bias.

    Its gradients are computed here, in the forward pass, and scaled in the backward pass. Where a
    backend can't (a trained weight narrower than float32 wants a float32 copy of itself for the sum
    of its gradient, and `workspace_mb` does not hold it with some tokens' logits beside it; the
    reference; a group; no gradient wanted), it is `policy_head` with the loss after it: the same
    value and gradients, at that op's cost. For a bfloat16 weight of 49,152 x 576 that copy is 108
    MiB, half of which lies in the gradient itself where the CPU multiplies bfloat16: the default
    workspace holds it, 64 MiB don't and take a third more time.

    Args:
        hidden: (..., D) floating; differentiable.
        weight: (V, D) floating; differentiable.
        targets: (...) int64.
        token_loss: given logprobs, entropy and divergence, each (n,) float32 or float64, and
            positions (n,) int64 into targets.flatten(), returns (n,): each token's loss with its
            weight, from nothing but that token. It is differentiated by autograd and may be called
            for any number of tokens at a time.
        bias: as `policy_head`, like all that follow.
        temperature: likewise.
        logit_softcap: likewise.
        mask: likewise.
        teacher: likewise.
        divergence: likewise.
        alpha: likewise.
        tail: likewise.
        grad_filter: likewise.
        workspace_mb: likewise.
        backend: likewise.
        group: likewise.

    Returns:
        The loss, a scalar, and PolicyHead without gradient.

    Raises:
        ValueError: as `policy_head`.
        TypeError: as `policy_head`.
        MachineError: as `policy_head`.
    """
    options = {
        "bias": bias,
        "temperature": temperature,
        "logit_softcap": logit_softcap,
        "mask": mask,
        "teacher": teacher,
        "divergence": divergence,
        "alpha": alpha,
        "tail": tail,
        "grad_filter": grad_filter,
        "workspace_mb": workspace_mb,
        "backend": backend,
        "group": group,
    }
    prepared = prepare("policy_head_loss", hidden, weight, targets, **options)
    if not _can_chunk(prepared):
        head: PolicyHead = policy_head(hidden, weight, targets, **options)
        return _loss_after(head, prepared, token_loss), PolicyHead(*(x.detach() for x in head))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *fields = _PolicyHeadLossFunction.apply(  # type: ignore[no-untyped-call]
            *prepared.student, prepared, token_loss
        )
    return loss, prepared.spread(tuple(fields))


def _can_chunk(prepared: Prepared) -> bool:
    hidden, weight, bias = prepared.student
    needs = tuple(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if prepared.options.vocabulary_slice is not None:
        return False
    if prepared.module is None or not any(needs) or not torch.is_grad_enabled():
        return False
    given = (prepared.student, prepared.teacher, needs, prepared.options)
    return bool(prepared.module.can_chunk(*given))


def _loss_after(head: PolicyHead, prepared: Prepared, token_loss: TokenLoss) -> Tensor:
    positions_N = prepared.rows_N
    if positions_N is None:
        positions_N = torch.arange(len(prepared.dropped_M), device=head.logprobs.device)
    logprobs_N, entropy_N, divergence_N = (
        x.flatten()[positions_N] for x in (head.logprobs, head.entropy, head.divergence)
    )
    return token_loss(logprobs_N, entropy_N, divergence_N, positions_N).sum()
