"""The ranks of test_policy_head_group: each runs every case on its slice, saves what came out.

`python -m tests.group_rank FOLDER` imports torch once and forks four ranks; the first two are the
group of two.
Legend: V vocabulary, D hidden, K top-k.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fdfast import TeacherHidden, TeacherTopK, policy_head, policy_head_loss
from tests.gloo import start_ranks
from tests.helpers import DIVERGENCES_AND_TEACHERS, F32, F64, Case, make_case, run

# Where the vocabulary is cut, in shares of it: slices of unlike size.
CUTS = {2: (0.0, 0.3, 1.0), 4: (0.0, 0.15, 0.17, 0.7, 1.0)}


def _cases() -> dict[str, Case]:
    cases = {}
    for dtype in (F64, F32):
        for divergence, teacher in DIVERGENCES_AND_TEACHERS:
            name = f"{divergence}-{teacher}-{str(dtype).removeprefix('torch.')}"
            kind: dict[str, Any] = {"dtype": dtype, "teacher": teacher, "divergence": divergence}
            cases[f"plain-{name}"] = make_case(41, alpha=0.3, **kind)
            # Both temperatures, softcap, a mask, and a workspace that cuts the tokens into chunks,
            # fewer on a rank with few columns (V = 311 is prime).
            case = make_case(
                42,
                (3, 9),
                10,
                311,
                D_teacher=6 if teacher != "none" else None,
                masked=0.3,
                spread=3.0,
                alpha=0.7,
                temperature=0.7,
                logit_softcap=5.0,
                workspace_mb=0.02,
                **kind,
            )
            given = case.options.get("teacher")
            if isinstance(given, TeacherHidden):
                case = case.having(teacher=dataclasses.replace(given, temperature=1.3))
            cases[f"options-{name}"] = case
    for teacher in ("none", "hidden", "topk-bucket"):
        cases[f"empty-{teacher}"] = make_case(43, (0,), teacher=teacher)
        cases[f"masked-{teacher}"] = make_case(44, teacher=teacher, masked=1.0)
        cases[f"large-{teacher}"] = make_case(45, teacher=teacher, spread=3e3, dtype=F64)
    cases["bfloat16"] = make_case(46, teacher="hidden", dtype=torch.bfloat16)
    cases["same"] = make_case(47, teacher="hidden", closeness=0.0)
    cases["whole-topk"] = make_case(48, teacher="topk-bucket", V=12, K=12)
    for teacher in ("none", "hidden", "topk-bucket"):
        cases[f"forbidden-{teacher}"] = _forbidden(teacher)
    tied = make_case(50, dtype=F64)
    cases["tied"] = dataclasses.replace(
        tied, weight=torch.zeros_like(tied.weight), options=tied.options | {"bias": None}
    )
    return cases


def _forbidden(kind: str) -> Case:
    """The first 25 of 83 columns are -inf for student and teacher: all that the first rank has."""
    case = make_case(49, teacher=kind, dtype=F64)
    bias = case.options["bias"].clone()
    bias[:25] = float("-inf")
    teacher = case.options.get("teacher")
    if isinstance(teacher, TeacherHidden):
        teacher = dataclasses.replace(teacher, bias=bias)
    elif teacher is not None:
        top = (1.1 * case.hidden @ case.weight.T + bias).log_softmax(-1).topk(5, -1)
        teacher = TeacherTopK(top.indices, top.values)
    targets = 25 + case.targets % 58
    return dataclasses.replace(case, targets=targets).having(bias=bias, teacher=teacher)


CASES = _cases()


def columns(V: int, rank: int, world: int) -> slice:
    """The columns of a rank, at least one."""
    edges = [round(share * V) for share in CUTS[world]]
    for i in range(1, world):
        edges[i] = max(edges[i], edges[i - 1] + 1)
    return slice(edges[rank], edges[rank + 1])


def sliced(case: Case, rank: int, world: int) -> Case:
    """What a rank gets of a case: its slice of the heads."""
    own = columns(len(case.weight), rank, world)
    options = dict(case.options)
    if options.get("bias") is not None:
        options["bias"] = options["bias"][own]
    teacher = options.get("teacher")
    if isinstance(teacher, TeacherHidden):
        bias = None if teacher.bias is None else teacher.bias[own]
        options["teacher"] = dataclasses.replace(teacher, weight=teacher.weight[own], bias=bias)
    return dataclasses.replace(case, weight=case.weight[own], options=options)


def _errors(rank: int, world: int, group: Any) -> dict[str, str]:
    """The messages of what `group` does not do."""
    case = sliced(CASES["plain-forward_kl-none-float32"], rank, world)
    wrong: dict[str, dict[str, Any]] = {
        "reference": {"backend": "reference"},
        "grad_filter": {"grad_filter": 0.1},
        "targets": {"targets": case.targets + 83},
        "tokens": {"mask": torch.arange(7) > rank},
    }
    messages = {}
    for name, options in wrong.items():
        arguments = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets}
        try:
            policy_head(**arguments | options, group=group)
        except ValueError as error:
            messages[name] = str(error)
    return messages


def _loss(rank: int, world: int, group: Any) -> dict[str, Tensor]:
    """policy_head_loss with a group, and the gradient of hidden."""
    case = sliced(CASES["plain-reverse_kl-hidden-float32"], rank, world)
    hidden = case.hidden.clone().requires_grad_()

    def token_loss(
        logprobs: Tensor, entropy: Tensor, divergence: Tensor, positions: Tensor
    ) -> Tensor:
        return divergence - logprobs + 0.1 * entropy * positions

    loss, _ = policy_head_loss(
        hidden, case.weight, case.targets, token_loss, group=group, **case.options
    )
    loss.backward()
    assert hidden.grad is not None
    return {"loss": loss.detach(), "dhidden": hidden.grad}


def _seen(rank: int, world: int, group: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {
        name: run(sliced(case, rank, world), "cpu", group=group) for name, case in CASES.items()
    }
    return seen | {"errors": _errors(rank, world, group), "loss": _loss(rank, world, group)}


def _outsider(group: Any) -> dict[str, Any]:
    case = CASES["plain-forward_kl-none-float32"]
    try:
        policy_head(case.hidden, case.weight, case.targets, group=group)
    except ValueError as error:
        return {"errors": {"outsider": str(error)}}
    return {}


def one_rank(rank: int) -> dict[int, dict[str, Any]]:
    two = dist.new_group([0, 1])
    seen = {2: _seen(rank, 2, two) if rank < 2 else _outsider(two)}
    seen[4] = _seen(rank, 4, dist.group.WORLD)
    return seen


if __name__ == "__main__":
    start_ranks(one_rank, 4)
