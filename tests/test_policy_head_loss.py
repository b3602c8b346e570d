"""policy_head_loss: gradients taken on the way are those of policy_head with the loss after it."""

import pytest
import torch
from torch import Tensor

from fdfast import policy_head, policy_head_loss
from fdfast.divergences import TABLE
from tests.helpers import (
    BACKEND_DTYPES,
    BF16,
    F16,
    F32,
    F64,
    FAST_BACKENDS,
    TEACHERS,
    Case,
    make_case,
    mixed,
    peak_bytes,
)


@pytest.fixture(autouse=True)
def _few_tokens_make_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Triton would take small workspaces the other way."""
    if "triton" in BACKEND_DTYPES:
        from fdfast.kernels import policy_head_loss as chunks

        monkeypatch.setattr(chunks, "MIN_CHUNK_TOKENS", 4)


def both_ways(
    case: Case, backend: str = "cpu", *, scale: float = 1.0, **options: object
) -> tuple[dict, dict]:
    """Loss, fields and gradients by policy_head and by policy_head_loss, on the CPU."""
    case = case.on(backend)
    upstream = [u.flatten() for u in case.upstream]

    def token_loss(logprobs: Tensor, entropy: Tensor, divergence: Tensor, at: Tensor) -> Tensor:
        fields = (logprobs, entropy, divergence)
        return sum(u[at].to(x) * x for u, x in zip(upstream, fields, strict=True))

    results = []
    for one_sweep in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (case.hidden, case.weight)]
        bias = case.options["bias"].detach().clone().requires_grad_()
        arguments = case.options | options | {"bias": bias, "backend": backend}
        if one_sweep:
            loss, head = policy_head_loss(*leaves, case.targets, token_loss, **arguments)
        else:
            head = policy_head(*leaves, case.targets, **arguments)
            loss = mixed(head, case.upstream)
        (loss * scale).backward()
        seen = head._asdict() | {"loss": loss}
        gradients = zip(("hidden", "weight", "bias"), [*leaves, bias], strict=True)
        seen |= {f"d{name}": leaf.grad for name, leaf in gradients}
        results.append({name: value.detach().cpu() for name, value in seen.items()})
    return results[0], results[1]


# Triton's is held against the truth in test_kernels_policy_head_loss.py, too.
BOTH_WAYS = [("cpu", F64), ("cpu", F32), ("cpu", BF16)] + [
    pytest.param("triton", dtype, marks=pytest.mark.slow)
    for dtype in (F32, F16)
    if "triton" in BACKEND_DTYPES
]


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("backend", "dtype"), BOTH_WAYS)
def test_both_ways_give_the_same(
    backend: str, teacher: str, divergence: str, dtype: torch.dtype
) -> None:
    # Many chunks of tokens, a softcap and a temperature: the chunk's logits are tempered in place.
    case = make_case(
        70, (5, 9), 16, 211, teacher=teacher, dtype=dtype, masked=0.3, divergence=divergence,
        temperature=0.7, logit_softcap=4.0, workspace_mb=0.1,
    )  # fmt: skip
    after, on_the_way = both_ways(case, backend, scale=-1.5)
    close = {F64: 1e-12, F32: 2e-5, F16: 2e-3, BF16: 1e-2}[dtype]
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


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("workspace_mb", [0.05, 0.5, 16.0])  # a token a chunk; some; bfloat16's own
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_the_filter_errs_by_no_more_than_it_says_in_every_dtype(
    dtype: torch.dtype, workspace_mb: float, masked: float
) -> None:
    case = make_case(
        75, (40,), 21, 1009, teacher="hidden", dtype=dtype, spread=5.0, masked=masked,
        workspace_mb=workspace_mb,
    )  # fmt: skip
    case.hidden = case.hidden * 1.5
    _, exact = both_ways(case)
    after, ours = both_ways(case, grad_filter=0.05)
    dropped = ours["dropped_mass"]
    assert (dropped <= 0.05).all()
    assert dropped.max() > 0.005
    assert (dropped[~case.options["mask"]] == 0).all() if masked else True
    for name in ("dhidden", "dweight"):
        off = (ours[name].double() - exact[name].double()).norm() / exact[name].double().norm()
        assert 0 < off < 0.1, f"{name}: {off:.2%}"
    assert ours["dbias"].equal(exact["dbias"]) or dtype == BF16
    # A bound of each token's whole row, so both ways drop the same, but for a rounding at the edge.
    torch.testing.assert_close(after["dropped_mass"], dropped, rtol=0.1, atol=2e-3)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_a_filter_that_would_not_pay_is_exact(dtype: torch.dtype) -> None:
    case = make_case(76, (30,), 8, 211, teacher="hidden", dtype=dtype, spread=0.1)
    _, exact = both_ways(case)
    _, ours = both_ways(case, grad_filter=0.02)
    assert (ours["dropped_mass"] == 0).all()
    for name in ("dhidden", "dweight"):
        assert ours[name].equal(exact[name]), name


def test_a_filter_never_drops_a_nan() -> None:
    case = make_case(77, (6,), V=211, spread=4.0)
    case.hidden[2] = float("nan")
    _, ours = both_ways(case, grad_filter=0.1)
    assert ours["dhidden"][2].isnan().all()
    assert ours["dhidden"][[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("grad_filter", [None, 0.05])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_a_frozen_narrow_weight_is_never_widened_whole(
    dtype: torch.dtype, grad_filter: float | None
) -> None:
    torch.use_deterministic_algorithms(False)  # index_add_ takes memory of its own under it
    N, D, V = 40, 64, 20_000
    case = make_case(78, (N,), D, V, dtype=dtype, bias=False, spread=4.0)
    case = case.having(workspace_mb=1.0, grad_filter=grad_filter)
    hidden = case.hidden.requires_grad_()

    def sweep() -> None:
        loss, _ = policy_head_loss(
            hidden, case.weight, case.targets, lambda lp, h, d, at: lp, backend="cpu",
            **case.options,
        )  # fmt: skip
        loss.backward()

    peak, _ = peak_bytes(sweep)
    assert peak <= 2**20 + 6 * N * D + 8 * N * 60, f"{peak / 2**20:.2f} MiB"  # the copy: 4.9 MiB


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_no_gradient_wanted_or_no_token_trained(backend: str) -> None:
    case = make_case(72, (6,), teacher="hidden", backend=backend).on(backend)
    loss, head = policy_head_loss(
        case.hidden, case.weight, case.targets, lambda lp, h, d, at: d, **case.options
    )
    assert loss.item() == pytest.approx(head.divergence.sum().item())
    nothing = case.having(mask=torch.zeros(6, dtype=torch.bool))
    _, ours = both_ways(nothing, backend)
    assert ours["loss"] == 0
    assert (ours["dhidden"] == 0).all()
    assert (ours["dweight"] == 0).all()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_loss_that_needs_no_output_has_no_gradient(backend: str) -> None:
    case = make_case(73, (6,), backend=backend).on(backend)
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
