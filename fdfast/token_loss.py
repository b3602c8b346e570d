"""The loss of a chunk of tokens and its gradients by what it is made of: for backends that take a
loss's gradients on the way.

Legend: R tokens of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# (logprobs, entropy, divergence, which of the tokens) -> the loss of each of them
ChunkLoss = Callable[[Tensor, Tensor, Tensor, slice], Tensor]
# Upstream gradients of logprobs, entropy and divergence, each (R,).
Upstream = tuple[Tensor, Tensor, Tensor]


def loss_and_upstream(
    outputs: tuple[Tensor, Tensor, Tensor], rows: slice, token_loss: ChunkLoss, dtype: torch.dtype
) -> tuple[Tensor, Upstream]:
    """The chunk's summed loss and its gradients by logprobs, entropy and divergence.

    Args:
        outputs: those three, each (R,).
        rows: which of the tokens they are.
        token_loss: differentiable.
        dtype: in which it gets them.
    """
    leaves = tuple(x.to(dtype, copy=True).requires_grad_() for x in outputs)
    with torch.enable_grad():
        loss = token_loss(leaves[0], leaves[1], leaves[2], rows).sum()
    if not loss.requires_grad:  # no output reaches it
        return loss, tuple(torch.zeros_like(x) for x in leaves)  # type: ignore[return-value]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), grads  # type: ignore[return-value]
