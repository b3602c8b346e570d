"""Products of bfloat16 matrices summed in float32, and who uses them.

Legend: M rows and N columns of a product, K its depth; R tokens, D hidden, V vocabulary.
"""

import pytest
import torch
from torch import Tensor

from fdfast import TeacherHidden, policy_head_loss
from fdfast.cpu import gemm
from fdfast.cpu.policy_head import can_chunk
from fdfast.types import Head, HeadOptions
from tests.helpers import BF16, TEACHERS, assert_right, generator, make_case, peak_bytes, run

needs_bfloat16 = pytest.mark.skipif(
    not gemm.bfloat16_runs(),
    reason="no AVX512-BF16: there is only the float32 way",
)

# One; one less and one more than a tile (8 x 48), a register (16 pairs) and a block (128 x 576, 640
# deep); primes.
SIZES = [
    (1, 1, 1),
    (7, 47, 31),
    (8, 48, 32),
    (9, 49, 33),
    (131, 13, 2),
    (3, 577, 5),
    (17, 19, 641),
    (130, 600, 1301),
]


def _matrix(seed: int, rows: int, columns: int, layout: str) -> Tensor:
    """bfloat16, its columns contiguous, its rows, or neither whole: a view of a wider one."""
    g = generator(seed)
    if layout == "rows":
        return torch.randn(rows, columns, generator=g).to(BF16)
    if layout == "columns":
        return torch.randn(columns, rows, generator=g).to(BF16).T
    return torch.randn(rows, 2 * columns + 3, generator=g).to(BF16)[:, 1 : columns + 1]


@needs_bfloat16
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("left", ["rows", "columns", "view"])
@pytest.mark.parametrize("right", ["rows", "columns", "view"])
def test_products_are_right_for_every_size_and_layout(
    size: tuple[int, int, int], left: str, right: str
) -> None:
    M, N, K = size
    a, b = _matrix(1, M, K, left), _matrix(2, K, N, right)
    truth = a.double() @ b.double()
    wider = torch.full((M, N + 5), 3.0)  # what lies beside the product stays as it was
    out = wider[:, :N]
    gemm.write_product(out, a, b)
    bound = 1e-6 * (a.double().abs() @ b.double().abs())
    assert ((out.double() - truth).abs() <= bound).all()
    gemm.add_product(out, a, b)
    assert ((out.double() - 2 * truth).abs() <= 4 * bound).all()
    assert (wider[:, N:] == 3.0).all()


@needs_bfloat16
@pytest.mark.parametrize("size", SIZES)
def test_a_sum_in_halves_is_the_float32_sum_rounded(size: tuple[int, int, int]) -> None:
    M, N, K = size
    products = [(_matrix(s, M, K, "columns"), _matrix(s + 1, K, N, "rows")) for s in (11, 13, 15)]
    products[2][0][0, 0] = float("inf")
    plain, narrow = torch.zeros(M, N), torch.zeros(M, N, dtype=BF16)
    halves = gemm.SplitSum(narrow, torch.zeros(M, N, dtype=torch.int16))
    for number, (a, b) in enumerate(products):
        into = gemm.add_product if number else gemm.write_product
        into(plain, a, b)
        into(halves, a, b)
    halves.round_()
    torch.testing.assert_close(narrow, plain.to(BF16), rtol=0, atol=0, equal_nan=True)


def test_halves_are_rounded_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    bits = torch.tensor([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F80_7FFF, 0x7F7F_FFFF])
    bits = torch.cat((bits, torch.tensor([0x7F80_0000, 0x7F80_0001, 0x7FC0_0000, 0])))
    bits = torch.cat((bits, bits | 0x8000_0000))
    upper, lower = ((bits >> shift & 0xFFFF).to(torch.uint16) for shift in (16, 0))
    halves = gemm.SplitSum(upper.view(BF16)[None], lower.view(torch.int16)[None])
    halves.round_()
    wide = torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)
    rounded = halves.upper_MN[0]
    torch.testing.assert_close(rounded, wide.to(BF16), rtol=0, atol=0, equal_nan=True)


@needs_bfloat16
def test_threads_and_neighbours_change_no_bit_of_a_product() -> None:
    a, b = _matrix(3, 67, 700, "rows"), _matrix(4, 700, 301, "columns")
    alone, shared, part = torch.zeros(67, 301), torch.zeros(67, 301), torch.zeros(1, 301)
    gemm.write_product(alone, a, b)
    torch.set_num_threads(3)
    gemm.write_product(shared, a, b)
    gemm.write_product(part, a[50:51], b)
    assert alone.equal(shared)
    assert alone[50:51].equal(part)


