"""policy_head with its vocabulary on 2 and 4 gloo ranks, against the unsharded reference.

The ranks run once for all tests of a process: see group_rank.py.
Legend: V vocabulary, D hidden.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fdfast import policy_head_loss
from tests.gloo import run_ranks
from tests.group_rank import CASES, columns
from tests.helpers import assert_right, run

WORLDS = (2, 4)
SLICED = ("dweight", "dbias")


def ranks(world: int) -> list[dict[str, Any]]:
    """What each rank of a group saw, by case."""
    return [seen[world] for seen in run_ranks("tests.group_rank", 4)[:world]]


def whole(seen: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' outputs, equal to the last bit, and their slices side by side."""
    joined = {}
    for name, first in seen[0].items():
        parts = [mine[name] for mine in seen]
        if name in SLICED:
            joined[name] = torch.cat(parts)
        else:
            assert all(part.nan_to_num().equal(first.nan_to_num()) for part in parts), name
            joined[name] = first
    return joined


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_gives_what_one_head_gives(name: str, world: int) -> None:
    ours = whole([seen[name] for seen in ranks(world)])
    assert_right(CASES[name], "reference", ours=ours)
    assert ours["argmax"].equal(run(CASES[name], "reference")["argmax"])


@pytest.mark.parametrize("world", WORLDS)
def test_the_same_student_and_teacher_have_no_divergence(world: int) -> None:
    assert (ranks(world)[0]["same"]["divergence"] == 0).all()


@pytest.mark.parametrize("world", WORLDS)
def test_of_equal_logits_on_many_ranks_the_lowest_id_is_argmax(world: int) -> None:
    assert (ranks(world)[0]["tied"]["argmax"] == 0).all()


def test_slices_are_uneven_and_one_is_a_single_column() -> None:
    sizes = [len(range(83)[columns(83, rank, 4)]) for rank in range(4)]
    assert sum(sizes) == 83
    assert len(set(sizes)) == 4
    assert 2 in sizes


@pytest.mark.parametrize("world", WORLDS)
def test_the_loss_goes_the_way_of_the_op(world: int) -> None:
    case = CASES["plain-reverse_kl-hidden-float32"]
    hidden = case.hidden.clone().requires_grad_()
    loss, _ = policy_head_loss(
        hidden,
        case.weight,
        case.targets,
        lambda logprobs, entropy, divergence, i: divergence - logprobs + 0.1 * entropy * i,
        backend="reference",
        **case.options,
    )
    loss.backward()
    ours = whole([seen["loss"] for seen in ranks(world)])
    torch.testing.assert_close(ours["loss"], loss.detach())
    torch.testing.assert_close(ours["dhidden"], hidden.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_group_cannot_do_is_one_line_on_every_rank(world: int) -> None:
    for seen in ranks(world):
        errors = seen["errors"]
        assert errors["reference"].startswith("policy_head: group wants backend='cpu'")
        assert errors["grad_filter"].startswith("policy_head: grad_filter with group is not")
        assert "targets must lie in [0, 83)" in errors["targets"]
        assert "the same hidden, targets and mask on every rank" in errors["tokens"]
        assert not any("\n" in message for message in errors.values())


def test_a_process_outside_the_group_is_told_so() -> None:
    for seen in run_ranks("tests.group_rank", 4)[2:]:
        assert "group must hold this process" in seen[2]["errors"]["outsider"]
