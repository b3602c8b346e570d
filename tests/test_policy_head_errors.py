"""What policy_head refuses, and that it says which argument, which rule, and what it got."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fdfast import TeacherHidden, TeacherTopK, policy_head
from tests.helpers import (
    BACKENDS,
    Case,
    make_case,
)

INF = float("inf")


def _refused() -> dict[str, tuple[type[Exception], str, Callable[[Case], dict[str, Any]]]]:
    """What is wrong -> the error, a part of its message, the arguments that replace good ones."""
    return {
        "weight shape": (
            ValueError,
            "weight must have shape (V, D) with D = 24",
            lambda c: {"weight": c.weight[:, 1:]},
        ),
        "weight 1-D": (ValueError, "got (24,)", lambda c: {"weight": c.weight[0]}),
        "empty vocabulary": (ValueError, "V > 0", lambda c: {"weight": c.weight[:0]}),
        "hidden 0-D": (ValueError, "weight must", lambda c: {"hidden": c.hidden[0, 0]}),
        "targets shape": (ValueError, "targets must have", lambda c: {"targets": c.targets[1:]}),
        "mask shape": (ValueError, "mask must have", lambda c: {"mask": torch.ones(3)}),
        "bias shape": (ValueError, "bias must have shape (83,)", lambda c: {"bias": torch.ones(3)}),
        "integer hidden": (TypeError, "floating", lambda c: {"hidden": c.hidden.long()}),
        "integer weight": (TypeError, "floating", lambda c: {"weight": c.weight.long()}),
        "int32 targets": (
            TypeError,
            "int64; got torch.int32",
            lambda c: {"targets": c.targets.int()},
        ),
        "targets too large": (
            ValueError,
            "[0, 83); got 83",
            lambda c: {"targets": c.targets * 0 + 83},
        ),
        "targets negative": (ValueError, "got -100", lambda c: {"targets": c.targets * 0 - 100}),
        "temperature": (ValueError, "temperature must be positive", lambda c: {"temperature": 0.0}),
        "temperature inf": (ValueError, "got inf", lambda c: {"temperature": INF}),
        "softcap": (ValueError, "logit_softcap must", lambda c: {"logit_softcap": -1.0}),
        "workspace": (ValueError, "workspace_mb must", lambda c: {"workspace_mb": 0}),
        "divergence": (ValueError, "must be one of forward_kl", lambda c: {"divergence": "kl"}),
        "tail": (ValueError, "tail must be one of truncate", lambda c: {"tail": "cut"}),
        "alpha": (ValueError, "alpha", lambda c: {"divergence": "jsd", "alpha": 1.0}),
        "grad_filter": (
            ValueError,
            "grad_filter must be None or in [0, 1)",
            lambda c: {"grad_filter": 1.0},
        ),
        "backend": (ValueError, "backend must be one of auto", lambda c: {"backend": "cuda"}),
        "teacher type": (TypeError, "teacher must be", lambda c: {"teacher": c.hidden}),
        "teacher hidden": (
            ValueError,
            "teacher.hidden must have shape (7, 'D')",
            lambda c: {"teacher": TeacherHidden(c.hidden[1:], c.weight)},
        ),
        "teacher weight": (
            ValueError,
            "teacher.weight must have shape (83, 24)",
            lambda c: {"teacher": TeacherHidden(c.hidden, c.weight[1:])},
        ),
        "teacher bias": (
            ValueError,
            "teacher.bias must have shape (83,)",
            lambda c: {"teacher": TeacherHidden(c.hidden, c.weight, torch.ones(1))},
        ),
        "teacher temperature": (
            ValueError,
            "teacher.temperature must be positive",
            lambda c: {"teacher": TeacherHidden(c.hidden, c.weight, temperature=-1.0)},
        ),
        "top-k shapes": (
            ValueError,
            "teacher.ids and teacher.logprobs",
            lambda c: {"teacher": _topk(7, [0, 1], 3)},
        ),
        "top-k rows": (ValueError, "(7, 'K')", lambda c: {"teacher": _topk(6, [0, 1], 2)}),
        "top-k of none": (ValueError, "1 <= K <= 83", lambda c: {"teacher": _topk(7, [], 0)}),
        "top-k repeated": (ValueError, "distinct", lambda c: {"teacher": _topk(7, [4, 4], 2)}),
        "top-k range": (ValueError, "[0, 83); got 83", lambda c: {"teacher": _topk(7, [1, 83], 2)}),
        "top-k int32": (
            TypeError,
            "teacher.ids must be int64",
            lambda c: {"teacher": TeacherTopK(_topk(7, [0], 1).ids.int(), torch.zeros(7, 1))},
        ),
    }


def _topk(N: int, ids: list[int], K: int) -> TeacherTopK:
    return TeacherTopK(torch.tensor(ids, dtype=torch.int64).expand(N, -1), torch.full((N, K), -1.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", _refused())
def test_wrong_arguments_are_named_with_rule_and_value(backend: str, wrong: str) -> None:
    error, message, change = _refused()[wrong]
    case = make_case(36)
    arguments: dict[str, Any] = {
        "hidden": case.hidden,
        "weight": case.weight,
        "targets": case.targets,
        "backend": backend,
        **case.options,
    }
    with pytest.raises(error, match=re.escape(message)) as seen:
        policy_head(**arguments | change(case))
    assert str(seen.value).startswith("policy_head: ")
    assert "got" in str(seen.value)
