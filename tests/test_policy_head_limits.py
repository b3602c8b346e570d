"""policy_head keeps its two promises about size: of what a filter drops, of the memory it takes.

Legend: N tokens, D hidden, V vocabulary, K top-k.
"""

import re

import pytest
import torch

from fdfast import InputError, TeacherHidden, TeacherTopK, policy_head, topk_head
from fdfast.divergences import TABLE
from tests.helpers import (
    BACKEND_DTYPES,
    BACKENDS,
    BACKENDS_TRITON_SLOW,
    BF16,
    F32,
    F64,
    FAST_BACKENDS,
    FAST_BACKENDS_TRITON_SLOW,
    TEACHERS,
    Case,
    assert_close_to_truth,
    backends_in,
    make_case,
    mixed,
    peak_bytes,
    run,
)


def _seeing_dlogits(case: Case) -> Case:
    """The same logits from an identity: dhidden is then dlogits itself, dweight.T its transpose."""
    z = (case.hidden.double() @ case.weight.double().T).to(case.hidden.dtype)
    V = z.shape[-1]
    eye = torch.eye(V, dtype=z.dtype)
    teacher = case.options.get("teacher")
    if isinstance(teacher, TeacherHidden):
        t = (teacher.hidden.double() @ teacher.weight.double().T).to(z.dtype)
        case = case.having(teacher=TeacherHidden(t, eye, teacher.bias))
    return Case(z, eye, case.targets, case.options, case.upstream)


@pytest.mark.parametrize(("backend", "dtype"), backends_in(F64, F32, triton_slow=True))
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_the_filter_drops_no_more_than_its_share_of_any_token(
    backend: str, teacher: str, share: float, dtype: torch.dtype
) -> None:
    case = make_case(50, (12,), 16, 211, teacher=teacher, spread=3.0, dtype=dtype, masked=0.25)
    case = _seeing_dlogits(case)
    exact = run(case, backend)
    ours = run(case, backend, grad_filter=share, workspace_mb=1.0)
    for name in ("logprobs", "entropy", "divergence", "teacher_mass", "argmax"):
        assert ours[name].equal(exact[name]), name

    off = (ours["dhidden"] - exact["dhidden"]).abs().sum(-1).double()
    total = exact["dhidden"].abs().sum(-1).double()
    dropped, mask = ours["dropped_mass"].double(), case.options["mask"]
    slack = 1e-4 * torch.finfo(dtype).eps ** 0.5  # of sums in this dtype
    assert (off <= share * total + slack * total).all()
    assert (dropped >= 0).all()
    assert (dropped <= share + slack).all()
    # What is reported is what was dropped, and a masked token drops nothing.
    assert ((dropped * total - off).abs() <= 20 * torch.finfo(dtype).eps * total).all()
    assert (dropped[~mask] == 0).all()
    if share >= 0.1:
        assert dropped[mask].max() > 0.01  # it does filter
    # The weight's gradient errs by what the tokens dropped, and no more.
    off_weight = (ours["dweight"] - exact["dweight"]).abs().sum(0).double()
    bound = (off[:, None] * case.hidden.abs().double()).sum(0)
    assert (off_weight <= bound + 1e-5 * exact["dweight"].abs().sum(0).double()).all()


