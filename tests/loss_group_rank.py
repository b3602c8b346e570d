"""The ranks of test_losses_group: each computes every loss and top-k with its slice of the heads.

`python -m tests.loss_group_rank FOLDER` forks three ranks; the first two are the group of two.
Legend: V vocabulary, K top-k.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fdfast import topk_head
from fdfast.losses import FeedbackDistillationLoss, GRPOLoss, LossOutput
from tests.gloo import start_ranks
from tests.helpers import F32, F64, make_case
from tests.loss_batch import Batch, V

# First columns of the ranks and V: uneven, and one rank has a single column.
CUTS = {1: (0, V), 2: (0, 7, V), 3: (0, 1, 21, V)}


def _place(group: Any) -> dict[str, Any]:
    """Where a loss is computed; without a group by the plain formula, which is the truth."""
    return {"backend": "reference"} if group is None else {"group": group}


def _distilled(teacher: str, **options: Any) -> Callable[[Batch, Any], LossOutput]:
    def loss(batch: Batch, group: Any) -> LossOutput:
        output: LossOutput = FeedbackDistillationLoss(**options, **_place(group))(
            batch.hidden,
            batch.weight,
            batch.targets,
            getattr(batch, teacher),
            mask=batch.mask,
            bias=batch.bias,
            num_tokens=17.0,
        )
        return output

    return loss


def _policy(*given: str, **options: Any) -> Callable[[Batch, Any], LossOutput]:
    def loss(batch: Batch, group: Any) -> LossOutput:
        known = {
            "teacher": batch.teacher,
            "topk": batch.topk,
            "old_logprobs": batch.old,
            "ref_logprobs": batch.ref,
            "sampling_logprobs": batch.sampling,
        }
        more = {"teacher" if name == "topk" else name: known[name] for name in given}
        counts = {"num_tokens": 17.0, "num_sequences": 6.0}
        return batch.grpo(GRPOLoss(**options, **_place(group)), **more, **counts)

    return loss


LOSSES: dict[str, Callable[[Batch, Any], LossOutput]] = {
    **{f"fd-{d}": _distilled("teacher", divergence=d) for d in ("forward_kl", "reverse_kl", "jsd")},
    **{f"fd-topk-{tail}": _distilled("topk", tail=tail) for tail in ("truncate", "bucket")},
    "fd-options": _distilled("teacher", temperature=0.7, logit_softcap=3.0, entropy_coef=0.1),
    "dapo": _policy("old_logprobs"),
    "grpo-reference": _policy("ref_logprobs", loss_type="grpo", beta=0.2, entropy_coef=0.1),
    "sapo": _policy("old_logprobs", loss_type="sapo"),
    "gspo": _policy("old_logprobs", loss_type="grpo", importance_sampling_level="sequence"),
    "corrected": _policy("sampling_logprobs", vllm_importance_sampling_mode="sequence_truncate"),
    "mix": _policy("teacher", distillation_weight=0.4),
    "mix-topk": _policy("topk", distillation_weight=0.4, loss_type="bnpo"),
}

# leading shape, D, V, k and options: k of one rank's columns and more; many chunks; forbidden
# tokens; none.
TOPKS: dict[str, dict[str, Any]] = {
    "plain": {"k": 5},
    "one": {"k": 1},
    "every": {"k": V},
    "tempered": {"k": 4, "temperature": 0.6, "logit_softcap": 2.0},
    "chunks": {"shape": (3, 300), "k": 6, "workspace_mb": 0.02},
    "forbidden": {"k": V, "forbidden": 9},
    "empty": {"shape": (2, 0), "k": 3},
    "float32": {"k": 5, "dtype": F32},
}


def top_k(shape=(4, 3), dtype=F64, forbidden: int = 0, *, own: slice, group: Any, **options: Any):
    """topk_head of one of TOPKS with some of the head's rows."""
    case = make_case(81, shape, 6, V, dtype=dtype, spread=2.0)
    bias = case.options["bias"].clone()
    bias[:forbidden] = float("-inf")
    return topk_head(case.hidden, case.weight[own], bias=bias[own], **_place(group), **options)


def scored(name: str, own: slice, group: Any) -> dict[str, Any]:
    """A loss with some of the head's rows: itself, its gradients, its metrics and its head."""
    batch = Batch()
    batch.weight = batch.weight.detach()[own].clone().requires_grad_()
    batch.bias = batch.bias.detach()[own].clone().requires_grad_()
    teacher = batch.teacher
    assert teacher.bias is not None
    batch.teacher = dataclasses.replace(
        teacher, weight=teacher.weight.detach()[own], bias=teacher.bias.detach()[own]
    )
    output = LOSSES[name](batch, group)
    gradients = torch.autograd.grad(output.loss, batch.leaves())
    seen = {f"head.{k}": v for k, v in output.head._asdict().items()} | output.metrics
    return seen | dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=True))


def _errors(group: Any, own: slice) -> dict[str, str]:
    wrong: dict[str, dict[str, Any]] = {"k": {"k": V + 1}, "backend": {"backend": "reference"}}
    case, messages = make_case(81, (4, 3), 6, V), {}
    for name, options in wrong.items():
        try:
            topk_head(case.hidden, case.weight[own], **{"k": 3} | options, group=group)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def _seen(rank: int, world: int, group: Any) -> dict[str, Any]:
    own = slice(CUTS[world][rank], CUTS[world][rank + 1])
    return {
        "losses": {name: scored(name, own, group) for name in LOSSES},
        "topks": {name: tuple(top_k(**k, own=own, group=group)) for name, k in TOPKS.items()},
        "errors": _errors(group, own),
    }


def one_rank(rank: int) -> dict[int, dict[str, Any]]:
    two = dist.new_group([0, 1])
    seen = {2: _seen(rank, 2, two)} if rank < 2 else {}
    return seen | {3: _seen(rank, 3, dist.group.WORLD)}


if __name__ == "__main__":
    start_ranks(one_rank, 3)