@needs_bfloat16
def test_infinities_and_nan_stay_in_their_rows() -> None:
    a, b = _matrix(5, 20, 33, "rows"), _matrix(6, 33, 50, "rows")
    a[3, 32], a[19, 0] = float("inf"), float("nan")
    out = torch.zeros(20, 50)
    gemm.write_product(out, a, b)
    assert (out[3].abs() == float("inf")).all()
    assert out[19].isnan().all()
    untouched = [i for i in range(20) if i not in (3, 19)]
    assert out[untouched].isfinite().all()


@needs_bfloat16
@pytest.mark.parametrize("teacher", ["none", "hidden"])
def test_logits_are_never_rounded_to_bfloat16(teacher: str) -> None:
    # Logits of size 30: rounded to bfloat16 they are off by 0.06.
    case = make_case(80, (40,), 64, 500, dtype=BF16, teacher=teacher, spread=8.0)
    ours, truth = run(case, "cpu"), run(case.double(), "reference")
    for name in ("logprobs", "entropy", "divergence"):
        assert (ours[name].double() - truth[name]).abs().max() < 1e-4, name
    for name in ("dhidden", "dweight", "dbias"):
        off = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert off < 5e-3, f"{name}: {off:.2%}"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_bfloat16_is_right_with_every_option_and_without_the_instruction(
    native: bool, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not gemm.bfloat16_runs():
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(gemm, "bfloat16_runs", lambda: native)
    case = make_case(
        81, (3, 23), 19, 311, dtype=BF16, teacher=teacher, masked=0.3, temperature=0.7,
        logit_softcap=5.0, workspace_mb=9.0,
    )  # fmt: skip
    assert_right(case, "cpu")
    assert_right(case, "cpu", grad_filter=0.0)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
def test_a_frozen_input_changes_no_other_gradient(frozen: tuple[str, ...]) -> None:
    case = make_case(82, (50,), 32, 307, dtype=BF16, teacher="hidden")
    everything, ours = run(case, "cpu"), run(case, "cpu", frozen=frozen)
    for name in ("hidden", "weight", "bias"):
        assert (f"d{name}" not in ours) == (name in frozen)
        if name not in frozen:
            assert ours[f"d{name}"].equal(everything[f"d{name}"]), name


def test_a_weight_of_any_strides_is_right() -> None:
    case = make_case(83, (12,), 16, 101, dtype=BF16)
    for weight in (case.weight.T.contiguous().T, torch.stack([case.weight] * 2, -1)[..., 0]):
        case.weight = weight
        assert_right(case, "cpu")


def _sweep(workspace_mb: float, seed: int = 84) -> tuple[dict[str, Tensor], int]:
    """Gradients of policy_head_loss and the memory it took beside them."""
    torch.use_deterministic_algorithms(False)  # index_add_ takes memory of its own under it
    case = make_case(seed, (300,), 16, 20_000, dtype=BF16, teacher="hidden", bias=False)
    leaves = {"hidden": case.hidden.requires_grad_(), "weight": case.weight.requires_grad_()}
    teacher = case.options["teacher"]

    def sweep() -> None:
        loss, _ = policy_head_loss(
            case.hidden, case.weight, case.targets, lambda lp, h, d, at: d + 0.1 * lp,
            teacher=TeacherHidden(teacher.hidden, case.weight.detach()),
            workspace_mb=workspace_mb, backend="cpu",
        )  # fmt: skip
        loss.backward()

    peak, _ = peak_bytes(sweep)
    taken = sum((2 + 4 * (name == "hidden")) * x.numel() for name, x in leaves.items())
    return {name: x.grad for name, x in leaves.items()}, peak - taken - 8 * 300 * 60  # type: ignore[misc]


@needs_bfloat16
@pytest.mark.parametrize("workspace_mb", [11.0, 12.0, 20.0, 40.0])
def test_a_narrow_weight_takes_the_token_chunk_way_within_its_workspace(
    workspace_mb: float,
) -> None:
    # Half the sum of the weight's gradient takes 0.6 MiB, 64 tokens 9.8 MiB; 11 MiB are too few.
    case = make_case(84, (300,), 16, 20_000, dtype=BF16, bias=False)
    options = HeadOptions(workspace_bytes=int(workspace_mb * 2**20))
    head = Head(case.hidden, case.weight, None)
    assert can_chunk(head, None, (True, True, False), options) == (workspace_mb > 11)
    ours, taken = _sweep(workspace_mb)
    assert taken <= workspace_mb * 2**20, f"{taken / 2**20:.2f} MiB"
    roomy, _ = _sweep(400.0)
    for name, gradient in ours.items():
        off = (gradient.double() - roomy[name].double()).norm() / roomy[name].double().norm()
        assert off < 4e-3, f"{name}: {off:.2%}"
