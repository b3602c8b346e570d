"""policy_head_loss: gradients taken on the way are those of policy_head with the loss after it."""

import pytest
import torch
from torch import Tensor

from fdfast import policy_head, policy_head_loss
from fdfast.divergences import TABLE
from tests.helpers import TEACHERS, Case, make_case, mixed, peak_bytes

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def both_ways(case: Case, scale: float = 1.0, **options: object) -> tuple[dict, dict]:
    """Loss, fields and gradients by policy_head and by policy_head_loss."""
    upstream = [u.flatten() for u in case.upstream]

    def token_loss(logprobs: Tensor, entropy: Tensor, divergence: Tensor, at: Tensor) -> Tensor:
        fields = (logprobs, entropy, divergence)
        return sum(u[at].to(x) * x for u, x in zip(upstream, fields, strict=True))

    results = []
    for one_sweep in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight)]
        bias = case.options["bias"].detach().clone().requires_grad_()
        arguments = case.options | options | {"bias": bias, "backend": "cpu"}
        if one_sweep:
            loss, head = policy_head_loss(*leaves, case.targets, token_loss, **arguments)
        else:
            head = policy_head(*leaves, case.targets, **arguments)
            loss = mixed(head, case.upstream)
        (loss * scale).backward()
        seen = {k: v.detach() for k, v in head._asdict().items()} | {"loss": loss.detach()}
        gradients = zip(("hidden", "weight", "bias"), [*leaves, bias], strict=True)
        results.append(seen | {f"d{name}": leaf.grad for name, leaf in gradients})
    return results[0], results[1]


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_both_ways_give_the_same(teacher: str, divergence: str, dtype: torch.dtype) -> None:
    # Many chunks of tokens, a softcap and a temperature: the chunk's logits are tempered in place.
    case = make_case(
        70, (5, 9), 16, 211, teacher=teacher, dtype=dtype, masked=0.3, divergence=divergence,
        temperature=0.7, logit_softcap=4.0, workspace_mb=0.1,
    )  # fmt: skip
    after, on_the_way = both_ways(case, scale=-1.5)
    close = {F64: 1e-12, F32: 2e-5, BF16: 1e-2}[dtype]
    for name, value in after.items():
        torch.testing.assert_close(on_the_way[name], value, rtol=close, atol=close, msg=name)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3])
def test_the_filter_keeps_its_bound_and_reports(teacher: str, share: float) -> None:
    case = make_case(71, (40,), 16, 211, teacher=teacher, dtype=F64, spread=3.0, workspace_mb=0.05)
    case.hidden, case.weight = case.hidden @ case.weight.T, torch.eye(211, dtype=F64)
    if teacher == "hidden":
        hidden = case.options["teacher"].hidden @ case.options["teacher"].weight.T
        teacher_head = type(case.options["teacher"])(hidden, case.weight)
        case = case.having(teacher=teacher_head)
    _, exact = both_ways(case)
    _, ours = both_ways(case, grad_filter=share)
    off = (ours["dhidden"] - exact["dhidden"]).abs().sum(-1)
    total = exact["dhidden"].abs().sum(-1)
    assert (off <= share * total + 1e-9).all()
    torch.testing.assert_close(ours["dropped_mass"] * total, off, rtol=1e-6, atol=1e-9)


def test_no_gradient_wanted_or_no_token_trained() -> None:
    case = make_case(72, (6,), teacher="hidden")
    loss, head = policy_head_loss(
        case.hidden, case.weight, case.targets, lambda lp, h, d, at: d, **case.options
    )
    assert loss.item() == pytest.approx(head.divergence.sum().item())
    nothing = case.having(mask=torch.zeros(6, dtype=torch.bool))
    _, ours = both_ways(nothing)
    assert ours["loss"] == 0
    assert (ours["dhidden"] == 0).all()
    assert (ours["dweight"] == 0).all()


def test_a_loss_that_needs_no_output_has_no_gradient() -> None:
    case = make_case(73, (6,))
    hidden = case.hidden.requires_grad_()
    loss, _ = policy_head_loss(
        hidden, case.weight, case.targets, lambda lp, h, d, at: torch.ones_like(lp), **case.options
    )
    assert loss.item() == 6.0
    loss.backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("shape", [(600, 16, 2_000), (40, 16, 40_000)])
@pytest.mark.parametrize("grad_filter", [None, 0.05])
def test_memory_stays_within_the_workspace(
    shape: tuple[int, int, int], grad_filter: float | None
) -> None:
    torch.use_deterministic_algorithms(False)  # index_add_ takes memory of its own under it
    N, D, V = shape
    case = make_case(74, (N,), D, V, teacher="hidden")
    case = case.having(workspace_mb=1.0, grad_filter=grad_filter)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight)]

    def sweep() -> tuple[Tensor, object]:
        loss, _ = policy_head_loss(
            *leaves, case.targets, lambda lp, h, d, at: d, backend="cpu", **case.options
        )
        loss.backward()
        return loss, None

    peak, _ = peak_bytes(sweep)
    assert peak <= 2**20 + 4 * (V * D + N * D) + 8 * N * 60, f"{peak / 2**20:.2f} MiB"
