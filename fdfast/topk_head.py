"""`topk_head`: the teacher's K most likely tokens straight from its hidden states, for
`TeacherTopK`.

Legend: ... any leading shape, N tokens, D hidden, V vocabulary, K top-k.
"""

import torch
from torch import Tensor

from fdfast import reference
from fdfast.dispatch import backend_for
from fdfast.policy_head import DEFAULT_WORKSPACE_MB
from fdfast.types import Head, TopK


@torch.no_grad()
def topk_head(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
    backend: str = "auto",
) -> TopK:
    """The k most likely tokens of each position with their log-probabilities over the whole
    vocabulary.

    Args:
        hidden: (..., D) floating; not differentiated.
        weight: (V, D) floating.
        k: 1 to V.
        bias: (V,) floating or None.
        temperature: > 0; the logits are divided by it.
        workspace_mb: MiB of memory beside inputs and outputs.
        backend: auto, cpu, reference.

    Returns:
        TopK: ids and logprobs (..., K), mass (...).

    Raises:
        ValueError: a shape or value is off.
        MachineError: the backend asked for cannot run here.
    """
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"topk_head: weight must have shape (V, D) with D = {hidden.shape[-1:]}; got "
            f"{tuple(weight.shape)}"
        )
    if not 1 <= k <= len(weight):
        raise ValueError(f"topk_head: k must lie in [1, {len(weight)}], the vocabulary; got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"topk_head: temperature must be positive and finite; got {temperature}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"topk_head: bias must have shape ({len(weight)},); got {tuple(bias.shape)}"
        )
    shape = hidden.shape[:-1]
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    module = backend_for("topk_head", hidden, backend)
    with torch.autocast(hidden.device.type, enabled=False):
        if module is None:
            ids, logprobs, mass = reference.topk_head(head, k, temperature=temperature)
        else:
            ids, logprobs, mass = module.topk_head_fwd(
                head, k, temperature=temperature, workspace_bytes=int(workspace_mb * 2**20)
            )
    return TopK(ids.view(*shape, k), logprobs.view(*shape, k), mass.view(shape))
