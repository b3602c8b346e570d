"""`topk_head`: the teacher's K most likely tokens straight from its hidden states, for
`TeacherTopK`.

Legend: ... any leading shape, N tokens, D hidden, V vocabulary, K top-k.
"""

from typing import Any

import torch
from torch import Tensor

from fdfast import reference
from fdfast.checks import check_head, check_positive
from fdfast.dispatch import backend_for
from fdfast.policy_head_group import VocabularySlice, check_group
from fdfast.types import DEFAULT_WORKSPACE_MB, Head, TopK


@torch.no_grad()
def topk_head(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    workspace_mb: float = DEFAULT_WORKSPACE_MB,
    backend: str = "auto",
    group: Any = None,
) -> TopK:
    """The k most likely tokens of each position with their log-probabilities over the whole
    vocabulary.

    Args:
        hidden: (..., D) floating; not differentiated.
        weight: (V, D) floating.
        k: 1 to V.
        bias: (V,) floating or None.
        temperature: > 0; the logits are divided by it.
        logit_softcap: c > 0 for c * tanh(logits / c), before the temperature; None for none.
        workspace_mb: MiB of memory beside inputs and outputs.
        backend: auto, cpu, triton, reference.
        group: the ranks over which the vocabulary is cut, as in `policy_head`: weight and bias are
            this rank's, hidden is the same on every rank, and so is the result; k may be more than
            a rank's rows.

    Returns:
        TopK: ids and logprobs (..., K), mass (...).

    Raises:
        ValueError: a shape or value is off.
        TypeError: a dtype is off.
        MachineError: the backend asked for cannot run here.
    """
    check_head("topk_head", hidden, weight, bias)
    check_positive(
        "topk_head",
        {
            "temperature": temperature,
            "logit_softcap": logit_softcap,
            "workspace_mb": workspace_mb,
        },
    )
    shape = hidden.shape[:-1]
    head = Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    dtype = reference.statistics_dtype(hidden, weight)
    module = backend_for("topk_head", hidden, backend, dtype)
    ranks, V, N = None, len(weight), len(head.hidden_ND)
    if group is not None:
        check_group("topk_head", hidden, backend)
        ranks = VocabularySlice.find("topk_head", group, V, N, N)
        V = ranks.vocabulary
    if not 1 <= k <= V:
        raise ValueError(f"topk_head: k must lie in [1, {V}], the vocabulary; got {k}")
    options: dict[str, Any] = {"temperature": temperature, "logit_softcap": logit_softcap}
    with torch.autocast(hidden.device.type, enabled=False):
        if module is None:
            ids, logprobs, mass = reference.topk_head(head, k, **options)
        else:
            options["workspace_bytes"] = int(workspace_mb * 2**20)
            if ranks is None:
                ids, logprobs, mass = module.topk_head_fwd(head, k, **options)
            else:
                ids, logprobs, mass = module.topk_head_sliced_fwd(head, k, ranks, **options)
    return TopK(ids.view(*shape, k), logprobs.view(*shape, k), mass.view(shape))
