"""The token-chunk way in Triton under the interpreter: values and gradients of policy_head_loss
against the float64 reference.

Legend: N tokens, D hidden, V vocabulary, K top-k.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fdfast import TeacherHidden, policy_head_loss
from fdfast.divergences import TABLE
from fdfast.kernels import policy_head, tiles
from fdfast.kernels import policy_head_loss as chunks
from fdfast.losses import GRPOLoss
from fdfast.types import Head, HeadOptions
from tests.helpers import (
    BF16,
    DIVERGENCES_AND_TEACHERS,
    F16,
    F32,
    F64,
    GRADIENTS,
    TEACHERS,
    Case,
    assert_right,
    draw_case,
    generator,
    make_case,
    peak_bytes,
)
from tests.helpers import run as after

SMALL = tiles.Tile(16, 64, 16, 4, 1, parts=2, split_v=128)
FIELDS = ("logprobs", "entropy", "divergence", "teacher_mass")


@pytest.fixture(autouse=True)
def _small_chunks_of_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, splits and parts of few tokens and columns."""
    for key in tiles.INTERPRET:
        monkeypatch.setitem(tiles.INTERPRET, key, SMALL)
    monkeypatch.setattr(chunks, "MIN_CHUNK_TOKENS", 4)


def run(
    case: Case, backend: str = "triton", *, frozen: tuple[str, ...] = (), **options: Any
) -> dict[str, Tensor]:
    """Every output, and the gradients of sum(upstream * output) taken on the way."""
    case = case.having(**options).on(backend)
    upstream = [u.flatten() for u in case.upstream]

    def token_loss(logprobs: Tensor, entropy: Tensor, divergence: Tensor, at: Tensor) -> Tensor:
        outputs = (logprobs, entropy, divergence)
        return sum(u[at].to(x) * x for u, x in zip(upstream, outputs, strict=True))

    leaves = {"hidden": case.hidden, "weight": case.weight, "bias": case.options.get("bias")}
    leaves = {
        name: leaf.detach().clone().requires_grad_(name not in frozen)
        for name, leaf in leaves.items()
        if leaf is not None
    }
    arguments = case.options | {"bias": leaves.get("bias"), "backend": backend}
    loss, head = policy_head_loss(
        leaves["hidden"], leaves["weight"], case.targets, token_loss, **arguments
    )
    loss.backward()
    seen = {name: value.detach().cpu() for name, value in head._asdict().items()}
    return seen | {f"d{name}": v.grad.cpu() for name, v in leaves.items() if v.grad is not None}


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks the token-chunk way has cut, for each call of it."""
    seen: list[int] = []
    cut = chunks._Workspace.of

    def counted(*arguments: Any) -> Any:
        workspace = cut(*arguments)
        seen.append(len(list(workspace.chunks())))
        return workspace

    monkeypatch.setattr(chunks._Workspace, "of", counted)
    return seen


@pytest.mark.parametrize(("divergence", "teacher"), DIVERGENCES_AND_TEACHERS)
def test_every_divergence_and_teacher_is_right_with_every_option(
    divergence: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(
        3, (3, 9), 10, 311, teacher=teacher, D_teacher=6 if teacher != "none" else None,
        masked=0.3, spread=3.0, divergence=divergence, alpha=0.7, temperature=0.7,
        logit_softcap=5.0, workspace_mb=0.07,
    )  # fmt: skip
    if isinstance(case.options.get("teacher"), TeacherHidden):
        theirs = case.options["teacher"]
        case = case.having(teacher=TeacherHidden(theirs.hidden, theirs.weight, theirs.bias, 1.3))
    calls = calls_of(monkeypatch)
    assert_right(case, "triton", ours=run(case))
    assert len(calls) == 1  # it was this way
    assert calls[0] > 1 or teacher != "hidden"


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("teacher", [name for name in TEACHERS if name != "hidden"])
@pytest.mark.parametrize("logit_softcap", [None, pytest.param(5.0, marks=pytest.mark.slow)])
def test_sixteen_bits_without_a_second_head_are_as_right_as_pytorch(
    dtype: torch.dtype, teacher: str, logit_softcap: float | None
) -> None:
    case = make_case(
        4, (20,), 16, 311, dtype=dtype, teacher=teacher, spread=3.0, temperature=0.7,
        logit_softcap=logit_softcap, workspace_mb=0.1,
    )  # fmt: skip
    ours = run(case)
    assert_right(case, "triton", ours=ours)
    # Without the allowance for the gradients' own dtype, which is as large as float16's rounding of
    # a logit: PyTorch's error has that rounding in it already.
    same_dtype, truth = after(case, "reference"), after(case.double(), "reference")
    for name in GRADIENTS:
        error, theirs = (
            (x[name].double() - truth[name]).norm() / truth[name].norm() for x in (ours, same_dtype)
        )
        assert error <= 2 * theirs, f"{name}: off by {error:.1e}, PyTorch by {theirs:.1e}"


@pytest.mark.parametrize("dtype", [pytest.param(F16, marks=pytest.mark.slow), BF16])
@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("closeness", [pytest.param(0.3, marks=pytest.mark.slow), 0.01])
def test_sixteen_bits_keep_what_a_pair_of_float16_holds(
    dtype: torch.dtype, divergence: str, closeness: float
) -> None:
    case = make_case(
        4, (20,), 16, 311, dtype=dtype, teacher="hidden", divergence=divergence, spread=3.0,
        closeness=closeness, workspace_mb=0.1,
    )  # fmt: skip
    # The entropy's gradient would hide what the divergence's loses.
    zero = torch.zeros(20, dtype=F64)
    case.upstream = (zero, zero, case.upstream[2])
    ours, truth = run(case), after(case.double(), "reference")
    for name in ("logprobs", "entropy"):
        assert (ours[name] - truth[name]).abs().max() <= 2e-5, name
    off = (ours["divergence"] - truth["divergence"]).norm() / truth["divergence"].norm().clamp(1e-9)
    assert off <= 1e-3
    # Half a unit of the gradients' own dtype, twice: of dlogits and of what is returned.
    bound = 4 * torch.finfo(dtype).eps if dtype == BF16 else 2e-3
    for name in ("dhidden", "dweight"):
        off = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert off <= bound, (name, off)


@pytest.mark.parametrize("divergence", TABLE)
def test_identical_student_and_teacher_give_exactly_zero(divergence: str) -> None:
    for dtype in (F32, F16):
        case = make_case(
            6, (9,), 16, 311, dtype=dtype, teacher="hidden", closeness=0.0, divergence=divergence
        )
        zero = torch.zeros(9, dtype=F64)
        case.upstream = (zero, zero, torch.ones(9, dtype=F64))
        ours = run(case)
        for name in ("divergence", "dhidden", "dweight", "dbias"):
            assert (ours[name] == 0).all(), name


@pytest.mark.parametrize("divergence", TABLE)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_logits_of_ten_thousand_and_forbidden_tokens_are_finite_and_right(
    divergence: str, dtype: torch.dtype
) -> None:
    # +-1e4 differ by more than float16 holds to a digit; a bias of -inf by more than it holds.
    V = 64
    z = (make_case(20, (6,), V, 2).hidden * 16).round() / 16
    z = z + torch.where(torch.arange(V) % 2 == 0, 1e4, -1e4)
    z = (z / 1e4).to(dtype)  # float16 hidden states; a weight of 1e4 brings the logits back
    bias = torch.zeros(V, dtype=dtype)
    bias[3::4] = float("-inf")
    base = make_case(22, (6,), 1, V)
    eye = torch.eye(V).mul(1e4).to(dtype)
    base.targets = base.targets // 4 * 4
    options = {
        "teacher": TeacherHidden(z.roll(1, 0), eye, bias),
        "divergence": divergence,
        "bias": bias,
        "alpha": 0.25,
    }
    ours = run(case := Case(z, eye, base.targets, options, base.upstream))
    assert all(ours[name].isfinite().all() for name in ("divergence", "dhidden", "dweight"))
    assert (ours["dbias"][3::4] == 0).all()
    assert_right(case, "triton", ours=ours)


def test_a_student_that_forbids_what_the_teacher_does_is_infinitely_far() -> None:
    for dtype in (F32, F16):
        case = make_case(8, (6,), 16, 200, dtype=dtype, teacher="hidden", bias=False)
        bias = torch.zeros(200, dtype=dtype)
        bias[150:] = float("-inf")
        case.targets = case.targets % 150
        ours = run(case.having(bias=bias), frozen=("weight", "bias"))
        assert (ours["divergence"] == float("inf")).all()
        assert ours["logprobs"].isfinite().all()


def test_nan_in_a_masked_row_does_not_leak_and_in_a_trained_row_is_seen() -> None:
    case = make_case(9, (8,), 16, 200, teacher="hidden", masked=0.5)
    mask = case.options["mask"]
    whole = run(case)
    case.hidden[~mask] = float("nan")
    spoiled = run(case)
    for name, value in whole.items():
        assert torch.equal(value, spoiled[name]), name
    trained = int(mask.nonzero()[0])
    case.hidden[trained] = float("nan")
    ours = run(case, frozen=("weight", "bias"))
    assert ours["divergence"][trained].isnan()
    assert ours["dhidden"][trained].isnan().all()
    others = mask.clone()
    others[trained] = False
    assert torch.equal(ours["dhidden"][others], whole["dhidden"][others])


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
@pytest.mark.parametrize("given", ["advantages", "old_logprobs", "ref_logprobs"])
def test_nan_in_what_a_loss_is_given_counts_in_its_own_row_only(
    loss_type: str, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(11, (2, 6), 16, 100, bias=False)
    g = generator(12)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False
    numbers = {name: torch.randn(2, 6, generator=g) for name in ("advantages", "ref_logprobs")}
    numbers["old_logprobs"] = -5.0 + torch.randn(2, 6, generator=g)
    calls = calls_of(monkeypatch)

    def gradients(numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        loss = GRPOLoss(
            loss_type=loss_type, beta=0.1, epsilon_high=0.28, workspace_mb=0.05, backend="triton"
        )(hidden, weight, case.targets, mask=mask, **numbers).loss
        loss.backward()
        return loss.detach(), hidden.grad, weight.grad

    whole = gradients(numbers)
    masked = numbers | {given: numbers[given].where(mask, float("nan"))}
    for clean, ours in zip(whole, gradients(masked), strict=True):
        assert torch.equal(clean, ours)
    spoiled = numbers[given].clone()
    spoiled[1, 2] = float("nan")
    loss, dhidden, _ = gradients(numbers | {given: spoiled})
    assert loss.isnan()
    assert dhidden[1, 2].isnan().all()
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(dhidden[others], whole[1][others])
    assert calls == [1, 1, 1]  # it was this way, all rows in one chunk


@settings(max_examples=6)  # the interpreter takes a second each
@given(data=st.data())
def test_random_shapes_and_options_are_right(data: st.DataObject) -> None:
    case = draw_case("triton", data.draw)
    assert_right(case, "triton", ours=run(case))


@pytest.mark.parametrize(
    "frozen", [("weight",), ("hidden",), pytest.param(("weight", "bias"), marks=pytest.mark.slow)]
)
def test_frozen_leaves_get_no_gradient_and_change_no_other(frozen: tuple[str, ...]) -> None:
    case = make_case(12, (9,), 16, 200, teacher="hidden")
    all_of_them, ours = run(case), run(case, frozen=frozen)
    assert all_of_them.keys() - ours.keys() == {f"d{name}" for name in frozen}
    for name, value in ours.items():
        assert torch.equal(value, all_of_them[name]), name


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_token_is_no_work_and_no_error(teacher: str) -> None:
    ours = run(make_case(10, (0,), 16, 70, teacher=teacher))
    assert ours["logprobs"].shape == (0,)
    assert (ours["dweight"] == 0).all()


def test_the_workspace_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(torch.zeros(9000, 64, dtype=BF16), torch.zeros(5000, 64, dtype=BF16), None)
    trained, frozen = (True, True, False), (True, False, False)

    def fits(needs: tuple[bool, bool, bool], workspace_mb: float, **options: Any) -> bool:
        wanted = HeadOptions(workspace_bytes=int(workspace_mb * 2**20), **options)
        return policy_head.can_chunk(head, None, needs, wanted)

    monkeypatch.setattr(chunks, "MIN_CHUNK_TOKENS", 512)
    assert fits(frozen, 64.0)
    assert not fits(frozen, 4.0)  # 512 tokens of 5,000 pairs take 10 MB
    assert not fits(frozen, 64.0, grad_filter=0.1)
    assert fits(trained, 64.0)
    narrow = min(mb for mb in range(1, 65) if fits(frozen, mb))
    wide = min(mb for mb in range(1, 65) if fits(trained, mb))
    assert wide - narrow == pytest.approx(4 * 5000 * 64 / 2**20, abs=1.0)  # the float32 sum
    mixed = head._replace(hidden_ND=head.hidden_ND.float())
    assert not policy_head.can_chunk(mixed, None, frozen, HeadOptions())


@pytest.mark.parametrize("teacher", ["none", "hidden"])
def test_memory_stays_within_the_workspace(teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in tiles.INTERPRET:
        monkeypatch.setitem(tiles.INTERPRET, key, tiles.Tile(64, 1024, 256, 4, 1))
    torch.use_deterministic_algorithms(False)
    N, D, V = 300, 16, 2000
    case = make_case(74, (N,), D, V, teacher=teacher, workspace_mb=1.0)
    calls = calls_of(monkeypatch)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight)]

    def sweep() -> tuple[None, None]:
        loss, _ = policy_head_loss(
            *leaves, case.targets, lambda lp, h, d, at: d - lp, backend="triton", **case.options
        )
        loss.backward()
        return None, None

    peak, _ = peak_bytes(sweep)
    assert calls[0] > 1
    assert peak <= 2**20 + 4 * (V * D + N * D) + 8 * N * 60, f"{peak / 2**20:.2f} MiB"