@pytest.mark.parametrize("backend", BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_filter_of_zero_is_exact(backend: str, teacher: str) -> None:
    case = make_case(51, (9,), 16, 211, teacher=teacher, workspace_mb=0.1)
    exact, ours = run(case, backend), run(case, backend, grad_filter=0.0)
    for name, value in exact.items():
        assert_close_to_truth(ours[name], value, value, 2e-6, name)


@pytest.mark.parametrize(("backend", "dtype"), backends_in(F64, F32))
def test_a_token_without_a_gradient_drops_nothing(backend: str, dtype: torch.dtype) -> None:
    case = make_case(52, (4,), dtype=dtype)
    trained = torch.tensor([1.0, 0.0, 0.0, 1.0])
    case.upstream = tuple(u * trained for u in case.upstream)  # type: ignore[assignment]
    ours = run(case, backend, grad_filter=0.1)
    assert (ours["dropped_mass"][1:3] == 0).all()
    assert (ours["dhidden"][1:3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_mass_is_zero_before_the_backward_pass_and_filled_after(backend: str) -> None:
    case = make_case(53, (2, 4), V=211, masked=0.3, spread=4.0)  # flat ones are not worth it
    hidden = case.hidden.requires_grad_()
    head = policy_head(
        hidden, case.weight, case.targets, grad_filter=0.2, backend=backend, **case.options
    )
    assert (head.dropped_mass == 0).all()
    mixed(head, case.upstream).backward()
    assert (head.dropped_mass > 0).any()
    assert head.dropped_mass.shape == (2, 4)


@pytest.mark.parametrize("backend", FAST_BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("divergence", TABLE)
def test_blocks_do_not_change_what_a_filter_may_drop(backend: str, divergence: str) -> None:
    # Each token's bound is of the whole row, however the vocabulary is cut.
    case = make_case(54, (40,), 6, 1009, teacher="hidden", divergence=divergence)
    exact = run(case, backend)
    for workspace_mb in (0.05, 0.2, 64.0):
        ours = run(case, backend, grad_filter=0.05, workspace_mb=workspace_mb)
        assert (ours["dropped_mass"] <= 0.05).all()
        off = (ours["dhidden"] - exact["dhidden"]).norm() / exact["dhidden"].norm()
        assert off < 0.05


# N, D, V: many tokens of a small vocabulary, few of a large one, a wide hidden state.
LARGE = {"tokens": (600, 16, 2_000), "vocabulary": (40, 16, 40_000), "hidden": (60, 200, 2_000)}


@pytest.mark.parametrize(
    ("backend", "dtype"), backends_in(F32, BF16, among=FAST_BACKENDS, triton_slow=True)
)
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("teacher", ["none", "hidden", "topk-bucket"])
@pytest.mark.parametrize("grad_filter", [None, 0.05])
@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_memory_stays_within_the_workspace(
    backend: str,
    shape: str,
    teacher: str,
    dtype: torch.dtype,
    grad_filter: float | None,
    masked: float,
) -> None:
    torch.use_deterministic_algorithms(False)  # index_add_ takes memory of its own under it
    N, D, V = LARGE[shape]
    workspace_mb = (
        0.5 if shape == "hidden" else 1.0
    )  # the logits of the student alone: 4.6, 6.1 and 0.5 MiB
    case = make_case(55, (N,), D, V, dtype=dtype, teacher=teacher, masked=masked)
    case = case.having(workspace_mb=workspace_mb, grad_filter=grad_filter)
    for leaf in (case.hidden, case.weight, case.options["bias"]):
        leaf.requires_grad_()
    forward, (head, _) = peak_bytes(lambda: (_head(case, backend), None))
    total = mixed(head, case.upstream)
    backward, _ = peak_bytes(total.backward)

    # What the docstring takes out: gradients, the float32 sum of a half-precision dhidden and
    # dbias, and N-sized numbers (float64, some sixty a token, and K of a top-k several times).
    gradients = dtype.itemsize * (V * D + V + N * D)
    gradients += 4 * (N * D + V) if dtype == BF16 else 0
    per_token = 8 * N * (60 + (60 if teacher == "topk-bucket" else 0))
    workspace = workspace_mb * 2**20
    assert forward <= workspace + per_token, f"forward takes {forward / 2**20:.2f} MiB"
    assert backward <= workspace + per_token + gradients, (
        f"backward takes {backward / 2**20:.2f} MiB, of them gradients {gradients / 2**20:.2f}"
    )


def _head(case: Case, backend: str) -> object:
    return policy_head(case.hidden, case.weight, case.targets, backend=backend, **case.options)


def test_the_measure_of_memory_sees_stored_logits() -> None:
    case = make_case(56, (100,), 8, 10_000)
    peak, _ = peak_bytes(lambda: run(case, "reference"))
    assert peak > 2 * 4 * 100 * 10_000


@pytest.mark.parametrize("backend", FAST_BACKENDS_TRITON_SLOW)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_workspace_too_small_says_what_would_do(backend: str, teacher: str) -> None:
    for dtype in BACKEND_DTYPES[backend]:
        case = make_case(57, (20,), 8, 5_000, teacher=teacher, dtype=dtype, grad_filter=0.1)
        with pytest.raises(InputError, match=r"policy_head: workspace_mb=0\.01 holds not") as seen:
            run(case, backend, workspace_mb=0.01)
        advice = re.search(r"give workspace_mb=(\S+) or more", str(seen.value))
        assert advice is not None
        enough = run(case, backend, workspace_mb=float(advice[1]))
        assert enough["logprobs"].isfinite().all()


@pytest.mark.parametrize("backend", FAST_BACKENDS_TRITON_SLOW)
def test_topk_head_stays_within_the_workspace(backend: str) -> None:
    N, D, V, K = 200, 16, 20_000, 5
    for dtype in (F32, BF16) if backend == "cpu" else (F32,):
        case = make_case(58, (N,), D, V, dtype=dtype)
        peak, _ = peak_bytes(
            lambda case=case: topk_head(
                case.hidden, case.weight, K, workspace_mb=1.0, backend=backend
            )
        )
        assert peak <= 2**20 + 8 * N * (8 * K + 10)


def test_a_frozen_weight_costs_no_memory() -> None:
    case = make_case(59, (50,), 64, 20_000, dtype=F32)
    hidden = case.hidden.requires_grad_()
    head = policy_head(hidden, case.weight, case.targets, workspace_mb=1.0, backend="cpu")
    peak, _ = peak_bytes(head.logprobs.sum().backward)
    assert peak < 4 * case.weight.numel() / 2


def test_a_teacher_top_k_of_the_topk_head_reports_its_mass() -> None:
    case = make_case(60, (6,), dtype=F64)
    top = topk_head(case.hidden, case.weight, 4)
    head = policy_head(
        case.hidden, case.weight, case.targets, teacher=TeacherTopK(top.ids, top.logprobs)
    )
    assert torch.allclose(head.teacher_mass, top.mass, rtol=1e-14)
